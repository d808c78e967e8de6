"""How fast images are read: sources are measured in alternation, in one process."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.loader import TrainingSamples, training_loader
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.sources import ImageSource, open_path
from dc_ssdae.errors import InputError
from dc_ssdae.timing import Spread, cores, measure_alternately

DATA_ROUNDS, LOADER_ROUNDS = 7, 3
"""Measurements of each of the things that alternate."""

LOADER_BATCH = 16
"""Small, so that a batch more or less in the measured time changes little."""

_FEWEST_IMAGES = 8


@contextmanager
def packed(source: ImageSource, report: Callable[[str], None]) -> Iterator[ImageSource]:
    """Pack a folder's images, as they are and in their order, into shards that are removed afterwards.

    Args:
        source: a folder of images.
        report: gets a line for each broken image; those are left out.

    Yields:
        The shards, opened.

    Raises:
        InputError: it is no folder of images.
        OSError: the shards cannot be written.
    """
    if not isinstance(source, ImageFolder):
        raise InputError("only a folder of images can be packed")
    with tempfile.TemporaryDirectory(prefix="dc_ssdae-bench-") as temporary:
        settings = PackSettings(size=None, shuffle=False)
        shards = f"{temporary}/shards"
        pack(source.root, shards, settings, cores(), max_broken_share=1.0, report=report)
        yield open_path(shards, None)


def measure_data(
    sources: Sequence[tuple[str, ImageSource]],
    image_size: int,
    aug_scale: float,
    seconds: float,
    workers: Sequence[int] = (),
) -> dict[str, Any]:
    """Time the input pipeline of some sources, in rounds that alternate between them, after one that warms up.

    Every source is read at the same indices in the same order. Where sources differ in length, only as many images
    are read as the shortest one has.

    Args:
        sources: at least one, each with its name; ratios are to the first.
        image_size: side of the crops in pixels.
        aug_scale: largest enlargement before the crop, at least 1.
        seconds: about how long the stages of each source are measured, and each of the loader's numbers of workers.
        workers: numbers of worker processes, at least 1, with which to time the loader too.

    Returns:
        How many `images` were read in each of how many `rounds`, and for each of the `sources` its `name`, how many
        `images` it holds, and what was measured as images per second and their ratio to the first source's, round by
        round: `stages` in this process, "read" (and decode) and the whole "sample" (with crop, resize and flip), and
        `loader` by its number of worker processes. `broken` are name and reason of what could not be read, and was
        replaced by another image, as in training.

    Raises:
        InputError: no image of a source can be read.
        OSError: a shard is gone.
    """
    readers = [TrainingSamples(source, 0, LOADER_BATCH, image_size, aug_scale, True) for _, source in sources]
    for reader in readers:  # one block of one length, so that all are read in the same order
        reader.blocks = (min(len(source) for _, source in sources),)
        _stage_rates(reader, _FEWEST_IMAGES)  # from the disk, perhaps
    rate = min(_stage_rates(reader, _FEWEST_IMAGES)["sample"] for reader in readers)
    # A round reads everything twice, alone and as a whole; so does the one that warms up.
    count = max(_FEWEST_IMAGES, int(seconds * rate / (2 * (DATA_ROUNDS + 1))))
    broken = [dict.fromkeys(image for draw in range(count) for image in reader[draw].broken) for reader in readers]
    stages = measure_alternately([partial(_stage_rates, reader, count) for reader in readers], DATA_ROUNDS)
    loaders = [partial(_loader_rates, reader, workers, seconds / LOADER_ROUNDS) for reader in readers]
    loading = measure_alternately(loaders, LOADER_ROUNDS)
    figures = [
        {
            "name": name,
            "images": len(source),
            "stages": _compared(stages[number], stages[0]),
            "loader": _compared(loading[number], loading[0]),
            "broken": [image._asdict() for image in broken[number]],
        }
        for number, (name, source) in enumerate(sources)
    ]
    return {"images": count, "rounds": DATA_ROUNDS, "sources": figures}


def _stage_rates(reader: TrainingSamples, count: int) -> dict[str, float]:
    """Images per second of reading alone, and of whole samples."""
    rates = {}
    for name, stage in (("read", reader.read), ("sample", reader.__getitem__)):
        start = time.perf_counter()
        for draw in range(count):
            stage(draw)
        rates[name] = count / (time.perf_counter() - start)
    return rates


def _loader_rates(reader: TrainingSamples, workers: Sequence[int], seconds: float) -> dict[str, float]:
    """Images per second of the loader by its number of worker processes, which have started by then."""
    rates = {}
    for processes in workers:
        batches = training_loader(reader, 0, None, processes, pin_memory=False)
        for _ in range(3 * processes):  # more than they read ahead
            next(batches)
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not count:
            for _ in range(processes):  # they end their batches at about the same time
                next(batches)
            count += processes * LOADER_BATCH
        rates[str(processes)] = count / spent
    return rates


def _compared(own: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Spread]]:
    """Summarise rounds of rates, and compare them with the first source's."""
    return {
        key: {
            "images_per_second": Spread.of([rates[key] for rates in own]),
            "ratio": Spread.of([rates[key] / others[key] for rates, others in zip(own, first, strict=True)]),
        }
        for key in own[0]
    }
