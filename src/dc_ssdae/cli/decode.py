"""`dc-ssdae decode`: latents, as `dc-ssdae encode` writes them, to PNG images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.decoding import decode_files
from dc_ssdae.cli.options import DecodingOptions
from dc_ssdae.errors import InputError
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE


@dataclass(kw_only=True)
class Options(DecodingOptions):
    """Decode latents written by dc-ssdae encode, to DIR/STEM.png for each, at the image's original size.

    Args:
        latents: safetensors file.
    """

    latents: list[Path] = setting(positional=True, metavar="LATENT")


def run(options: Options) -> int:
    """Decode every latent; gives the exit code."""
    return decode_files(options, options.latents, _read)


def _read(path: Path, model: "DCSSDAE") -> "tuple[Tensor, tuple[int, int], Sequence[str]]":
    from dc_ssdae.cli.latent_file import read_latent

    latent, size, factor = read_latent(path)
    theirs, own = (len(latent), factor), (model.config.latent_channels, model.config.downsample_factor)
    if theirs != own:
        raise InputError(f"the latent has (c, f) = {theirs}, which does not fit the model, which has {own}")
    return latent[None], size, ()
