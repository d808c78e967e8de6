"""`dc-ssdae pack`: a folder of images to tar shards."""

from argparse import Namespace

from dc_ssdae.cli.common import add_shard_options, complain, say_part
from dc_ssdae.cli.parser import CommandParser, file_path, filled, whole_number
from dc_ssdae.errors import InputError


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae pack",
        description="Pack images into WebDataset tar shards, with a manifest and an index that make opening quick. "
        "Images larger than --size are made smaller (bicubic, antialiased); the others keep their bytes if they are "
        "JPEG, PNG or WebP. Interrupted at any time, the same command goes on where it stopped.",
    )
    parser.add_argument(
        "source",
        type=filled,
        metavar="SRC",
        help="folder of images, perhaps with train/ and validation/ (or val/); or shards",
    )
    parser.add_argument("destination", type=file_path, metavar="DST", help="folder to write to; made if need be")
    parser.add_argument(
        "--size", type=_size, default=256, metavar="N", help="shorter side in pixels, or none (default 256)"
    )
    parser.add_argument(
        "--format", choices=("jpg", "png", "webp"), default="jpg", help="of images that are written anew (default jpg)"
    )
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="Q", help="of jpg and webp, 1 to 100 (default 95)"
    )
    add_shard_options(parser)
    parser.add_argument(
        "--keep-order",
        action="store_true",
        help="leave the images in the order of their names; by default they are spread over the shards, so that each "
        "shard has images of every class",
    )
    parser.add_argument(
        "--workers", type=whole_number(1), metavar="N", help="processes (default: one for each core, at most 16)"
    )
    return parser


def run(args: Namespace) -> int:
    """Pack the images; gives the exit code."""
    if args.format == "png" and args.quality is not None:
        raise InputError("--quality is for jpg and webp; png is lossless")
    from dc_ssdae.data.pack import pack
    from dc_ssdae.data.pack_shard import PackSettings
    from dc_ssdae.timing import cores

    quality = None if args.format == "png" else args.quality or 95
    settings = PackSettings(args.size, args.format, quality, args.shard_size, not args.keep_order)
    parts = pack(
        args.source,
        args.destination,
        settings,
        workers=args.workers or min(cores(), 16),
        max_broken_share=args.max_broken_share,
        cache=args.cache,
        report=lambda line: complain(args.program, line),
    )
    for part in parts:
        small = "" if args.size is None else f" (at most {args.size} pixels)"
        kept = f"; {part.kept} kept byte by byte{small}, colour profiles included" if part.kept else ""
        say_part(part, kept)
    return 0


def _size(text: str) -> int | None:
    return None if text == "none" else whole_number(1)(text)
