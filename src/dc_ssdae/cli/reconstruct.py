"""`dc-ssdae reconstruct`: images through the autoencoder and back, as PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import encode_pixels
from dc_ssdae.cli.decoding import decode_files
from dc_ssdae.cli.options import DecodingOptions
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE


@dataclass(kw_only=True)
class Options(DecodingOptions):
    """Encode images and decode them again, to DIR/STEM.png for each.

    Images may have any size: they are padded by reflection to a multiple of the model's downsampling factor f, and the
    results are cropped.

    Args:
        images: image file.
    """

    images: list[Path] = setting(positional=True, metavar="IMAGE")


def run(options: Options) -> int:
    """Reconstruct every image; gives the exit code."""
    return decode_files(options, options.images, _read)


def _read(path: Path, model: "DCSSDAE") -> "tuple[Tensor, tuple[int, int], Sequence[str]]":
    from dc_ssdae.data.images import read_image

    image = read_image(path)
    posterior, size = encode_pixels(model, image.pixels)
    return posterior.mode(), size, image.notes
