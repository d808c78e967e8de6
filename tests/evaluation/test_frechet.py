"""The distance between sets against torchmetrics and closed forms; its interval; passes, batches and processes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import t
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from two_processes import PROCESSES, TwoProcesses

from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.estimates import Estimate
from dc_ssdae.evaluation.frechet import BUFFERED_ROWS, REPLICATES, FrechetDistance

CHANNELS = 6
COUNT = 40
SHAPE = (3, 4, 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Features(nn.Module):
    """A fixed projection of images, in float32; remembers how many images it was given at a time."""

    num_features = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.randn(math.prod(SHAPE), CHANNELS, generator=generator) / 400.0
        self.calls: list[int] = []

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        self.calls.append(len(pixels))
        return torch.tanh(pixels.float().flatten(1) @ self.weight)


class InFloat64(Features):
    """The same values in float64, by which torchmetrics judges how it ends."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).double()


class Table:
    """Features of images whose pixels are all the number of a row."""

    def __init__(self, *tables: np.ndarray) -> None:
        self.rows = torch.from_numpy(np.concatenate(tables))

    def __call__(self, pixels: Tensor) -> Tensor:
        numbers = pixels[:, 0, 0, 0].long() + 256 * pixels[:, 1, 0, 0].long()
        return self.rows[numbers]


def numbered(first: int, count: int) -> Tensor:
    """Images for a `Table`."""
    numbers = torch.arange(first, first + count)
    channels = torch.stack([numbers % 256, numbers // 256, torch.zeros_like(numbers)], dim=1)
    return channels[:, :, None, None].expand(-1, -1, 2, 2).to(torch.uint8)


def noise(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def image_names(count: int) -> list[str]:
    return [f"folder/image{place}.png" for place in range(count)]


def sets(seed: int = 0, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Images and their reconstructions, darker and with noise."""
    reference = noise(count, seed)
    strength = 40.0 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(100 + seed))
    return reference, (0.8 * reference + strength).round().clamp(0, 255).to(torch.uint8)


def measured(
    distance: FrechetDistance, reference: Tensor, images: Tensor, batch_size: int = 16, order: Sequence[int] = ()
) -> Estimate:
    add_all(distance, reference, images, batch_size, order)
    return distance.finish(Processes())


def add_all(
    distance: FrechetDistance, reference: Tensor, images: Tensor, batch_size: int = 16, order: Sequence[int] = ()
) -> None:
    names = image_names(len(images))
    places = list(order) or list(range(len(images)))
    for start in range(0, len(places), batch_size):
        here = places[start : start + batch_size]
        distance.add(reference[here], images[here], [names[place] for place in here])


def assert_same(found: Estimate, expected: Estimate, tolerance: float = 1e-6) -> None:
    numbers = [(getattr(found, key), getattr(expected, key)) for key in ("value", "low", "high")]
    for ours, theirs in numbers:
        assert ours is not None
        assert theirs is not None
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


# --- the value ---


def test_it_is_torchmetrics_distance() -> None:
    reference, images = sets()
    theirs = FrechetInceptionDistance(feature=InFloat64())
    theirs.update(reference, real=True)
    theirs.update(images, real=False)
    expected = theirs.compute()
    assert expected.dtype == torch.float64
    found = measured(FrechetDistance(Features(), CHANNELS), reference, images)
    assert expected > 0.01
    assert found.value == pytest.approx(float(expected), rel=1e-6)


def test_the_two_sides_are_not_mixed_up() -> None:
    """The distance is the same both ways, but the reference is the side that stays."""
    reference, images = sets()
    distance = FrechetDistance(Features(), CHANNELS)
    measured(distance, reference, images)
    found = measured(distance, images, reference)
    assert found.value == pytest.approx(0.0, abs=1e-6)


def test_a_set_is_at_no_distance_from_itself() -> None:
    reference, _ = sets()
    found = measured(FrechetDistance(Features(), CHANNELS), reference, reference)
    assert found.value is not None
    assert 0.0 <= found.value < 1e-3
    assert found.low == 0.0
    assert found.high is not None
    assert found.high < 1e-3


def test_two_halves_of_noise_are_at_a_small_distance() -> None:
    value = measured(FrechetDistance(Features(), CHANNELS, replicates=0), noise(200, 1), noise(200, 2)).value
    far = measured(FrechetDistance(Features(), CHANNELS, replicates=0), noise(200, 1), noise(200, 2) // 2).value
    assert value is not None
    assert far is not None
    assert 1e-4 < value < 0.5 * far


def whitened(count: int, channels: int, seed: int) -> np.ndarray:
    """Rows of mean 0 and of sample covariance exactly the identity."""
    drawn = np.random.default_rng(seed).normal(size=(count, channels))
    columns, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
    return columns * math.sqrt(count - 1)


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gaussians_of_diagonal_covariance_have_the_closed_form(shift: float, scale: float) -> None:
    deviations = np.array([0.3, 1.0, 2.0, 5.0])
    other_deviations = scale * deviations[::-1] if scale != 1.0 else deviations
    means = shift * np.array([1.0, -1.0, 0.5, 0.0])
    real, fake = whitened(60, 4, 1) * deviations, whitened(60, 4, 2) * other_deviations + means
    distance = FrechetDistance(Table(real, fake), 4, replicates=0)
    expected = (means**2).sum() + ((deviations - other_deviations) ** 2).sum()
    assert measured(distance, numbered(0, 60), numbered(60, 60)).value == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_fewer_images_than_features_have_a_distance() -> None:
    """Their covariances are singular, which costs about half of the digits and no more."""
    real = np.random.default_rng(0).normal(size=(5, 16))
    found = measured(FrechetDistance(Table(real, 2.0 * real), 16), numbered(0, 5), numbered(5, 5))
    centred = real - real.mean(axis=0)
    assert found.value == pytest.approx((real.mean(axis=0) ** 2).sum() + (centred**2).sum() / 4, rel=1e-5)


def test_features_that_never_change_are_no_obstacle() -> None:
    """The covariance is singular however many images there are."""
    real = np.random.default_rng(0).normal(size=(60, 4)) * [1.0, 1.0, 0.0, 0.0]
    real[:, 1] = 2.0 * real[:, 0]
    found = measured(FrechetDistance(Table(real, 3.0 * real), 4), numbered(0, 60), numbered(60, 60))
    assert found.value == pytest.approx(4.0 * (real.mean(axis=0) ** 2).sum() + 4.0 * np.cov(real.T).trace(), rel=1e-9)


def test_more_images_than_are_buffered_count_once() -> None:
    count = 2 * BUFFERED_ROWS + 3
    rows = np.random.default_rng(0).normal(size=(count, 3))
    distance = FrechetDistance(Table(rows, rows @ np.diag([1.0, 2.0, 3.0]) + 1.0), 3, replicates=0)
    found = measured(distance, numbered(0, count), numbered(count, count), 100)
    other = rows @ np.diag([1.0, 2.0, 3.0]) + 1.0
    root = sqrtm(np.cov(rows.T) @ np.cov(other.T)).real
    means = ((rows.mean(axis=0) - other.mean(axis=0)) ** 2).sum()
    assert found.value == pytest.approx(means + (np.cov(rows.T) + np.cov(other.T) - 2 * root).trace(), rel=1e-8)


# --- batches, order and devices ---


@pytest.mark.parametrize("batch_size", [1, 7, COUNT])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    reference, images = sets()
    expected = measured(FrechetDistance(Features(), CHANNELS), reference, images)
    assert_same(measured(FrechetDistance(Features(), CHANNELS), reference, images, batch_size), expected)


def test_the_order_changes_nothing() -> None:
    reference, images = sets()
    expected = measured(FrechetDistance(Features(), CHANNELS), reference, images)
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    assert_same(measured(FrechetDistance(Features(), CHANNELS), reference, images, 7, order), expected)


def test_sums_are_kept_in_float64() -> None:
    """Far from 0 the covariance is a small difference of large numbers."""
    real = whitened(60, 4, 1) + 1e4
    found = measured(FrechetDistance(Table(real, real + 1.0), 4), numbered(0, 60), numbered(60, 60))
    assert found.value == pytest.approx(4.0, rel=1e-3)


class OnApplesGPU:
    """Features that have to be moved before they can be converted: that device has no float64."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def to(self, device: torch.device) -> Tensor:
        return self.features.to(device)

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")


def test_a_device_without_float64_leaves_the_sums_to_the_cpu() -> None:
    features = Features()
    distance = FrechetDistance(lambda pixels: OnApplesGPU(features(pixels)), CHANNELS, device="mps")  # type: ignore[arg-type, return-value]
    assert distance.device == torch.device("cpu")
    reference, images = sets()
    assert measured(distance, reference, images) == measured(FrechetDistance(Features(), CHANNELS), reference, images)


def test_no_random_numbers_are_drawn_from_the_default_generator() -> None:
    state = torch.get_rng_state()
    measured(FrechetDistance(Features(), CHANNELS), *sets())
    assert torch.equal(torch.get_rng_state(), state)


# --- several candidates ---


def test_the_reference_is_kept_and_not_looked_at_again() -> None:
    features = Features()
    distance = FrechetDistance(features, CHANNELS)
    reference, images = sets()
    assert not distance.has_reference
    first = measured(distance, reference, images)
    assert distance.has_reference
    assert sum(features.calls) == 2 * COUNT

    others = images // 2
    features.calls.clear()
    second = measured(distance, torch.zeros_like(reference), others)
    assert sum(features.calls) == COUNT
    assert_same(second, measured(FrechetDistance(Features(), CHANNELS), reference, others))
    assert second.value is not None
    assert first.value is not None
    assert second.value > 1.5 * first.value

    third = measured(distance, torch.zeros_like(reference), images)
    assert third == first


@pytest.mark.parametrize("seen", [1, 16, COUNT])
def test_a_pass_that_is_given_up_leaves_no_trace(seen: int) -> None:
    reference, images = sets()
    expected = measured(FrechetDistance(Features(), CHANNELS), reference, images)
    distance = FrechetDistance(Features(), CHANNELS)
    add_all(distance, noise(seen, 8), noise(seen, 9), 3)
    distance.discard()
    assert not distance.has_reference
    assert measured(distance, reference, images) == expected


def test_a_later_pass_that_is_given_up_leaves_the_reference() -> None:
    reference, images = sets()
    features = Features()
    distance = FrechetDistance(features, CHANNELS)
    expected = measured(distance, reference, images)
    add_all(distance, noise(16, 8), noise(16, 9))
    distance.discard()
    distance.discard()
    features.calls.clear()
    assert measured(distance, noise(COUNT, 8), images) == expected
    assert sum(features.calls) == COUNT


# --- the interval ---


def test_the_interval_holds_the_value() -> None:
    for seed in range(5):
        found = measured(FrechetDistance(Features(), CHANNELS), *sets(seed))
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        assert 0.0 <= found.low < found.value < found.high


@pytest.mark.parametrize("replicates", [0, 1])
def test_without_replicates_there_is_no_interval(replicates: int) -> None:
    reference, images = sets()
    found = measured(FrechetDistance(Features(), CHANNELS, replicates), reference, images)
    full = measured(FrechetDistance(Features(), CHANNELS), reference, images)
    assert found == Estimate(full.value)


def test_the_seed_draws_the_replicates() -> None:
    reference, images = sets()
    first, again, other = (
        measured(FrechetDistance(Features(), CHANNELS, seed=seed), reference, images) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.value == other.value
    assert first.low != other.low


def deviation(estimate: Estimate, replicates: int) -> float:
    """The replicates' standard deviation, from the interval."""
    assert estimate.value is not None
    assert estimate.high is not None
    return (estimate.high - estimate.value) / float(t.ppf(0.975, replicates - 1))


def paired_features(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of images and of reconstructions that resemble them closely."""
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(count, 3)) * [1.0, 2.0, 0.5]
    return real, 0.8 * real + 0.3 * rng.normal(size=real.shape) + [0.5, -0.3, 0.2]


def test_the_replicates_vary_as_independent_data_sets_do() -> None:
    """And an image is drawn together with its reconstruction: the two sets alone would vary much more."""
    count, replicates = 300, 40

    def value(real: np.ndarray, fake: np.ndarray, replicates: int = 0) -> Estimate:
        distance = FrechetDistance(Table(real, fake), 3, replicates)
        return measured(distance, numbered(0, count), numbered(count, count), count)

    independent = [value(*paired_features(seed, count)).value for seed in range(100)]
    unpaired = [
        value(paired_features(seed, count)[0], paired_features(1000 + seed, count)[1]).value for seed in range(100)
    ]
    truth, loose = np.std(independent, ddof=1), np.std(unpaired, ddof=1)  # type: ignore[arg-type]
    assert loose > 2.0 * truth
    estimates = [value(*paired_features(seed, count), replicates) for seed in range(200, 206)]
    ours = np.mean([deviation(estimate, replicates) for estimate in estimates])
    # The truth is known to 7 %, ours to about 6 %.
    assert 0.75 < ours / truth < 1.3


# --- too few images ---


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_a_reason(count: int) -> None:
    distance = FrechetDistance(Features(), CHANNELS)
    found = measured(distance, *sets(count=count))
    assert found == Estimate(reason="a distance between sets needs at least two images")


def test_an_empty_batch_changes_nothing() -> None:
    reference, images = sets()
    distance = FrechetDistance(Features(), CHANNELS)
    distance.add(reference[:0], images[:0], [])
    expected = measured(FrechetDistance(Features(), CHANNELS), reference, images)
    assert measured(distance, reference, images) == expected


def test_of_two_images_some_replicates_are_left_out() -> None:
    """A replicate can have drawn none of them."""
    found = measured(FrechetDistance(Features(), CHANNELS, replicates=50), *sets(count=2))
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    assert math.isfinite(found.high)
    assert found.low <= found.value <= found.high


# --- two processes ---

PASSES = (COUNT, 3, 1)
"""Images; of one image the second process has none."""


def passes(processes: Processes) -> Iterator[Estimate]:
    """Two candidates of data sets of several sizes, the second one against the reference that was kept."""
    for count in PASSES:
        reference, images = sets(count=count)
        distance = FrechetDistance(Features(), CHANNELS, replicates=5)
        add_all(distance, reference, images.flip(2), 3, processes.share(count)[: count // 2 or None])
        distance.discard()
        for candidate in (images, images // 2):
            if len(processes.share(count)):
                add_all(distance, reference, candidate, 3, processes.share(count))
            yield distance.finish(processes)


def work(rank: int, folder: str) -> None:
    found = [estimate.as_json() for estimate in passes(Processes(rank, PROCESSES))]
    torch.save(found, f"{folder}/record{rank}")


@pytest.fixture(scope="module")
def records(made_once: Any, two_processes: TwoProcesses) -> list[list[dict[str, Any]]]:
    folder = made_once("frechet-processes", lambda folder: two_processes(work, str(folder)))
    return [torch.load(folder / f"record{rank}", weights_only=True) for rank in range(PROCESSES)]


def test_two_processes_find_what_one_does(records: list[list[dict[str, Any]]]) -> None:
    expected = list(passes(Processes()))
    assert len(records[0]) == len(expected) == 2 * len(PASSES)
    for found, alone in zip(records[0], expected, strict=True):
        if alone.value is None:
            assert found == alone.as_json()
        else:
            assert_same(Estimate(**found), alone)
    assert [estimate.value is None for estimate in expected] == [False] * 4 + [True] * 2


def test_the_main_process_alone_tells_the_distance(records: list[list[dict[str, Any]]]) -> None:
    for found in records[1]:
        assert found["value"] is None
        assert found["reason"] == "told by the main process"


def test_the_default_keeps_enough_replicates() -> None:
    distance = FrechetDistance(Features(), CHANNELS)
    estimate = measured(distance, *sets())
    more = measured(FrechetDistance(Features(), CHANNELS, replicates=200), *sets())
    # A standard deviation of 20 replicates is known to 16 %.
    assert deviation(estimate, REPLICATES) == pytest.approx(deviation(more, 200), rel=0.5)
