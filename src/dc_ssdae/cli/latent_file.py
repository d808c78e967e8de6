"""The file of one latent: what `dc-ssdae encode` writes and `dc-ssdae decode` reads."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dc_ssdae import __version__
from dc_ssdae.errors import InputError
from dc_ssdae.files import write_whole
from dc_ssdae.weights import read_safetensors

FORMAT = {"format": "dc-ssdae latent", "format_version": "1"}


def write_latent(path: Path, latent: Tensor, original_size: tuple[int, int], downsample_factor: int) -> None:
    """Write a latent file, whole or not at all.

    Args:
        path: of the file.
        latent: (c, h, w), kept in its own dtype.
        original_size: (H, W) of the image in pixels, kept as int64 (2,).
        downsample_factor: the f it was encoded with.

    Raises:
        InputError: the latent holds infinities or NaN.
        OSError: the file cannot be written.
    """
    _check_finite(path, latent)
    shape = {"latent_channels": str(len(latent)), "downsample_factor": str(downsample_factor)}
    metadata = {**FORMAT, **shape, "dc_ssdae_version": __version__}
    tensors = {"latent": latent.contiguous().cpu(), "original_size": torch.tensor(original_size, dtype=torch.int64)}
    write_whole(path, save(tensors, metadata))  # not save_file, whose files only their owner can read


def read_latent(path: Path) -> tuple[Tensor, tuple[int, int], int]:
    """Read a latent file and check that its parts fit together: what `write_latent` took besides the path.

    Raises:
        InputError: it is missing, damaged or no latent file, or its parts do not fit.
    """
    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        latent, size = tensors["latent"], tensors["original_size"]
        (height, width), factor = size.tolist(), int(metadata["downsample_factor"])
        shape = (int(metadata["latent_channels"]), -(-height // factor), -(-width // factor))
        fits = (latent.shape, size.dtype, len(tensors)) == (shape, torch.int64, 2) and min(height, width, factor) > 0
        fits = fits and latent.is_floating_point() and latent.numel() > 0 and FORMAT.items() <= metadata.items()
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        fits = False
    if not fits:
        raise InputError(f"{path}: not a latent file as dc-ssdae encode writes it")
    _check_finite(path, latent)
    return latent, (height, width), factor


def _check_finite(path: Path, latent: Tensor) -> None:
    if non_finite := int((~latent.isfinite()).sum()):
        raise InputError(f"{path}: {non_finite} of {latent.numel()} values of the latent are infinite or NaN")
