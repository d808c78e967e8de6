"""`dc-ssdae reconstruct`: images through the autoencoder and back, as PNG."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import add_file_options, encode_pixels
from dc_ssdae.cli.decoding_options import ToDecode, add_decoding_options, decode_files
from dc_ssdae.cli.parser import CommandParser, file_path

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae reconstruct",
        description="Encode images and decode them again; writes DIR/STEM.png for each. Any image size: padded by "
        "reflection to a multiple of the model's f, and cropped back.",
    )
    parser.add_argument("images", nargs="+", type=file_path, metavar="IMAGE", help="image file")
    add_file_options(parser)
    add_decoding_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Reconstruct every image; gives the exit code."""
    return decode_files(args, args.images, _read)


def _read(path: Path, model: "DCSSDAE") -> ToDecode:
    from dc_ssdae.data.images import read_image

    image = read_image(path)
    posterior, size = encode_pixels(model, image.pixels)
    return ToDecode(posterior.mode(), size, image.notes)
