"""A report for people: one self-contained HTML page, pictures first."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from dc_ssdae.evaluation.html import data_uri, escape, fill_template, png
from dc_ssdae.files import write_whole

DIFFERENCE_GAIN = 2
"""How much the pictures of differences are amplified around mid-grey."""


@dataclass(frozen=True)
class PhotoResult:
    """One held-out photo: pictures uint8 (3, H, W), quality of model and baseline, seconds of encode and decode."""

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
    encode_seconds: float
    decode_seconds: float

    @property
    def latent_values(self) -> int:
        """Numbers in the latent."""
        count = 1
        for side in self.latent_shape:
            count *= side
        return count


@dataclass(frozen=True)
class LossCurve:
    """A curve over training steps."""

    name: str
    values: Sequence[float]


def write_demo_report(
    path: Path,
    results: Sequence[PhotoResult],
    curves: Sequence[LossCurve],
    facts: Mapping[str, str],
) -> None:
    """Write the demo's report.

    Args:
        path: the HTML file, written beside and renamed.
        results: of the held-out photos, at least one.
        curves: the losses, one value a step.
        facts: label and text of what else a reader should know about the run.
    """
    page = fill_template(
        "demo_report.html",
        verdict=escape(_verdict(results)),
        photos="\n".join(_photo(result) for result in results),
        rows="\n".join([*(_row(result) for result in results), _row(_mean(results))]),
        curves=data_uri(_plot(curves)),
        facts="\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()),
        gain=str(DIFFERENCE_GAIN),
    )
    write_whole(path, page.encode("utf-8"))


@dataclass(frozen=True)
class _Mean:
    psnr: float
    ssim: float
    baseline_psnr: float
    baseline_ssim: float
    encode_seconds: float
    decode_seconds: float


def _mean(results: Sequence[PhotoResult]) -> _Mean:
    return _Mean(*(sum(getattr(r, name) for r in results) / len(results) for name in _Mean.__annotations__))


def _verdict(results: Sequence[PhotoResult]) -> str:
    mean = _mean(results)
    gap = mean.psnr - mean.baseline_psnr
    if gap < 0:
        return (
            f"The model reaches {mean.psnr:.1f} dB on photos it has not seen; bicubic resizing with the same number "
            f"of values reaches {mean.baseline_psnr:.1f} dB. That is what to expect: the model started from random "
            "weights and trained for minutes on a handful of photos. The demo shows that everything runs, not how "
            "good the architecture is."
        )
    return (
        f"The model reaches {mean.psnr:.1f} dB on photos it has not seen, {gap:.1f} dB above bicubic resizing with "
        "the same number of values. It trained on a handful of photos: this says nothing yet about others."
    )


def _photo(result: PhotoResult) -> str:
    height, width = result.baseline_size
    panels = (
        (result.original, "original", f"{result.original.shape[2]}×{result.original.shape[1]} px"),
        (result.reconstruction, "reconstruction", f"{result.psnr:.2f} dB, SSIM {result.ssim:.3f}"),
        (difference(result.original, result.reconstruction), "difference", f"×{DIFFERENCE_GAIN}, grey is none"),
        (result.baseline, f"bicubic, {width}×{height} and back", f"{result.baseline_psnr:.2f} dB, "
         f"SSIM {result.baseline_ssim:.3f}"),
    )  # fmt: skip
    figures = "".join(
        f'<figure><img src="{data_uri(png(pixels))}" alt="{escape(result.name)}: {escape(title)}" '
        f'width="{pixels.shape[2]}" height="{pixels.shape[1]}">'
        f"<figcaption><b>{escape(title)}</b><br>{escape(caption)}</figcaption></figure>"
        for pixels, title, caption in panels
    )
    return f'<section class="photo"><h3>{escape(result.name)}</h3><div class="panels">{figures}</div></section>'


def _row(result: PhotoResult | _Mean) -> str:
    name, latent, values = "mean", "", ""
    if isinstance(result, PhotoResult):
        name = result.name
        latent = "×".join(str(side) for side in result.latent_shape)
        values = f"{result.latent_values:,} / {3 * result.baseline_size[0] * result.baseline_size[1]:,}"
    cells = (
        escape(name),
        latent,
        values,
        f"{result.psnr:.2f}",
        f"{result.baseline_psnr:.2f}",
        f"{result.ssim:.3f}",
        f"{result.baseline_ssim:.3f}",
        f"{1000 * result.encode_seconds:.0f}",
        f"{1000 * result.decode_seconds:.0f}",
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def difference(original: Tensor, reconstruction: Tensor) -> Tensor:
    """A picture of what differs between two images, uint8 (3, H, W), `DIFFERENCE_GAIN` times around mid-grey."""
    return (128 + DIFFERENCE_GAIN * (reconstruction.int() - original.int())).clamp(0, 255).byte()


def _plot(curves: Sequence[LossCurve]) -> bytes:
    """Draw each curve in its own panel, raw values pale and their running mean dark."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * len(curves), 3.2), dpi=110, layout="constrained")
        for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            axes.plot(curve.values, color="#9db8d9", linewidth=0.8, label="each step")
            axes.plot(_running_mean(curve.values), color="#1f4e8c", linewidth=1.8, label="running mean")
            axes.set_title(curve.name)
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.grid(alpha=0.25, which="both")
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _running_mean(values: Sequence[float], keep: float = 0.95) -> list[float]:
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means
