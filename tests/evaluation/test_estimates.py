"""Intervals against brute force and theory, and figures that are not finite."""

import itertools
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest

from dc_ssdae.evaluation.estimates import METRICS, Estimate, around, bootstrap, pooled_psnr

ODD_VALUES = [math.inf, -math.inf, math.nan, None, 0.0, -0.0, 1e-300, 27.125]


def skewed(count: int, seed: int = 0) -> np.ndarray:
    """As errors are: positive, with a long tail."""
    return np.random.default_rng(seed).gamma(2.0, 0.5, count)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


# --- the bootstrap ---


def by_brute_force(values: np.ndarray, statistic: Any, resamples: int) -> tuple[float, float]:
    rng = np.random.default_rng(12345)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize(
    ("statistic", "reference"),
    [
        (np.mean, np.mean),
        (np.median, np.median),
        (pooled_psnr, lambda drawn: -10.0 * math.log10(sum(drawn) / len(drawn))),
    ],
    ids=["mean", "median", "pooled PSNR"],
)
def test_the_interval_is_that_of_a_bootstrap_by_hand(statistic: Any, reference: Any) -> None:
    values = skewed(40)
    estimate = bootstrap(values, statistic, resamples=20_000)
    assert estimate.value == pytest.approx(reference(values), rel=1e-12)
    low, high = ends(estimate)
    expected = by_brute_force(values, reference, 20_000)
    # Each end is a quantile of 20 000 draws, and off by about 2 % of the half width.
    tolerance = 0.1 * (expected[1] - expected[0]) / 2
    assert (low, high) == pytest.approx(expected, abs=tolerance)
    assert low < estimate.value < high


def test_many_images_have_the_interval_of_normal_theory() -> None:
    values = skewed(4000)
    estimate = bootstrap(values, resamples=8000)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean(), rel=1e-12)
    assert ends(estimate) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )


def test_a_thousand_resamples_are_enough_to_show() -> None:
    values = skewed(500)
    low, high = ends(bootstrap(values))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(500), rel=0.1)


@pytest.mark.parametrize("statistic", [np.mean, np.median, pooled_psnr])
def test_the_order_of_images_changes_no_bit(statistic: Any) -> None:
    values = skewed(101)
    rng = np.random.default_rng(1)
    orders = [values, values[::-1], *(rng.permutation(values) for _ in range(5))]
    assert len({bootstrap(order, statistic) for order in orders}) == 1


def test_the_seed_draws_the_resamples_and_nothing_else() -> None:
    values = skewed(30)
    state = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    first, again, other = bootstrap(values), bootstrap(values), bootstrap(values, seed=1)
    assert first == again
    assert first.value == other.value
    assert first.low != other.low
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index] # noqa: NPY002


def test_the_values_are_left_as_they_are() -> None:
    values = skewed(20)
    before = values.copy()
    bootstrap(values)
    np.testing.assert_array_equal(values, before)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 50 normal values a percentile interval of 95 % covers the mean in 94 % of all cases."""
    rng = np.random.default_rng(3)
    trials, covered = 300, 0
    for trial in range(trials):
        low, high = ends(bootstrap(rng.normal(7.0, 2.0, 50), seed=trial, resamples=300))
        covered += low <= 7.0 <= high
    assert 0.89 <= covered / trials <= 0.98


def test_memory_does_not_grow_with_images_times_resamples() -> None:
    """As for 50 000 images: resamples are drawn some at a time."""
    widest = 0

    def watched(values: np.ndarray, axis: int = 0) -> Any:
        nonlocal widest
        widest = max(widest, values.size)
        return values.mean(axis=axis)

    bootstrap(skewed(50_000), watched, resamples=60)
    assert 50_000 < widest <= 2_000_000


@pytest.mark.parametrize("values", [[3.5], [math.inf], [math.inf, 30.0, 31.0], [math.inf, math.inf], [math.nan, 1.0]])
def test_there_is_no_interval_of_one_image_or_of_one_that_is_not_finite(values: list[float]) -> None:
    estimate = bootstrap(np.array(values))
    assert (estimate.low, estimate.high, estimate.reason) == (None, None, None)
    assert estimate.value == pytest.approx(np.mean(values), nan_ok=True)


def test_no_image_has_no_value_but_a_reason() -> None:
    assert bootstrap(np.array([])) == Estimate(reason="no image was measured")


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap(np.full(9, 0.25)) == Estimate(0.25, 0.25, 0.25)


# --- the PSNR of pooled errors ---


def test_pooled_psnr_is_the_closed_form() -> None:
    errors = np.array([1e-2, 1e-4, 0.0])
    assert pooled_psnr(errors) == pytest.approx(-10.0 * math.log10((1e-2 + 1e-4) / 3), rel=1e-12)
    assert pooled_psnr(np.array([1.0])) == 0.0
    assert pooled_psnr(np.array([0.01, 0.01])) == pytest.approx(20.0, rel=1e-12)
    table = np.array([[0.1, 0.3], [0.01, 0.03]])
    assert pooled_psnr(table, axis=1) == pytest.approx(-10.0 * np.log10([0.2, 0.02]), rel=1e-12)
    assert pooled_psnr(table, axis=-1) == pytest.approx(pooled_psnr(table, axis=1), rel=0)


def test_pooled_psnr_is_at_most_the_mean_of_psnrs() -> None:
    errors = skewed(50) / 100
    assert pooled_psnr(errors) < np.mean([pooled_psnr(errors[i : i + 1]) for i in range(50)])


def test_the_interval_of_pooled_psnr_is_that_of_the_mean_error() -> None:
    """The logarithm keeps the order: only the interpolation between two neighbouring resamples differs."""
    errors = skewed(60) / 100
    low, high = ends(bootstrap(errors, pooled_psnr))
    least, most = ends(bootstrap(errors))
    assert (low, high) == pytest.approx((-10 * math.log10(most), -10 * math.log10(least)), abs=1e-3)


def test_perfect_images_have_an_infinite_pooled_psnr_without_an_interval() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap(np.zeros(5), pooled_psnr) == Estimate(math.inf)


def test_few_images_of_which_some_are_perfect_have_no_interval_with_an_infinite_end() -> None:
    """Some resamples of two images hold the perfect one alone, whose PSNR is infinite."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = bootstrap(np.array([0.0, 0.01]), pooled_psnr)
    assert estimate.value == pytest.approx(-10.0 * math.log10(0.005), rel=1e-12)
    assert "inf" not in estimate.interval_text(2)
    assert (estimate.low is None) == (estimate.as_json()["high"] is None)


# --- intervals around distances ---


def test_the_interval_around_a_distance_is_students() -> None:
    replicates = np.array([5.0, 6.0, 7.0, 9.0])
    deviation = math.sqrt(((replicates - 6.75) ** 2).sum() / 3)
    estimate = around(12.0, replicates)
    # 3.182446305… is the 97.5 % quantile of Student's t with 3 degrees of freedom.
    assert ends(estimate) == pytest.approx((12.0 - 3.182446305 * deviation, 12.0 + 3.182446305 * deviation), rel=1e-9)
    assert estimate.value == 12.0


def test_the_replicates_mean_does_not_matter() -> None:
    replicates = np.array([5.0, 6.0, 7.0, 9.0])
    assert ends(around(12.0, replicates)) == pytest.approx(ends(around(12.0, replicates + 100.0)), rel=1e-12)


def test_a_distance_is_not_negative() -> None:
    low, high = ends(around(0.5, np.array([0.0, 10.0])))
    assert low == 0.0
    assert high > 0.5
    assert around(0.0, np.array([0.0, 0.0, 0.0])) == Estimate(0.0, 0.0, 0.0)


def test_replicates_that_are_not_finite_are_left_out() -> None:
    replicates = np.array([5.0, math.nan, 6.0, math.inf, 8.0])
    assert around(7.0, replicates) == around(7.0, np.array([5.0, 6.0, 8.0]))
    for too_few in ([], [5.0], [5.0, math.nan], [math.nan, math.inf]):
        assert around(7.0, np.array(too_few)) == Estimate(7.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_distance_that_is_not_finite_has_no_interval(value: float) -> None:
    estimate = around(value, np.array([1.0, 2.0, 3.0]))
    assert (estimate.low, estimate.high) == (None, None)


# --- how it is written ---


def test_it_is_json_whatever_it_holds() -> None:
    for numbers in itertools.product(ODD_VALUES, repeat=3):
        found = json.loads(json.dumps(Estimate(*numbers).as_json(), allow_nan=False))
        for key, given in zip(("value", "low", "high"), numbers, strict=True):
            assert found[key] == (given if given is not None and math.isfinite(given) else None)


def test_json_says_why_there_is_no_number() -> None:
    numbers = {"value": None, "low": None, "high": None}
    assert Estimate().as_json() == numbers
    assert Estimate(math.inf).as_json() == {**numbers, "reason": "infinite"}
    assert Estimate(-math.inf).as_json() == {**numbers, "reason": "-inf"}
    assert Estimate(math.nan).as_json() == {**numbers, "reason": "nan"}
    assert Estimate(reason="not asked for").as_json() == {**numbers, "reason": "not asked for"}
    assert Estimate(math.inf, reason="all equal").as_json()["reason"] == "all equal"


def test_json_has_what_there_is_to_know() -> None:
    estimate = Estimate(1.5, 1.0, 2.0).noted("random weights")
    assert estimate.as_json() == {"value": 1.5, "low": 1.0, "high": 2.0, "note": "random weights"}
    assert estimate.noted(None) == Estimate(1.5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (27.125, 2, "27.12"),
        (27.126, 2, "27.13"),
        (0.99996, 4, "1.0000"),
        (3.0, 0, "3"),
        (None, 2, "–"),
        (math.inf, 2, "∞"),
        (-math.inf, 2, "-inf"),
        (math.nan, 2, "nan"),
    ],
)
def test_a_value_in_words(value: float | None, digits: int, text: str) -> None:
    assert Estimate(value).text(digits) == text


def test_an_interval_in_words() -> None:
    assert Estimate(2.0, 1.0, 3.456).interval_text(2) == "1.00 to 3.46"
    for estimate in (Estimate(2.0), Estimate(2.0, 1.0), Estimate(2.0, None, 3.0), Estimate()):
        assert estimate.interval_text(2) == ""


def test_the_metrics_and_which_way_is_better() -> None:
    assert list(METRICS) == ["psnr", "ssim", "lpips", "dreamsim", "rfid", "rfdd"]
    assert [name for name, info in METRICS.items() if info.more_is_better] == ["psnr", "ssim"]
    assert [name for name, info in METRICS.items() if info.unit] == ["psnr"]
