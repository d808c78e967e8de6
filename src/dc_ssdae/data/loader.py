"""From a data set to training batches: order and crops, all from (seed, step, place in the batch)."""

import atexit
import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dc_ssdae.data.order import permutation
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.data.transforms import center_crop, central_part, random_scaled_crop, resize_shorter_side
from dc_ssdae.errors import InputError
from dc_ssdae.randomness import image_generator, replacement_index
from dc_ssdae.timing import cores

T = TypeVar("T")

MOST_REPLACEMENTS = 100
"""Broken images in a row, each drawn at random, after which the data set is given up."""

AHEAD = 2
"""Batches that each worker reads ahead."""

POLL_SECONDS = 2
"""How often a wait for a batch looks at signals and at the workers."""

STALLED_SECONDS = 1800
"""Seconds without a batch after which the readers have stalled."""


class ReadingFailed(InputError):
    """The data set can no longer be read."""

    in_one_process = True


class BrokenImage(NamedTuple):
    """An image that cannot be read: its name in the data set, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Some images of a step; of one image, the same without the batch dimension.

    pixels: uint8 (B, 3, S, S).
    draw: int64 (B,), numbers the run's images, step · batch size + place; one number is one crop with one noise.
    broken: what could not be read while the batch was drawn.
    """

    pixels: Tensor
    draw: Tensor
    broken: list[BrokenImage]

    @classmethod
    def of(cls, images: Sequence["Batch"]) -> "Batch":
        """Make one batch of single images."""
        pixels, draw, broken = zip(*images, strict=True)
        return cls(default_collate([*pixels]), default_collate([*draw]), list(itertools.chain(*broken)))


class Samples(Protocol):
    """The examples of a run, by their position among all that it draws: step · batch size + place in the batch."""

    batch_size: int
    workers_option: ClassVar[str]

    def __getitem__(self, position: int) -> Any:
        """Read an example, which depends on nothing that was read before."""

    def collate(self, examples: Sequence[Any]) -> Any:
        """Make a batch."""


@dataclass
class TrainingSamples(Dataset[Batch]):
    """The images of a run by their position among all that the run draws: step · batch size + place in the batch.

    Reading one depends on nothing that was read before.

    Args:
        source: the images.
        seed: of the run.
        batch_size: of the global batch.
        image_size: side S of the crops in pixels.
        aug_scale: largest enlargement before the crop, at least 1.
        flip: mirror half of the crops.
        repeat_after: steps after which the first step's crops and noise come again; None always draws new ones.
    """

    source: ImageSource
    seed: int
    batch_size: int
    image_size: int
    aug_scale: float
    flip: bool
    repeat_after: int | None = None
    workers_option: ClassVar = "data.workers"

    def __post_init__(self) -> None:
        self.blocks = tuple(getattr(self.source, "blocks", [len(self.source)]))

    def __getitem__(self, position: int) -> Batch:
        draw = position if self.repeat_after is None else position % (self.repeat_after * self.batch_size)
        pixels, broken = self.read(draw)
        generator = image_generator(self.seed, *divmod(draw, self.batch_size))
        pixels = random_scaled_crop(pixels, self.image_size, self.aug_scale, generator, self.flip)
        return Batch(pixels, torch.tensor(draw), broken)

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Make a batch."""
        return Batch.of(examples)

    def read(self, draw: int) -> tuple[Tensor, list[BrokenImage]]:
        """Read and decode the image of a draw, or one that replaces it; also tells what could not be read.

        Raises:
            InputError: as many images in a row as `MOST_REPLACEMENTS` cannot be read.
        """
        broken: list[BrokenImage] = []
        epoch, place = divmod(draw, sum(self.blocks))
        index = int(permutation(self.blocks, self.seed, epoch)[place])
        for attempt in range(MOST_REPLACEMENTS):
            try:
                return self.source.read(index)[0], broken
            except InputError as error:
                broken.append(BrokenImage(self.source.name(index), str(error)))
                index = replacement_index(self.seed, draw, attempt, sum(self.blocks))
        told = f"{MOST_REPLACEMENTS} images in a row cannot be read, the last because: {broken[-1].reason}"
        raise InputError(f"{told}; is the data set still there?")


class ValidationImage(NamedTuple):
    """A validation image (3, S, S), uint8 unless another `prepare` made it, at its place; or why it cannot be read.

    `enlarged`: its shorter side was smaller than S. `label`: -1 where it is not known.
    """

    place: int
    pixels: Tensor
    broken: BrokenImage | None
    enlarged: bool = False
    label: int = -1


def resize_and_crop(pixels: Tensor, size: int) -> Tensor:
    """Resize an image (3, H, W) by its shorter side, bicubically, and cut the centre: (3, size, size)."""
    return center_crop(resize_shorter_side(central_part(pixels), size), size)


@dataclass
class ValidationImages(Dataset[ValidationImage]):
    """At most `limit` images, evenly spread over a data set, resized by the shorter side and cut to the centre.

    Args:
        source: the images.
        image_size: side S in pixels.
        limit: how many, at most.
        prepare: resizes and cuts in another way: from uint8 (3, H, W) and S to (3, S, S); can be pickled.
        workers_option: what a user calls the number of processes that read them.
    """

    source: ImageSource
    image_size: int
    limit: int
    prepare: Callable[[Tensor, int], Tensor] = resize_and_crop
    workers_option: str = "--workers"

    def __post_init__(self) -> None:
        count = min(len(self.source), self.limit)
        self.indices = [place * len(self.source) // count for place in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> ValidationImage:
        index = self.indices[place]
        try:
            pixels, label = self.source.read(index)
            prepared = self.prepare(pixels, self.image_size)
        except InputError as error:
            blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
            return ValidationImage(place, blank, BrokenImage(self.source.name(index), str(error)))
        return ValidationImage(place, prepared, None, min(pixels.shape[-2:]) < self.image_size, label)

    def name(self, place: int) -> str:
        """The image's name, without the place of its data set on this machine where the data set allows that."""
        name: Callable[[int], str] = getattr(self.source, "relative_name", self.source.name)
        return name(self.indices[place])


def enlarged_caveat(enlarged: int, images: int, size: int) -> list[str]:
    """Say in one line, or none, how many of some images were enlarged to squares of `size` pixels."""
    smaller = f"{enlarged:,} of {images:,} images were smaller than {size} px and enlarged"
    return [f"{smaller}: blurrier, and easier to reconstruct, than photos of that size."] if enlarged else []


def validation_loader(
    images: ValidationImages, places: Sequence[int], batch_size: int, workers: int, group_size: int | None = None
) -> Iterator[list[ValidationImage]]:
    """Read some validation images, batch by batch.

    Args:
        images: of an evaluation.
        places: which, in this order.
        batch_size: images at a time.
        workers: processes that read them; 0 reads in this one.
        group_size: no batch reaches over the end of so many of the places; None is all of them.

    Raises:
        ReadingFailed: the data set can no longer be read.
    """
    group_size = group_size or max(1, len(places))
    groups = [places[first : first + group_size] for first in range(0, len(places), group_size)]
    batches = [group[first : first + batch_size] for group in groups for first in range(0, len(group), batch_size)]
    for parts in read_batches(images, _collate_validation, workers, batch_sampler=batches):
        yield [ValidationImage(*image) for image in zip(*parts, strict=True)]


def _collate_validation(images: Sequence[ValidationImage]) -> tuple[Any, ...]:
    places, pixels, *others = zip(*images, strict=True)
    return (places, default_collate([*pixels]), *others)  # one tensor: each takes a descriptor to get to the parent


def training_loader(
    samples: Samples,
    first_step: int,
    last_step: int | None,
    workers: int,
    pin_memory: bool,
    share: tuple[int, int, int] = (0, 1, 1),
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """Read batches ahead in worker processes; with 0 workers, in this one.

    Args:
        samples: to read.
        first_step: to start at.
        last_step: to end before; None never ends.
        workers: processes.
        pin_memory: put the batches where a GPU copies from fastest.
        share: of this process in a step: its index, the number of processes, and into how many parts it is cut.
        stop: asked before each batch and while waiting for one; where it answers True, there are no more.

    Raises:
        ReadingFailed: the data set cannot be read.
    """
    process, processes, parts = share
    size = samples.batch_size // (processes * parts)
    steps = itertools.count(first_step) if last_step is None else range(first_step, last_step)
    firsts = (step * samples.batch_size + (process * parts + part) * size for step in steps for part in range(parts))
    settings = {"batch_sampler": (range(first, first + size) for first in firsts), "pin_memory": pin_memory}
    return read_batches(samples, samples.collate, workers, stop, **settings)


def read_batches(
    dataset: Any,
    collate: Callable[[Any], T],
    workers: int,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Iterator[T]:
    """Read batches with PyTorch's loader; whatever goes wrong in its processes becomes one line.

    Args:
        dataset: as of `DataLoader`; its `workers_option` is what a user calls the number of workers.
        collate: makes a batch of what the data set gives. It stacks tensors by PyTorch's `default_collate`, which
            shares them with the parent right away: the queue would do so in a thread whose failure on a full /dev/shm
            nobody hears of.
        workers: processes that read; 0 reads in this one.
        stop: as for `training_loader`.
        settings: further ones of `DataLoader`.

    Raises:
        ReadingFailed: the data set cannot be read, a process was ended, or nothing comes any more.
    """
    if workers:
        settings |= {"prefetch_factor": AHEAD, "timeout": POLL_SECONDS}
    generator = torch.Generator()  # else the loader would draw its base seed from the default generator
    settings |= {"worker_init_fn": _leave_signals, "generator": generator}
    # PyTorch's handler, of this loader or an earlier one, raises anywhere, also in the middle of an optimiser's step,
    # when a worker dies. Waiting for the next batch notices it too.
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(DataLoader(dataset, collate_fn=collate, num_workers=workers, **settings))
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # once, and before what PyTorch has registered
    if threading.current_thread() is threading.main_thread() and handler is not None:
        is_pytorchs = str(getattr(handler, "__module__", "")).startswith("torch.")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_pytorchs else handler)
    waited = 0
    while not stop():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, InputError, OSError) as error:
            if "DataLoader timed out" in str(error):
                waited += POLL_SECONDS
                if waited < STALLED_SECONDS:
                    continue
            raise _reading_failed(error, dataset.workers_option) from error
        waited = 0
        yield batch


def _reading_failed(error: Exception, workers_option: str) -> ReadingFailed:
    line = next(reversed(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, InputError | OSError) and not isinstance(error, ConnectionError):
        return ReadingFailed(line.removeprefix(f"{InputError.__module__}.{InputError.__name__}: "))
    ended = f"a process that reads images was ended from outside, or failed ({line})"
    what = f"no image was read for {STALLED_SECONDS // 60} minutes" if "DataLoader timed out" in line else ended
    advice = "give it more memory, or shared memory (/dev/shm; docker run --shm-size)"
    return ReadingFailed(f"{what}; {advice}, or try fewer {workers_option}")


def _leave_signals(worker: int) -> None:
    """Ignore what a cluster or Ctrl-C sends to all processes at once: the parent ends its workers after saving."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End what Python would end by SIGTERM and wait for, at an exit with an exception that still holds a loader."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def default_workers(processes_here: int) -> int:
    """Choose the number of worker processes for each of the training processes on this machine."""
    return max(0, min(8, cores() // processes_here - 1))
