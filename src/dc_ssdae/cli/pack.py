"""`dc-ssdae pack`: a folder of images to tar shards."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from dc_ssdae.cli.common import complain, say_part
from dc_ssdae.cli.options import ShardOptions
from dc_ssdae.errors import InputError
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class Options(ShardOptions):
    """Pack images into WebDataset tar shards, with a manifest and an index so that they open quickly.

    Images larger than --size are shrunk (bicubic, antialiased); other JPEG, PNG and WebP files are copied byte by byte.
    If interrupted, the same command continues where it stopped.

    Args:
        source: folder of images, which may have subfolders train/ and validation/ (or val/); or shards.
        destination: folder to write to; it is created if it does not exist.
        size: largest shorter side in pixels, or none to keep every image's size.
        format: format of images that are encoded again.
        quality: quality of jpg and webp, 1 to 100; by default 95.
        keep_order: keep the images in the order of their names; by default they are shuffled, so that each shard has
            images of every class.
        workers: number of processes; by default one per core, at most 16.
    """

    source: str = setting(positional=True, metavar="SRC")
    destination: Path = setting(positional=True, metavar="DST")
    size: str = setting("256", metavar="N|none")
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int | None = setting(None, at_least=1, at_most=100, metavar="Q")
    keep_order: bool = setting(False, name="--keep-order")
    workers: int | None = setting(None, at_least=1, metavar="N")


def run(options: Options) -> None:
    """Pack the images."""
    if options.format == "png" and options.quality is not None:
        raise InputError("--quality is for jpg and webp; png is lossless")
    if options.size != "none" and not (options.size.isdecimal() and int(options.size)):
        raise InputError(f"--size is {options.size!r}; it must be a number of pixels, or none")
    from dc_ssdae.data.packing import PackSettings, pack
    from dc_ssdae.timing import cores

    quality = None if options.format == "png" else options.quality or 95
    size = None if options.size == "none" else int(options.size)
    settings = PackSettings(size, options.format, quality, options.shard_size, not options.keep_order)
    workers, report = options.workers or min(cores(), 16), partial(complain, options.program)
    given = options.given("max_broken_share", "cache")
    manifests = pack(options.source, options.destination, settings, workers, report=report, **given)
    for part, manifest in manifests.items():
        kept = manifest["kept"]
        remark = f"; {kept} kept byte by byte, colour profiles included" if kept else ""
        say_part(part, options.destination / part, manifest, remark)
