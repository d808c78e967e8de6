"""Images to tar shards: resized, in parallel, resumable, and the same bytes however often it was interrupted."""

import hashlib
import importlib.metadata
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dc_ssdae.data.folder import ImageFolder, number_classes
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.optional import import_optional
from dc_ssdae.data.pack_shard import PACK, PackJob, PackSettings, ShardReport, read_report, write_shard
from dc_ssdae.data.resumable import check_broken, check_places, files_sha256
from dc_ssdae.data.shard_index import INDEX_FILE, MANIFEST_FORMAT, MANIFEST_VERSION, ShardIndex, write_index
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.sources import open_path, split_folders
from dc_ssdae.errors import InputError

_POLL_SECONDS = 0.5
_OTHER_IMAGES = {
    **dict.fromkeys(
        ("images", "names_sha256", "classes_sha256"), "was packed from other images than are in the source now"
    ),
    "files_sha256": "was packed from files that have changed since, in size or time",
}


class PackedPart(NamedTuple):
    """What became of one part of the images.

    name: "train", "validation", or "" where the source is not divided.
    folder: of the shards.
    images: how many are in the shards.
    shards: how many there are.
    kept: how many of the images are the source's files, byte by byte.
    broken: how many could not be read, and were left out.
    """

    name: str
    folder: Path
    images: int
    shards: int
    kept: int
    broken: int


def pack(
    source: str,
    destination: str | Path,
    settings: PackSettings,
    workers: int = 1,
    max_broken_share: float = 0.1,
    cache: str | None = None,
    report: Callable[[str], None] = print,
) -> list[PackedPart]:
    """Write images into WebDataset shards, `000000.tar` and so on, with a manifest and an index.

    A sample is the image and, from class folders, `.cls`: the number of its folder in the manifest's `classes`.
    Every shard is written beside its place and renamed; run again after it was interrupted, this skips what is
    finished and leaves the same bytes as an uninterrupted run. The manifest comes last.

    Args:
        source: a folder, or shards, as `open_sources` takes for its root; train/ and validation/ become folders of
            the destination.
        destination: the folder to write to; made if need be, and else empty or begun by this function.
        settings: what is written.
        workers: processes; 1 is this one.
        max_broken_share: the largest share of broken images, of all in a part, with which it succeeds.
        cache: folder for shards from URLs.
        report: gets a line for each broken image, and for other things to be told.

    Returns:
        What became of each part.

    Raises:
        InputError: the source cannot be read, the destination holds something else or was begun with other settings,
            or too many images are broken.
        OSError: something cannot be written.
    """
    import_optional("webdataset")
    target = Path(destination)
    check_places(source, target)
    parts = {name: open_path(folder, cache) for name, folder in (split_folders(source) or {"": source}).items()}
    if any(isinstance(part, Shards) for part in parts.values()):
        report("the source is shards: members other than the images, labels too, are left out")
    number_classes(parts.values())
    classes = next((part.classes for part in parts.values() if isinstance(part, ImageFolder)), [])
    with PACK.lock(target):
        jobs = {name: _plan(part, classes, target / name, settings) for name, part in parts.items()}
        finished = {
            name: PACK.begin(job.folder, identity, set(parts), _OTHER_IMAGES) for name, (job, identity) in jobs.items()
        }
        done = []
        for name, (job, identity) in jobs.items():
            manifest = finished[name]
            if manifest is not None:
                report(f"{str(job.folder)!r} is finished already; nothing to do")
            else:
                reports = _pack_part(name, job, workers, max_broken_share, report)
                manifest = _finish(job, reports, classes, identity)
            counts = manifest["images"], len(manifest["shards"]), manifest["kept"], len(manifest["broken"])
            done.append(PackedPart(name, job.folder, *counts))
        return done


def _plan(source: Any, classes: Sequence[str], folder: Path, settings: PackSettings) -> tuple[PackJob, dict[str, Any]]:
    """Decide which image goes into which shard, and by what to know the same plan again."""
    names = [source.relative_name(index) for index in range(len(source))]
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    order = np.arange(len(names))
    if settings.shuffle:
        # By a hash, and not by a generator, whose stream may change with its library.
        hashes = [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") for name in encoded]
        order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
    identity = {
        **asdict(settings),
        "images": len(names),
        "names_sha256": hashlib.sha256(b"\0".join(encoded)).hexdigest(),
        "files_sha256": files_sha256(source),
        "classes_sha256": hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    return PackJob(source, order, folder, settings), identity


def _pack_part(
    name: str, job: PackJob, workers: int, max_broken_share: float, report: Callable[[str], None]
) -> list[ShardReport]:
    """Write the shards that are still missing; gives the reports of all, in order."""
    from tqdm import tqdm

    reports = {number: found for number in range(job.shards) if (found := read_report(job, number)) is not None}
    missing = [number for number in range(job.shards) if number not in reports]
    total = len(job.order)
    already = sum(len(shard.names) + len(shard.broken) for shard in reports.values())
    with tqdm(total=total, initial=already, unit="image", desc=name or None, disable=None) as bar:
        check_broken(_broken(reports), total, max_broken_share)
        for number, shard in _write_shards(job, missing, workers, bar.update):
            reports[number] = shard
            for broken_name, reason in shard.broken:
                report(reason if broken_name in reason else f"{broken_name}: {reason}")
            check_broken(_broken(reports), total, max_broken_share)
    return [reports[number] for number in sorted(reports)]


def _broken(reports: Mapping[int, ShardReport]) -> list[tuple[str, str]]:
    return [entry for number in sorted(reports) for entry in reports[number].broken]


def _write_shards(
    job: PackJob, numbers: Sequence[int], workers: int, advance: Callable[[int], Any]
) -> Iterator[tuple[int, ShardReport]]:
    """Write shards, and give each when it is done; `advance` hears of images on the way."""
    workers = min(workers, len(numbers))
    if workers <= 1:
        for number in numbers:
            yield number, write_shard(job, number, advance)
        return
    # Not forked from this process: PyTorch's threads, if any run, do not survive that. A server that has only
    # imported it can be forked, which saves every worker the seconds of importing.
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([write_shard.__module__])
    else:
        context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    told = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (job, counter)) as pool:
        pending: dict[Future[ShardReport], int] = {
            pool.submit(_write_shard_in_worker, number): number for number in numbers
        }
        try:
            while pending:
                done, _ = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                count = counter.get_obj().value  # without its lock, which a killed worker may hold
                advance(count - told)
                told = count
                for future in done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise OSError("a worker was killed, perhaps for its memory; run it again, with fewer workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# What a pool's initializer sets up, its tasks can find in a module only.
_worker: dict[str, Any] = {}


def _start_worker(job: PackJob, counter: Any) -> None:
    import torch

    torch.set_num_threads(1)  # the processes share the cores among themselves
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C goes to all; the parent tells of it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker.update(job=job, counter=counter)


def _write_shard_in_worker(number: int) -> ShardReport:
    counter = _worker["counter"]

    def advance(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    return write_shard(_worker["job"], number, advance)


def _finish(
    job: PackJob, reports: Sequence[ShardReport], classes: Sequence[str], identity: dict[str, Any]
) -> dict[str, Any]:
    """Write the index and, as the last thing, the manifest."""
    index = ShardIndex.join(
        [
            ShardIndex(NameTable.of(shard.names), np.array(shard.offsets, np.int64), np.array(shard.sizes, np.int64))
            for shard in reports
        ]
    )
    if not len(index.names):
        raise InputError(f"every image is broken; there is nothing to pack into {str(job.folder)!r}")
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "settings": identity,
        "written_with": {name: importlib.metadata.version(name) for name in ("dc-ssdae", "pillow", "torchvision")},
        "images": len(index.names),
        "kept": sum(shard.kept for shard in reports),
        "classes": list(classes),
        "broken": [{"name": name, "reason": reason} for shard in reports for name, reason in shard.broken],
        "index": {"file": INDEX_FILE, "sha256": write_index(index, job.folder / INDEX_FILE)},
        "shards": [
            {
                "name": PACK.shard_path(job.folder, number).name,
                "images": len(shard.names),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for number, shard in enumerate(reports)
        ],
    }
    PACK.finish(job.folder, manifest)
    return manifest
