"""Images to shards of latents: in parallel over processes, resumable, and the same bytes however it was interrupted."""

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dc_ssdae.data.folder import number_classes
from dc_ssdae.data.latent_manifest import LATENTS_FORMAT, LATENTS_VERSION
from dc_ssdae.data.latent_shard import (
    LATENTS,
    ImageBatch,
    LatentEncoder,
    LatentSettings,
    LatentShard,
    LatentShardReport,
    read_latent_report,
)
from dc_ssdae.data.loader import ValidationImage, ValidationImages, enlarged_caveat, read_batches, stack
from dc_ssdae.data.resumable import check_broken, files_sha256
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, counted
from dc_ssdae.latent import LatentMoments

_STOP_FILE = "stop"
_OTHER_IMAGES = "was encoded from other images than are in the source now"


class EncodedPart(NamedTuple):
    """What became of one part of the images.

    name: "train", "validation", or "" where the source is not divided.
    folder: of the shards.
    images: how many are in the shards.
    shards: how many there are.
    unlabelled: how many of the images have no label.
    broken: how many could not be read, and were left out.
    """

    name: str
    folder: Path
    images: int
    shards: int
    unlabelled: int
    broken: int


@dataclass(frozen=True)
class LatentJob:
    """Everything that is needed to write the shards of one part.

    Args:
        images: to encode, in this order.
        classes: names of what the labels number.
        folder: to write to.
        encoder: encodes them.
        settings: what is stored.
        shape: (c, h, w) of a latent.
    """

    images: ValidationImages
    classes: list[str]
    folder: Path
    encoder: LatentEncoder
    settings: LatentSettings
    shape: tuple[int, int, int]

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.images) // self.settings.shard_size)

    def places(self, number: int) -> range:
        """Places of a shard's images."""
        first = number * self.settings.shard_size
        return range(first, min(first + self.settings.shard_size, len(self.images)))

    @cached_property  # what is found before the images are read holds for all of them
    def identity(self) -> dict[str, Any]:
        """By what to know the same job again."""
        digest = hashlib.sha256()
        for place in range(len(self.images)):
            digest.update(self.images.name(place).encode("utf-8", "surrogateescape") + b"\0")
        classes = "\0".join(self.classes).encode("utf-8", "surrogateescape")
        settings = asdict(self.settings)
        if self.settings.store != "sample":
            del settings["seed"]  # nothing depends on it
        return {
            **settings,
            "compute_dtype": self.encoder.compute_dtype,
            "model_sha256": self.encoder.sha256,
            "images": len(self.images),
            "names_sha256": digest.hexdigest(),
            "files_sha256": files_sha256(self.images.source),
            "classes_sha256": hashlib.sha256(classes).hexdigest(),
        }


def encode_latents(
    parts: Mapping[str, ImageSource],
    destination: str | Path,
    encoder: LatentEncoder,
    settings: LatentSettings,
    *,
    only: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    processes: Processes | None = None,
    max_broken_share: float = 0.1,
    report: Callable[[str], None] = print,
) -> list[EncodedPart]:
    """Encode images into shards, `000000.safetensors` and so on, with a manifest: what `LatentDataset` reads.

    A shard holds the tensors `latents` (N, c, h, w), as the encoder gives them, `labels` int64 (N,), -1 where not
    known, and perhaps `latents_flip`, `latents_std` and `latents_flip_std`. Of several processes each writes its
    share of the shards. Run again after it was interrupted, this skips shards that are finished, and leaves the same
    bytes as an uninterrupted run with the same batch size. The manifest comes last.

    Args:
        parts: the images of each part, which becomes a folder of the destination; "" is the destination itself.
        destination: the folder to write to; made if need be, and else empty or begun by this function.
        encoder: encodes the images.
        settings: what is stored.
        only: the one part to encode; the classes are still numbered over all.
        limit: images of a part, at most, evenly spread over it.
        batch_size: images encoded at a time.
        workers: processes that read images, for each process that encodes; 0 reads in that one.
        processes: that share the work and see the same files; None is this one alone.
        max_broken_share: the largest share of broken images, of all in a part, with which it succeeds.
        report: gets a line for each broken image, and for other things to be told.

    Returns:
        What became of each part.

    Raises:
        InputError: the settings do not fit the encoder, the destination holds something else or was begun with other
            settings, too many images are broken, or a latent is not finite. Of several processes the main one tells it.
        OSError: something cannot be written.
    """
    processes = processes or Processes()
    target = Path(destination)
    jobs = processes.together(lambda: _plan(parts, only, target, encoder, settings, limit))

    def begin() -> dict[str, dict[str, Any] | None]:
        if not processes.is_main:
            return {}
        differs = {
            **dict.fromkeys(("images", "names_sha256", "classes_sha256"), _OTHER_IMAGES),
            "files_sha256": "was encoded from files that have changed since, in size or time",
            "model_sha256": f"was encoded with another model than {encoder.name}",
        }
        locked.enter_context(LATENTS.lock(target))
        manifests = {}
        for name, job in jobs.items():
            manifests[name] = LATENTS.begin(job.folder, job.identity, set(parts), differs)
            _stop_file(job).unlink(missing_ok=True)
        return manifests

    with contextlib.ExitStack() as locked:
        finished = processes.gather(processes.together(begin))[0]
        done = []
        for name, job in jobs.items():
            manifest = finished[name]
            if manifest is None:
                manifest = _encode_part(name, job, batch_size, workers, processes, max_broken_share, report)
            elif processes.is_main:
                report(f"{str(job.folder)!r} is finished already; nothing to do{_other_numbers(manifest, encoder)}")
            if processes.is_main:
                for line in enlarged_caveat(manifest.get("enlarged", 0), manifest["images"], settings.size):
                    report(f"{name}: {line}" if name else line)
            counts = (manifest["images"], len(manifest["shards"]), manifest["unlabelled"], len(manifest["broken"]))
            done.append(EncodedPart(name, job.folder, *counts))
        return done


def _other_numbers(manifest: Mapping[str, Any], encoder: LatentEncoder) -> str:
    """Say it where a manifest holds other numbers than the model has now."""
    found, numbers = manifest.get("model"), asdict(encoder.scaling)
    same = isinstance(found, dict) and all(found.get(name) == value for name, value in numbers.items())
    return "" if same else "; manifest.json keeps the scaling from then; the model's has changed since"


def _plan(
    parts: Mapping[str, ImageSource],
    only: str | None,
    target: Path,
    encoder: LatentEncoder,
    settings: LatentSettings,
    limit: int | None,
) -> dict[str, LatentJob]:
    if only is not None and only not in parts:
        has = f"it has {', '.join(parts)}" if "" not in parts else "it is not divided into parts"
        raise InputError(f"there are no {only} images: {has}")
    shape = encoder.latent_shape(settings)
    number_classes(parts.values())
    jobs = {}
    for name, source in parts.items():
        if only not in (None, name):
            continue
        images = ValidationImages(source, settings.size, len(source) if limit is None else limit)
        jobs[name] = LatentJob(images, source.classes, target / name, encoder, settings, shape)
    return jobs


def _encode_part(
    name: str,
    job: LatentJob,
    batch_size: int,
    workers: int,
    processes: Processes,
    max_broken_share: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write the shards that are still missing, share by share; gives the manifest."""
    found = processes.together(
        lambda: [number for number in range(job.shards) if read_latent_report(job.folder, number)]
    )
    missing = sorted(set(range(job.shards)) - set(processes.gather(found)[0]))
    if processes.is_main and 0 < len(missing) < processes.count:
        report(f"{counted(len(missing), 'shard')} can keep at most as many processes busy; smaller shards keep more")
    own = missing[processes.index :: processes.count]
    processes.together(lambda: _encode_share(name, job, own, batch_size, workers, processes, max_broken_share, report))

    def finish() -> dict[str, Any]:
        return _finish(job, max_broken_share) if processes.is_main else {}

    return processes.gather(processes.together(finish))[0]


def _encode_share(
    name: str,
    job: LatentJob,
    numbers: Sequence[int],
    batch_size: int,
    workers: int,
    processes: Processes,
    max_broken_share: float,
    report: Callable[[str], None],
) -> None:
    from tqdm import tqdm

    broken: list[tuple[str, str]] = []
    total = sum(len(job.places(number)) for number in numbers)
    disabled = None if processes.is_main else True
    try:
        with tqdm(total=total, unit="image", desc=name or None, disable=disabled) as bar:
            for shard in _write_shards(job, numbers, batch_size, workers, bar.update):
                broken += shard.broken
                for image, reason in shard.broken:
                    report(f"left out: {reason if image in reason else f'{image}: {reason}'}")
                check_broken(broken, len(job.images), max_broken_share)
                if _stop_file(job).exists():
                    return
    except (InputError, OSError):
        if processes.count > 1:
            with contextlib.suppress(OSError):
                _stop_file(job).touch()  # the others look for it, and do not work on for hours
        raise


def _write_shards(
    job: LatentJob, numbers: Sequence[int], batch_size: int, workers: int, advance: Callable[[int], object]
) -> Iterator[LatentShardReport]:
    """Write shards, and give each one's report; batches do not reach over a shard's end."""
    batches = {number: _batches(job.places(number), batch_size) for number in numbers}
    images = job.images
    stream = read_batches(
        images,
        partial(_collate, images),
        workers if numbers else 0,
        images.workers_option,
        batch_size * 3 * images.image_size**2,
        batch_sampler=[places for number in numbers for places in batches[number]],
    )
    for number in numbers:
        shard = LatentShard(job.folder, number, job.encoder, job.settings)
        for places in batches[number]:
            shard.add(next(stream))
            advance(len(places))
        yield shard.write()


def _batches(places: range, batch_size: int) -> list[list[int]]:
    return [list(places[start : start + batch_size]) for start in range(0, len(places), batch_size)]


def _collate(source: ValidationImages, images: Sequence[ValidationImage]) -> ImageBatch:
    places, pixels, broken, enlarged, labels = zip(*images, strict=True)
    names = [source.name(place) if image is None else image.name for place, image in zip(places, broken, strict=True)]
    reasons = [None if image is None else image.reason for image in broken]
    return ImageBatch(stack(pixels), list(labels), names, reasons, sum(enlarged))


def _finish(job: LatentJob, max_broken_share: float) -> dict[str, Any]:
    """Put the reports together and, as the last thing, write the manifest."""
    shards: list[LatentShardReport] = []
    for number in range(job.shards):
        shard = read_latent_report(job.folder, number)
        if shard is None:
            raise InputError(
                f"shard {str(LATENTS.shard_path(job.folder, number))!r} has gone; run the same command again"
            )
        shards.append(shard)
    broken = [entry for shard in shards for entry in shard.broken]
    check_broken(broken, len(job.images), max_broken_share)
    images = sum(shard.images for shard in shards)
    if not images:
        raise InputError(f"none of {counted(len(job.images), 'image')} can be read; the first: {broken[0][1]}")
    moments = torch.tensor([shard.moments for shard in shards], dtype=torch.float64)
    encoder = job.encoder
    manifest = {
        "format": LATENTS_FORMAT,
        "version": LATENTS_VERSION,
        "settings": job.identity,
        "model": {
            "name": encoder.name,
            "sha256": encoder.sha256,
            "downsample_factor": encoder.downsample_factor,
            "latent_channels": encoder.latent_channels,
            **asdict(encoder.scaling),
        },
        "written_with": {name: importlib.metadata.version(name) for name in ("dc-ssdae", "torch", "torchvision")},
        "latent_shape": list(job.shape),
        "images": images,
        "unlabelled": sum(shard.unlabelled for shard in shards),
        "enlarged": sum(shard.enlarged for shard in shards),
        "classes": job.classes,
        "broken": [{"name": name, "reason": reason} for name, reason in broken],
        "statistics": LatentMoments.from_states(moments).statistics().settings(),
        "shards": [
            {
                "name": LATENTS.shard_path(job.folder, number).name,
                "images": shard.images,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for number, shard in enumerate(shards)
        ],
    }
    LATENTS.finish(job.folder, manifest)
    return manifest


def _stop_file(job: LatentJob) -> Path:
    return job.folder / LATENTS.unfinished_folder / _STOP_FILE
