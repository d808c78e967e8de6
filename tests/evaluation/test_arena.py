"""The arena: candidates side by side, what they cost, and that one which fails harms none of the others."""

import gc
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colour_distance import suite_of
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae import InputError
from dc_ssdae.data.loader import ReadingFailed
from dc_ssdae.evaluation import arena
from dc_ssdae.evaluation.arena import Entry, run_arena
from dc_ssdae.evaluation.candidates import BicubicCandidate, Candidate, CodecCandidate, PythonCandidate
from dc_ssdae.evaluation.evaluate import EvaluationSettings
from dc_ssdae.evaluation.protocol import PROTOCOLS

CPU = torch.device("cpu")
SIDE, COUNT, BATCH, SHOW, ROUNDS = 32, 11, 4, 5, 2
MEGABYTE = 10**6

Reconstruct = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """These images are too small for more than one thread to be of use, and libraries too large to be collected."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compete({"resizing": BicubicCandidate(2)})  # imports what is imported late
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# --- images, metrics, candidates ---


class Source:
    """Images in memory; some are broken, and after some reads the disk is taken away."""

    def __init__(self, broken: Sequence[int] = (), reads: int = 10**6) -> None:
        self.broken, self.left = broken, reads

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int) -> str:
        return f"photo {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error", f"photo {index}")
        if index in self.broken:
            raise InputError(f"cannot read photo {index}")
        coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(index))
        return F.interpolate(coarse, (40, 36), mode="bilinear")[0].mul(255).to(torch.uint8), -1


class Pooling:
    """Colours of patches as a latent (3, 8, 8); sleeps, and takes memory for a moment, while it works."""

    def __init__(self, seconds: Sequence[float] = (0.0, 0.0), size: int = 0) -> None:
        self.seconds, self.size = seconds, size

    def encode(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds[0])
        return F.avg_pool2d(x, 4)

    def decode(self, z: Tensor) -> Tensor:
        time.sleep(self.seconds[1])
        return F.interpolate(z, scale_factor=4.0) * torch.ones(1 + self.size // 4)[-1]


class Tokens:
    """A latent of 16 tokens with 3 channels."""

    def encode(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8).flatten(2).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z.transpose(1, 2).unflatten(2, (4, 4)), scale_factor=8.0)


class Network(nn.Module):
    """A network with 3 · 5 · 16 + 5 and 5 · 3 · 16 + 3 parameters, and a buffer of so many bytes."""

    def __init__(self, size: int = 4000) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            self.down, self.up = nn.Conv2d(3, 5, 4, stride=4), nn.ConvTranspose2d(5, 3, 4, stride=4)
        self.register_buffer("unused", torch.ones(size // 4))

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.up(z)


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


def good() -> dict[str, Candidate]:
    return {"network": PythonCandidate(Network(), "network"), "function": PythonCandidate(blurred, "blurred")}


def raising(error: BaseException, calls: int = 0) -> Reconstruct:
    """Blurs so many batches, and then raises."""
    left = itertools.count(calls, -1)

    def reconstruct(x: Tensor) -> Tensor:
        if next(left) <= 0:
            raise error
        return blurred(x)

    return reconstruct


QUALITY_CALLS = math.ceil(COUNT / BATCH) + math.ceil(SHOW / BATCH)
"""Batches of a candidate before its memory and speed are measured."""


def failing() -> dict[str, tuple[Reconstruct, str]]:
    """Functions that fail, and the reasons that are to be read."""
    tired = RuntimeError("tired\n  of | it")
    return {
        "second batch": (raising(ZeroDivisionError(), 1), "ZeroDivisionError"),
        "NaN": (lambda x: x * math.nan, "gives NaN or infinity for photo 0"),
        "memory of a GPU": (raising(RuntimeError("CUDA out of memory")), "out of memory with batches of 4"),
        "input": (raising(InputError("sides of 7\nare needed")), "sides of 7 are needed"),
        "pictures to show": (raising(tired, QUALITY_CALLS - 1), "RuntimeError: tired of | it"),
        "memory round": (raising(tired, QUALITY_CALLS), "RuntimeError: tired of | it"),
        "last speed round": (raising(tired, QUALITY_CALLS + 2 * ROUNDS), "RuntimeError: tired of | it"),
    }


def compete(candidates: Mapping[str, Candidate], source: Source | None = None, **given: Any) -> list[Entry]:
    settings = EvaluationSettings(PROTOCOLS["dcae"], SIDE, BATCH)
    entries = [Entry(label, candidate) for label, candidate in candidates.items()]
    options = {"rounds": ROUNDS, "show": SHOW, "advance": bool, "report": lambda *words: None, "device": CPU, **given}
    run_arena(entries, settings.images(source or Source()), suite_of(PROTOCOLS["dcae"]), settings, **options)
    return entries


@pytest.fixture(scope="module")
def alone() -> dict[str, Entry]:
    """The good ones, without one that fails."""
    return {entry.label: entry for entry in compete(good())}


# --- failures ---


def test_those_that_fail_say_why_and_harm_no_other(alone: dict[str, Entry]) -> None:
    """All but speed and memory of the others is the same, to the last bit."""
    told: list[tuple[str, str]] = []
    done: list[int] = []
    bad = {name: PythonCandidate(reconstruct, name) for name, (reconstruct, _) in failing().items()}
    order = [*[*bad][:5], "network", *[*bad][5:], "function"]
    candidates = bad | good()
    entries = compete(
        {name: candidates[name] for name in order}, report=lambda *words: told.append(words), advance=done.append
    )
    assert [entry.label for entry in entries] == order
    assert told == [(entry.label, entry.failed) for entry in entries if entry.failed]
    assert dict(told) == {name: reason for name, (_, reason) in failing().items()}
    assert done[-3:] == [4, 4, 3]
    for entry in entries:
        if entry.label in bad:
            assert (entry.evaluation, entry.encode, entry.decode, entry.tokens, entry.shown) == (*[None] * 4, {})
            continue
        expected = alone[entry.label]
        assert entry.evaluation is not None
        assert expected.evaluation is not None
        assert entry.evaluation.metrics == expected.evaluation.metrics
        assert entry.evaluation.metrics["rfid"].low is not None
        for name, values in expected.evaluation.values.items():
            np.testing.assert_array_equal(entry.evaluation.values[name], values)
        assert entry.shown.keys() == expected.shown.keys()
        assert all(torch.equal(entry.shown[place].output, image.output) for place, image in expected.shown.items())


class Moved(PythonCandidate):
    """Notes which candidates are on the device, and which are there when one works."""

    there: set[str]
    seen: list[set[str]]

    def to(self, device: torch.device) -> Candidate:
        (self.there.discard if device == CPU else self.there.add)(self.name)
        return self

    def decode(self, latent: Tensor) -> Any:
        self.seen.append(set(self.there))
        return super().decode(latent)


@pytest.mark.parametrize("name", [None, "second batch", "memory round"])
def test_each_is_on_the_device_for_its_turn_alone_also_one_that_fails(name: str | None) -> None:
    functions = {"first": blurred if name is None else failing()[name][0], "second": blurred, "third": blurred}
    candidates = {label: Moved(reconstruct, label) for label, reconstruct in functions.items()}
    there: set[str] = set()
    seen: list[set[str]] = []
    for candidate in candidates.values():
        candidate.there, candidate.seen = there, seen
    entries = compete(candidates, device=torch.device("cpu:0"))  # the same device under another name
    assert [entry.failed is None for entry in entries] == [name is None, True, True]
    assert {frozenset(labels) for labels in seen} == {frozenset([label]) for label in functions}
    assert there == set()


def test_what_a_candidate_held_when_it_failed_is_free_for_the_next() -> None:
    """An out-of-memory error holds its frames, and they all that was on the device."""
    held: list[weakref.ref[nn.Module]] = []
    found: list[bool] = []

    def greedy(x: Tensor) -> Tensor:
        mine = nn.Module()
        held.append(weakref.ref(mine))
        error = MemoryError()  # a cycle: the error will have this frame, and the frame has the error
        raise error

    def next_one(x: Tensor) -> Tensor:
        found.append(held[0]() is None)
        return blurred(x)

    compete({"greedy": PythonCandidate(greedy, "greedy"), "next": PythonCandidate(next_one, "next")})
    assert found
    assert all(found)


# --- images that cannot be read ---


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (Source(broken=range(COUNT)), r"^none of 11 images can be read; the first: cannot read photo 0$"),
        *((Source(reads=reads), "Input/output error") for reads in (0, COUNT + 2, 2 * COUNT)),
    ],
)
def test_a_data_set_that_cannot_be_read_is_no_candidates_fault(source: Source, told: str) -> None:
    with pytest.raises(ReadingFailed, match=told):
        compete(good(), source, report=lambda *words: pytest.fail("told"))


def test_broken_images_are_left_out_of_everything() -> None:
    broken = [0, 1, 2, 3, 5, 6, 7, 8]
    for entry in compete({**good(), "codec": CodecCandidate("jpeg", 60)}, Source(broken=broken)):
        assert entry.evaluation is not None
        assert [image.name for image in entry.evaluation.broken] == [f"photo {index}" for index in broken]
        assert (entry.evaluation.images, list(entry.shown)) == (3, [4])


# --- what is told of each ---


@pytest.mark.parametrize(
    ("candidate", "shape", "tokens"),
    [
        (PythonCandidate(Network(), "network"), (5, 8, 8), 64),
        (PythonCandidate(Tokens(), "tokens"), (16, 3), 16),
        (PythonCandidate(blurred, "blurred"), None, None),
        (CodecCandidate("jpeg", 60), None, None),
    ],
)
def test_entries(candidate: Candidate, shape: Any, tokens: Any) -> None:
    (entry,) = compete({"one": candidate})
    assert entry.evaluation is not None
    assert entry.decode is not None
    assert (entry.evaluation.latent_shape, entry.tokens) == (shape, tokens)
    assert (entry.encode is None) == (not candidate.splits) == (entry.decode.note is not None)


def test_all_show_the_same_images_evenly_spread(alone: dict[str, Entry]) -> None:
    for entry in alone.values():
        assert list(entry.shown) == [0, 2, 4, 6, 8]
        for place, image in entry.shown.items():
            assert (image.place, image.name) == (place, f"photo {place}")


def test_speed_is_images_a_second_with_quartiles() -> None:
    (entry,) = compete({"slow": PythonCandidate(Pooling(seconds=(0.04, 0.01)), "slow")})
    assert entry.encode is not None
    assert entry.decode is not None
    assert 0 < entry.encode.low <= entry.encode.value <= entry.encode.high
    assert entry.encode.high <= BATCH / 0.04
    assert entry.encode.high < entry.decode.high <= BATCH / 0.01


def test_rounds_go_forwards_and_backwards_in_turn_without_what_failed() -> None:
    calls: list[str] = []
    tired = raising(RuntimeError("tired"), QUALITY_CALLS)

    def candidate(label: str) -> Candidate:
        return PythonCandidate(lambda x: (calls.append(label), tired(x) if label == "c" else blurred(x))[1], label)

    compete({label: candidate(label) for label in "abcd"}, rounds=3)
    assert calls.count("c") == QUALITY_CALLS + 1
    assert "".join(label for label, _ in itertools.groupby(calls)) == "abcd" + "abcd" + "ba" + "bd"


# --- memory ---


def tells_memory() -> bool:
    """Whether the kernel resets the mark of the most memory that was resident."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return "VmHWM:" in Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return False


@pytest.mark.skipif(not tells_memory(), reason="this system does not tell the most memory that was resident")
def test_memory_is_what_a_candidate_takes_for_a_moment_and_its_weights() -> None:
    hungry, heavy, light = compete(
        {
            "hungry": PythonCandidate(Pooling(size=200 * MEGABYTE), "hungry"),
            "heavy": PythonCandidate(Network(100 * MEGABYTE), "heavy"),
            "light": PythonCandidate(Pooling(), "light"),
        }
    )
    for entry, least, most in ((hungry, 180, 240), (heavy, 100, 140), (light, 0, 40)):
        assert entry.memory is not None
        assert least * MEGABYTE <= entry.memory <= most * MEGABYTE


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena.ctypes, "CDLL", lambda name: Path("/no/such/library").read_bytes())
    assert [entry.memory for entry in compete(good())] == [None, None]
