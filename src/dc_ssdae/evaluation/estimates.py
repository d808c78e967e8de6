"""A measured figure with its interval, or the reason why there is none; intervals by the bootstrap."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
        """Value, low and high, with None for what is not finite, which JSON lacks; and what else there is to say."""
        numbers = {key: finite(getattr(self, key)) for key in ("value", "low", "high")}
        reason = self.reason
        if reason is None and self.value is not None and not math.isfinite(self.value):
            reason = "infinite" if self.value > 0 else str(self.value)
        remarks = {"reason": reason, "note": self.note}
        return {**numbers, **{key: text for key, text in remarks.items() if text is not None}}

    def noted(self, note: str | None) -> "Estimate":
        """The same with a note."""
        return replace(self, note=note)

    def text(self, digits: int) -> str:
        """The value in words, "∞" or "–" where there is no finite one."""
        if self.value is None:
            return "–"
        if not math.isfinite(self.value):
            return "∞" if self.value > 0 else str(self.value)
        return f"{self.value:,.{digits}f}"

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
        values: (N,) float64, one of each image, in any order, which changes nothing.
        statistic: of an array along `axis`, as `numpy.mean`.
        seed: of the resampling.
        resamples: how many.

    Returns:
        Without an interval where there are fewer than two images, or the value is not finite.
    """
    if len(values) == 0:
        return Estimate(reason="no image was measured")
    values = np.sort(values)
    value = float(statistic(values, axis=0))
    if len(values) < 2 or not np.isfinite(values).all() or not math.isfinite(value):
        return Estimate(value)
    if values[0] == values[-1]:
        return Estimate(value, value, value)
    from scipy.stats import bootstrap as resample

    with np.errstate(invalid="ignore"):  # resamples of perfect images alone have an infinite PSNR
        interval = resample(
            (values,),
            statistic,
            n_resamples=resamples,
            confidence_level=CONFIDENCE,
            method="percentile",
            batch=max(1, 2_000_000 // len(values)),  # resamples at a time, so that memory stays small
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
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
