"""One tar shard of packed images: its plan, its bytes, and the report that says it is finished."""

import hashlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import to_pillow
from dc_ssdae.data.optional import import_optional
from dc_ssdae.data.resumable import ShardCommand, to_json
from dc_ssdae.data.shard_index import MANIFEST_FORMAT, scan_tar
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.errors import InputError, check_at_least, unknown_name
from dc_ssdae.files import write_whole, written_beside

ImageFormat = Literal["jpg", "png", "webp"]
FORMATS = ("jpg", "png", "webp")

PACK = ShardCommand("pack", MANIFEST_FORMAT, ".tar")


@dataclass(frozen=True)
class PackSettings:
    """What decides the shards' bytes.

    Args:
        size: the shorter side in pixels; smaller images stay as they are. None resizes nothing.
        format: of the images that are written anew.
        quality: of JPEG and WebP, 1 to 100; None for PNG. JPEG keeps its colours at full resolution (4:4:4).
        shard_size: images in a shard, at most.
        shuffle: spread the images over the shards by a hash of their names; else in the order of their names.

    Raises:
        InputError: a setting is out of range, or quality is given for PNG.
    """

    size: int | None = 256
    format: ImageFormat = "jpg"
    quality: int | None = 95
    shard_size: int = 1000
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown_name("image format", self.format, FORMATS)
        if (self.quality is None) != (self.format == "png"):
            raise InputError(
                "png is lossless and takes no quality" if self.quality else f"{self.format} needs a quality"
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise InputError(f"quality is {self.quality}; it must be from 1 to 100")
        if self.size is not None:
            check_at_least(1, size=self.size)
        check_at_least(1, shard_size=self.shard_size)


class ShardReport(NamedTuple):
    """A finished shard; kept beside the shards until all are done, so that a killed run goes on from there."""

    bytes: int
    sha256: str
    kept: int
    broken: list[tuple[str, str]]
    names: list[str]
    offsets: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class PackJob:
    """Everything a process needs to write the shards of one part."""

    source: ImageFolder | Shards
    order: np.ndarray
    folder: Path
    settings: PackSettings

    @property
    def shards(self) -> int:
        return -(-len(self.order) // self.settings.shard_size)


def write_shard(job: PackJob, number: int, advance: Callable[[int], Any]) -> ShardReport:
    tar_writer = import_optional("webdataset.writer").TarWriter
    first = number * job.settings.shard_size
    kept, broken = 0, []
    with written_beside(PACK.shard_path(job.folder, number)) as beside:
        with open(beside, "wb") as file:
            hashing = _Hashing(file)
            with tar_writer(hashing, user="", group="", mtime=0, encoder=False) as writer:
                for place in range(first, min(first + job.settings.shard_size, len(job.order))):
                    index = int(job.order[place])
                    try:
                        extension, data, is_kept = _packed_image(job, index)
                    except InputError as error:
                        broken.append((job.source.name(index), str(error)))
                    else:
                        kept += is_kept
                        label = job.source.label(index) if isinstance(job.source, ImageFolder) else -1
                        sample = {"__key__": _key(place, job.source.relative_name(index)), extension: data}
                        writer.write(sample if label < 0 else {**sample, "cls": str(label).encode()})
                    advance(1)
            file.flush()
            os.fsync(file.fileno())
        found = scan_tar(str(beside))  # also proves that it can be read
        shard = ShardReport(
            hashing.bytes,
            hashing.digest.hexdigest(),
            kept,
            broken,
            [found.names[index] for index in range(len(found.names))],
            found.offsets.tolist(),
            found.sizes.tolist(),
        )
        # Before the shard's own renaming: a shard is finished when both are there.
        write_whole(PACK.report_path(job.folder, number), to_json(shard._asdict()))
    return shard


class _Hashing:
    """A file to write to that also computes its SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def _packed_image(job: PackJob, index: int) -> tuple[str, bytes, bool]:
    """The extension and bytes of an image in the shard, and whether they are the source's own."""
    settings = job.settings
    pixels, _ = job.source.read(index)  # before its bytes, which of a file that is no image may be very many
    if settings.size is None or min(pixels.shape[1:]) <= settings.size:
        data = job.source.read_bytes(index)
        extension = _plain_format(data)
        if extension is not None:
            return extension, data, True
    else:
        pixels = resize_shorter_side(pixels, settings.size)
    return settings.format, _encode(pixels, settings), False


def _encode(pixels: Tensor, settings: PackSettings) -> bytes:
    options: dict[str, dict[str, Any]] = {
        "jpg": {"format": "JPEG", "quality": settings.quality, "subsampling": 0},
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "quality": settings.quality},
    }
    buffer = io.BytesIO()
    to_pillow(pixels).save(buffer, **options[settings.format])
    return buffer.getvalue()


def _plain_format(data: bytes) -> str | None:
    """The extension of what a readable image is, whatever its file was called; None for what shards do not hold."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _key(place: int, relative_name: str) -> str:
    """A sample's key: its place, which no other has, and its old name, for the reader; ASCII without dots."""
    stem = relative_name.rpartition("/")[2].rpartition(".")[0]
    return f"{place:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"


def read_report(job: PackJob, number: int) -> ShardReport | None:
    """The report of a shard that is finished."""
    content = PACK.read_report(job.folder, number)
    if content is None:
        return None
    found = ShardReport(**content)
    return found._replace(broken=[(name, reason) for name, reason in found.broken])
