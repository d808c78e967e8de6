"""The arena: candidates side by side, what they cost, and that one which fails harms none of the others."""

import gc
import itertools
import math
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae import InputError
from dc_ssdae.data.loader import ReadingFailed
from dc_ssdae.evaluation import arena
from dc_ssdae.evaluation.arena import Entry, describe_failure, peak_memory, run_arena, shown_places
from dc_ssdae.evaluation.candidates import BicubicCandidate, Candidate, CodecCandidate, PythonCandidate
from dc_ssdae.evaluation.evaluate import EvaluationSettings
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.metric_networks import MetricSuite, load_metrics
from dc_ssdae.evaluation.protocol import PROTOCOLS

CPU = torch.device("cpu")
SIDE = 32
COUNT = 11
BATCH = 4
SHOW = 5
ROUNDS = 2
MEGABYTE = 10**6

Openers = Mapping[str, Callable[[], Candidate]]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """These images are too small for more than one thread to be of use, and libraries too large to be collected."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compete({"resizing": lambda: BicubicCandidate(2)})  # imports what is imported late
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# --- images, metrics, candidates ---


class Source:
    """Images in memory; some are broken."""

    def __init__(self, count: int = COUNT, broken: Sequence[int] = ()) -> None:
        self.count = count
        self.broken = set(broken)

    def __len__(self) -> int:
        return self.count

    @property
    def blocks(self) -> Sequence[int]:
        return [self.count]

    def name(self, index: int) -> str:
        return f"photo {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise InputError(f"cannot read photo {index}")
        generator = torch.Generator().manual_seed(index)
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        return F.interpolate(coarse, (40, 36), mode="bilinear")[0].mul(255).to(torch.uint8), -1


def colours(pixels: Tensor) -> Tensor:
    """Mean and spread of each colour: (B, 6)."""
    values = pixels.double().div(255.0).flatten(2)
    return torch.cat([values.mean(dim=2), values.std(dim=2)], dim=1)


def suite() -> MetricSuite:
    """PSNR, and an "rFID" of colours."""
    found = load_metrics(PROTOCOLS["dcae"], CPU, ("psnr",))
    found.distances["rfid"] = FrechetDistance(colours, 6, replicates=3)
    del found.missing["rfid"]
    return found


class Pooling:
    """Colours of patches as a latent (3, 8, 8)."""

    def encode(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=4.0)


class Tokens:
    """A latent of 16 tokens with 3 channels."""

    def encode(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8).flatten(2).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z.transpose(1, 2).unflatten(2, (4, 4)), scale_factor=8.0)


class Network(nn.Module):
    """A network with 3 · 5 · 16 + 5 and 5 · 3 · 16 + 3 parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            self.down, self.up = nn.Conv2d(3, 5, 4, stride=4), nn.ConvTranspose2d(5, 3, 4, stride=4)
        self.register_buffer("unused", torch.zeros(1000))

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.up(z)


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


GOOD: Openers = {
    "network": lambda: PythonCandidate(Network(), "network"),
    "function": lambda: PythonCandidate(blurred, "blurred"),
}


def raising(error: BaseException, calls: int = 0) -> Callable[[], Candidate]:
    """Opens a function that blurs so many batches, and then raises."""

    def opener() -> Candidate:
        left = itertools.count(calls, -1)

        def reconstruct(x: Tensor) -> Tensor:
            if next(left) <= 0:
                raise error
            return blurred(x)

        return PythonCandidate(reconstruct, "raising")

    return opener


def refuse() -> Candidate:
    raise InputError("there is no such\nmodel")


QUALITY_CALLS = math.ceil(COUNT / BATCH) + math.ceil(SHOW / BATCH)
"""Batches of a candidate before its memory and speed are measured."""

FAILING: Mapping[str, tuple[Callable[[], Candidate], str]] = {
    "NaN": (
        lambda: PythonCandidate(lambda x: x * math.nan, "nan"),
        "gives NaN or infinity in 4 of a batch's 4 images, photo 0 first",
    ),
    "wrong size": (
        lambda: PythonCandidate(lambda x: x[..., ::2, ::2], "half"),
        "gives images of shape 4×3×16×16 for 4×3×32×32",
    ),
    "memory of a GPU": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the manual.")),
        "out of memory with batches of 4",
    ),
    "memory of PyTorch's CPU": (
        raising(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")),
        "out of memory with batches of 4",
    ),
    "memory of Python": (raising(MemoryError()), "out of memory with batches of 4"),
    "opener": (refuse, "there is no such model"),
    "input": (raising(InputError("sides of 7\nare needed")), "sides of 7 are needed"),
    "anything": (raising(ZeroDivisionError("a\n  bug | here")), "ZeroDivisionError: a bug | here"),
    "without words": (raising(LookupError()), "LookupError"),
    "second batch": (raising(RuntimeError("tired"), 1), "RuntimeError: tired"),
    "pictures to show": (raising(RuntimeError("tired"), QUALITY_CALLS - 1), "RuntimeError: tired"),
    "memory round": (raising(RuntimeError("tired"), QUALITY_CALLS), "RuntimeError: tired"),
    "last speed round": (raising(RuntimeError("tired"), QUALITY_CALLS + ROUNDS), "RuntimeError: tired"),
}
"""What opens a candidate that fails, and the reason that is to be read."""

IN_THE_SPEED_ROUNDS = ("memory round", "last speed round")


def compete(openers: Openers, source: Source | None = None, **given: Any) -> list[Entry]:
    settings = EvaluationSettings(PROTOCOLS["dcae"], SIDE, BATCH)
    images = settings.images(source or Source())
    options = {"rounds": ROUNDS, "show": SHOW, **given}
    return run_arena(openers, images, suite(), settings, CPU, **options)


@pytest.fixture(scope="module")
def alone() -> dict[str, Entry]:
    """The good ones, without one that fails."""
    return {entry.label: entry for entry in compete(GOOD)}


def assert_same_results(found: Entry, expected: Entry) -> None:
    """All but speed and memory, to the last bit."""
    assert found.failed is None
    assert found.evaluation is not None
    assert expected.evaluation is not None
    assert found.evaluation.metrics == expected.evaluation.metrics
    assert found.evaluation.metrics["rfid"].value is not None
    assert found.evaluation.metrics["rfid"].low is not None
    for name, values in expected.evaluation.values.items():
        np.testing.assert_array_equal(found.evaluation.values[name], values)
    assert found.latent_shape == expected.latent_shape
    assert (found.parameters, found.remarks, found.batch) == (expected.parameters, expected.remarks, expected.batch)
    assert found.shown.keys() == expected.shown.keys()
    for place, image in expected.shown.items():
        assert torch.equal(found.shown[place].output, image.output)
    assert found.decode is not None


# --- failures ---


class TestFailures:
    @pytest.mark.parametrize("name", FAILING)
    def test_one_that_fails_says_why_and_harms_no_other(self, alone: dict[str, Entry], name: str) -> None:
        opener, reason = FAILING[name]
        told: list[tuple[str, str]] = []
        openers = {"network": GOOD["network"], "bad": opener, "function": GOOD["function"]}
        first, bad, last = compete(openers, report=lambda *words: told.append(words))
        assert bad.failed == reason
        assert told == [("bad", reason)]
        assert (bad.evaluation is not None) == (name in (*IN_THE_SPEED_ROUNDS, "pictures to show"))
        assert (bad.encode, bad.decode) == (None, None)
        assert_same_results(first, alone["network"])
        assert_same_results(last, alone["function"])

    @pytest.mark.parametrize("name", ["second batch", "pictures to show", "NaN"])
    def test_one_that_fails_first_leaves_the_reference_of_distances_whole(
        self, alone: dict[str, Entry], name: str
    ) -> None:
        bad, *others = compete({"bad": FAILING[name][0], **GOOD})
        assert bad.failed == FAILING[name][1]
        for entry in others:
            assert_same_results(entry, alone[entry.label])

    def test_many_that_fail_keep_their_places(self, alone: dict[str, Entry]) -> None:
        openers = {**{name: opener for name, (opener, _) in FAILING.items()}, **GOOD}
        names = list(FAILING)
        order = [*names[:5], "network", *names[5:], "function"]
        entries = compete({name: openers[name] for name in order})
        assert [entry.label for entry in entries] == order
        for entry in entries:
            if entry.label in GOOD:
                assert_same_results(entry, alone[entry.label])
            else:
                assert entry.failed == FAILING[entry.label][1]

    def test_all_may_fail(self) -> None:
        entries = compete({"refused": refuse, "bug": raising(ZeroDivisionError("a bug"))})
        assert [entry.failed for entry in entries] == ["there is no such model", "ZeroDivisionError: a bug"]

    def test_what_is_known_of_one_that_fails_late_is_kept(self) -> None:
        class Tired(Network):
            def decode(self, z: Tensor) -> Tensor:
                raise RuntimeError("tired")

        def opener() -> Candidate:
            candidate = PythonCandidate(Tired(), "tired")
            candidate.remarks.append("old")
            return candidate

        (entry,) = compete({"tired": opener})
        assert entry.failed == "RuntimeError: tired"
        assert entry.remarks == ["old"]
        assert entry.parameters == 3 * 5 * 16 + 5 + 5 * 3 * 16 + 3

    @pytest.mark.parametrize("calls", [0, QUALITY_CALLS + 1])
    def test_an_interrupt_ends_everything(self, calls: int) -> None:
        told: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            compete({"mine": raising(KeyboardInterrupt(), calls), **GOOD}, report=lambda *words: told.extend(words))
        assert told == []

    def test_tracebacks_are_for_debugging(self, capsys: pytest.CaptureFixture[str]) -> None:
        compete({"bug": raising(ZeroDivisionError("a bug"))})
        assert capsys.readouterr().err == ""
        compete({"bug": raising(ZeroDivisionError("a bug"))}, debug=True)
        printed = capsys.readouterr().err
        assert printed.startswith("Traceback (most recent call last):")
        assert printed.splitlines()[-1] == "ZeroDivisionError: a bug"

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (RuntimeError("CUDA error: out of memory"), "out of memory with batches of 3"),
            (RuntimeError("shapes do not fit"), "RuntimeError: shapes do not fit"),
            (ValueError("no\tgood\n"), "ValueError: no good"),
            (InputError("give another"), "give another"),
            (AssertionError(), "AssertionError"),
        ],
    )
    def test_reasons_are_one_line(self, error: Exception, told: str) -> None:
        assert describe_failure(error, 3) == told


class Moved(PythonCandidate):
    """Notes which candidates are on the device."""

    there: set[str]

    def to(self, device: torch.device) -> Candidate:
        (self.there.discard if device == CPU else self.there.add)(self.name)
        return self


class TestDevice:
    @pytest.mark.parametrize("name", [None, "NaN", "second batch", "pictures to show", *IN_THE_SPEED_ROUNDS])
    def test_each_is_there_for_its_turn_alone_also_one_that_fails(self, name: str | None) -> None:
        there: set[str] = set()
        seen: list[set[str]] = []

        def candidate(label: str, reconstruct: Callable[[Tensor], Tensor]) -> Candidate:
            def watch(x: Tensor) -> Tensor:
                seen.append(set(there))
                return reconstruct(x)

            moved = Moved(watch, label)
            moved.there = there
            return moved

        failing = blurred if name is None else FAILING[name][0]().value  # type: ignore[attr-defined]
        made = {
            "first": candidate("first", failing),
            "second": candidate("second", blurred),
            "third": candidate("third", blurred),
        }
        settings = EvaluationSettings(PROTOCOLS["dcae"], SIDE, BATCH)
        # The same device under another name. The openers keep their candidates, as those of the command do.
        openers = {label: (lambda label=label: made[label]) for label in made}
        entries = run_arena(
            openers, settings.images(Source()), suite(), settings, torch.device("cpu:0"), rounds=ROUNDS, show=SHOW
        )
        assert [entry.failed is None for entry in entries] == [name is None, True, True]
        assert {frozenset(labels) for labels in seen} == {frozenset([label]) for label in made}
        assert there == set()


class Gone(Source):
    """A data set whose disk is taken away after some images."""

    def __init__(self, reads: int) -> None:
        super().__init__()
        self.left = reads

    def read(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error", f"photo {index}")
        return super().read(index)


class TestImagesThatCannotBeRead:
    def test_a_broken_data_set_is_no_candidates_fault(self) -> None:
        told: list[str] = []
        with pytest.raises(ReadingFailed, match=r"^none of 11 images can be read; the first: cannot read photo 0$"):
            compete(GOOD, Source(broken=range(COUNT)), report=lambda *words: told.extend(words))
        assert told == []

    @pytest.mark.parametrize("reads", [0, 6, COUNT + 2, 2 * COUNT])
    def test_a_data_set_that_goes_away_is_no_candidates_fault(self, reads: int) -> None:
        told: list[str] = []
        with pytest.raises(ReadingFailed, match="Input/output error"):
            compete(GOOD, Gone(reads), report=lambda *words: told.extend(words))
        assert told == []

    def test_no_image_is_read_where_no_candidate_opens(self) -> None:
        (entry,) = compete({"refused": refuse}, Source(broken=range(COUNT)))
        assert entry.failed is not None

    def test_they_are_left_out_of_everything(self) -> None:
        broken = [0, 1, 2, 3, 5, 6, 7, 8]
        entries = compete({**GOOD, "codec": lambda: CodecCandidate("jpeg", 60)}, Source(broken=broken))
        for entry in entries:
            assert entry.failed is None
            assert entry.evaluation is not None
            assert entry.evaluation.images == 3
            assert [image.name for image in entry.evaluation.broken] == [f"photo {index}" for index in broken]
            assert entry.batch == 3
        assert all(entry.shown.keys() == {4} for entry in entries)


# --- what is told of each ---


class TestEntries:
    def test_progress_is_told_for_each(self) -> None:
        done: list[int] = []
        compete({**GOOD, "bad": FAILING["second batch"][0]}, advance=done.append)
        assert done == [4, 4, 3, 4, 4, 3, 4]

    def test_parameters_are_counted(self) -> None:
        openers = {
            **GOOD,
            "codec": lambda: CodecCandidate("webp", 60),
            "resizing": lambda: BicubicCandidate(4),
            "object": lambda: PythonCandidate(Pooling(), "pooling"),
        }
        found = {entry.label: entry.parameters for entry in compete(openers)}
        expected = 3 * 5 * 16 + 5 + 5 * 3 * 16 + 3
        assert found == {"network": expected, "function": None, "codec": None, "resizing": 0, "object": None}

    @pytest.mark.parametrize(
        ("opener", "shape", "tokens", "compression"),
        [
            (lambda: PythonCandidate(Pooling(), "pooling"), (3, 8, 8), 64, 16.0),
            (lambda: PythonCandidate(Network(), "network"), (5, 8, 8), 64, 9.6),
            (lambda: BicubicCandidate(2), (3, 16, 16), 256, 4.0),
            (lambda: PythonCandidate(Tokens(), "tokens"), (16, 3), 16, 64.0),
            (lambda: PythonCandidate(blurred, "blurred"), None, None, None),
            (lambda: CodecCandidate("jpeg", 60), None, None, None),
        ],
    )
    def test_tokens_and_compression_follow_from_the_latents_shape(
        self, opener: Callable[[], Candidate], shape: Any, tokens: int | None, compression: float | None
    ) -> None:
        (entry,) = compete({"one": opener})
        assert entry.latent_shape == shape
        assert entry.tokens == tokens
        assert entry.compression(SIDE) == compression

    def test_nothing_is_known_of_one_that_did_not_open(self) -> None:
        (entry,) = compete({"refused": refuse})
        assert (entry.latent_shape, entry.tokens, entry.compression(SIDE)) == (None, None, None)
        assert (entry.parameters, entry.encode, entry.decode, entry.memory) == (None, None, None, None)
        assert entry.shown == {}

    def test_remarks_and_kinds_are_those_of_the_candidate(self) -> None:
        codec, function, network = compete(
            {"codec": lambda: CodecCandidate("jpeg", 60), **dict(reversed(GOOD.items()))}
        )
        assert codec.remarks == ["codec, on one core of the CPU"]
        assert function.remarks == ["a function, timed as a whole"]
        assert network.remarks == []
        assert (codec.is_baseline, network.is_baseline) == (True, False)
        assert (codec.splits, network.splits, function.splits) == (True, True, False)


class TestShown:
    @pytest.mark.parametrize(
        ("count", "show", "places"),
        [
            (11, 5, [0, 2, 4, 6, 8]),
            (10, 5, [0, 2, 4, 6, 8]),
            (100, 3, [0, 33, 66]),
            (3, 8, [0, 1, 2]),
            (1, 1, [0]),
            (7, 1, [0]),
        ],
    )
    def test_places_are_evenly_spread(self, count: int, show: int, places: list[int]) -> None:
        assert shown_places(count, show) == places

    @pytest.mark.parametrize("count", [1, 2, 9, 50])
    @pytest.mark.parametrize("show", [1, 3, 8])
    def test_no_two_steps_differ_by_more_than_one(self, count: int, show: int) -> None:
        places = shown_places(count, show)
        assert len(places) == min(count, show)
        steps = np.diff([*places, count])
        assert steps.max() - steps.min() <= 1

    def test_all_show_the_same_images(self, alone: dict[str, Entry]) -> None:
        protocol, source = PROTOCOLS["dcae"], Source()
        for entry in alone.values():
            assert list(entry.shown) == [0, 2, 4, 6, 8]
            for place, image in entry.shown.items():
                assert (image.place, image.name) == (place, f"photo {place}")
                assert torch.equal(image.original, protocol.prepare(source.read(place)[0], SIDE))
        for place, image in alone["function"].shown.items():
            x = protocol.model_input(protocol.prepare(source.read(place)[0], SIDE))
            assert torch.equal(image.output, protocol.to_uint8(blurred(x[None]))[0])


class TestSpeed:
    def test_it_is_images_a_second_with_quartiles(self, alone: dict[str, Entry]) -> None:
        entry = alone["network"]
        for spread in (entry.encode, entry.decode):
            assert spread is not None
            assert 0 < spread.low <= spread.median <= spread.high
        assert entry.batch == BATCH

    def test_a_function_has_no_encoding_of_its_own(self, alone: dict[str, Entry]) -> None:
        assert alone["function"].encode is None
        assert alone["function"].decode is not None
        assert alone["function"].decode.low > 0

    def test_it_is_that_of_the_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock that candidates move: encoding takes 2 s and then 4 s a batch, decoding half a second."""
        now = [100.0]
        encoding = iter([0.0] * (QUALITY_CALLS + 1) + [2.0, 4.0])

        class Slow(Pooling):
            def encode(self, x: Tensor) -> Tensor:
                now[0] += next(encoding)
                return super().encode(x)

            def decode(self, z: Tensor) -> Tensor:
                now[0] += 0.5
                return super().decode(z)

        monkeypatch.setattr(arena, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
        (entry,) = compete({"slow": lambda: PythonCandidate(Slow(), "slow")})
        assert entry.encode is not None
        assert entry.decode is not None
        assert (entry.encode.low, entry.encode.median, entry.encode.high) == (1.25, 1.5, 1.75)
        assert (entry.decode.low, entry.decode.median, entry.decode.high) == (8.0, 8.0, 8.0)

    def test_what_happens_once_on_a_gpu_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock that the candidate moves: the first batch takes a minute, the next 2 s and half a second."""
        now, once = [100.0], [60.0]

        class Slow(Pooling):
            def encode(self, x: Tensor) -> Tensor:
                now[0] += once.pop() if once else 2.0
                return super().encode(x)

            def decode(self, z: Tensor) -> Tensor:
                now[0] += 0.5
                return super().decode(z)

        monkeypatch.setattr(arena, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
        x = torch.zeros(BATCH, 3, SIDE, SIDE)
        assert arena._time(PythonCandidate(Slow(), "slow"), x, torch.device("xpu")) == (2.0, 0.5)

    def test_rounds_go_forwards_and_backwards_in_turn(self) -> None:
        calls: list[str] = []

        def opener(label: str) -> Callable[[], Candidate]:
            def reconstruct(x: Tensor) -> Tensor:
                calls.append(label)
                return x

            return lambda: PythonCandidate(reconstruct, label)

        compete({label: opener(label) for label in "abc"}, rounds=3)
        quality, speed = "".join(calls)[:-12], "".join(calls)[-12:]
        assert quality == "a" * QUALITY_CALLS + "b" * QUALITY_CALLS + "c" * QUALITY_CALLS
        assert speed == "cba" + "abc" + "cba" + "abc"

    def test_one_that_failed_is_not_tried_again(self) -> None:
        calls: list[int] = []

        def reconstruct(x: Tensor) -> Tensor:
            calls.append(len(x))
            if len(calls) > QUALITY_CALLS:
                raise RuntimeError("tired")
            return x

        compete({"tired": lambda: PythonCandidate(reconstruct, "tired")}, rounds=3)
        assert len(calls) == QUALITY_CALLS + 1


# --- memory ---


@pytest.fixture
def high_water_mark() -> None:
    """Skip where the kernel does not reset the mark of the most memory that was resident."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        told = "VmHWM:" in Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError as error:
        pytest.skip(f"this system does not tell the most memory that was resident: {error}")
    if not told:
        pytest.skip("this system does not tell the most memory that was resident: no VmHWM in /proc/self/status")


class Hungry(Pooling):
    """Takes so many bytes while it decodes, and gives them back."""

    def __init__(self, size: int) -> None:
        self.size = size

    def decode(self, z: Tensor) -> Tensor:
        taken = torch.ones(self.size // 4)
        return super().decode(z) * taken[-1]


class Heavy(Network):
    """Has so many bytes of weights and of a buffer, each half of them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size // 8))
        self.register_buffer("state", torch.ones(size // 8))


@pytest.mark.usefixtures("high_water_mark")
class TestMemory:
    def test_what_a_candidate_takes_for_a_moment_is_seen(self) -> None:
        x = torch.zeros(BATCH, 3, SIDE, SIDE)
        for size in (200 * MEGABYTE, 400 * MEGABYTE, 0):
            candidate = PythonCandidate(Hungry(size + 4), "hungry")
            seen = peak_memory(candidate, partial(candidate.reconstruct, x), CPU)
            assert seen is not None
            assert 0.9 * size <= seen <= size + 40 * MEGABYTE

    def test_weights_are_part_of_it(self) -> None:
        x = torch.zeros(BATCH, 3, SIDE, SIDE)
        gc.collect()
        candidate = PythonCandidate(Heavy(100 * MEGABYTE), "heavy")
        seen = peak_memory(candidate, partial(candidate.reconstruct, x), CPU)
        assert seen is not None
        assert 100 * MEGABYTE <= seen <= 140 * MEGABYTE

    def test_each_has_its_own_in_the_arena(self) -> None:
        hungry, heavy, light = compete(
            {
                "hungry": lambda: PythonCandidate(Hungry(200 * MEGABYTE), "hungry"),
                "heavy": lambda: PythonCandidate(Heavy(100 * MEGABYTE), "heavy"),
                "light": lambda: PythonCandidate(Pooling(), "light"),
            }
        )
        assert hungry.memory is not None
        assert heavy.memory is not None
        assert light.memory is not None
        assert 180 * MEGABYTE <= hungry.memory <= 240 * MEGABYTE
        assert 100 * MEGABYTE <= heavy.memory <= 140 * MEGABYTE
        assert light.memory <= 40 * MEGABYTE


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "sys", types.SimpleNamespace(platform="darwin"))
    (entry,) = compete({"function": GOOD["function"]})
    assert entry.failed is None
    assert entry.memory is None
    assert entry.decode is not None


class Held:
    """What a candidate has in memory while it works."""


def test_what_a_candidate_held_when_it_failed_is_free_for_the_next() -> None:
    """An out-of-memory error holds its frames, and they all that was on the device."""
    held: list[weakref.ref[Held]] = []
    found: list[bool] = []

    def greedy(x: Tensor) -> Tensor:
        mine = Held()
        held.append(weakref.ref(mine))
        error = MemoryError()  # a cycle: the error will have this frame, and the frame has the error
        raise error

    def next_one(x: Tensor) -> Tensor:
        found.append(held[0]() is None)
        return blurred(x)

    entries = compete(
        {"greedy": lambda: PythonCandidate(greedy, "greedy"), "next": lambda: PythonCandidate(next_one, "n")}
    )
    assert [entry.failed is None for entry in entries] == [False, True]
    assert all(found)
