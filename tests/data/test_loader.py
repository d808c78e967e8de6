"""What a step reads: every place of its batch once, each a function of (seed, step, place) alone."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data._utils import signal_handling

from dc_ssdae.data import loader
from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.loader import (
    Batch,
    BrokenImage,
    Drawing,
    Place,
    Places,
    ReadingFailed,
    Sample,
    TrainingSamples,
    ValidationImages,
    default_workers,
    training_loader,
)
from dc_ssdae.data.order import EpochOrder
from dc_ssdae.errors import InputError
from dc_ssdae.randomness import replacement_index

SIZE = 16


class Numbered:
    """A source whose images hold their own number, some of them broken; notes what is read."""

    def __init__(self, length: int, broken: Sequence[int] = (), blocks: Sequence[int] | None = None) -> None:
        self.length = length
        self.broken = set(broken)
        self.blocks = blocks or [length]
        self.read_so_far: list[int] = []

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        self.read_so_far.append(index)
        if index in self.broken:
            raise InputError(f"cannot read image {index}")
        return torch.full((3, 20 + index % 3, 24), index, dtype=torch.uint8), -1


class Textured(Numbered):
    """Images in which every crop looks different."""

    def read(self, index: int) -> tuple[Tensor, int]:
        shape = super().read(index)[0].shape
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), -1


def drawing(batch_size: int = 6, seed: int = 3, flip: bool = True, aug_scale: float = 2.0) -> Drawing:
    return Drawing(seed, batch_size, SIZE, aug_scale, flip)


def loaded(
    source: Numbered,
    settings: Drawing,
    steps: range,
    processes: int = 1,
    parts: int = 1,
    workers: int = 0,
) -> dict[tuple[int, int], Sample]:
    """Every sample of some steps by step and place, put together from all processes and parts."""
    found = {}
    for process in range(processes):
        places = Places(steps.start, steps.stop, settings.batch_size, process, processes, parts)
        batches = training_loader(TrainingSamples(source, settings), places, workers, pin_memory=False)
        for where, batch in zip(places, batches, strict=True):
            for index, place in enumerate(where):
                assert (place.step, place.place) not in found
                found[place.step, place.place] = Sample(batch.pixels[index], batch.draw[index], [])
    return found


def assert_same(one: dict[tuple[int, int], Sample], other: dict[tuple[int, int], Sample]) -> None:
    assert one.keys() == other.keys()
    for where, sample in one.items():
        for name, tensor in sample._asdict().items():
            assert name == "broken" or torch.equal(tensor, getattr(other[where], name)), f"{name} at {where}"


# --- places ---


@pytest.mark.parametrize(("processes", "parts"), list(itertools.product([1, 2, 3, 4], [1, 2, 3])))
def test_places_cover_every_batch_once(processes: int, parts: int) -> None:
    batch_size = 72
    found = []
    for process in range(processes):
        lists = list(Places(2, 5, batch_size, process, processes, parts))
        assert len(lists) == 3 * parts
        assert {len(places) for places in lists} == {batch_size // (processes * parts)}
        for index, places in enumerate(lists):
            assert {place.step for place in places} == {2 + index // parts}
        found += [place for places in lists for place in places]
    assert sorted(found) == [Place(step, place) for step in range(2, 5) for place in range(batch_size)]


def test_places_without_an_end() -> None:
    endless = iter(Places(7, None, 2, 0, 1, 1))
    assert [next(endless)[0].step for _ in range(100)] == list(range(7, 107))
    assert list(Places(5, 5, 2, 0, 1, 1)) == []


# --- samples ---


@pytest.mark.parametrize(("processes", "parts", "workers"), [(1, 1, 2), (2, 1, 0), (1, 3, 0), (2, 3, 0), (3, 2, 0)])
def test_how_the_batch_is_split_and_who_reads_it_changes_nothing(processes: int, parts: int, workers: int) -> None:
    expected = loaded(Textured(10), drawing(), range(4))
    assert len(expected) == 24
    assert_same(loaded(Textured(10), drawing(), range(4), processes, parts, workers), expected)


def test_where_a_run_starts_changes_nothing() -> None:
    expected = loaded(Textured(10), drawing(), range(6))
    assert_same(loaded(Textured(10), drawing(), range(3, 6)), {key: expected[key] for key in expected if key[0] >= 3})


def test_the_default_generator_neither_matters_nor_moves() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = loaded(Textured(10), drawing(), range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same(loaded(Textured(10), drawing(), range(2)), first)


def test_no_two_samples_are_alike() -> None:
    samples = [*loaded(Textured(2), drawing(), range(5)).values()]
    samples += loaded(Textured(2), drawing(seed=4), range(5)).values()
    assert len({sample.pixels.numpy().tobytes() for sample in samples}) == 60


def test_a_batch_moves_its_pixels_and_little_else() -> None:
    (batch,) = training_loader(TrainingSamples(Textured(10), drawing(200)), Places(0, 1, 200, 0, 1, 1), 0, False)
    assert isinstance(batch, Batch)
    assert (batch.pixels.shape, batch.pixels.dtype) == ((200, 3, SIZE, SIZE), torch.uint8)
    assert batch.draw.tolist() == list(range(200))
    assert sum(part.nbytes for part in batch if isinstance(part, Tensor)) == 200 * (3 * SIZE * SIZE + 8)


def test_every_epoch_goes_through_every_image_once() -> None:
    source = Numbered(9, blocks=[4, 5])
    loaded(source, drawing(batch_size=6), range(6))  # four epochs
    epochs = [source.read_so_far[start : start + 9] for start in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    order = EpochOrder([4, 5], seed=3)
    assert source.read_so_far == [order[position] for position in range(36)]


def test_flip_and_scale_reach_the_crop() -> None:
    source = Textured(10)
    whole = loaded(source, drawing(flip=False, aug_scale=1.0), range(2))
    flipped = loaded(source, drawing(flip=True, aug_scale=1.0), range(2))
    kinds = set()
    for where, sample in whole.items():
        same = torch.equal(sample.pixels, flipped[where].pixels)
        assert same or torch.equal(sample.pixels, flipped[where].pixels.flip(-1))
        kinds.add(same)
    assert kinds == {True, False}


# --- broken images ---


def test_a_broken_image_is_replaced_and_reported() -> None:
    source = Numbered(10, broken=[2, 5])
    samples = TrainingSamples(source, drawing(batch_size=5))
    order = EpochOrder([10], seed=3)
    replaced = 0
    for position in range(30):
        sample = samples[Place(*divmod(position, 5))]
        expected, broken, attempt = order[position], [], 0
        while expected in source.broken:
            broken.append(BrokenImage(f"image {expected}", f"cannot read image {expected}"))
            expected = replacement_index(3, position, attempt, 10)
            attempt += 1
        assert sample.broken == broken
        assert (sample.pixels == expected).all()
        replaced += attempt > 0
    assert replaced == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_replacement_leaves_the_randomness_of_its_place(workers: int) -> None:
    whole = loaded(Textured(10), drawing(), range(3))
    broken = loaded(Textured(10, broken=[2, 5]), drawing(), range(3), workers=workers)
    different = [where for where in whole if not torch.equal(whole[where].pixels, broken[where].pixels)]
    assert 0 < len(different) < 8
    assert all(torch.equal(sample.draw, broken[where].draw) for where, sample in whole.items())


def test_a_batch_holds_the_reports_of_its_images() -> None:
    samples = TrainingSamples(Numbered(6, broken=[0, 1, 2]), drawing())
    (batch,) = training_loader(samples, Places(0, 1, 6, 0, 1, 1), 0, False)
    assert {image.name for image in batch.broken} == {"image 0", "image 1", "image 2"}


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_are_broken_one_line_says_so(workers: int) -> None:
    source = Numbered(4, broken=range(4))
    batches = training_loader(TrainingSamples(source, drawing()), Places(0, 1, 6, 0, 1, 1), workers, False)
    with pytest.raises(
        InputError, match=r"^100 images in a row cannot be read, the last because: .*still there\?$"
    ) as e:
        next(iter(batches))
    assert "\n" not in str(e.value)


def test_a_process_that_fails_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    """An exception keeps the loader alive until exit, when Python ends the workers by a signal they else ignore.

    Before that: a batch of images takes one descriptor, not one per image, and loaders leave nothing behind.
    """
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_loader as t\n"
        "images, places = t.ValidationImages(t.Textured(200), t.SIZE, 200), [*range(200), *range(100)]\n"
        "left = []\n"
        "for round in range(6):\n"
        "    (batch,) = t.loader.validation_loader(images, places, 300, 1)\n"
        "    assert [image.place for image in batch] == places\n"
        "    assert all(t.torch.equal(image.pixels, images[image.place].pixels) for image in batch[:9])\n"
        "    del batch\n"
        "    left.append(open('/proc/self/maps').read().count('sem') if sys.platform == 'linux' else 0)\n"
        "assert left[0] == left[-1], left\n"
        "places = t.Places(0, None, 6, 0, 1, 1)\n"
        "batches = t.training_loader(t.TrainingSamples(t.Textured(10), t.drawing()), places, 1, False)\n"
        "for batch in batches:\n"
        "    raise RuntimeError('out of memory')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: out of memory")


@pytest.mark.parametrize("of_pytorch", [False, True])
def test_a_reader_that_is_killed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, of_pytorch: bool) -> None:
    """Whatever waits for signals already: nothing, or the handler of another loader of PyTorch's."""
    monkeypatch.setattr(loader, "POLL_SECONDS", 1)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if of_pytorch:
        signal_handling._set_SIGCHLD_handler()
        assert callable(signal.getsignal(signal.SIGCHLD))
    others = set(multiprocessing.active_children())
    batches = training_loader(TrainingSamples(Textured(10), drawing()), Places(0, None, 6, 0, 1, 1), 1, False)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - others
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "PyTorch's would raise in the middle of a step"
    reader.kill()
    with pytest.raises(ReadingFailed, match=r"ended from outside .* fewer data\.workers") as caught:
        for _ in batches:
            pass
    assert "\n" not in str(caught.value)


class Stalled(Numbered):
    """Images that come when somebody writes into a pipe."""

    def __init__(self, pipe: int) -> None:
        super().__init__(10)
        self.pipe = pipe

    def read(self, index: int) -> tuple[Tensor, int]:
        os.read(self.pipe, 1)
        return super().read(index)


def test_a_signal_ends_a_wait_for_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 1)
    end, other_end = os.pipe()
    asked = []

    def stop() -> bool:
        asked.append(len(asked))
        if len(asked) == 3:
            os.write(other_end, bytes(1000))  # that the reader can end, too
        return len(asked) == 3

    samples = TrainingSamples(Stalled(end), drawing())
    assert list(training_loader(samples, Places(0, None, 6, 0, 1, 1), 1, False, stop)) == []
    os.close(other_end)
    os.close(end)


class NeverReady:
    """A loader from which no batch ever comes."""

    def __init__(self, *_: object, timeout: float, **__: object) -> None:
        self.timeout = timeout

    def __iter__(self) -> "NeverReady":
        return self

    def __next__(self) -> Batch:
        raise RuntimeError(f"DataLoader timed out after {self.timeout} seconds")


def test_readers_that_stall_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "DataLoader", NeverReady)
    with pytest.raises(ReadingFailed, match="no image was read for 30 minutes"):
        next(training_loader(TrainingSamples(Textured(10), drawing()), Places(0, None, 6, 0, 1, 1), 1, False))


def test_too_little_shared_memory_is_told_before_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 6 * 3 * SIZE * SIZE
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: (16 * batch, 8 * batch, 8 * batch))
    samples, places = TrainingSamples(Textured(10), drawing()), Places(0, 1, 6, 0, 1, 1)
    assert len(list(training_loader(samples, places, 3, False))) == 1
    with pytest.raises(InputError, match=r"--shm-size\), or set data\.workers to 3$"):
        next(training_loader(samples, places, 4, False))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"has 0\.\d MiB free.* data\.workers to 1$"):
        next(training_loader(samples, places, 3, False))


# --- validation ---


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    generator = np.random.default_rng(0)
    for index in range(10):
        pixels = generator.integers(0, 256, (20 + index, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"")
    return ImageFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("limit", "indices"),
    [(100, list(range(10))), (10, list(range(10))), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0])],
)
def test_validation_images_are_spread_over_the_data_set(folder: ImageFolder, limit: int, indices: list[int]) -> None:
    images = ValidationImages(folder, SIZE, limit)
    assert images.indices == indices
    assert len(images) == len(indices)


def test_validation_images_are_whole_and_in_the_middle(folder: ImageFolder) -> None:
    images = ValidationImages(folder, 20, 100)
    assert torch.equal(images[0].pixels, folder.read(0)[0][:, :, 6:26])  # 20 by 33: nothing is resized
    for place in (0, 1, 9):
        image = images[place]
        assert (image.place, image.broken) == (place, None)
        assert (image.pixels.shape, image.pixels.dtype) == ((3, 20, 20), torch.uint8)
        assert torch.equal(image.pixels, images[place].pixels)


def test_a_broken_validation_image_is_blank_and_reported(folder: ImageFolder) -> None:
    image = ValidationImages(folder, 20, 100)[4]
    assert image.pixels.shape == (3, 20, 20)
    assert not image.pixels.any()
    assert image.broken is not None
    assert image.broken.name.endswith("4.png")
    assert "cannot read image" in image.broken.reason


def test_the_number_of_workers() -> None:
    assert default_workers(10_000) == 0
    assert 0 <= default_workers(1) <= 8
