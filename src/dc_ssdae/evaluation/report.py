"""A report for people: one self-contained HTML page, pictures first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from torch import Tensor

from dc_ssdae.evaluation.curves import running_mean, save_picture
from dc_ssdae.evaluation.html import data_uri, fill_template
from dc_ssdae.files import write_whole

DIFFERENCE_GAIN = 2
"""How much the pictures of differences are amplified around mid-grey."""

_FIGURES = {
    "psnr": "%.2f",
    "baseline_psnr": "%.2f",
    "ssim": "%.3f",
    "baseline_ssim": "%.3f",
    "encode_milliseconds": "%.0f",
    "decode_milliseconds": "%.0f",
}
_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class PhotoResult:
    """One held-out photo: pictures uint8 (3, H, W), quality of model and baseline, times of encode and decode."""

    name: str
    original: Tensor
    reconstruction: Tensor
    baseline: Tensor
    baseline_size: tuple[int, int]
    latent_shape: tuple[int, ...]
    psnr: float
    ssim: float
    baseline_psnr: float
    baseline_ssim: float
    encode_milliseconds: float
    decode_milliseconds: float

    @property
    def latent_values(self) -> int:
        """Numbers in the latent."""
        return math.prod(self.latent_shape)


def write_demo_report(
    path: Path,
    shipped: Sequence[PhotoResult],
    results: Sequence[PhotoResult],
    curves: Mapping[str, Sequence[float]],
    facts: Mapping[str, str],
) -> None:
    """Write the demo's report.

    Args:
        path: the HTML file, written beside and renamed.
        shipped: of the held-out photos by the model that comes with the package, at least one.
        results: of the same photos by the model that the demo has trained.
        curves: the losses by title, one value a step.
        facts: label and text of what else a reader should know about the run.
    """
    page = fill_template(
        "demo_report.html",
        shipped=shipped,
        results=results,
        panels=_panels,
        figures=_FIGURES,
        means=_means,
        curves=data_uri(save_picture(lambda: _plot(curves), style=_STYLE)),
        facts=facts,
    )
    write_whole(path, page.encode("utf-8"))


def _means(results: Sequence[PhotoResult]) -> dict[str, float]:
    return {name: fmean(getattr(result, name) for result in results) for name in _FIGURES}


def _panels(result: PhotoResult) -> list[tuple[Tensor, str, str]]:
    """Pictures of a photo, with title and caption."""
    height, width = result.baseline_size
    quality = f"{result.psnr:.2f} dB, SSIM {result.ssim:.3f}"
    baseline = f"{result.baseline_psnr:.2f} dB, SSIM {result.baseline_ssim:.3f}"
    return [
        (result.original, "original", f"{result.original.shape[2]}×{result.original.shape[1]} px"),
        (result.reconstruction, "reconstruction", quality),
        (difference(result.original, result.reconstruction), "difference", f"×{DIFFERENCE_GAIN}, grey is none"),
        (result.baseline, f"bicubic, {width}×{height} and back", baseline),
    ]


def difference(original: Tensor, reconstruction: Tensor) -> Tensor:
    """A picture of what differs between two images, uint8 (3, H, W), `DIFFERENCE_GAIN` times around mid-grey."""
    return (128 + DIFFERENCE_GAIN * (reconstruction.int() - original.int())).clamp(0, 255).byte()


def _plot(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw each curve in its own panel, raw values pale and their running mean dark."""
    figure = Figure(figsize=(4.6 * len(curves), 3.2), dpi=110, layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(values, color="#9db8d9", linewidth=0.8, label="each step")
        axes.plot(running_mean(values, window=20), color="#1f4e8c", linewidth=1.8, label="running mean")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
    return figure
