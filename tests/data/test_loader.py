"""What a step reads: every place of its batch once, each a function of (seed, step, place) alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils import signal_handling

from dc_ssdae.data import loader
from dc_ssdae.data.loader import (
    BrokenImage,
    ReadingFailed,
    TrainingSamples,
    ValidationImages,
    training_loader,
    validation_loader,
)
from dc_ssdae.data.order import permutation
from dc_ssdae.errors import InputError
from dc_ssdae.randomness import replacement_index

SIZE, BATCH = 16, 6


class Numbered:
    """A source whose images hold their own number, some of them broken; notes what is read."""

    classes: Sequence[str] = ()

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
        return torch.full((3, 20 + index % 3, 24), index, dtype=torch.uint8), index


class Textured(Numbered):
    """Images in which every crop looks different."""

    def read(self, index: int) -> tuple[Tensor, int]:
        shape = super().read(index)[0].shape
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), -1


def samples_of(source: Numbered, batch_size: int = BATCH, seed: int = 3, **given: object) -> TrainingSamples:
    settings = {"image_size": SIZE, "aug_scale": 2.0, "flip": True, **given}
    return TrainingSamples(source, seed, batch_size, **settings)


def loaded(
    samples: TrainingSamples, first: int, last: int, processes: int = 1, parts: int = 1, workers: int = 0
) -> dict[int, Tensor]:
    """The crop of every draw of some steps, put together from all processes and parts."""
    found: dict[int, Tensor] = {}
    for process in range(processes):
        for batch in training_loader(samples, first, last, workers, False, (process, processes, parts)):
            assert len(batch.draw) == samples.batch_size // (processes * parts)
            crops = dict(zip(batch.draw.tolist(), batch.pixels, strict=True))
            assert not found.keys() & crops.keys()
            found |= crops
    return found


def assert_same(one: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(pixels, other[draw]) for draw, pixels in one.items())


# --- samples ---


@pytest.mark.parametrize(("processes", "parts", "workers"), [(1, 1, 2), (2, 1, 0), (2, 3, 0), (3, 2, 0)])
def test_how_the_batch_is_split_and_who_reads_it_changes_nothing(processes: int, parts: int, workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    expected = loaded(samples_of(Textured(10)), 0, 4)
    assert list(expected) == list(range(24))
    assert torch.equal(torch.get_rng_state(), before), "the default generator has moved"
    torch.manual_seed(6)
    assert_same(loaded(samples_of(Textured(10)), 0, 4, processes, parts, workers), expected)
    assert_same(loaded(samples_of(Textured(10)), 2, 4), {draw: expected[draw] for draw in range(12, 24)})


def test_no_two_samples_are_alike_until_they_repeat() -> None:
    samples = [*loaded(samples_of(Textured(2)), 0, 5).values(), *loaded(samples_of(Textured(2), seed=4), 0, 5).values()]
    assert len({pixels.numpy().tobytes() for pixels in samples}) == 60
    repeated = [*training_loader(samples_of(Textured(10), repeat_after=2), 0, 4, 0, False)]
    assert [batch.draw.tolist() for batch in repeated[2:]] == [batch.draw.tolist() for batch in repeated[:2]]
    assert all(torch.equal(repeated[step].pixels, repeated[step + 2].pixels) for step in range(2))


def test_every_epoch_goes_through_every_image_once() -> None:
    source = Numbered(9, blocks=[4, 5])
    loaded(samples_of(source), 0, 6)  # four epochs
    epochs = [source.read_so_far[start : start + 9] for start in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert [list(permutation((4, 5), 3, epoch)) for epoch in range(4)] == epochs
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_flip_and_scale_reach_the_crop() -> None:
    whole = loaded(samples_of(Textured(10), flip=False, aug_scale=1.0), 0, 2)
    flipped = loaded(samples_of(Textured(10), aug_scale=1.0), 0, 2)
    same = {draw for draw, pixels in whole.items() if torch.equal(pixels, flipped[draw])}
    assert 0 < len(same) < len(whole)
    assert all(torch.equal(whole[draw], flipped[draw].flip(-1)) for draw in whole.keys() - same)


# --- broken images ---


def test_a_broken_image_is_replaced_and_reported() -> None:
    source = Numbered(10, broken=[1, 2, 5, 7, 8])
    samples = samples_of(source)
    replaced = 0
    for step, batch in enumerate(training_loader(samples, 0, 5, 0, False)):
        reports = []
        for place in range(BATCH):
            draw = step * BATCH + place
            expected, attempt = int(permutation((10,), 3, draw // 10)[draw % 10]), 0
            while expected in source.broken:
                reports.append(BrokenImage(f"image {expected}", f"cannot read image {expected}"))
                expected = replacement_index(3, draw, attempt, 10)
                attempt += 1
            assert (batch.pixels[place] == expected).all()
            replaced += attempt > 0
        assert batch.broken == reports
    assert replaced == 15


@pytest.mark.parametrize("workers", [0, 1])
def test_a_replacement_leaves_the_randomness_of_its_place(workers: int) -> None:
    whole = loaded(samples_of(Textured(10)), 0, 3)
    broken = loaded(samples_of(Textured(10, broken=[2, 5])), 0, 3, workers=workers)
    assert whole.keys() == broken.keys()
    assert 0 < sum(not torch.equal(whole[draw], broken[draw]) for draw in whole) < 8


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_are_broken_one_line_says_so(workers: int) -> None:
    batches = training_loader(samples_of(Numbered(4, broken=range(4))), 0, 1, workers, False)
    with pytest.raises(ReadingFailed, match=r"^100 images in a row cannot be read.* still there\?$") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


# --- worker processes ---


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
        "for round in range(4):\n"
        "    (batch,) = t.validation_loader(images, places, 300, 1)\n"
        "    assert [image.place for image in batch] == places\n"
        "    assert all(t.torch.equal(image.pixels, images[image.place].pixels) for image in batch[:9])\n"
        "    del batch\n"
        "    left.append(open('/proc/self/maps').read().count('sem') if sys.platform == 'linux' else 0)\n"
        "assert left[-1] <= left[0] + 2, left\n"  # the last one may still be on its way out
        "batches = t.training_loader(t.samples_of(t.Textured(10)), 0, None, 2, False)\n"  # lives on
        "for batch in batches:\n"
        "    raise RuntimeError('out of memory')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
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
    others = set(multiprocessing.active_children())
    batches = training_loader(samples_of(Textured(10)), 0, None, 1, False)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - others
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "PyTorch's would raise in the middle of a step"
    os.kill(reader.pid or 0, signal.SIGTERM)  # as a cluster does to all processes at once: the parent saves first
    next(batches)
    reader.kill()
    with pytest.raises(ReadingFailed, match=r"ended from outside.* fewer data\.workers") as caught:
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


def test_a_wait_for_readers_ends_by_a_signal_or_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 1)
    end, other_end = os.pipe()
    asked = []

    def stop() -> bool:
        asked.append(len(asked))
        if len(asked) == 3:
            os.write(other_end, bytes(1000))  # that the reader can end, too
        return len(asked) == 3

    assert list(training_loader(samples_of(Stalled(end)), 0, None, 1, False, stop=stop)) == []
    end, other_end = os.pipe()
    monkeypatch.setattr(loader, "STALLED_SECONDS", 1)
    with pytest.raises(ReadingFailed, match="no image was read for") as caught:
        next(training_loader(samples_of(Stalled(end)), 0, None, 1, False))
    os.write(other_end, bytes(1000))
    assert "\n" not in str(caught.value)


# --- validation ---


@pytest.mark.parametrize(("limit", "indices"), [(100, list(range(10))), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0])])
def test_validation_images_are_spread_over_the_data_set(limit: int, indices: list[int]) -> None:
    assert ValidationImages(Numbered(10), SIZE, limit).indices == indices


def test_validation_images_are_whole_and_in_the_middle_or_blank_and_reported() -> None:
    source = Textured(10, broken=[4])
    images = ValidationImages(source, 20, 100)
    for image in (images[0], next(validation_loader(images, [0, 4], 2, 1))[0]):
        assert torch.equal(image.pixels, source.read(0)[0][:, :, 2:22])  # 20 by 24: nothing is resized
        assert (image.place, image.broken, image.enlarged, image.label) == (0, None, False, -1)
    assert ValidationImages(Numbered(10), 22, 100)[1].enlarged
    assert ValidationImages(Numbered(10), 22, 100)[1].label == 1
    blank = images[4]
    assert (blank.pixels.shape, blank.pixels.any()) == ((3, 20, 20), False)
    assert blank.broken == BrokenImage("image 4", "cannot read image 4")
