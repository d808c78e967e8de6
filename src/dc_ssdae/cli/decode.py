"""`dc-ssdae decode`: latents, as `dc-ssdae encode` writes them, to PNG images."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import add_file_options
from dc_ssdae.cli.decoding_options import ToDecode, add_decoding_options, decode_files
from dc_ssdae.cli.parser import CommandParser, file_path
from dc_ssdae.errors import InputError

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae decode",
        description="Decode the latents that dc-ssdae encode wrote; writes DIR/STEM.png for each, at the image's "
        "original size.",
    )
    parser.add_argument("latents", nargs="+", type=file_path, metavar="LATENT", help="safetensors file")
    add_file_options(parser)
    add_decoding_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Decode every latent; gives the exit code."""
    return decode_files(args, args.latents, _read)


def _read(path: Path, model: "DCSSDAE") -> ToDecode:
    from dc_ssdae.cli.latent_file import read_latent

    config, content = model.config, read_latent(path)
    theirs, own = (len(content.latent), content.downsample_factor), (config.latent_channels, config.downsample_factor)
    if theirs != own:
        raise InputError(f"the latent's (c, f) are {theirs} and do not fit the model, whose are {own}")
    return ToDecode(content.latent[None], content.original_size)
