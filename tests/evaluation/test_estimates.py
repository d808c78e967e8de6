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


def skewed(count: int) -> np.ndarray:
    """As errors are: positive, with a long tail."""
    return np.random.default_rng(0).gamma(2.0, 0.5, count)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


@pytest.mark.parametrize("statistic", [np.mean, pooled_psnr])
def test_the_interval_is_that_of_a_bootstrap_by_hand(statistic: Any) -> None:
    values, rng = skewed(40), np.random.default_rng(12345)
    estimate = bootstrap(values, statistic, resamples=20_000)
    drawn = [statistic(values[rng.integers(0, 40, 40)]) for _ in range(20_000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert estimate.value == pytest.approx(statistic(values), rel=1e-12)
    # Each end is a quantile of 20 000 draws, and off by about 2 % of the half width.
    assert ends(estimate) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_neither_order_nor_ambient_numbers_matter_but_the_seed_does() -> None:
    values, rng = skewed(101), np.random.default_rng(1)
    before = values.copy()
    for statistic in (np.mean, pooled_psnr):
        assert len({bootstrap(order, statistic) for order in (values, values[::-1], rng.permutation(values))}) == 1
    np.testing.assert_array_equal(values, before)
    first, other = bootstrap(values), bootstrap(values, seed=1)
    assert first.value == other.value
    assert first.low != other.low


def test_memory_does_not_grow_with_images_times_resamples() -> None:
    """As for 50 000 images: resamples are drawn some at a time."""
    sizes: list[int] = []

    def watched(values: np.ndarray, axis: int = 0) -> Any:
        sizes.append(values.size)
        return values.mean(axis=axis)

    bootstrap(skewed(50_000), watched, resamples=60)
    assert 50_000 < max(sizes) <= 2_000_000


@pytest.mark.parametrize("values", [[3.5], [math.inf, 30.0, 31.0], [math.inf, math.inf], [math.nan, 1.0]])
def test_there_is_no_interval_of_one_image_or_of_one_that_is_not_finite(values: list[float]) -> None:
    estimate = bootstrap(np.array(values))
    assert (estimate.low, estimate.high, estimate.reason) == (None, None, None)
    assert estimate.value == pytest.approx(np.mean(values), nan_ok=True)


def test_of_equal_images_and_without_resamples() -> None:
    assert bootstrap(np.full(9, 0.25)) == Estimate(0.25, 0.25, 0.25)
    assert bootstrap(np.array([1.0, 2.0]), resamples=0) == Estimate(1.5)


def test_pooled_psnr_is_the_closed_form() -> None:
    assert pooled_psnr(np.array([1e-2, 1e-4, 0.0])) == pytest.approx(-10.0 * math.log10((1e-2 + 1e-4) / 3), rel=1e-12)
    table = np.array([[0.1, 0.3], [0.01, 0.03]])
    assert pooled_psnr(table, axis=1) == pytest.approx(-10.0 * np.log10([0.2, 0.02]), rel=1e-12)


def test_perfect_images_have_an_infinite_pooled_psnr_without_an_interval() -> None:
    """Some resamples of two images hold the perfect one alone, whose PSNR is infinite too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap(np.zeros(5), pooled_psnr) == Estimate(math.inf)
        assert bootstrap(np.array([0.0, 0.01]), pooled_psnr) == Estimate(pytest.approx(-10.0 * math.log10(0.005)))


def test_the_interval_around_a_distance_is_students() -> None:
    replicates = np.array([5.0, 6.0, 7.0, 9.0])
    deviation = math.sqrt(((replicates - 6.75) ** 2).sum() / 3)
    # 3.182446305… is the 97.5 % quantile of Student's t with 3 degrees of freedom.
    expected = (12.0 - 3.182446305 * deviation, 12.0 + 3.182446305 * deviation)
    for some in (replicates, replicates + 100.0, np.array([*replicates, math.nan, math.inf])):
        assert ends(around(12.0, some)) == pytest.approx(expected, rel=1e-9)


def test_a_distance_is_not_negative_and_may_have_no_interval() -> None:
    assert ends(around(0.5, np.array([0.0, 10.0])))[0] == 0.0
    assert around(0.0, np.array([0.0, 0.0, 0.0])) == Estimate(0.0, 0.0, 0.0)
    for too_few in ([], [5.0, math.nan], [math.nan, math.inf]):
        assert around(7.0, np.array(too_few)) == Estimate(7.0)
    assert around(math.inf, np.array([1.0, 2.0, 3.0])) == Estimate(math.inf)


def test_it_is_json_whatever_it_holds() -> None:
    for numbers in itertools.product(ODD_VALUES, repeat=3):
        found = json.loads(json.dumps(Estimate(*numbers).as_json(), allow_nan=False))
        for key, given in zip(("value", "low", "high"), numbers, strict=True):
            assert found[key] == (given if given is not None and math.isfinite(given) else None)
    assert Estimate(1.5, 1.0, 2.0, note="a").as_json() == {"value": 1.5, "low": 1.0, "high": 2.0, "note": "a"}
    assert [Estimate(value).as_json()["reason"] for value in (math.inf, math.nan)] == ["infinite", "nan"]
    assert Estimate(math.inf, reason="all equal").as_json()["reason"] == "all equal"


def test_in_words() -> None:
    texts = {27.126: "27.13", 0.99996: "1.00", None: "–", math.inf: "∞", math.nan: "nan"}
    assert [Estimate(value).text(2) for value in texts] == list(texts.values())
    assert Estimate(2.0, 1.0, 3.456).interval_text(2) == "1.00 to 3.46"
    for estimate in (Estimate(2.0), Estimate(2.0, 1.0), Estimate(2.0, None, 3.0), Estimate(2.0, 2.0, 2.0)):
        assert estimate.interval_text(2) == ""


def test_which_way_a_metric_is_better() -> None:
    assert [name for name, info in METRICS.items() if info.more_is_better] == ["psnr", "ssim"]
