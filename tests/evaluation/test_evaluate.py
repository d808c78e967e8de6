"""A pass over a data set: every figure against its own definition, however the work is cut, in little memory."""

import gc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from colour_distance import colours, suite_of
from tiny_models import tiny
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image import StructuralSimilarityIndexMeasure
from two_processes import PROCESSES, TwoProcesses

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation import metrics
from dc_ssdae.evaluation.candidates import (
    BicubicCandidate,
    Candidate,
    CodecCandidate,
    OurCandidate,
    PythonCandidate,
)
from dc_ssdae.evaluation.estimates import METRICS, Estimate, bootstrap
from dc_ssdae.evaluation.evaluate import (
    BITS,
    EVALUATIONS,
    KL,
    Evaluation,
    EvaluationSettings,
    evaluate,
    reconstruct_places,
)
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.metric_networks import MSE, MetricSuite, load_metrics
from dc_ssdae.evaluation.protocol import PROTOCOLS, TRAINING, Protocol
from dc_ssdae.evaluation.statistics import LatentProfiler
from dc_ssdae.randomness import named_generator

CPU = torch.device("cpu")
SIDE = 32
COUNT = 11


# --- data sets, candidates, metrics ---


class Source:
    """Images that are known by a number, in any order; some are broken."""

    def __init__(self, numbers: Sequence[int] = range(COUNT), broken: Sequence[int] = ()) -> None:
        self.numbers = list(numbers)
        self.broken = set(broken)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"/somewhere/photo{self.numbers[index]:04}.png"

    def relative_name(self, index: int) -> str:
        return f"photo{self.numbers[index]:04}.png"

    def read(self, index: int) -> tuple[Tensor, int]:
        number = self.numbers[index]
        if number in self.broken:
            raise InputError(f"cannot read photo {number}")
        generator = torch.Generator().manual_seed(number)
        phases = torch.rand(3, 3, generator=generator)
        rows, columns = torch.linspace(0, 1, 37)[:, None], torch.linspace(0, 1, 43)
        waves = [torch.sin(6 * (a * rows + b * columns + c)) for a, b, c in phases.tolist()]
        grain = torch.randn(3, 37, 43, generator=generator)
        return (127.5 + 90 * torch.stack(waves) + 20 * grain).round().clamp(0, 255).to(torch.uint8), -1


class Grey:
    """Images of one grey each, read in no time; without names of another kind than `name`."""

    def __init__(self, greys: Sequence[int]) -> None:
        self.greys = list(greys)

    def __len__(self) -> int:
        return len(self.greys)

    def name(self, index: int) -> str:
        return f"grey {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, SIDE, SIDE), self.greys[index], dtype=torch.uint8), -1


class Pooling:
    """A Gaussian over the colours of patches, shrunk to 4 pixels; one channel has a variance of its own."""

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean = F.avg_pool2d(x, 4)
        return DiagonalGaussian(mean, torch.stack([mean[:, 0] - 3, mean[:, 1] - 2, 0 * mean[:, 2] - 4], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=4.0, mode="nearest")


def rippled(x: Tensor) -> Tensor:
    """An error of its own at every pixel, beyond [-1, 1] too."""
    return x + 0.15 * torch.sin(50 * x) + 0.05


def pooling() -> PythonCandidate:
    return PythonCandidate(Pooling(), "pooling")


def measure(
    candidate: Candidate,
    source: Any = None,
    protocol: str = "dcae",
    suite: MetricSuite | None = None,
    processes: Processes | None = None,
    limit: int | None = None,
    advance: Callable[[int], object] | None = None,
    **given: int,
) -> Evaluation:
    settings = EvaluationSettings(PROTOCOLS[protocol], SIDE, **{"batch_size": 4, **given})
    images = settings.images(Source() if source is None else source, limit)
    suite = suite or suite_of(settings.protocol, "ssim")
    return evaluate(candidate, images, suite, settings, CPU, processes, advance)


def by_hand(protocol: Protocol, numbers: Sequence[int], reconstruct: Callable[[Tensor, str], Tensor]) -> list[Any]:
    """Reference and output of each image, uint8 (3, S, S), one image at a time."""
    source = Source()
    pairs = []
    for number in numbers:
        prepared = protocol.prepare(source.read(number)[0], SIDE)
        output = reconstruct(protocol.model_input(prepared)[None], source.relative_name(number))[0]
        pairs.append((protocol.reference(prepared), protocol.to_uint8(output)))
    return pairs


# --- comparing two passes ---


def record(found: Evaluation) -> dict[str, Any]:
    """All that a pass found, in plain numbers, images by their names."""
    return {
        "metrics": {name: vars(estimate) for name, estimate in found.metrics.items()},
        "others": {name: vars(estimate) for name, estimate in found.others.items()},
        "values": {name: dict(zip(found.names, values.tolist(), strict=True)) for name, values in found.values.items()},
        "latent": None if found.latent is None else found.latent.as_json(),
        "latent_shape": None if found.latent_shape is None else list(found.latent_shape),
        "images": found.images,
        "broken": [list(image) for image in found.broken],
        "broken_places": found.broken_places,
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """To 1e-6."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{place}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6, nan_ok=True), where
    else:
        assert found == expected, where


SITUATIONS: Mapping[str, tuple[Callable[[], Candidate], str, Sequence[int]]] = {
    "a sample": (pooling, "lightningdit", ()),
    "broken images": (pooling, "dcae", (1, 2, 5)),
    "a function": (lambda: PythonCandidate(rippled, "rippled"), "original", ()),
    "a codec": (lambda: CodecCandidate("jpeg", 50), "rae", (0,)),
}
"""Candidate, protocol and broken images."""


def situation(name: str, numbers: Sequence[int] = range(COUNT), **given: Any) -> dict[str, Any]:
    make, protocol, broken = SITUATIONS[name]
    return record(measure(make(), Source(numbers, broken), protocol, **given))


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    """One process, all images in one batch."""
    return {name: situation(name, batch_size=COUNT) for name in SITUATIONS}


# --- what is measured ---


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_metric_is_what_its_definition_gives_image_by_image(name: str) -> None:
    protocol = PROTOCOLS[name]
    found = measure(PythonCandidate(rippled, "rippled"), protocol=name)
    pairs = by_hand(protocol, range(COUNT), lambda x, _: rippled(x))
    ssim = metrics.ssim if protocol.ssim == "torchmetrics" else metrics.scikit_ssim
    expected = {MSE: metrics.mse, "psnr": metrics.psnr, "ssim": ssim}.items()
    values = {metric: np.array([function(*pair) for pair in pairs]) for metric, function in expected}
    if name == "lightningdit":  # its definition of SSIM: unrounded, and clamped where it is measured
        x = [protocol.model_input(protocol.prepare(Source().read(place)[0], SIDE))[None] for place in range(COUNT)]
        theirs = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        values["ssim"] = np.array([float(theirs(rippled(image), image)) for image in x])
    for metric, column in values.items():
        np.testing.assert_allclose(found.values[metric], column, rtol=1e-6, err_msg=metric)
    psnr = -10 * math.log10(values[MSE].mean()) if protocol.psnr == "pooled" else values["psnr"].mean()
    assert found.metrics["psnr"].value == pytest.approx(psnr, rel=1e-9)
    assert found.metrics["ssim"].value == pytest.approx(values["ssim"].mean(), rel=1e-6)
    alone = FrechetDistance(colours, 6, 0)
    alone.add(*(torch.stack(side) for side in zip(*pairs, strict=True)), found.names)
    distance = alone.finish(Processes()).value
    assert found.metrics["rfid"].value == pytest.approx(distance, rel=1e-6, abs=1e-9)
    for metric in ("psnr", "ssim", "rfid"):
        assert found.metrics[metric].low < found.metrics[metric].value < found.metrics[metric].high


def test_every_metric_has_a_value_or_a_reason_and_its_note() -> None:
    suite = suite_of(PROTOCOLS["dcae"], "ssim")
    suite.notes = {"rfid": "of colours alone", "psnr": "on paper"}
    found = measure(pooling(), suite=suite, seed=3)
    assert list(found.metrics) == list(METRICS)
    for name in ("lpips", "dreamsim", "rfdd"):
        assert found.metrics[name] == Estimate(reason="not asked for")
    assert found.metrics["rfid"].note == "of colours alone"
    assert found.metrics["psnr"] == replace(bootstrap(found.values["psnr"], seed=3), note="on paper")


def test_images_are_spread_over_the_data_set_named_and_counted() -> None:
    assert measure(pooling(), limit=4).names == [f"photo{number:04}.png" for number in (0, 2, 5, 8)]
    assert measure(pooling(), Grey([10, 200])).names == ["grey 0", "grey 1"]
    done: list[int] = []
    measure(pooling(), Source(broken=[0, 1, 2, 3]), advance=done.append)
    assert done == [4, 4, 3]


def test_an_image_without_an_error_makes_a_mean_infinite_but_for_raes_limit_and_a_pooled_error() -> None:
    """Of images of one grey against 127.5, the middle of the range, which rounds to 128."""
    middle = PythonCandidate(torch.zeros_like, "middle")
    lossless, capped, pooled = (measure(middle, Grey([128, 0]), name) for name in ("dcae", "rae", "original"))
    assert lossless.metrics["psnr"] == Estimate(math.inf)
    assert lossless.values["psnr"].tolist() == [math.inf, pytest.approx(-20 * math.log10(128 / 255))]
    assert pooled.metrics["psnr"].value == pytest.approx(-10 * math.log10((128 / 255) ** 2 / 2))
    capped = measure(middle, Grey([127, 0]), "rae")
    assert capped.metrics["psnr"].value == pytest.approx((100.0 - 20 * math.log10(127 / 255)) / 2)


def test_a_metric_that_is_nan_for_an_image_is_nan() -> None:
    values = torch.tensor([0.1, torch.nan, 0.3])
    suite = MetricSuite(images={MSE: metrics.each(metrics.mse), "lpips": lambda reference, output: values})
    suite.missing = dict.fromkeys(METRICS.keys() - suite.images.keys(), "not asked for")
    found = measure(pooling(), Source([0, 1, 2]), suite=suite)
    assert found.metrics["lpips"].as_json() == {"value": None, "low": None, "high": None, "reason": "nan"}


# --- latents ---


def test_a_codec_has_bits_and_no_latent_and_a_function_neither() -> None:
    found, protocol, codec = measure(CodecCandidate("jpeg", 60)), PROTOCOLS["dcae"], CodecCandidate("jpeg", 60)
    x = torch.stack([protocol.model_input(protocol.prepare(Source().read(n)[0], SIDE)) for n in range(COUNT)])
    bits = [size / SIDE**2 for size in codec.encode(x).bits or []]
    assert found.values[BITS].tolist() == bits
    assert found.others == {BITS: bootstrap(np.array(bits))}
    assert (found.latent, found.latent_shape) == (None, None)
    found = measure(PythonCandidate(rippled, "rippled"))
    assert (found.latent, found.latent_shape, found.others) == (None, None, {})
    assert all(np.isnan(found.values[name]).all() for name in (KL, BITS, EVALUATIONS))


def test_a_profile_is_of_all_images_that_can_be_read() -> None:
    found, protocol = measure(pooling(), Source(broken=[4])), PROTOCOLS["dcae"]
    numbers = [number for number in range(COUNT) if number != 4]
    x = torch.stack([protocol.model_input(protocol.prepare(Source().read(number)[0], SIDE)) for number in numbers])
    posterior = Pooling().encode(x)
    assert found.latent_shape == (3, 8, 8)
    assert found.latent is not None
    assert_same(found.latent.as_json(), LatentProfiler.of(posterior).profile().as_json())
    np.testing.assert_allclose(np.delete(found.values[KL], 4), posterior.kl().numpy(), rtol=1e-6)
    assert math.isnan(found.values[KL][4])
    assert found.others[KL].value == pytest.approx(sum(found.latent.kl or []), rel=1e-6)
    points = measure(BicubicCandidate(4))
    assert (points.latent_shape, points.others, points.latent and points.latent.kl) == ((3, 8, 8), {}, None)


def test_evaluations_of_ours_are_noted() -> None:
    found = measure(OurCandidate(tiny(), {"num_steps": 3}), Source(range(3), broken=[1]))
    np.testing.assert_array_equal(found.values[EVALUATIONS], [3, math.nan, 3])
    assert found.others[EVALUATIONS] == Estimate(3.0, 3.0, 3.0)
    assert found.others.keys() == {KL, EVALUATIONS}


@pytest.mark.parametrize("seed", [0, 5])
def test_a_sample_depends_on_the_images_name_and_the_seed_alone(seed: int) -> None:
    def reconstruct(x: Tensor, name: str) -> Tensor:
        posterior = Pooling().encode(x)
        noise = torch.randn(posterior.mean.shape[1:], generator=named_generator(seed, name))
        return Pooling().decode(posterior.mean + posterior.std * noise)

    expected = [metrics.psnr(*pair) for pair in by_hand(PROTOCOLS["lightningdit"], range(COUNT), reconstruct)]
    torch.manual_seed(seed + 100)
    found = measure(pooling(), protocol="lightningdit", seed=seed)
    np.testing.assert_allclose(found.values["psnr"], expected, atol=1e-6)
    few = measure(pooling(), Source([7, 2]), "lightningdit", seed=seed)
    assert few.values["psnr"].tolist() == found.values["psnr"][[7, 2]].tolist()


# --- however the work is cut ---


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("given", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 3, "workers": 1}])
def test_results_do_not_depend_on_batches_and_workers(
    plain: dict[str, dict[str, Any]], name: str, given: dict[str, int]
) -> None:
    found = situation(name, **given)
    assert_same(found, plain[name])
    for metric in ("psnr", "ssim", MSE):
        assert repr(found["values"][metric]) == repr(plain[name]["values"][metric]), "not a bit"


def work(rank: int, folder: str) -> None:
    """What each of two processes does."""
    processes = Processes(rank, PROCESSES)
    found: dict[str, Any] = {name: situation(name, processes=processes, batch_size=3) for name in SITUATIONS}
    found["one image"] = record(measure(pooling(), Source([3]), processes=processes))
    found["half broken"] = record(measure(pooling(), Source(broken=range(1, COUNT, 2)), processes=processes))
    suite = suite_of(PROTOCOLS["dcae"], "ssim")
    for name, candidate in (("first", pooling()), ("second", BicubicCandidate(2))):
        found[name] = record(measure(candidate, suite=suite, processes=processes))
    spoilt = PythonCandidate(with_one(math.nan) if rank == 1 else rippled, "mine")
    calls: list[int] = []
    for name, candidate, broken in (("all broken", pooling(), range(COUNT)), ("one fails", spoilt, ())):
        with pytest.raises(InputError) as caught:
            measure(candidate, Source(broken=broken), processes=processes)
        found[name] = str(caught.value)
    measure(PythonCandidate(lambda x: (calls.append(len(x)), x)[1], "counts"), processes=processes)
    found["calls"] = calls
    torch.save(found, f"{folder}/record{rank}")


@pytest.fixture(scope="module")
def records(made_once: Any, two_processes: TwoProcesses) -> list[dict[str, Any]]:
    """What two processes have found, by each of them."""
    folder = made_once("evaluation-processes", lambda folder: two_processes(work, str(folder)))
    return [torch.load(folder / f"record{rank}", weights_only=True) for rank in range(PROCESSES)]


def test_results_do_not_depend_on_the_number_of_processes(
    plain: dict[str, dict[str, Any]], records: list[dict[str, Any]]
) -> None:
    """Also where a process has no image, or broken ones alone."""
    expected = {
        **plain,
        "one image": record(measure(pooling(), Source([3]))),
        "half broken": record(measure(pooling(), Source(broken=range(1, COUNT, 2)))),
        "first": record(measure(pooling())),
        "second": record(measure(BicubicCandidate(2))),
    }
    for name, alone in expected.items():
        main, other = (dict(found[name]) for found in records)
        assert_same(main, alone, name)
        assert repr(main["values"]["psnr"]) == repr(alone["values"]["psnr"])
        assert_same(other, main, name)


def test_processes_fail_together_and_call_equally_often(records: list[dict[str, Any]]) -> None:
    """Else some would wait for another; sharded networks need them all."""
    for found in records:
        assert found["all broken"] == f"none of {COUNT} images can be read; the first: cannot read photo 0"
        assert found["one fails"] == "gives NaN or infinity for photo0003.png"
        assert found["calls"] == [4, 2]


# --- what goes wrong ---


def test_broken_images_are_left_out_named_and_nan() -> None:
    broken = [0, 4, 5, 10]
    found = measure(pooling(), Source(broken=broken))
    kept = [number for number in range(COUNT) if number not in broken]
    assert found.broken[1] == ("/somewhere/photo0004.png", "cannot read photo 4")
    assert (found.images, found.broken_places, len(found.names)) == (COUNT - len(broken), broken, COUNT)
    for name in ("psnr", "ssim", MSE, KL):
        assert np.flatnonzero(np.isnan(found.values[name])).tolist() == broken
    without = record(measure(pooling(), Source(kept)))
    for key in ("metrics", "others", "latent"):
        assert_same(record(found)[key], without[key], key)


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[1, 2, 3, 4] = value
        return x

    return spoil


@pytest.mark.parametrize(
    ("give", "told"),
    [
        (with_one(math.nan), "gives NaN or infinity for photo0001.png"),
        (lambda x: x[:, :, 1:], "shape (4, 3, 31, 32); floating-point ones of (4, 3, 32, 32) are expected"),
        (lambda x: (127.5 * x + 127.5).to(torch.uint8), "torch.uint8"),
    ],
)
@pytest.mark.parametrize("protocol", ["dcae", "rae"])
def test_what_cannot_be_measured_is_refused(give: Callable[[Tensor], Tensor], told: str, protocol: str) -> None:
    with pytest.raises(InputError) as caught:
        measure(PythonCandidate(give, "mine"), protocol=protocol)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_within_a_run_an_image_that_is_not_finite_has_no_values() -> None:
    settings = EvaluationSettings(TRAINING, SIDE, COUNT, in_training=True)
    images, suite = settings.images(Source(broken=[0])), load_metrics(TRAINING, CPU, ("psnr", "ssim"))
    found = evaluate(PythonCandidate(with_one(math.inf), "mine"), images, suite, settings, CPU)
    for name in ("psnr", "ssim", MSE):
        assert np.flatnonzero(np.isnan(found.values[name])).tolist() == [0, 1]
    found = evaluate(pooling(), images, suite, settings, CPU)
    assert found.metrics["psnr"] == Estimate(float(np.nanmean(np.sort(found.values["psnr"]))))


def test_the_candidate_after_one_that_failed_has_the_right_distance() -> None:
    expected = [record(measure(candidate)) for candidate in (pooling(), BicubicCandidate(2))]
    suite = suite_of(PROTOCOLS["dcae"], "ssim")
    for candidate, right in zip((pooling(), BicubicCandidate(2)), expected, strict=True):
        batches = itertools.count()
        with pytest.raises(InputError, match="NaN"):
            measure(PythonCandidate(lambda x, batches=batches: x / (next(batches) < 2), "mine"), suite=suite)
        assert_same(record(measure(candidate, suite=suite)), right)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_shown_is_what_was_measured(protocol: str, batch_size: int) -> None:
    settings = EvaluationSettings(PROTOCOLS[protocol], SIDE, batch_size, seed=2)
    images = settings.images(Source(broken=[6]))
    found = measure(pooling(), Source(broken=[6]), protocol, seed=2)
    shown = reconstruct_places(pooling(), images, [9, 0, 6, 4, 3], settings, CPU)
    assert [(image.place, image.name) for image in shown] == [(place, found.names[place]) for place in (9, 0, 4, 3)]
    for image in shown:
        assert image.original.dtype == image.output.dtype == torch.uint8
        assert metrics.mse(image.original, image.output) == found.values[MSE][image.place]
        prepared = settings.protocol.prepare(Source().read(image.place)[0], SIDE)
        assert torch.equal(image.original, settings.protocol.reference(prepared))
    assert reconstruct_places(pooling(), images, [6], settings, CPU) == []


def test_memory_does_not_grow_with_the_images() -> None:
    """All tensors that are alive while a batch is measured, the metrics' own among them, have as many numbers."""
    batches: list[int] = []

    def watch(reference: Tensor, images: Tensor) -> Tensor:
        alive = 0
        if len(batches) in (2, 19):
            gc.collect()
            alive = sum(value.numel() for value in gc.get_objects() if type(value) is Tensor)
        batches.append(alive)
        return torch.zeros(len(images))

    suite = suite_of(PROTOCOLS["lightningdit"], "ssim")
    suite.images[MSE] = watch
    measure(pooling(), Grey(range(40)), "lightningdit", suite, batch_size=2)
    assert 0 < batches[19] < batches[2] + 3 * SIDE**2, "values are kept: less than the pixels of one image"
