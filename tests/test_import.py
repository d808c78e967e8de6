"""Importing the package is quick: torch comes with the first name that needs it."""

import subprocess
import sys

import dc_ssdae


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has imported after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(result.stdout.split())


def test_importing_the_package_and_its_presets_does_not_import_torch() -> None:
    found = modules_after(
        "import dc_ssdae, dc_ssdae.classes, dc_ssdae.errors, dc_ssdae.presets\n"
        "dc_ssdae.presets.load_preset('demo'); dir(dc_ssdae); dc_ssdae.__version__; dc_ssdae.InputError"
    )
    assert "dc_ssdae.presets" in found
    assert not found & {"torch", "diffusers", "numpy", "torchvision"}


def test_importing_the_autoencoder_does_not_import_diffusers_own_models() -> None:
    """Which take longer than all the rest."""
    found = modules_after("import dc_ssdae.autoencoder")
    assert "diffusers.models.modeling_utils" in found
    assert not found & {"diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.pipelines"}


def test_public_names_are_there() -> None:
    assert set(dir(dc_ssdae)) == set(dc_ssdae.__all__)
    for name in dc_ssdae.__all__:
        assert getattr(dc_ssdae, name) is not None
    assert dc_ssdae.DCSSDAE.__module__ == "dc_ssdae"  # where diffusers' pipelines look for it
    assert issubclass(dc_ssdae.InputError, ValueError)
    assert not hasattr(dc_ssdae, "DCSSDAF")
