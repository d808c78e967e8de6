"""Images to tar shards: resized, in parallel, resumable, and the same bytes however often it was interrupted."""

import hashlib
import importlib.metadata
import io
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dc_ssdae.data.folder import number_classes
from dc_ssdae.data.images import to_pillow
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.optional import import_optional
from dc_ssdae.data.resumable import check_broken, check_places, files_sha256, to_json
from dc_ssdae.data.shards import INDEX_FILE, MANIFEST_FORMAT, MANIFEST_VERSION, PACK, ShardIndex, scan_tar, write_index
from dc_ssdae.data.sources import open_path, split_folders
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.errors import InputError, wrong_value
from dc_ssdae.files import sha256, sync, write_whole, written_beside
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
    with PACK.lock(target):
        jobs = {name: _PackJob(part, target / name, settings) for name, part in parts.items()}
        manifests: dict[str, Any] = {name: PACK.begin(job.folder, job.identity) for name, job in jobs.items()}
        for name, job in jobs.items():
            if manifests[name] is not None:
                report(f"{str(job.folder)!r} is finished already; nothing to do")
            else:
                manifests[name] = _write_part(name, job, workers, max_broken_share, report)
        return manifests


class _PackJob(Dataset[bool | Exception]):
    """The shards of one part, by their numbers; getting one writes it if it is missing, and says so."""

    def __init__(self, source: Any, folder: Path, settings: PackSettings) -> None:
        self.source, self.folder, self.settings = source, folder, settings
        names = [source.relative_name(index).encode("utf-8", "surrogateescape") for index in range(len(source))]
        self.order = list(range(len(names)))
        if settings.shuffle:  # by a hash, and not by a generator, whose stream may change with its library
            hashes = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
            self.order.sort(key=hashes.__getitem__)
        self.identity = {
            **asdict(settings),
            "images": len(names),
            "names_sha256": hashlib.sha256(b"\0".join(names)).hexdigest(),
            "files_sha256": files_sha256(source),
            "classes_sha256": hashlib.sha256("\0".join(source.classes).encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def __len__(self) -> int:
        return -(-len(self.order) // self.settings.shard_size)

    def __getitem__(self, number: int) -> bool | Exception:
        try:
            is_missing = PACK.read_report(self.folder, number) is None
            if is_missing:
                self._write(number)
        except (InputError, OSError) as error:
            return error  # raised, it would come out of the loader with another message
        return is_missing

    def _write(self, number: int) -> None:
        path, settings = PACK.shard_path(self.folder, number), self.settings
        first = number * settings.shard_size
        kept, broken = 0, []
        tar_writer = import_optional("webdataset.writer").TarWriter
        with written_beside(path) as beside:
            with open(beside, "wb") as file, tar_writer(file, user="", group="", mtime=0, encoder=False) as writer:
                for place, index in enumerate(self.order[first : first + settings.shard_size], first):
                    try:
                        sample, is_kept = self._sample(index)
                    except InputError as error:
                        broken.append((self.source.name(index), str(error)))
                        continue
                    kept += is_kept
                    writer.write({"__key__": _key(place, self.source.relative_name(index)), **sample})
            sync(beside)
            table = scan_tar(str(beside))  # also proves that it can be read
            names = [table.names[row] for row in range(len(table.names))]
            size, digest = beside.stat().st_size, sha256(beside)
            content = {"name": path.name, "images": len(names), "bytes": size, "sha256": digest}
            content |= {"names": names, "offsets": table.offsets.tolist(), "sizes": table.sizes.tolist()}
            content |= {"kept": kept, "broken": broken}
            # Before the shard's own renaming: a shard is finished when both are there.
            write_whole(PACK.report_path(self.folder, number), to_json(content))

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


def _write_part(
    name: str, job: _PackJob, workers: int, max_broken_share: float, report: Callable[[str], None]
) -> dict[str, Any]:
    """Write the shards that are still missing, the index and, as the last thing, the manifest."""
    from tqdm import tqdm

    processes = min(workers, len(job)) if workers > 1 else 0
    # With a generator of its own: otherwise the loader would draw from the default one.
    loader = DataLoader(job, batch_size=None, num_workers=processes, generator=torch.Generator())
    shards: list[dict[str, Any]] = []
    broken: list[tuple[str, str]] = []
    try:
        with tqdm(total=len(job.order), unit="image", desc=name or None, disable=None) as bar:
            for number, is_new in enumerate(loader):
                if isinstance(is_new, Exception):
                    raise is_new
                shards.append(PACK.read_report(job.folder, number) or {})
                for image, reason in shards[-1]["broken"] if is_new else ():
                    report(reason if image in reason else f"{image}: {reason}")
                broken += shards[-1]["broken"]
                bar.update(shards[-1]["images"] + len(shards[-1]["broken"]))
                check_broken(broken, len(job.order), max_broken_share)
    except RuntimeError as dead:
        raise OSError("a worker was killed, perhaps for its memory; try fewer workers") from dead
    names, *places = ([entry for shard in shards for entry in shard[key]] for key in ("names", "offsets", "sizes"))
    if not names:
        raise InputError(f"every image is broken; there is nothing to pack into {str(job.folder)!r}")
    table = ShardIndex(NameTable.of(names), *(np.array(column, np.int64) for column in places))
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "settings": job.identity,
        "written_with": {name: importlib.metadata.version(name) for name in ("dc-ssdae", "pillow", "torchvision")},
        "images": len(names),
        "kept": sum(shard["kept"] for shard in shards),
        "classes": job.source.classes,
        "broken": [{"name": image, "reason": reason} for image, reason in broken],
        "index": {"file": INDEX_FILE, "sha256": write_index(table, job.folder / INDEX_FILE)},
        "shards": [{key: shard[key] for key in ("name", "images", "bytes", "sha256")} for shard in shards],
    }
    PACK.finish(job.folder, manifest)
    return manifest
