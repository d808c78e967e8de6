"""A measured figure with its interval, or the reason why there is none; intervals by the bootstrap."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dc_ssdae.files import finite

CONFIDENCE = 0.95
RESAMPLES = 1000
"""Of the bootstrap of a mean over images."""


class MetricInfo(NamedTuple):
    """How a metric is shown: its title, unit, direction, and digits behind the point."""

    title: str
    unit: str
    more_is_better: bool
    digits: int


METRICS: Mapping[str, MetricInfo] = {
    "psnr": MetricInfo("PSNR", "dB", True, 2),
    "ssim": MetricInfo("SSIM", "", True, 4),
    "lpips": MetricInfo("LPIPS", "", False, 4),
    "dreamsim": MetricInfo("DreamSim", "", False, 4),
    "rfid": MetricInfo("rFID", "", False, 3),
    "rfdd": MetricInfo("rFDD", "", False, 2),
}
"""The metrics by name, in the order in which they are shown."""


@dataclass(frozen=True)
class Estimate:
    """A figure.

    Args:
        value: None where there is none.
        low: lower end of its interval; None where it has none.
        high: upper end.
        reason: why there is no value, or no finite one.
        note: what to know before it is compared.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Value, low and high, with None for what is not finite, which JSON lacks; and reason and note, if any."""
        word = str(self.value).replace("inf", "infinite")
        reason = self.reason or (word if finite(self.value) != self.value else None)
        numbers = {key: finite(getattr(self, key)) for key in ("value", "low", "high")}
        return numbers | {key: text for key, text in (("reason", reason), ("note", self.note)) if text is not None}

    def text(self, digits: int) -> str:
        """The value in words: "–" where there is none, "∞" where it is infinite."""
        return "–" if self.value is None else f"{self.value:,.{digits}f}".replace("inf", "∞")

    def interval_text(self, digits: int) -> str:
        """The interval in words, empty where there is none or it is a point."""
        if self.low is None or self.high is None or self.low == self.high:
            return ""
        return f"{self.low:,.{digits}f} to {self.high:,.{digits}f}"


def bootstrap(
    values: np.ndarray, statistic: Callable[..., Any] = np.mean, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Estimate a statistic of images with its percentile bootstrap interval of 95 % (Efron and Tibshirani 1993).

    Args:
        values: (N,) float64, at least one, one of each image; their order changes nothing.
        statistic: along `axis`, as `numpy.mean`.
        seed: of the resampling.
        resamples: how many; 0 gives no interval.

    Returns:
        Without an interval where there are fewer than two images, or something is not finite.
    """
    values = np.sort(values)
    value = float(statistic(values, axis=0))
    if min(len(values) - 1, resamples) < 1 or not np.isfinite([value, *values[[0, -1]]]).all():
        return Estimate(value)
    from scipy.stats import bootstrap as resample

    blocks = max(1, 2_000_000 // len(values))  # resamples at a time, so that memory stays small
    settings = {"n_resamples": resamples, "confidence_level": CONFIDENCE, "method": "percentile", "batch": blocks}
    with np.errstate(invalid="ignore"):  # resamples of perfect images alone have an infinite PSNR
        found = resample((values,), statistic, rng=np.random.default_rng(seed), **settings)
    low, high = map(float, found.confidence_interval)
    return Estimate(value, low, high) if math.isfinite(low) and math.isfinite(high) else Estimate(value)


def around(value: float, replicates: np.ndarray) -> Estimate:
    """Put the standard bootstrap interval of 95 %, ± t · s, around a distance, which is not negative.

    s is the replicates' standard deviation and t Student's quantile for as many. Their mean is not used: a resampled
    set has images twice, which raises a distance between sets.

    Args:
        value: the distance.
        replicates: (R,) distances of resampled sets; those that are not finite are left out.
    """
    replicates = replicates[np.isfinite(replicates)]
    if len(replicates) < 2 or not math.isfinite(value):
        return Estimate(value)
    from scipy.stats import t

    reach = float(t.ppf(0.5 + CONFIDENCE / 2, len(replicates) - 1) * replicates.std(ddof=1))
    return Estimate(value, min(value, max(0.0, value - reach)), value + reach)


def pooled_psnr(squared_errors: np.ndarray, axis: int = 0) -> Any:
    """PSNR in dB of the mean of images' mean squared errors, these in units of the full range, squared."""
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(squared_errors.mean(axis=axis))
