"""How fast images are read: sources are measured in alternation, in one process."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.loader import BrokenImage, Drawing, Place, Places, TrainingSamples, training_loader
from dc_ssdae.data.pack import pack
from dc_ssdae.data.pack_shard import PackSettings
from dc_ssdae.data.sources import ImageSource, open_path, split_folders
from dc_ssdae.data.transforms import random_scaled_crop
from dc_ssdae.errors import InputError, check_at_least, counted
from dc_ssdae.randomness import image_generator
from dc_ssdae.timing import Spread, alternating, cores

STAGES = ("read", "crop", "sample")
"""What of the input pipeline is timed: reading and decoding; crop, resize and flip; all together."""


DATA_ROUNDS, LOADER_ROUNDS = 7, 3
"""Measurements of each of the things that alternate."""


LOADER_BATCH = 16
"""Small, so that a batch more or less in the measured time changes little."""


_FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Rate:
    """Images a second, and their `ratio` to the first source's, round by round."""

    images_per_second: Spread
    ratio: Spread


@dataclass(frozen=True)
class SourceFigures:
    """What was measured of a source.

    name: of the source.
    images: how many it holds.
    stages: rates of one thread, by the names of `STAGES`.
    loader: rates of the loader, by its number of worker processes.
    broken: what could not be read of the images measured, each replaced by another one, as in training.
    """

    name: str
    images: int
    stages: dict[str, Rate]
    loader: dict[int, Rate]
    broken: list[BrokenImage]


@dataclass(frozen=True)
class DataFigures:
    """Figures of sources, which were measured on the same `images` positions `rounds` times."""

    images: int
    rounds: int
    sources: list[SourceFigures]


class NamedSource(NamedTuple):
    """A source, and what to call it."""

    name: str
    source: ImageSource


def training_images(path: str) -> str:
    """Find the part of a folder, shard or pattern of shards that a run would train on.

    Raises:
        InputError: the folder's parts are ambiguous, or there is nothing in train/.
    """
    path = os.path.expanduser(path)
    return split_folders(path).get("train", path)


@contextmanager
def packed(folder: str, report: Callable[[str], None]) -> Iterator[ImageSource]:
    """Pack a folder's images, as they are and in their order, into shards that are removed afterwards.

    Args:
        folder: of images.
        report: gets a line for each broken image; those are left out.

    Yields:
        The shards, opened.

    Raises:
        InputError: it is no folder of images, or there is not enough room for the shards.
        OSError: they cannot be written.
    """
    source = open_path(folder, None)
    if not isinstance(source, ImageFolder):
        raise InputError(f"only a folder of images can be packed; {folder!r} holds shards")
    if split_folders(folder):
        raise InputError(f"{folder!r} holds a folder train/ itself, so it cannot be packed as one data set")
    _check_room(source)
    with tempfile.TemporaryDirectory(prefix="dc_ssdae-bench-") as temporary:
        settings = PackSettings(size=None, shuffle=False)
        (part,) = pack(folder, Path(temporary) / "shards", settings, cores(), max_broken_share=1.0, report=report)
        yield open_path(str(part.folder), None)


def data_drawing(image_size: int, aug_scale: float) -> Drawing:
    """How samples are drawn where only the input pipeline is measured: seed 0, flips.

    Args:
        image_size: side of the crops in pixels, at least 1.
        aug_scale: largest enlargement, at least 1.
    """
    check_at_least(1, image_size=image_size)
    return Drawing(0, LOADER_BATCH, image_size, aug_scale, True)


def measure_data(
    sources: Sequence[NamedSource], drawing: Drawing, seconds: float, workers: Sequence[int] = ()
) -> DataFigures:
    """Time the input pipeline of some sources, in rounds that alternate between them, after one that warms up.

    Every source is read at the same indices in the same order. Where sources differ in length, only as many images
    are read as the shortest one has.

    Args:
        sources: at least one; ratios are to the first.
        drawing: how samples are drawn.
        seconds: about how long the stages of each source are measured, and each of the loader's numbers of workers.
        workers: numbers of worker processes, at least 1, with which to time the loader too.

    Raises:
        InputError: no image of a source can be read.
        OSError: a shard is gone.
    """
    length = min(len(source) for _, source in sources)
    readers = [TrainingSamples(_Beginning(source, length), drawing) for _, source in sources]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        places = _choose_places(readers, seconds)
        readable = [_readable(reader, places) for reader in readers]
        broken = [_read_samples(reader, places) for reader in readers]
        rates: list[dict[str, list[float]]] = [{stage: [] for stage in STAGES} for _ in readers]
        for round_ in range(DATA_ROUNDS):
            for number in alternating(len(readers), round_):
                for stage, spent in _time_stages(readers[number], readable[number]).items():
                    rates[number][stage].append(len(readable[number]) / spent)
                start = time.perf_counter()
                _read_samples(readers[number], places)
                rates[number]["sample"].append(len(places) / (time.perf_counter() - start))
        loading: list[dict[int, list[float]]] = [{count: [] for count in workers} for _ in readers]
        for round_ in range(LOADER_ROUNDS if workers else 0):
            for number in alternating(len(readers), round_):
                for count in workers:
                    loading[number][count].append(_loader_rate(readers[number], count, seconds / LOADER_ROUNDS))
    finally:
        torch.set_num_threads(threads)
    figures = [
        SourceFigures(
            name,
            len(source),
            {stage: _rate(values, rates[0][stage]) for stage, values in rates[number].items()},
            {count: _rate(values, loading[0][count]) for count, values in loading[number].items()},
            broken[number],
        )
        for number, (name, source) in enumerate(sources)
    ]
    return DataFigures(len(places), DATA_ROUNDS, figures)


def draw_crop(drawing: Drawing, place: Place, pixels: Tensor) -> Tensor:
    """The crop stage of a training sample."""
    generator = image_generator(drawing.seed, place.step, place.place)
    return random_scaled_crop(pixels, drawing.image_size, drawing.aug_scale, generator, drawing.flip)


class _Beginning:
    """The first `length` images of a source as one block: sources of one length are then read in the same order."""

    def __init__(self, source: ImageSource, length: int) -> None:
        self._source = source
        self._length = length

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read(self, index: int) -> Tensor:
        return self._source.read(index)


def _choose_places(readers: Sequence[TrainingSamples], seconds: float) -> list[Place]:
    """As many places as all rounds, and one to warm up, read in the given time."""
    trial = _places(_FEWEST_IMAGES)
    slowest = 0.0
    for reader in readers:
        _read_samples(reader, trial)  # from the disk, perhaps
        start = time.perf_counter()
        _read_samples(reader, trial)
        slowest = max(slowest, (time.perf_counter() - start) / len(trial))
    # A round reads everything twice: in stages, and as a whole.
    return _places(max(_FEWEST_IMAGES, int(seconds / (2 * (DATA_ROUNDS + 1) * slowest))))


def _places(count: int) -> list[Place]:
    return [Place(*divmod(position, LOADER_BATCH)) for position in range(count)]


def _index_at(reader: TrainingSamples, place: Place) -> int:
    return reader.order[place.step * reader.drawing.batch_size + place.place]


def _readable(reader: TrainingSamples, places: Sequence[Place]) -> list[Place]:
    """The places whose own image can be read; a stage is not timed on others."""
    found = []
    for place in places:
        try:
            reader.source.read(_index_at(reader, place))
        except InputError as error:
            reason = str(error)
        else:
            found.append(place)
    if not found:
        raise InputError(f"none of {counted(len(places), 'image')} can be read, the last because: {reason}")
    return found


def _read_samples(reader: TrainingSamples, places: Sequence[Place]) -> list[BrokenImage]:
    """Read whole samples; gives what is broken, each image once."""
    return list(dict.fromkeys(image for place in places for image in reader[place].broken))


def _time_stages(reader: TrainingSamples, places: Sequence[Place]) -> dict[str, float]:
    """Seconds of each stage on readable images, one after the other as in training."""
    read = crop = 0.0
    for place in places:
        index = _index_at(reader, place)
        start = time.perf_counter()
        pixels = reader.source.read(index)
        has_read = time.perf_counter()
        draw_crop(reader.drawing, place, pixels)
        end = time.perf_counter()
        read += has_read - start
        crop += end - has_read
    return {"read": read, "crop": crop}


def _loader_rate(reader: TrainingSamples, workers: int, seconds: float) -> float:
    """Images a second of the loader with worker processes, which have started by then."""
    places = Places(0, None, LOADER_BATCH, 0, 1, 1)
    batches = iter(training_loader(reader, places, workers, pin_memory=False))
    for _ in range(3 * workers):  # more than they read ahead
        next(batches)
    count = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not count:
        for _ in range(workers):  # they end their batches at about the same time
            next(batches)
        count += workers * LOADER_BATCH
    return count / spent


def _rate(values: Sequence[float], first: Sequence[float]) -> Rate:
    return Rate(Spread.of(values), Spread.of([value / other for value, other in zip(values, first, strict=True)]))


def _check_room(source: ImageFolder) -> None:
    sampled = range(0, len(source), max(1, len(source) // 1000))
    sizes = [os.path.getsize(name) for index in sampled if os.path.exists(name := source.name(index))]
    needed = len(source) * (statistics.fmean(sizes) if sizes else 0.0)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > 0.9 * free:
        raise InputError(
            f"packing {source.root!r} needs about {needed / 2**30:,.1f} GiB; {tempfile.gettempdir()} has "
            f"{free / 2**30:,.1f} GiB free; set TMPDIR to a folder with more room"
        )
