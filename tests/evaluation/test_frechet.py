"""The distance between sets against torchmetrics and closed forms; its interval; the reference that is kept."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.estimates import Estimate, around
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.randomness import resampling_counts

CHANNELS = 6
COUNT = 40


def rows(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Features, in place of images, of a set and of its reconstructions."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.3, 1.0, 2.0, 0.5, 0.1, 1.0])
    reference = torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64) * scales
    return reference, 0.8 * reference + 0.3 * torch.randn(reference.shape, generator=generator) + 0.1


def distance(replicates: int = 20, channels: int = CHANNELS, **given: Any) -> FrechetDistance:
    return FrechetDistance(lambda features: features, channels, replicates, **given)


def add_all(measure: FrechetDistance, reference: Tensor, images: Tensor, batch_size: int = 16) -> None:
    for places in torch.arange(len(images)).split(batch_size):
        measure.add(reference[places], images[places], [f"folder/image{place}.png" for place in places])


def measured(measure: FrechetDistance, reference: Tensor, images: Tensor, *given: Any) -> Estimate:
    add_all(measure, reference, images, *given)
    return measure.finish(Processes())


def of_arrays(real: np.ndarray, fake: np.ndarray) -> float | None:
    return measured(distance(0, real.shape[1]), torch.from_numpy(real), torch.from_numpy(fake), 100).value


def assert_same(found: Estimate, expected: Estimate) -> None:
    assert found.reason == expected.reason
    for key in ("value", "low", "high") if expected.reason is None else ():
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=1e-6, abs=1e-6)


# --- the value ---


def test_it_is_torchmetrics_distance() -> None:
    identity = nn.Identity()
    identity.num_features = CHANNELS  # type: ignore[assignment]
    theirs, (reference, images) = FrechetInceptionDistance(feature=identity), rows()
    theirs.update(reference, real=True)
    theirs.update(images, real=False)
    expected, found = float(theirs.compute()), measured(distance(), reference, images)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert 0.0 <= found.low < expected < found.high  # type: ignore[operator]
    same = measured(distance(), reference, reference)
    assert (same.value, same.low) == (pytest.approx(0.0, abs=1e-3), 0.0)


@pytest.mark.parametrize(("shift", "scale", "away"), [(0.0, 1.0, 0.0), (3.0, 0.5, 0.0), (1.0, 1.0, 1e4)])
def test_gaussians_of_diagonal_covariance_have_the_closed_form(shift: float, scale: float, away: float) -> None:
    """Far from 0 the covariance is a small difference of large numbers."""

    def whitened(seed: int) -> np.ndarray:
        """Rows of mean 0 and of sample covariance exactly the identity."""
        drawn = np.random.default_rng(seed).normal(size=(60, 4))
        columns, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
        return columns * math.sqrt(59)

    deviations, means = np.array([0.3, 1.0, 2.0, 5.0]), shift * np.array([1.0, -1.0, 0.5, 0.0])
    found = of_arrays(whitened(1) * deviations + away, whitened(2) * scale * deviations[::-1] + means + away)
    expected = (means**2).sum() + ((deviations - scale * deviations[::-1]) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-9 if not away else 1e-3)


def test_singular_covariances_are_no_obstacle() -> None:
    """Of fewer images than features, which costs about half of the digits; of features that follow from others."""
    rng = np.random.default_rng(0)
    few, dependent = rng.normal(size=(5, 16)), rng.normal(size=(60, 4)) * [1.0, 1.0, 0.0, 0.0]
    dependent[:, 1] = 2.0 * dependent[:, 0]
    for real in (few, dependent):
        expected = (real.mean(axis=0) ** 2).sum() + np.cov(real.T).trace()
        assert of_arrays(real, 2.0 * real) == pytest.approx(expected, rel=1e-5)


# --- however the work is cut ---


class OnApplesGPU:
    """Features that have to be moved before they can be converted: that device has no float64."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def to(self, device: torch.device) -> Tensor:
        return self.features.to(device)


def test_a_device_without_float64_leaves_the_sums_to_the_cpu() -> None:
    measure = FrechetDistance(OnApplesGPU, CHANNELS, device="mps")  # type: ignore[arg-type]
    assert measured(measure, *rows()) == measured(distance(), *rows())


def test_the_reference_is_kept_and_not_looked_at_again() -> None:
    """Also where a pass in between was given up."""
    (reference, images), nothing, seen = rows(), torch.full((COUNT, CHANNELS), 7.0), []
    measure = FrechetDistance(lambda features: seen.append(len(features)) or features, CHANNELS)  # type: ignore[func-returns-value]
    add_all(measure, nothing, images / 3)
    measure.discard()
    first = measured(measure, reference, images)
    assert first == measured(distance(), reference, images)
    seen.clear()
    add_all(measure, nothing, images / 3)
    measure.discard()
    second = measured(measure, nothing, images / 2)
    assert sum(seen) == 2 * COUNT
    assert_same(second, measured(distance(), reference, images / 2))
    assert second.value > 1.5 * first.value  # type: ignore[operator]
    assert measured(measure, nothing, images) == first


# --- the interval ---


def test_a_replicate_draws_an_image_and_its_reconstruction_together() -> None:
    """As often as the bootstrap says, of their names."""
    (reference, images), names = rows(), [f"folder/image{place}.png" for place in range(COUNT)]
    counts = torch.from_numpy(resampling_counts(3, names, 5)).T
    drawn = [[side.repeat_interleave(count, dim=0).numpy() for side in (reference, images)] for count in counts]
    found = measured(distance(5, seed=3), reference, images)
    replicates = np.array([of_arrays(*sides) for sides in drawn])
    assert_same(found, around(found.value or 0.0, replicates))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images(count: int) -> None:
    """Fewer than two have no distance; of two images some replicates, which have drawn neither, are left out."""
    measure = distance(50)
    measure.add(*(side[:0] for side in rows()), [])
    found = measured(measure, *rows(count))
    if count < 2:
        assert found == Estimate(reason="a distance between sets needs at least two images")
    else:
        assert found.low <= found.value <= found.high < math.inf  # type: ignore[operator]
