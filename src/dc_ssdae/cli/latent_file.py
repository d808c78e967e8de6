"""The file of one latent: what `dc-ssdae encode` writes and `dc-ssdae decode` reads."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dc_ssdae import __version__
from dc_ssdae.errors import InputError
from dc_ssdae.files import write_whole
from dc_ssdae.weights import read_safetensors

FORMAT = "dc-ssdae latent"
FORMAT_VERSION = "1"


class LatentFile(NamedTuple):
    """One image's `latent` (c, h, w), its `original_size` (H, W) in pixels, and the f it was encoded with."""

    latent: Tensor
    original_size: tuple[int, int]
    downsample_factor: int


def write_latent(path: Path, content: LatentFile) -> None:
    """Write a latent file, whole or not at all.

    Tensors `latent` (c, h, w) in its own dtype and `original_size` int64 (2,); what they mean is in the metadata.

    Raises:
        InputError: the latent holds infinities or NaN.
        OSError: the file cannot be written.
    """
    size = torch.tensor(content.original_size, dtype=torch.int64)
    tensors = {"latent": content.latent.contiguous().cpu(), "original_size": size}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "latent_channels": str(content.latent.shape[0]),
        "downsample_factor": str(content.downsample_factor),
        "dc_ssdae_version": __version__,
    }
    if problem := _problem(tensors, metadata):
        raise InputError(problem)
    write_whole(path, save(tensors, metadata))  # not save_file, whose files only their owner can read


def read_latent(path: Path) -> LatentFile:
    """Read a latent file and check that its parts fit together.

    Raises:
        InputError: it is missing, damaged or no latent file, or its parts do not fit; names the file and the part.
    """
    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if problem := _problem(tensors, metadata):
        raise InputError(f"{path}: {problem}")
    height, width = tensors["original_size"].tolist()
    return LatentFile(tensors["latent"], (height, width), int(metadata["downsample_factor"]))


def _problem(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str | None:
    """Say what is wrong with a latent file."""
    if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        return f"not a latent file of format version {FORMAT_VERSION}, as dc-ssdae encode writes it"
    if set(tensors) != {"latent", "original_size"}:
        return f"holds the tensors {', '.join(sorted(tensors)) or 'none'}; needs latent and original_size"
    latent, size = tensors["latent"], tensors["original_size"]
    if latent.ndim != 3 or 0 in latent.shape or not latent.is_floating_point():
        return f"latent is {_describe(latent)}; it must be floating point of shape (c, h, w)"
    if non_finite := int((~latent.isfinite()).sum()):
        return f"{non_finite} of {latent.numel()} values of the latent are infinite or NaN"
    if size.dtype != torch.int64 or size.shape != (2,) or size.min() < 1:
        return f"original_size is {_describe(size)}; it must be int64 of shape (2,), a height and a width in pixels"
    factor = metadata.get("downsample_factor", "")
    if not re.fullmatch("[1-9][0-9]{0,8}", factor):
        return f"downsample_factor in its metadata is {factor!r}; it must be a positive whole number"
    shape = (metadata.get("latent_channels"), *(str(-(-side // int(factor))) for side in size.tolist()))
    if shape != tuple(map(str, latent.shape)):
        return (
            f"latent is {_describe(latent)}; latent_channels {shape[0]}, original_size {size.tolist()} and "
            f"downsample_factor {factor} want ({', '.join(map(str, shape))})"
        )
    return None


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
