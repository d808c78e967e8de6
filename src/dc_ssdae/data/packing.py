"""Images to tar shards: resized, in parallel, resumable, and the same bytes however often it was interrupted."""

import hashlib
import importlib.metadata
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dc_ssdae.data.folder import number_classes
from dc_ssdae.data.images import to_pillow
from dc_ssdae.data.loader import read_batches
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.optional import import_optional
from dc_ssdae.data.resumable import ShardWriter, check_places, identify, write_parts
from dc_ssdae.data.shards import INDEX_FILE, PACK, ShardIndex, scan_tar, write_index
from dc_ssdae.data.sources import open_path, split_folders
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, wrong_value
from dc_ssdae.settings import check_settings, setting

ImageFormat = Literal["jpg", "png", "webp"]

_KEPT = re.compile(rb"(?P<jpg>\xff\xd8\xff)|(?P<png>\x89PNG)|(?P<webp>RIFF.{4}WEBP)", re.DOTALL)  # how such files begin


@dataclass(frozen=True)
class PackSettings:
    """What decides the shards' bytes.

    Args:
        size: the shorter side in pixels; smaller images stay as they are. None resizes nothing.
        format: of the images that are encoded again.
        quality: of JPEG and WebP, 1 to 100; None for PNG. JPEG keeps its colours at full resolution (4:4:4).
        shard_size: images in a shard, at most.
        shuffle: spread the images over the shards by a hash of their names; else in the order of their names.

    Raises:
        InputError: a setting is out of range, or quality is given for PNG.
    """

    size: int | None = setting(256, at_least=1)
    format: ImageFormat = "jpg"
    quality: int | None = setting(95, at_least=1, at_most=100)
    shard_size: int = setting(1000, at_least=1)
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "")
        if (self.quality is None) != (self.format == "png"):
            raise wrong_value("quality", self.quality, "from 1 to 100, or null for png, which is lossless")


def pack(
    source: str,
    destination: str | Path,
    settings: PackSettings,
    workers: int = 1,
    max_broken_share: float = 0.1,
    cache: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Write images into WebDataset shards, `000000.tar` and so on, with a manifest and an index.

    A sample is the image and, if its class is known, `.cls`: the number of the class in the manifest's `classes`.
    Every shard is written beside its place and renamed; run again after it was interrupted, this skips finished
    shards and leaves the same bytes as an uninterrupted run. The manifest comes last.

    Args:
        source: a folder, or shards, as `open_sources` takes for its root; train/ and validation/ become folders of
            the destination.
        destination: the folder to write to; made if need be, and otherwise empty or begun by this function.
        settings: what is written.
        workers: processes; 1 is this one.
        max_broken_share: the largest share of broken images, of all in a part, with which it succeeds.
        cache: folder for shards from URLs.
        report: gets a line for each broken image, and other remarks.

    Returns:
        The manifest of each part by its name: "train", "validation", or "" if the source is not divided. It tells how
        many `images` there are, how many are `kept` byte by byte, and lists the `shards` and what is `broken`.

    Raises:
        InputError: the source cannot be read, the destination holds something else or was begun with other settings,
            or too many images are broken.
        OSError: something cannot be written.
    """
    target = Path(destination)
    check_places(source, target)
    parts = {name: open_path(folder, cache) for name, folder in (split_folders(source) or {"": source}).items()}
    number_classes(parts.values())
    writers = {}
    for name, part in parts.items():
        work = target / name, len(part), settings.shard_size, 1, max_broken_share, report
        writers[name] = _PackWriter(PACK, *work, part, settings, workers)
    return write_parts(PACK, target, writers, Processes())


_Packed = tuple[dict[str, Any], bool, tuple[str, str] | None]
"""A sample for the tar, whether its image is the source's own bytes, and name and reason if it is broken."""


@dataclass
class _PackWriter(ShardWriter):
    """Packs the images of one part; as a data set, what is written of each by its place in the shards."""

    workers_option: ClassVar = "--workers"

    source: Any
    settings: PackSettings
    workers: int

    def __post_init__(self) -> None:
        names = [self.source.relative_name(index) for index in range(self.total)]
        self.names = [name.encode("utf-8", "surrogateescape") for name in names]
        self.order = list(range(self.total))
        if self.settings.shuffle:  # by a hash, and not by a generator, whose stream may change with its library
            self.order.sort(key=lambda index: hashlib.blake2b(self.names[index], digest_size=8).digest())

    @cached_property
    def identity(self) -> dict[str, Any]:
        images = identify(self.source, b"\0".join(self.names))
        return {**asdict(self.settings), "images": self.total, **images}

    def read(self, places: Sequence[int]) -> Iterator[_Packed]:
        workers = self.workers if self.workers > 1 else 0
        return read_batches(self, itemgetter(0), workers, batch_sampler=[[place] for place in places])

    def __getitem__(self, place: int) -> _Packed:
        index = self.order[place]
        try:
            sample, is_kept = self._sample(index)
        except InputError as error:
            return {}, False, (self.source.name(index), str(error))
        return {"__key__": _key(place, self.source.relative_name(index)), **sample}, is_kept, None

    def write(self, path: Path, images: Iterable[_Packed], advance: Callable[[int], object]) -> dict[str, Any]:
        kept, broken = 0, []
        tar_writer = import_optional("webdataset.writer").TarWriter
        with open(path, "wb") as file, tar_writer(file, user="", group="", mtime=0, encoder=False) as writer:
            for sample, is_kept, why_broken in images:
                if why_broken is None:
                    writer.write(sample)
                else:
                    broken.append(why_broken)
                kept += is_kept
                advance(1)
        table = scan_tar(str(path))  # also proves that it can be read
        names = [table.names[row] for row in range(len(table.names))]
        report = {"names": names, "offsets": table.offsets.tolist(), "sizes": table.sizes.tolist()}
        return {**report, "images": len(names), "kept": kept, "broken": broken}

    def content(self, reports: Sequence[dict[str, Any]], broken: Sequence[dict[str, str]]) -> dict[str, Any]:
        names, *places = ([row for report in reports for row in report[key]] for key in ("names", "offsets", "sizes"))
        if not names:
            raise InputError(f"every image is broken; there is nothing to pack into {str(self.folder)!r}")
        table = ShardIndex(NameTable.of(names), *(np.array(column, np.int64) for column in places))
        return {
            "written_with": {name: importlib.metadata.version(name) for name in ("dc-ssdae", "pillow", "torchvision")},
            "images": len(names),
            "kept": sum(report["kept"] for report in reports),
            "classes": self.source.classes,
            "broken": broken,
            "index": {"file": INDEX_FILE, "sha256": write_index(table, self.folder / INDEX_FILE)},
        }

    def _sample(self, index: int) -> tuple[dict[str, bytes], bool]:
        """The members of an image's sample by extension, and whether the image's are the source's own bytes."""
        size, extension, kept = self.settings.size, self.settings.format, None
        pixels, label = self.source.read(index)  # before its bytes: a file that is no image may have very many
        if size is not None and min(pixels.shape[1:]) > size:
            pixels = resize_shorter_side(pixels, size)
        else:
            data = self.source.read_bytes(index)
            kept = _KEPT.match(data)
        if kept is None:
            buffer = io.BytesIO()
            kind = "jpeg" if extension == "jpg" else extension
            to_pillow(pixels).save(buffer, kind, quality=self.settings.quality, subsampling=0)
            data = buffer.getvalue()
        image = {str(kept.lastgroup) if kept else extension: data}
        return image if label < 0 else {**image, "cls": str(label).encode()}, kept is not None


def _key(place: int, relative_name: str) -> str:
    """A sample's key: its place, which no other has, and its old name, for the reader; ASCII without dots."""
    stem = relative_name.rpartition("/")[2].rpartition(".")[0]
    return f"{place:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"
