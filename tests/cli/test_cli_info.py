"""`dc-ssdae info`: the list of presets, and the profile of a preset or a saved model."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_samples import WEIGHTS, Refusal, Run, save_model
from tiny_models import edit_config

from dc_ssdae import DCSSDAE
from dc_ssdae.parameter_groups import group_sizes
from dc_ssdae.presets import list_presets, load_preset


@pytest.fixture
def copy(model_dir: Path) -> Path:
    """A copy of the saved model, in the folder `copy`."""
    return Path(shutil.copytree(model_dir, "copy"))


def test_without_an_argument_it_lists_every_preset(run: Run) -> None:
    outcome = run("info")
    assert max(map(len, outcome.out)) <= 100
    assert [line.split()[0] for line in outcome.out if not line.startswith(" ")] == ["preset", *list_presets()]
    listed = run("info", "--json").json()
    described = [(name, load_preset(name)["description"]) for name in list_presets()]
    assert [(entry["name"], entry["description"]) for entry in listed] == described


def test_text_and_json_say_the_same(run: Run) -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset("fast_f32c32")
    f, c = model.config.downsample_factor, model.config.latent_channels
    outcome = run("info", "fast_f32c32")
    rows = [line.split() for line in outcome.out]
    profile = run("info", "fast_f32c32", "--json").json()
    for part, module in (("encoder", model.encoder), ("decoder", model.decoder), ("total", model)):
        count = sum(tensor.numel() for tensor in module.parameters())
        assert profile["parameters"][part] == count
        assert [f"parameters.{part}", f"{count:,}"] in rows
    assert profile["compression_ratio"] == 3 * f * f / c
    for size in (256, 512):
        assert profile["sizes"][f"{size}"]["latent_shape"] == [c, size // f, size // f]
        assert [f"sizes.{size}.latent_shape", str(c), *[str(size // f)] * 2] in rows
        for key in ("encode_flops", "decode_step_flops"):
            assert [f"sizes.{size}.{key}", f"{profile['sizes'][str(size)][key]:,}"] in rows


def test_a_saved_model_and_a_run_are_described_as_their_preset(run: Run, model_dir: Path) -> None:
    shutil.copytree(model_dir, "run/model")
    Path("run/config.yaml").touch()
    preset = run("info", "demo", "--json").json()
    for folder in (model_dir, "run"):
        saved = run("info", folder, "--json").json()
        assert (saved["name"], saved["weights"]) == (str(folder), [WEIGHTS])
        assert saved == {**preset, **{key: saved[key] for key in ("name", "description", "weights")}}
    assert run("info", model_dir).out[-1].split() == ["weights", WEIGHTS]


def test_where_a_model_comes_from_is_told(run: Run, refusal: Refusal, copy: Path) -> None:
    metrics = {"lpips": {"value": 0.5, "note": "random"}}
    evaluation = {"protocol": "dcae", "data": "photos", "images": 9, "metrics": metrics}
    provenance = {"preset": "demo", "changes": ["training.lr"], "steps": 30, "evaluations": [evaluation]}
    edit_config(copy, provenance=provenance)
    text = " ".join(" ".join(run("info", copy).out).split())
    assert "preset demo settings changed in it training.lr steps 30" in text
    assert "evaluation 1 protocol dcae; data photos; images 9; lpips 0.5 random" in text
    assert run("info", copy, "--json").json()["provenance"] == provenance
    edit_config(copy, provenance={"data": "\x1b[31m"})
    assert "provenance.data is '\\x1b[31m'" in refusal("info", copy)


def test_a_size_that_is_no_multiple_of_f_is_told(run: Run) -> None:
    sizes = run("info", save_model(Path("model"), downsample_factor=512), "--json").json()["sizes"]
    assert (sizes["256"], sizes["512"]["latent_shape"]) == (None, [4, 1, 1])


def test_what_is_no_whole_model_is_one_line(refusal: Refusal, copy: Path) -> None:
    weights = copy / WEIGHTS
    os.truncate(weights, weights.stat().st_size - 10)
    assert "is truncated" in refusal("info", copy)
    weights.unlink()
    assert "copy does not fit; missing: " in refusal("info", copy)
    edit_config(copy, latent_chanels=4)
    assert "did you mean 'latent_channels'" in refusal("info", copy)


def test_the_dtype_halves_the_memory_and_a_device_adds_times(
    run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_ssdae.cli.info.SIZES", (32, 64))  # bfloat16 takes minutes where a CPU has no kernels for it
    wide = run("info", model_dir, "--json").json()
    narrow = run("info", model_dir, "--json", "--dtype", "bfloat16", "--device", "cpu").json()
    assert wide["seconds"] is None
    assert narrow["seconds"]["encode"] > 0
    # All but the batch norm's counter halves.
    assert narrow["weights_mebibytes"] == pytest.approx(wide["weights_mebibytes"] / 2, rel=1e-4)
    assert wide["weights_mebibytes"] > 4 * wide["parameters"]["total"] / 2**20
    timed = run("info", "demo", "--device", "cpu")
    assert any(line.startswith("seconds.encode ") for line in timed.out)


def test_groups_are_one_per_line_whatever_the_width(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    sizes = group_sizes(DCSSDAE.from_preset("demo"))
    for model in ("demo", model_dir):
        outcome = run("info", model, "--groups")
        assert [tuple(line.split()) for line in outcome.out] == [(group, str(size)) for group, size in sizes.items()]
    assert run("info", "demo", "--groups", "--json").json() == sizes
