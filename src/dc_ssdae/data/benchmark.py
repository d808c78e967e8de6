"""How fast images are read: sources are measured in alternation, in one process."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.loader import Drawing, Place, Places, TrainingSamples, training_loader
from dc_ssdae.data.order import EpochOrder
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.sources import ImageSource, open_path, split_folders
from dc_ssdae.errors import InputError
from dc_ssdae.timing import Spread, cores, measure_alternately

DATA_ROUNDS, LOADER_ROUNDS = 7, 3
"""Measurements of each of the things that alternate."""

LOADER_BATCH = 16
"""Small, so that a batch more or less in the measured time changes little."""

_FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Rate:
    """Images per second, and their `ratio` to the first source's, round by round."""

    images_per_second: Spread
    ratio: Spread


@dataclass(frozen=True)
class SourceFigures:
    """What was measured of a source.

    name: of the source.
    images: how many it holds.
    stages: rates of one thread: "read" (and decode), "crop" (with resize and flip), and the whole "sample".
    loader: rates of the loader, by its number of worker processes.
    broken: name and reason of what could not be read of the images measured, each replaced by another image, as in
        training.
    """

    name: str
    images: int
    stages: dict[str, Rate]
    loader: dict[str, Rate]
    broken: list[dict[str, Any]]


@dataclass(frozen=True)
class DataFigures:
    """Figures of sources, which were measured on the same `images` positions `rounds` times."""

    images: int
    rounds: int
    sources: list[SourceFigures]


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
        InputError: it is no folder of images.
        OSError: the shards cannot be written.
    """
    if not isinstance(open_path(folder, None), ImageFolder) or split_folders(folder):
        raise InputError(f"only a folder of images can be packed; {folder!r} holds shards, or parts of a data set")
    with tempfile.TemporaryDirectory(prefix="dc_ssdae-bench-") as temporary:
        settings = PackSettings(size=None, shuffle=False)
        shards = Path(temporary) / "shards"
        pack(folder, shards, settings, cores(), max_broken_share=1.0, report=report)
        yield open_path(str(shards), None)


def measure_data(
    sources: Sequence[tuple[str, ImageSource]],
    image_size: int,
    aug_scale: float,
    seconds: float,
    workers: Sequence[int] = (),
) -> DataFigures:
    """Time the input pipeline of some sources, in rounds that alternate between them, after one that warms up.

    Every source is read at the same indices in the same order. Where sources differ in length, only as many images
    are read as the shortest one has.

    Args:
        sources: at least one, each with its name; ratios are to the first.
        image_size: side of the crops in pixels.
        aug_scale: largest enlargement before the crop, at least 1.
        seconds: about how long the stages of each source are measured, and each of the loader's numbers of workers.
        workers: numbers of worker processes, at least 1, with which to time the loader too.

    Raises:
        InputError: no image of a source can be read.
        OSError: a shard is gone.
    """
    drawing = Drawing(0, LOADER_BATCH, image_size, aug_scale, flip=True)
    readers = [TrainingSamples(source, drawing) for _, source in sources]
    for reader in readers:  # one block of one length, so that all are read in the same order
        reader.order = EpochOrder([min(len(source) for _, source in sources)], drawing.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        places = _choose_places(readers, seconds)
        broken = [dict.fromkeys(image for place in places for image in reader[place].broken) for reader in readers]
        stages = measure_alternately([partial(_stage_rates, reader, places) for reader in readers], DATA_ROUNDS)
        loaders = [partial(_loader_rates, reader, workers, seconds / LOADER_ROUNDS) for reader in readers]
        loading = measure_alternately(loaders, LOADER_ROUNDS)
    finally:
        torch.set_num_threads(threads)
    figures = [
        SourceFigures(
            name,
            len(source),
            _compared(stages[number], stages[0]),
            _compared(loading[number], loading[0]),
            [image._asdict() for image in broken[number]],
        )
        for number, (name, source) in enumerate(sources)
    ]
    return DataFigures(len(places), DATA_ROUNDS, figures)


def _choose_places(readers: Sequence[TrainingSamples], seconds: float) -> list[Place]:
    """As many places as all rounds, and one to warm up, read in the given time."""
    trial = _places(_FEWEST_IMAGES)
    for reader in readers:
        _stage_rates(reader, trial)  # from the disk, perhaps
    rate = min(_stage_rates(reader, trial)["sample"] for reader in readers)
    # A round reads everything twice: in stages, and as a whole.
    return _places(max(_FEWEST_IMAGES, int(seconds * rate / (2 * (DATA_ROUNDS + 1)))))


def _places(count: int) -> list[Place]:
    return [Place(*divmod(position, LOADER_BATCH)) for position in range(count)]


def _stage_rates(reader: TrainingSamples, places: Sequence[Place]) -> dict[str, float]:
    """Images per second of the stages, one after the other as in training, and of whole samples."""
    read = crop = 0.0
    for place in places:
        start = time.perf_counter()
        pixels, _ = reader.read(place)
        has_read = time.perf_counter()
        reader.crop(place, pixels)
        read += has_read - start
        crop += time.perf_counter() - has_read
    start = time.perf_counter()
    for place in places:
        reader[place]
    sample = time.perf_counter() - start
    return {name: len(places) / spent for name, spent in (("read", read), ("crop", crop), ("sample", sample))}


def _loader_rates(reader: TrainingSamples, workers: Sequence[int], seconds: float) -> dict[str, float]:
    """Images per second of the loader by its number of worker processes, which have started by then."""
    rates = {}
    for processes in workers:
        places = Places(0, None, LOADER_BATCH, 0, 1, 1)
        batches = iter(training_loader(reader, places, processes, pin_memory=False))
        for _ in range(3 * processes):  # more than they read ahead
            next(batches)
        count = 0
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not count:
            for _ in range(processes):  # they end their batches at about the same time
                next(batches)
            count += processes * LOADER_BATCH
        rates[str(processes)] = count / spent
    return rates


def _compared(own: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]) -> dict[str, Rate]:
    """Summarise rounds of rates, and compare them with the first source's."""
    return {
        key: Rate(
            Spread.of([rates[key] for rates in own]),
            Spread.of([rates[key] / others[key] for rates, others in zip(own, first, strict=True)]),
        )
        for key in own[0]
    }
