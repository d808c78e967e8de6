"""The file of one latent: what `dc-ssdae encode` writes and `dc-ssdae decode` reads."""

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
    """Write a latent file, whole or not at all: beside its place first, then renamed.

    Tensors `latent` (c, h, w) in its own dtype and `original_size` int64 (2,); what they mean is in the metadata.

    Raises:
        InputError: the latent holds infinities or NaN.
        OSError: the file cannot be written.
    """
    _check_finite(content.latent)
    tensors = {
        "latent": content.latent.contiguous().cpu(),
        "original_size": torch.tensor(content.original_size, dtype=torch.int64),
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "latent_channels": str(content.latent.shape[0]),
        "downsample_factor": str(content.downsample_factor),
        "dc_ssdae_version": __version__,
    }
    write_whole(path, save(tensors, metadata))  # not save_file, whose files only their owner can read


def read_latent(path: Path) -> LatentFile:
    """Read a latent file and check that its parts fit together.

    Raises:
        InputError: it is missing, damaged or no latent file, or its parts do not fit; names the file and the part.
    """
    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        return _check(tensors, metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_model_fits(content: LatentFile, latent_channels: int, downsample_factor: int) -> None:
    """Check that a model of c latent channels and factor f can decode the latent.

    Raises:
        InputError: names what differs.
    """
    mine = {"latent_channels": latent_channels, "downsample_factor": downsample_factor}
    theirs = {"latent_channels": content.latent.shape[0], "downsample_factor": content.downsample_factor}
    differing = [f"{name} is {theirs[name]}, the model's {mine[name]}" for name in mine if mine[name] != theirs[name]]
    if differing:
        raise InputError(f"the latent does not fit the model: {'; '.join(differing)}")


def _check(tensors: dict[str, Tensor], metadata: dict[str, str]) -> LatentFile:
    if metadata.get("format") != FORMAT:
        raise InputError("not a latent file: dc-ssdae encode writes such files")
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise InputError(f"format version {version!r}; this version of dc-ssdae reads {FORMAT_VERSION!r}")
    if set(tensors) != {"latent", "original_size"}:
        raise InputError(f"holds the tensors {', '.join(sorted(tensors)) or 'none'}; needs latent and original_size")
    latent, size = tensors["latent"], tensors["original_size"]
    if latent.ndim != 3 or 0 in latent.shape or not latent.is_floating_point():
        raise InputError(f"latent is {_describe(latent)}; it must be floating point of shape (c, h, w)")
    _check_finite(latent)
    if size.dtype != torch.int64 or size.shape != (2,):
        raise InputError(f"original_size is {_describe(size)}; it must be int64 of shape (2,)")
    channels, factor = (_number(metadata, name) for name in ("latent_channels", "downsample_factor"))
    if channels != latent.shape[0]:
        raise InputError(f"latent_channels is {channels}, but latent is {_describe(latent)}")
    height, width = size.tolist()
    fitting = (-(-height // factor), -(-width // factor))
    if fitting != tuple(latent.shape[1:]) or min(height, width) < 1:
        raise InputError(
            f"original_size is {height} by {width} pixels; a latent of {latent.shape[1]} by {latent.shape[2]} "
            f"with downsample_factor {factor} is not of such an image"
        )
    return LatentFile(latent, (height, width), factor)


def _number(metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name, "")
    # isdecimal alone would take other scripts' digits, and any number of them.
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise InputError(f"{name} in its metadata is {text!r}; it must be a positive whole number")
    return int(text)


def _check_finite(latent: Tensor) -> None:
    non_finite = int((~latent.isfinite()).sum())
    if non_finite:
        raise InputError(f"{non_finite} of {latent.numel()} values of the latent are infinite or NaN")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
