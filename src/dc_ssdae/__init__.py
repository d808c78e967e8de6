"""DC-SSDAE: deep-compression image autoencoders whose decoder is a one-step diffusion model.

The public names are imported on first use, so that `import dc_ssdae` and `dc-ssdae --help` do not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.errors import InputError
    from dc_ssdae.latent import DiagonalGaussian
    from dc_ssdae.machine import keep_freed_memory

__all__ = ["DCSSDAE", "DiagonalGaussian", "InputError", "__version__", "keep_freed_memory"]

_HOMES = {
    "DCSSDAE": "dc_ssdae.autoencoder",
    "DiagonalGaussian": "dc_ssdae.latent",
    "InputError": "dc_ssdae.errors",
    "keep_freed_memory": "dc_ssdae.machine",
    # Not ours to offer, but diffusers looks for it in the module of a pipeline's part, to know how to load that.
    "ModelMixin": "diffusers.models.modeling_utils",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("dc-ssdae")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
