"""How fast images are read: sources are measured in alternation, in one process."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.loader import TrainingSamples, training_loader
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.sources import ImageSource, open_path
from dc_ssdae.errors import InputError
from dc_ssdae.timing import Spread, cores, measure_alternately

ROUNDS = 5
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
        pack(source.root, f"{temporary}/shards", settings, cores(), max_broken_share=1.0, report=report)
        yield open_path(f"{temporary}/shards", None)


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
    rate = min(_rates(reader, _FEWEST_IMAGES)["sample"] for reader in readers)
    # A round reads everything twice, alone and as a whole; so does the one that warms up.
    count = max(_FEWEST_IMAGES, int(seconds * rate / (2 * (ROUNDS + 1))))
    broken = [dict.fromkeys(image for draw in range(count) for image in reader[draw].broken) for reader in readers]
    rounds = measure_alternately([partial(_rates, reader, count, workers) for reader in readers], ROUNDS)
    figures = []
    for (name, source), own, images in zip(sources, rounds, broken, strict=True):
        compared = {
            key: {
                "images_per_second": Spread.of([rates[key] for rates in own]),
                "ratio": Spread.of([rates[key] / first[key] for rates, first in zip(own, rounds[0], strict=True)]),
            }
            for key in own[0]
        }
        stages = {stage: compared.pop(stage) for stage in ("read", "sample")}
        described = {"stages": stages, "loader": compared, "broken": [image._asdict() for image in images]}
        figures.append({"name": name, "images": len(source), **described})
    return {"images": count, "rounds": ROUNDS, "sources": figures}


def _rates(reader: TrainingSamples, count: int, workers: Sequence[int] = ()) -> dict[str, float]:
    """Images per second of each stage, and of the loader by its number of worker processes, which have started by then.

    The loader's batches are as many that each worker reads about twice as many images as a stage.
    """
    rates = {"read": _rate(map(reader.read, range(count)), count)}
    rates["sample"] = _rate(map(reader.__getitem__, range(count)), count)
    for processes in workers:
        batches = training_loader(reader, 0, None, processes, pin_memory=False)
        _rate(batches, 3 * processes)  # more than they read ahead
        rates[str(processes)] = LOADER_BATCH * _rate(batches, processes * -(-2 * count // LOADER_BATCH))
    return rates


def _rate(items: Iterable[object], count: int) -> float:
    """How many items per second come, over the next `count`."""
    start = time.perf_counter()
    for _ in islice(items, count):
        pass
    return count / (time.perf_counter() - start)
