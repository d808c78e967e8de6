"""From a data set to training batches: order and crops, all from (seed, step, place in the batch)."""

import atexit
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

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

AHEAD = 2
"""Batches that each worker reads ahead."""

POLL_SECONDS = 2
"""How often a wait for a batch looks at signals and at the workers."""

STALLED_SECONDS = 1800
"""Without any batch, after which the readers have stalled."""

SHARED_MEMORY = "/dev/shm"


class ReadingFailed(InputError):
    """The data set can no longer be read."""

    in_one_process = True


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
        return cls(stack(pixels), stack(draw), [image for images in broken for image in images])


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
        pixels, broken = self.read(place)
        return Sample(self.crop(place, pixels), torch.tensor(self._draw(place)), broken)

    def read(self, place: Place) -> tuple[Tensor, list[BrokenImage]]:
        """Read and decode the image of a place, or one that replaces it; also tells what could not be read.

        Raises:
            InputError: as many images in a row as `MOST_REPLACEMENTS` cannot be read.
        """
        position = self._draw(place)
        broken: list[BrokenImage] = []
        index = self.order[position]
        for attempt in range(MOST_REPLACEMENTS):
            try:
                return self.source.read(index)[0], broken
            except InputError as error:
                broken.append(BrokenImage(self.source.name(index), str(error)))
                index = replacement_index(self.drawing.seed, position, attempt, self.order.length)
        raise InputError(
            f"{MOST_REPLACEMENTS} images in a row cannot be read, the last because: {broken[-1].reason}; "
            "is the data set still there?"
        )

    def crop(self, place: Place, pixels: Tensor) -> Tensor:
        """Enlarge, crop and mirror the image of a place at random: uint8 (3, H, W) to (3, S, S)."""
        drawing = self.drawing
        generator = image_generator(drawing.seed, self._step(place), place.place)
        return random_scaled_crop(pixels, drawing.image_size, drawing.aug_scale, generator, drawing.flip)

    def _draw(self, place: Place) -> int:
        return self._step(place) * self.drawing.batch_size + place.place

    def _step(self, place: Place) -> int:
        repeat_after = self.drawing.repeat_after
        return place.step if repeat_after is None else place.step % repeat_after


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

    `enlarged`: its shorter side was smaller than S. `label`: -1 where it is not known.
    """

    place: int
    pixels: Tensor
    broken: BrokenImage | None
    enlarged: bool = False
    label: int = -1


class ValidationImages(Dataset[ValidationImage]):
    """At most `limit` images, evenly spread over a data set, resized by the shorter side and cut to the centre.

    Args:
        source: the images.
        image_size: side S in pixels.
        limit: how many, at most.
        prepare: resizes and cuts in another way: from uint8 (3, H, W) and S to (3, S, S); can be pickled.
        workers_option: what a user calls the number of processes that read them.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        limit: int,
        prepare: Callable[[Tensor, int], Tensor] | None = None,
        workers_option: str = "--workers",
    ) -> None:
        count = min(len(source), limit)
        self.source = source
        self.image_size = image_size
        self.workers_option = workers_option
        self.prepare = prepare or _resize_and_crop
        self.indices = [place * len(source) // count for place in range(count)]

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
        return ValidationImage(place, prepared, None, is_enlarged(pixels, self.image_size), label)

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
    size = min(batch_size, max(1, len(places))) * 3 * images.image_size**2
    batches = read_batches(
        images, _collate_validation, workers, images.workers_option, size, sampler=places, batch_size=batch_size
    )
    for parts in batches:
        yield [ValidationImage(*image) for image in zip(*parts, strict=True)]


def _collate_validation(images: Sequence[ValidationImage]) -> tuple[Any, ...]:
    places, pixels, *others = zip(*images, strict=True)
    return (places, stack(pixels), *others)  # one tensor: each takes a descriptor of its own to get to the parent


def training_loader(
    samples: TrainingSamples,
    places: Places,
    workers: int,
    pin_memory: bool,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """Read batches ahead in worker processes; with 0 workers, in this one.

    Args:
        samples: to read.
        places: which, batch by batch.
        workers: processes.
        pin_memory: put the batches where a GPU copies from fastest.
        stop: asked before each batch and while waiting for one; where it answers True, there are no more.

    Raises:
        ReadingFailed: the data set cannot be read.
    """
    size = places.size * 3 * samples.drawing.image_size**2
    held = 2 * places.parts  # of this step and the next
    return read_batches(
        samples, Batch.of, workers, "data.workers", size, held, stop, batch_sampler=places, pin_memory=pin_memory
    )


def read_batches(
    dataset: Any,
    collate: Callable[[Any], T],
    workers: int,
    workers_option: str,
    batch_bytes: int,
    held: int = 1,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Iterator[T]:
    """Read batches with PyTorch's loader; whatever goes wrong in its processes becomes one line.

    Args:
        dataset: as of `DataLoader`.
        collate: makes a batch of what the data set gives; it puts tensors together by `stack`.
        workers: processes that read; 0 reads in this one.
        workers_option: what a user calls their number.
        batch_bytes: size of a batch in bytes.
        held: batches that the caller has in use at a time.
        stop: as `training_loader`'s.
        settings: further ones of `DataLoader`.

    Raises:
        ReadingFailed: the data set cannot be read, a process was ended, or nothing comes any more.
        InputError: the batches that are read ahead do not fit into the shared memory.
    """
    if workers:
        _check_shared_memory(workers, held, batch_bytes, workers_option)
    loader = DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        timeout=POLL_SECONDS if workers else 0,
        worker_init_fn=partial(_leave_signals, _exiting()),
        generator=torch.Generator(),  # else the loader would draw its base seed from the default generator
        **settings,
    )
    # PyTorch's handler, of this loader or an earlier one, raises anywhere, also in the middle of an optimiser's step,
    # when a worker dies. Waiting for the next batch notices it too.
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        is_pytorchs = str(getattr(handler, "__module__", "")).startswith("torch.")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_pytorchs else handler)
    waited = 0
    while not stop():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            line = " ".join(str(error).split())
            if line.startswith("DataLoader timed out"):
                waited += POLL_SECONDS
                if waited < STALLED_SECONDS:
                    continue
                line = f"no image was read for {waited // 60} minutes"
            elif line.startswith("DataLoader worker") or not isinstance(error, RuntimeError):
                line = f"a process that reads images was ended from outside ({line or type(error).__name__})"
            elif "shared memory" in line:
                line = f"the shared memory is full ({line[line.index('unable') :] if 'unable' in line else line})"
            else:
                raise
            raise ReadingFailed(
                f"{line}; give it more memory, or shared memory (/dev/shm; docker run --shm-size), or try fewer "
                f"{workers_option}"
            ) from None
        except (InputError, OSError) as error:
            line = str(error).strip().splitlines()[-1]
            raise ReadingFailed(line.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None
        waited = 0
        yield batch


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; in a worker, where the parent can read them.

    The queue would share them as well, in a thread whose failure on a full /dev/shm nobody hears of.
    """
    stacked = torch.stack(list(tensors))
    return stacked if get_worker_info() is None else stacked.share_memory_()


def _check_shared_memory(workers: int, held: int, batch_bytes: int, workers_option: str) -> None:
    try:
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # a system without
        return
    # The other training processes of this machine need as much; when each looks, some of them may have taken theirs.
    free = min(free, total // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    needed = (workers * AHEAD + held) * batch_bytes
    if needed > free:
        fitting = max(0, (free // batch_bytes - held) // AHEAD)
        raise InputError(
            f"batches that are read ahead take {needed / 2**20:,.1f} MiB of shared memory; {SHARED_MEMORY} has "
            f"{free / 2**20:,.1f} MiB free: give it more (docker run --shm-size), or set {workers_option} to {fitting}"
        )


@cache
def _exiting() -> Event:
    """Set when this process exits.

    Workers ignore what a cluster or Ctrl-C sends to all processes at once: the parent ends them after saving. When it
    exits with an exception that still holds a loader, Python ends them by SIGTERM and waits for them: from then on
    they obey it.
    """
    exiting = multiprocessing.Event()
    atexit.register(exiting.set)
    return exiting


def _leave_signals(exiting: Event, worker: int) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        if exiting.is_set():
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


def default_workers(processes_here: int) -> int:
    """Choose the number of worker processes for each of the training processes on this machine."""
    return max(0, min(MOST_WORKERS, cores() // processes_here - 1))
