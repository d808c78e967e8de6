"""From a data set to training batches: order and crops, all from (seed, step, place in the batch)."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from types import FrameType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dc_ssdae.data.order import EpochOrder
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.data.transforms import center_crop, central_part, random_scaled_crop, resize_shorter_side
from dc_ssdae.errors import InputError
from dc_ssdae.randomness import image_generator, replacement_index
from dc_ssdae.timing import cores

T = TypeVar("T")

MOST_REPLACEMENTS = 100
"""Broken images in a row, each drawn at random, after which the data set is given up."""

MOST_WORKERS = 8


class ReadingFailed(InputError):
    """The data set can no longer be read; this process alone may know."""


class BrokenImage(NamedTuple):
    """An image that cannot be read: its name in the data set, and why."""

    name: str
    reason: str


class Sample(NamedTuple):
    """One image of a step; the same fields as `Batch`, without the batch dimension."""

    pixels: Tensor
    draw: Tensor
    broken: list[BrokenImage]


class Batch(NamedTuple):
    """Some images of a step.

    pixels: uint8 (B, 3, S, S).
    draw: int64 (B,), numbers the run's images, step · batch size + place; one number is one crop with one noise.
    broken: what could not be read while the batch was drawn.
    """

    pixels: Tensor
    draw: Tensor
    broken: list[BrokenImage]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Batch":
        """Stack samples."""
        pixels, draw, broken = zip(*samples, strict=True)
        return cls(torch.stack(pixels), torch.stack(draw), [image for images in broken for image in images])


@dataclass(frozen=True)
class Drawing:
    """How the images of a step are drawn.

    Args:
        seed: of the run.
        batch_size: of the global batch.
        image_size: side S of the crops in pixels.
        aug_scale: largest enlargement before the crop, at least 1.
        flip: mirror half of the crops.
        repeat_after: steps after which the first step's crops and noise come again; None draws anew for ever.
    """

    seed: int
    batch_size: int
    image_size: int
    aug_scale: float
    flip: bool
    repeat_after: int | None = None


class Place(NamedTuple):
    """The place of an image: its step and where it stands in that step's global batch, both from 0."""

    step: int
    place: int


class TrainingSamples(Dataset[Sample]):
    """The samples of a run by `Place`; reading one depends on nothing that was read before.

    Args:
        source: the images.
        drawing: how they are drawn.
    """

    def __init__(self, source: ImageSource, drawing: Drawing) -> None:
        self.source = source
        self.drawing = drawing
        self.order = EpochOrder(getattr(source, "blocks", [len(source)]), drawing.seed)

    def __getitem__(self, place: Place) -> Sample:
        drawing = self.drawing
        step = place.step if drawing.repeat_after is None else place.step % drawing.repeat_after
        draw = step * drawing.batch_size + place.place
        pixels, broken = self._read(draw)
        generator = image_generator(drawing.seed, step, place.place)
        crop = random_scaled_crop(pixels, drawing.image_size, drawing.aug_scale, generator, drawing.flip)
        return Sample(crop, torch.tensor(draw), broken)

    def _read(self, position: int) -> tuple[Tensor, list[BrokenImage]]:
        broken: list[BrokenImage] = []
        index = self.order[position]
        for attempt in range(MOST_REPLACEMENTS):
            try:
                return self.source.read(index), broken
            except InputError as error:
                broken.append(BrokenImage(self.source.name(index), str(error)))
                index = replacement_index(self.drawing.seed, position, attempt, self.order.length)
        raise InputError(
            f"{MOST_REPLACEMENTS} images in a row cannot be read, the last because: {broken[-1].reason}; "
            "is the data set still there?"
        )


class Places:
    """The places of each batch that one process reads: its share of every step, cut into `parts`.

    Args:
        first_step: to start at.
        last_step: to end before; None never ends.
        batch_size: of the global batch, a multiple of processes times parts.
        process: index of this process.
        processes: how many there are.
        parts: of a process's share, for gradient accumulation.
    """

    def __init__(
        self, first_step: int, last_step: int | None, batch_size: int, process: int, processes: int, parts: int
    ) -> None:
        self.first_step = first_step
        self.last_step = last_step
        self.size = batch_size // (processes * parts)
        self.start = process * self.size * parts
        self.parts = parts

    def __iter__(self) -> Iterator[list[Place]]:
        step = self.first_step
        while self.last_step is None or step < self.last_step:
            for part in range(self.parts):
                start = self.start + part * self.size
                yield [Place(step, place) for place in range(start, start + self.size)]
            step += 1


class ValidationImage(NamedTuple):
    """A validation image (3, S, S), uint8 unless another `prepare` made it, at its place; or why it cannot be read.

    `enlarged`: its shorter side was smaller than S.
    """

    place: int
    pixels: Tensor
    broken: BrokenImage | None
    enlarged: bool = False


class ValidationImages(Dataset[ValidationImage]):
    """At most `limit` images, evenly spread over a data set, resized by the shorter side and cut to the centre.

    Args:
        source: the images.
        image_size: side S in pixels.
        limit: how many, at most.
        prepare: resizes and cuts in another way: from uint8 (3, H, W) and S to (3, S, S); can be pickled.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        limit: int,
        prepare: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        count = min(len(source), limit)
        self.source = source
        self.image_size = image_size
        self.prepare = prepare or _resize_and_crop
        self.indices = [place * len(source) // count for place in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> ValidationImage:
        index = self.indices[place]
        try:
            pixels = self.source.read(index)
            prepared = self.prepare(pixels, self.image_size)
        except InputError as error:
            blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
            return ValidationImage(place, blank, BrokenImage(self.source.name(index), str(error)))
        return ValidationImage(place, prepared, None, is_enlarged(pixels, self.image_size))

    def name(self, place: int) -> str:
        """The name of an image, which says nothing about where its data set lies, where the data set allows that."""
        name: Callable[[int], str] = getattr(self.source, "relative_name", self.source.name)
        return name(self.indices[place])


def is_enlarged(pixels: Tensor, size: int) -> bool:
    """Whether an image (3, H, W) has a side that is shorter than the square which is made of it."""
    return min(pixels.shape[-2:]) < size


def enlarged_caveat(enlarged: int, images: int, size: int) -> list[str]:
    """Say in one line, or none, how many of some images were enlarged to squares of `size` pixels."""
    if not enlarged:
        return []
    were = "image was smaller" if images == 1 else "images were smaller"
    return [
        f"{enlarged:,} of {images:,} {were} than {size} px and enlarged: blurrier, and easier to reconstruct, than "
        "photos of that size."
    ]


def _resize_and_crop(pixels: Tensor, size: int) -> Tensor:
    return center_crop(resize_shorter_side(central_part(pixels), size), size)


def validation_loader(
    images: ValidationImages, places: Sequence[int], batch_size: int, workers: int
) -> Iterator[list[ValidationImage]]:
    """Read some validation images, batch by batch.

    Args:
        images: of an evaluation.
        places: which, in this order.
        batch_size: images at a time.
        workers: processes that read them; 0 reads in this one.

    Raises:
        ReadingFailed: the data set can no longer be read.
    """
    loader: DataLoader[list[ValidationImage]] = DataLoader(
        images,  # type: ignore[arg-type]
        sampler=places,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_parent(),
        generator=torch.Generator(),
    )
    return in_one_line(loader)


def training_loader(samples: TrainingSamples, places: Places, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Read batches ahead in worker processes; with 0 workers, in this one.

    Args:
        samples: to read.
        places: which, batch by batch.
        workers: processes.
        pin_memory: put the batches where a GPU copies from fastest.

    Raises:
        InputError: as reading a sample does.
    """
    loader: DataLoader[Batch] = DataLoader(
        samples,  # type: ignore[arg-type]  # what is read is a Sample, what comes out a Batch
        batch_sampler=places,
        collate_fn=Batch.of,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_parent(),
        generator=torch.Generator(),  # else the loader would draw its base seed from the default generator
    )
    return in_one_line(loader)


def in_one_line(loader: Iterable[T]) -> Iterator[T]:
    """Go through a loader; what a worker raises, with its traceback in the message, becomes one line.

    Raises:
        ReadingFailed: the data set cannot be read.
    """
    try:
        yield from loader
    except (InputError, OSError) as error:
        line = str(error).strip().splitlines()[-1]
        raise ReadingFailed(line.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ReadingFailed(
            f"a process that reads images was ended from outside ({' '.join(str(error).split())}); it may lack memory, "
            "or shared memory (/dev/shm): give it more, or try fewer data.workers"
        ) from None


def leave_signals_to_the_parent() -> Callable[[int], None]:
    """Make a loader's `worker_init_fn` that ignores what a cluster or Ctrl-C sends to all processes at once.

    The parent ends its workers after saving. When it exits with an exception that still holds a loader, Python ends
    them by SIGTERM and waits for them: from then on they obey it.
    """
    exiting = multiprocessing.Event()
    atexit.register(exiting.set)
    return partial(_leave_signals, exiting)


def _leave_signals(exiting: Event, worker: int) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        if exiting.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


def default_workers(processes_here: int) -> int:
    """Choose the number of worker processes for each of the training processes on this machine."""
    return max(0, min(MOST_WORKERS, cores() // processes_here - 1))
