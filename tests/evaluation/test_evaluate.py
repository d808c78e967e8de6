"""A pass over a data set: every figure against its own definition, however the work is cut, in little memory."""

import io
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
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
    Decoded,
    Encoded,
    OurCandidate,
    PythonCandidate,
)
from dc_ssdae.evaluation.estimates import METRICS, Estimate, bootstrap
from dc_ssdae.evaluation.evaluate import (
    BITS,
    EVALUATIONS,
    KL,
    CandidateFailed,
    Evaluation,
    EvaluationSettings,
    evaluate,
    reconstruct_places,
)
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.latent_statistics import LatentProfile, LatentProfiler
from dc_ssdae.evaluation.metric_networks import MSE, MetricSuite, load_metrics
from dc_ssdae.evaluation.protocol import PROTOCOLS, Protocol
from dc_ssdae.randomness import named_generator

CPU = torch.device("cpu")
SIDE = 32
COUNT = 11


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These images are too small for more to be of use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- data sets, candidates, metrics ---


class Source:
    """Images that are known by a number, in any order; some are broken."""

    def __init__(self, numbers: Sequence[int] = range(COUNT), broken: Sequence[int] = ()) -> None:
        self.numbers = list(numbers)
        self.broken = set(broken)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def blocks(self) -> Sequence[int]:
        return [len(self)]

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

    @property
    def blocks(self) -> Sequence[int]:
        return [len(self)]

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


class Tokens:
    """A latent of tokens (B, N, C)."""

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean = F.avg_pool2d(x, 8).flatten(2).transpose(1, 2)
        return DiagonalGaussian(mean, torch.full_like(mean, -1.0))

    def decode(self, z: Tensor) -> Tensor:
        grid = z.transpose(1, 2).unflatten(2, (SIDE // 8, SIDE // 8))
        return F.interpolate(grid, scale_factor=8.0, mode="nearest")


def rippled(x: Tensor) -> Tensor:
    """An error of its own at every pixel, beyond [-1, 1] too."""
    return x + 0.15 * torch.sin(50 * x) + 0.05


def pooling() -> PythonCandidate:
    return PythonCandidate(Pooling(), "pooling")


def colours(pixels: Tensor) -> Tensor:
    """Mean and spread of each colour: (B, 6)."""
    values = pixels.double().div(255.0).flatten(2)
    return torch.cat([values.mean(dim=2), values.std(dim=2)], dim=1)


def suite_of(protocol: Protocol, replicates: int = 5) -> MetricSuite:
    """PSNR, SSIM, and an "rFID" of colours."""
    suite = load_metrics(protocol, CPU, ("psnr", "ssim"))
    suite.distances["rfid"] = FrechetDistance(colours, 6, replicates)
    del suite.missing["rfid"]
    return suite


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
    suite = suite or suite_of(settings.protocol)
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


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Between features (N, D), by the formula, with scipy's matrix root."""
    apart = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root))


def features(images: Sequence[Tensor]) -> np.ndarray:
    return colours(torch.stack(list(images))).numpy()


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


class TestMetrics:
    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_each_is_what_its_definition_gives_image_by_image(self, name: str) -> None:
        protocol = PROTOCOLS[name]
        found = measure(PythonCandidate(rippled, "rippled"), protocol=name)
        pairs = by_hand(protocol, range(COUNT), lambda x, _: rippled(x))

        def ssim(reference: Tensor, output: Tensor) -> float:
            if protocol.ssim == "torchmetrics":
                return metrics.ssim(reference, output)
            return float(metrics.scikit_ssim_each(reference[None], output[None]))

        mse = np.array([metrics.mse(*pair) for pair in pairs])
        expected = {
            MSE: mse,
            "psnr": np.array([metrics.psnr(*pair) for pair in pairs]),
            "ssim": np.array([ssim(*pair) for pair in pairs]),
        }
        if name == "lightningdit":  # its definition of SSIM: unrounded, and clamped where it is measured
            x = [protocol.model_input(protocol.prepare(Source().read(place)[0], SIDE))[None] for place in range(COUNT)]
            theirs = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
            expected["ssim"] = np.array([float(theirs(rippled(image), image)) for image in x])
            np.testing.assert_allclose(found.values["ssim"], expected["ssim"], atol=1e-6)
            expected["ssim"] = found.values["ssim"]
        for metric, values in expected.items():
            np.testing.assert_allclose(found.values[metric], values, rtol=1e-6, err_msg=metric)
        assert len(set(mse)) == COUNT
        psnr = -10 * math.log10(mse.mean()) if protocol.psnr == "pooled" else expected["psnr"].mean()
        assert found.metrics["psnr"].value == pytest.approx(psnr, rel=1e-9)
        assert found.metrics["ssim"].value == pytest.approx(expected["ssim"].mean(), rel=1e-9)
        distance = frechet(*(features(side) for side in zip(*pairs, strict=True)))
        assert distance > 1e-4
        assert found.metrics["rfid"].value == pytest.approx(distance, rel=1e-6, abs=1e-9)
        assert found.images == COUNT
        assert found.broken == []

    def test_intervals_are_around_the_values(self) -> None:
        found = measure(PythonCandidate(rippled, "rippled"), seed=3)
        for name in ("psnr", "ssim", "rfid"):
            estimate = found.metrics[name]
            assert estimate.low < estimate.value < estimate.high
        assert found.metrics["psnr"] == bootstrap(found.values["psnr"], seed=3)

    def test_every_metric_has_a_value_or_a_reason(self) -> None:
        suite = suite_of(PROTOCOLS["dcae"])
        suite.notes["rfid"] = "of colours alone"
        found = measure(pooling(), suite=suite)
        assert list(found.metrics) == list(METRICS)
        for name in ("lpips", "dreamsim", "rfdd"):
            assert found.metrics[name] == Estimate(reason="not asked for")
        assert found.metrics["rfid"].note == "of colours alone"
        assert found.metrics["psnr"].note is None

    def test_images_are_spread_over_the_data_set_and_named(self) -> None:
        found, all_of_them = measure(pooling(), limit=4), measure(pooling())
        chosen = [0, 2, 5, 8]
        assert found.names == [f"photo{number:04}.png" for number in chosen]
        np.testing.assert_allclose(found.values["psnr"], all_of_them.values["psnr"][chosen])
        assert measure(pooling(), Grey([10, 200])).names == ["grey 0", "grey 1"]

    def test_progress_is_told_after_each_batch(self) -> None:
        done: list[int] = []
        measure(pooling(), Source(broken=[0, 1, 2, 3]), advance=done.append)
        assert done == [4, 4, 3]

    def test_a_pooled_psnr_against_its_closed_form(self) -> None:
        greys = [0, 28, 100, 130, 255]
        squares = [((grey - 128) / 255) ** 2 for grey in greys]
        # 127.5, the middle of the range, rounds to 128.
        middle = PythonCandidate(torch.zeros_like, "middle")
        pooled = measure(middle, Grey(greys), "original").metrics["psnr"]
        assert pooled.value == pytest.approx(-10 * math.log10(sum(squares) / 5), rel=1e-12)
        assert pooled.low < pooled.value < pooled.high
        each = measure(middle, Grey(greys), "dcae").metrics["psnr"]
        assert each.value == pytest.approx(sum(-10 * math.log10(square) for square in squares) / 5, rel=1e-6)

    @pytest.mark.parametrize("protocol", ["dcae", "original"])
    def test_a_lossless_candidate_has_an_infinite_psnr(self, protocol: str) -> None:
        found = measure(PythonCandidate(lambda x: x, "same"), protocol=protocol)
        assert found.metrics["psnr"] == Estimate(math.inf)
        assert found.metrics["psnr"].as_json()["reason"] == "infinite"
        assert found.metrics["ssim"].value == pytest.approx(1.0)
        assert found.metrics["rfid"].value == pytest.approx(0.0, abs=1e-6)
        assert (found.values["psnr"] == math.inf).all()
        assert (found.values[MSE] == 0).all()

    def test_no_image_of_raes_makes_the_mean_infinite(self) -> None:
        found = measure(PythonCandidate(torch.zeros_like, "middle"), Grey([127, 0]), "rae")
        assert found.metrics["psnr"].value == pytest.approx((100.0 - 20 * math.log10(127 / 255)) / 2)

    def test_metrics_see_unrounded_images_where_the_protocol_says_so(self) -> None:
        seen: dict[str, list[Tensor]] = {}

        def metric(name: str) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda *sides: (seen.__setitem__(name, list(sides)), torch.zeros(len(sides[0])))[1]

        suite = MetricSuite(images={name: metric(name) for name in (MSE, "psnr", "ssim", "lpips")})
        suite.missing = dict.fromkeys(METRICS.keys() - suite.images.keys(), "not asked for")
        measure(PythonCandidate(lambda x: 3.0 * x, "3"), Source([3]), "lightningdit", suite)
        protocol = PROTOCOLS["lightningdit"]
        x = protocol.model_input(protocol.prepare(Source().read(3)[0], SIDE))[None]
        for name in ("ssim", "lpips"):
            assert torch.equal(seen[name][0], x)
            assert torch.equal(seen[name][1], 3.0 * x)
        assert [side.dtype for side in seen["psnr"] + seen[MSE]] == [torch.uint8] * 4

    def test_a_metric_that_is_nan_for_an_image_has_a_reason_and_no_value(self) -> None:
        values = torch.tensor([0.1, torch.nan, 0.3])
        suite = MetricSuite(images={MSE: metrics.mse_each, "lpips": lambda reference, output: values})
        suite.missing = dict.fromkeys(METRICS.keys() - suite.images.keys(), "not asked for")
        found = measure(pooling(), Source([0, 1, 2]), suite=suite)
        assert found.metrics["lpips"].value is None
        assert "NaN for 1 of 3" in (found.metrics["lpips"].reason or "")

    def test_images_smaller_than_the_evaluation_are_counted(self) -> None:
        """Of photos of 37×43 pixels."""
        settings = {size: EvaluationSettings(PROTOCOLS["dcae"], size) for size in (37, 38)}
        counts = {}
        for size, given in settings.items():
            images = given.images(Source(range(5), broken=[1]))
            counts[size] = evaluate(BicubicCandidate(2), images, suite_of(given.protocol), given, CPU).enlarged
        assert counts == {37: 0, 38: 4}

    def test_one_lossless_image_among_others(self) -> None:
        greys = [128] + 11 * [0]
        found = measure(PythonCandidate(torch.zeros_like, "middle"), Grey(greys))
        assert found.values["psnr"].tolist() == [math.inf] + 11 * [pytest.approx(-20 * math.log10(128 / 255))]
        assert found.metrics["psnr"] == Estimate(math.inf)
        pooled = measure(PythonCandidate(torch.zeros_like, "middle"), Grey(greys), "original").metrics["psnr"]
        assert pooled.value == pytest.approx(-10 * math.log10((128 / 255) ** 2 * 11 / 12))

    def test_one_image_has_no_distance_and_no_interval(self) -> None:
        found = measure(pooling(), Source([3]))
        assert found.metrics["psnr"] == Estimate(found.values["psnr"][0])
        assert found.metrics["rfid"].reason == "a distance between sets needs at least two images"


class TestLatents:
    def test_a_codec_has_bits_and_no_latent(self) -> None:
        found = measure(CodecCandidate("jpeg", 60))
        protocol = PROTOCOLS["dcae"]
        bits = []
        for number in range(COUNT):
            buffer = io.BytesIO()
            prepared = protocol.prepare(Source().read(number)[0], SIDE)
            Image.fromarray(prepared.permute(1, 2, 0).numpy()).save(buffer, "jpeg", quality=60)
            bits.append(8 * len(buffer.getvalue()) / SIDE**2)
        assert found.values[BITS].tolist() == bits
        assert found.others.keys() == {BITS}
        assert found.others[BITS].value == pytest.approx(np.mean(bits))
        assert found.latent is None
        assert found.latent_shape is None

    def test_a_function_has_neither(self) -> None:
        found = measure(PythonCandidate(rippled, "rippled"))
        assert found.latent is None
        assert found.latent_shape is None
        assert found.others == {}
        assert all(np.isnan(found.values[name]).all() for name in (KL, BITS, EVALUATIONS))

    def test_a_point_has_a_profile_and_no_kl(self) -> None:
        found = measure(BicubicCandidate(4))
        assert found.latent_shape == (3, 8, 8)
        assert found.latent is not None
        assert found.latent.kl is None
        assert found.others == {}
        assert np.isnan(found.values[KL]).all()

    def test_a_profile_is_that_of_all_images(self) -> None:
        found = measure(pooling(), Source(broken=[4]))
        protocol, source = PROTOCOLS["dcae"], Source()
        numbers = [number for number in range(COUNT) if number != 4]
        x = torch.stack([protocol.model_input(protocol.prepare(source.read(number)[0], SIDE)) for number in numbers])
        posterior = Pooling().encode(x)
        assert found.latent_shape == (3, 8, 8)
        assert_profile(found.latent, posterior)
        np.testing.assert_allclose(np.delete(found.values[KL], 4), posterior.kl().numpy(), rtol=1e-6)
        assert math.isnan(found.values[KL][4])
        assert found.others[KL].value == pytest.approx(sum(found.latent.kl), rel=1e-6)
        assert found.others[KL].low < found.others[KL].value < found.others[KL].high

    def test_tokens_have_a_shape_and_a_kl_but_no_profile(self) -> None:
        found = measure(PythonCandidate(Tokens(), "tokens"))
        assert found.latent_shape == (16, 3)
        assert found.latent is None
        assert found.others[KL].value == pytest.approx(found.values[KL].mean())
        assert (found.values[KL] > 0).all()

    @pytest.mark.parametrize("steps", [1, 3])
    def test_evaluations_of_ours_are_noted(self, steps: int) -> None:
        found = measure(OurCandidate(tiny(), {"num_steps": steps}), Source(range(3)))
        assert found.values[EVALUATIONS].tolist() == [steps] * 3
        assert found.others[EVALUATIONS] == Estimate(steps, steps, steps)
        assert found.latent_shape == (4, 4, 4)
        assert found.others.keys() == {KL, EVALUATIONS}


class TestSampling:
    def expected(self, seed: int) -> list[float]:
        protocol = PROTOCOLS["lightningdit"]

        def reconstruct(x: Tensor, name: str) -> Tensor:
            posterior = Pooling().encode(x)
            noise = torch.randn(posterior.mean.shape[1:], generator=named_generator(seed, name))
            assert posterior.logvar is not None
            return Pooling().decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)

        return [metrics.psnr(*pair) for pair in by_hand(protocol, range(COUNT), reconstruct)]

    @pytest.mark.parametrize("seed", [0, 5])
    def test_a_sample_depends_on_the_images_name_and_the_seed_alone(self, seed: int) -> None:
        torch.manual_seed(seed + 100)
        found = measure(pooling(), protocol="lightningdit", seed=seed)
        np.testing.assert_allclose(found.values["psnr"], self.expected(seed), atol=1e-6)
        few = measure(pooling(), Source([7, 2]), "lightningdit", seed=seed)
        np.testing.assert_allclose(few.values["psnr"], found.values["psnr"][[7, 2]], atol=1e-6)

    def test_another_seed_is_another_sample(self) -> None:
        assert (np.abs(np.subtract(self.expected(0), self.expected(5))) > 1e-4).all()

    def test_the_mean_depends_on_no_seed(self) -> None:
        first, second = (measure(pooling(), seed=seed) for seed in (0, 5))
        assert first.values["psnr"].tolist() == second.values["psnr"].tolist()


# --- however the work is cut ---


class TestInvariance:
    @pytest.mark.parametrize("name", SITUATIONS)
    @pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
    def test_results_do_not_depend_on_the_batch_size(
        self, plain: dict[str, dict[str, Any]], name: str, batch_size: int
    ) -> None:
        assert_same(situation(name, batch_size=batch_size), plain[name])

    @pytest.mark.parametrize("name", ["a sample", "broken images"])
    def test_results_do_not_depend_on_workers(self, plain: dict[str, dict[str, Any]], name: str) -> None:
        assert_same(situation(name, workers=1), plain[name])

    @pytest.mark.parametrize("name", SITUATIONS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_results_do_not_depend_on_the_images_order(
        self, plain: dict[str, dict[str, Any]], name: str, seed: int
    ) -> None:
        numbers = np.random.default_rng(seed).permutation(COUNT).tolist()
        broken = SITUATIONS[name][2]
        found, expected = situation(name, numbers), dict(plain[name])
        assert [image[0] for image in found["broken"]] == [
            f"/somewhere/photo{number:04}.png" for number in numbers if number in broken
        ]
        assert found.pop("broken_places") == [place for place, number in enumerate(numbers) if number in broken]
        expected.pop("broken_places")
        assert_same(without_order(found), without_order(expected))

    @pytest.mark.parametrize("name", SITUATIONS)
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_results_do_not_depend_on_the_number_of_processes(
        self, plain: dict[str, dict[str, Any]], records: list[dict[str, Any]], name: str, batch_size: int
    ) -> None:
        main, other = (dict(found[f"{name} {batch_size}"]) for found in records)
        assert_same(main, plain[name])
        # The distance is for the main process alone to tell; all else is known to all.
        assert other["metrics"].pop("rfid") == vars(Estimate(reason="told by the main process"))
        main["metrics"].pop("rfid")
        assert_same(other, main)

    def test_a_process_may_have_no_image(self, records: list[dict[str, Any]]) -> None:
        expected = record(measure(pooling(), Source([3])))
        assert_same(records[0]["one image"], expected)
        assert records[1]["one image"]["latent"] == records[0]["one image"]["latent"]

    def test_a_process_may_have_broken_images_alone(self, records: list[dict[str, Any]]) -> None:
        expected = record(measure(pooling(), Source(broken=range(1, COUNT, 2))))
        assert_same(records[0]["half broken"], expected)

    def test_the_next_candidate_of_two_processes_has_its_own_distance(self, records: list[dict[str, Any]]) -> None:
        for name, candidate in (("first", pooling()), ("second", BicubicCandidate(2))):
            assert_same(records[0][name], record(measure(candidate)))
        assert records[0]["first"]["metrics"]["rfid"] != records[0]["second"]["metrics"]["rfid"]

    def test_no_readable_image_is_everyones_error(self, records: list[dict[str, Any]]) -> None:
        for found in records:
            assert found["all broken"] == f"none of {COUNT} images can be read; the first: cannot read photo 0"

    def test_a_candidate_that_fails_in_one_process_fails_in_all(self, records: list[dict[str, Any]]) -> None:
        """Else the others would wait for that one, and the main process would not know why."""
        for found in records:
            assert (
                found["one fails"]
                == "CandidateFailed: gives NaN or infinity in 1 of a batch's 4 images, photo0003.png first"
            )


def without_order(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "broken": sorted(found["broken"])}


def work(rank: int, folder: str) -> None:
    """What each of two processes does."""
    processes = Processes(rank, PROCESSES)
    found: dict[str, Any] = {
        f"{name} {batch_size}": situation(name, processes=processes, batch_size=batch_size)
        for name in SITUATIONS
        for batch_size in (1, 3)
    }
    found["one image"] = record(measure(pooling(), Source([3]), processes=processes))
    found["half broken"] = record(measure(pooling(), Source(broken=range(1, COUNT, 2)), processes=processes))
    suite = suite_of(PROTOCOLS["dcae"])
    for name, candidate in (("first", pooling()), ("second", BicubicCandidate(2))):
        found[name] = record(measure(candidate, suite=suite, processes=processes))
    try:
        measure(pooling(), Source(broken=range(COUNT)), processes=processes)
    except InputError as error:
        found["all broken"] = str(error)
    try:  # last, because processes that do not fail together have nothing more to say to each other
        measure(PythonCandidate(with_one(math.nan) if rank == 1 else rippled, "mine"), processes=processes)
    except Exception as error:
        found["one fails"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/record{rank}")


@pytest.fixture(scope="module")
def records(made_once: Any, two_processes: TwoProcesses) -> list[dict[str, Any]]:
    """What two processes have found, by each of them."""
    folder = made_once("evaluation-processes", lambda folder: two_processes(work, str(folder)))
    return [torch.load(folder / f"record{rank}", weights_only=True) for rank in range(PROCESSES)]


# --- what goes wrong ---


class TestBrokenImages:
    def test_they_are_left_out_named_and_nan(self) -> None:
        broken = [0, 4, 5, 10]
        found = measure(pooling(), Source(broken=broken))
        kept = [number for number in range(COUNT) if number not in broken]
        assert [(image.name, image.reason) for image in found.broken] == [
            (f"/somewhere/photo{number:04}.png", f"cannot read photo {number}") for number in broken
        ]
        assert found.images == COUNT - len(broken)
        assert found.broken_places == broken
        assert len(found.names) == COUNT
        for name in ("psnr", "ssim", MSE, KL):
            assert np.isnan(found.values[name][broken]).all()
            assert np.isfinite(found.values[name][kept]).all()
        without = measure(pooling(), Source(kept))
        for name in ("psnr", "ssim", "rfid"):
            assert_same(vars(found.metrics[name]), vars(without.metrics[name]), name)
        assert_same(found.latent.as_json(), without.latent.as_json())

    def test_none_that_can_be_read_is_an_error(self) -> None:
        with pytest.raises(InputError, match=f"^none of {COUNT} images can be read; the first: cannot read photo 0$"):
            measure(pooling(), Source(broken=range(COUNT)))

    def test_a_batch_of_them_alone_is_nothing_to_reconstruct(self) -> None:
        seen: list[int] = []

        def count(x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

        measure(PythonCandidate(count, "count"), Source(broken=[4, 5, 6, 7, 8]))
        assert seen == [4, 2]


def failure(candidate: Candidate, suite: MetricSuite | None = None, protocol: str = "dcae") -> str:
    with pytest.raises(CandidateFailed) as error:
        measure(candidate, protocol=protocol, suite=suite)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[1, 2, 3, 4] = value
        return x

    return spoil


def refuse(x: Tensor) -> Tensor:
    raise InputError("sides of 7 are needed")


class FailsLater(Candidate):
    """Gives another candidate's images until it has seen so many batches."""

    def __init__(self, inner: Candidate, batches: int) -> None:
        super().__init__()
        self.inner = inner
        self.left = batches

    def encode(self, x: Tensor) -> Encoded:
        self.left -= 1
        return self.inner.encode(x)

    def decode(self, latent: Any) -> Decoded:
        images, evaluations = self.inner.decode(latent)
        return Decoded(images if self.left >= 0 else images * math.nan, evaluations)


class TestFailures:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite(self, value: float, protocol: str) -> None:
        told = failure(PythonCandidate(with_one(value), "mine"), protocol=protocol)
        assert told == "gives NaN or infinity in 1 of a batch's 4 images, photo0001.png first"

    @pytest.mark.parametrize(
        ("give", "shape"),
        [
            (lambda x: x[:, :, 1:], "4×3×31×32"),
            (lambda x: x[:, :1], "4×1×32×32"),
            (lambda x: x[:-1], "3×3×32×32"),
            (lambda x: x[0], "3×32×32"),
        ],
    )
    def test_another_shape(self, give: Callable[[Tensor], Tensor], shape: str) -> None:
        assert failure(PythonCandidate(give, "mine")) == f"gives images of shape {shape} for 4×3×32×32"

    def test_an_input_error(self) -> None:
        assert failure(PythonCandidate(refuse, "mine")) == "sides of 7 are needed"

    @pytest.mark.parametrize("protocol", ["dcae", "rae"])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
    def test_images_that_are_no_floating_point_numbers(self, dtype: torch.dtype, protocol: str) -> None:
        """In [0, 255] they would be measured as white."""
        failure(PythonCandidate(lambda x: (127.5 * x + 127.5).to(dtype), "mine"), protocol=protocol)

    def test_no_images_at_all(self) -> None:
        assert "images (B, 3, H, W) are expected" in failure(PythonCandidate(lambda x: None, "mine"))

    def test_any_other_error_stays_what_it_is(self) -> None:
        def divide(x: Tensor) -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            measure(PythonCandidate(divide, "mine"))

    @pytest.mark.parametrize("batches", [0, 1, 2])
    def test_the_candidate_after_one_that_failed_has_the_right_distance(self, batches: int) -> None:
        expected = [record(measure(candidate)) for candidate in (pooling(), BicubicCandidate(2))]
        suite = suite_of(PROTOCOLS["dcae"])
        failure(FailsLater(BicubicCandidate(16), batches), suite)
        assert_same(record(measure(pooling(), suite=suite)), expected[0])
        failure(FailsLater(BicubicCandidate(16), batches), suite)
        assert_same(record(measure(BicubicCandidate(2), suite=suite)), expected[1])
        assert_same(record(measure(pooling(), suite=suite)), expected[0])


class TestShowing:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_what_is_shown_is_what_was_measured(self, protocol: str) -> None:
        settings = EvaluationSettings(PROTOCOLS[protocol], SIDE, batch_size=3, seed=2)
        images = settings.images(Source(broken=[6]))
        found = measure(pooling(), Source(broken=[6]), protocol, seed=2)
        shown = reconstruct_places(pooling(), images, [9, 0, 6, 4, 3], settings, CPU)
        assert [image.place for image in shown] == [9, 0, 4, 3]
        assert [image.name for image in shown] == [found.names[place] for place in (9, 0, 4, 3)]
        for image in shown:
            assert image.original.dtype == image.output.dtype == torch.uint8
            assert metrics.mse(image.original, image.output) == found.values[MSE][image.place]
            prepared = PROTOCOLS[protocol].prepare(Source().read(image.place)[0], SIDE)
            assert torch.equal(image.original, PROTOCOLS[protocol].reference(prepared))

    def test_it_is_the_same_in_batches_of_any_size(self) -> None:
        shown = []
        for batch_size in (1, 2, 5):
            settings = EvaluationSettings(PROTOCOLS["lightningdit"], SIDE, batch_size)
            shown.append(reconstruct_places(pooling(), settings.images(Source()), range(5), settings, CPU))
        for one, other in itertools.pairwise(shown):
            assert all(torch.equal(a.output, b.output) for a, b in zip(one, other, strict=True))

    def test_broken_images_alone_show_nothing(self) -> None:
        settings = EvaluationSettings(PROTOCOLS["dcae"], SIDE)
        assert reconstruct_places(pooling(), settings.images(Source(broken=[1])), [1], settings, CPU) == []

    def test_a_candidate_that_fails(self) -> None:
        settings = EvaluationSettings(PROTOCOLS["dcae"], SIDE)
        with pytest.raises(CandidateFailed, match="NaN or infinity"):
            reconstruct_places(
                PythonCandidate(with_one(math.nan), "mine"), settings.images(Source()), [0, 1], settings, CPU
            )


# --- profiles of latents ---


def profile_of(*posteriors: DiagonalGaussian) -> LatentProfile:
    profiler = LatentProfiler(posteriors[0].mean.shape[1])
    for posterior in posteriors:
        profiler.add(posterior)
    return profiler.profile()


def assert_profile(found: LatentProfile | None, posterior: DiagonalGaussian, tolerance: float = 1e-6) -> None:
    """Against NumPy, of all latents at once."""
    assert found is not None
    mean = posterior.mean.double().numpy()
    by_channel = np.moveaxis(mean, 1, 0).reshape(mean.shape[1], -1)
    covariance = np.cov(by_channel, bias=True)
    variance = by_channel.var(axis=1)
    if posterior.logvar is not None:
        logvar = posterior.logvar.double().numpy()
        variance = variance + np.exp(logvar).mean(axis=(0, 2, 3))
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(2, 3)).mean(axis=0)
        np.testing.assert_allclose(found.kl, kl, rtol=tolerance)
        assert sum(found.kl) == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    else:
        assert found.kl is None
    np.testing.assert_allclose(found.mean, by_channel.mean(axis=1), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=tolerance)
    eigenvalues = np.linalg.eigvalsh(covariance)
    assert found.effective_dimensions == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=tolerance)
    assert found.active_channels == (by_channel.var(axis=1) > 0.01).sum()
    assert found.images == len(mean)


def random_posterior(images: int = 9, shift: float = 0.0) -> DiagonalGaussian:
    """Over 4 channels that hang together; the last varies little."""
    mixing = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0, 0.3, 2.0, 0], [0, 0, 0, 0.05]])
    mean = torch.einsum("ck,bkhw->bchw", mixing, torch.randn(images, 4, 3, 5)) + shift
    return DiagonalGaussian(mean.double(), torch.randn(images, 4, 3, 5).double())


class TestProfile:
    PATTERNS = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])
    """Orthogonal, of mean 0 and variance 1."""

    def channels(self, *rows: Tensor) -> DiagonalGaussian:
        """Two images of two places each."""
        return DiagonalGaussian(torch.stack(rows).reshape(len(rows), 2, 1, 2).transpose(0, 1))

    @pytest.mark.parametrize(
        ("scales", "expected"),
        [((1, 1), 2.0), ((5, 5), 2.0), ((2, 1), 25 / 17), ((1, 0), 1.0), ((0, 0), 0.0)],
    )
    def test_effective_dimensions_of_independent_channels(self, scales: tuple[int, int], expected: float) -> None:
        rows = [scale * pattern + 3 for scale, pattern in zip(scales, self.PATTERNS, strict=True)]
        assert profile_of(self.channels(*rows)).effective_dimensions == pytest.approx(expected)

    def test_channels_that_are_one_have_one_dimension(self) -> None:
        rows = [self.PATTERNS[0], -2 * self.PATTERNS[0] + 1, 0.5 * self.PATTERNS[0]]
        assert profile_of(self.channels(*rows)).effective_dimensions == pytest.approx(1.0)

    def test_mean_and_std_in_closed_form(self) -> None:
        found = profile_of(self.channels(2 * self.PATTERNS[0] + 5, self.PATTERNS[1]))
        assert found.mean == pytest.approx([5.0, 0.0])
        assert found.std == pytest.approx([2.0, 1.0])
        assert found.kl is None
        assert found.images == 2

    def test_kl_in_closed_form(self) -> None:
        """Of N(m, s²): ½ (m² + s² - 1 - ln s²), here at 6 places."""
        mean = torch.tensor([0.0, 1.0, -2.0]).reshape(1, 3, 1, 1).expand(4, 3, 2, 3)
        logvar = torch.tensor([0.0, 0.0, math.log(4)]).reshape(1, 3, 1, 1).expand(4, 3, 2, 3)
        found = profile_of(DiagonalGaussian(mean, logvar))
        assert found.kl == pytest.approx([0.0, 3.0, 3 * (4 + 4 - 1 - math.log(4))])
        assert found.std == pytest.approx([1.0, 1.0, 2.0])

    def test_channels_are_active_by_the_variance_of_their_mean(self) -> None:
        rows = [math.sqrt(variance) * self.PATTERNS[0] for variance in (0.0, 0.0099, 0.0101, 1.0)]
        mean = self.channels(*rows).mean
        assert profile_of(DiagonalGaussian(mean, torch.zeros_like(mean))).active_channels == 2

    @pytest.mark.parametrize("shift", [0.0, 1e3])
    def test_it_is_numpys(self, shift: float) -> None:
        posterior = random_posterior(shift=shift)
        assert_profile(profile_of(posterior), posterior)
        assert_profile(profile_of(DiagonalGaussian(posterior.mean)), DiagonalGaussian(posterior.mean))

    @pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [2, 3, 4], [1, 8], [8, 1]])
    @pytest.mark.parametrize("shift", [0.0, 1e3])
    def test_any_split_and_any_merging_gives_the_same(self, sizes: list[int], shift: float) -> None:
        posterior = random_posterior(shift=shift)
        assert posterior.logvar is not None
        parts = [
            DiagonalGaussian(mean, logvar)
            for mean, logvar in zip(posterior.mean.split(sizes), posterior.logvar.split(sizes), strict=True)
        ]
        whole = profile_of(posterior)
        assert_same(profile_of(*parts).as_json(), whole.as_json())
        for order in (parts, parts[::-1]):
            merged = LatentProfiler(4)
            for part in order:
                one = LatentProfiler(4)
                one.add(part)
                one.merge(LatentProfiler(4))
                merged.merge(one)
            assert_same(merged.profile().as_json(), whole.as_json())

    def test_one_part_without_a_variance_leaves_no_kl(self) -> None:
        posterior = random_posterior()
        point = DiagonalGaussian(posterior.mean)
        assert profile_of(posterior, point).kl is None
        assert profile_of(point, posterior).kl is None
        first, second = LatentProfiler(4), LatentProfiler(4)
        first.add(posterior)
        second.add(point)
        first.merge(second)
        assert first.profile().kl is None

    def test_another_number_of_channels_is_refused(self) -> None:
        profiler = LatentProfiler(4)
        with pytest.raises(InputError, match="4"):
            profiler.add(DiagonalGaussian(torch.zeros(1, 3, 2, 2)))
        with pytest.raises(InputError, match="4 channels; these latents have 3"):
            profiler.merge(LatentProfiler(3))

    def test_what_is_not_finite_is_none_in_a_file(self) -> None:
        profile = LatentProfile([0.0, math.nan], [1.0, math.inf], None, math.nan, 1, 3)
        assert profile.as_json() == {
            "mean": [0.0, None],
            "std": [1.0, None],
            "kl": None,
            "effective_dimensions": None,
            "active_channels": 1,
            "images": 3,
        }


# --- memory ---

FEW, MANY = 4_000, 12_000
HELD = 2 * 3 * SIDE**2 * (MANY - FEW)
"""Bytes that the further images and their reconstructions have, as uint8: 49 MB."""

BOUND = HELD // 4


def high_water_mark() -> int:
    """The largest resident set that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")


def memory_work(folder: str) -> None:
    """Evaluate few images, then many, then few with a metric that keeps them; write the growth of each."""
    torch.set_num_threads(1)
    kept: list[Tensor] = []

    def keeps(reference: Tensor, images: Tensor) -> Tensor:
        kept.extend((reference.clone(), images.clone()))
        return metrics.mse_each(reference, images)

    suite = suite_of(PROTOCOLS["dcae"])
    suite.images.pop("ssim")
    suite.missing["ssim"] = "not asked for"
    growth = []
    for count, metric in ((FEW, metrics.mse_each), (MANY, metrics.mse_each), (FEW, keeps)):
        suite.images[MSE] = metric
        before = high_water_mark()
        found = measure(pooling(), Grey([index % 256 for index in range(count)]), suite=suite, batch_size=50)
        assert found.images == count
        growth.append(high_water_mark() - before)
    torch.save(growth, f"{folder}/growth")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not tell a process's peak memory")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """The peak of a process that has measured 4,000 images hardly rises when it measures 12,000.

    Held as uint8, the 8,000 further images and their reconstructions would be 49 MB, and four times that as floats.
    The bound is a quarter of the 49 MB, for values, names and what the allocator does. It leaves the bootstrap aside,
    which from 4,000 images on goes through its resamples in several blocks of one size. A metric that does keep half
    as many images shows that the bound would notice.
    """
    process = multiprocessing.get_context("spawn").Process(target=memory_work, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    _, growth, growth_of_one_that_keeps_them = torch.load(tmp_path / "growth", weights_only=True)
    print(f"grew by {growth / 2**20:.1f} MiB; with what is kept {growth_of_one_that_keeps_them / 2**20:.1f} MiB")
    assert growth < BOUND
    assert growth_of_one_that_keeps_them > BOUND
