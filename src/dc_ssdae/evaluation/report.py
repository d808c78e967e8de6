"""A report for people: one self-contained HTML page, pictures first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from torch import Tensor

from dc_ssdae.evaluation.curves import running_mean, save_picture
from dc_ssdae.evaluation.html import data_uri, escape, fill_template, png
from dc_ssdae.files import write_whole

DIFFERENCE_GAIN = 2
"""How much the pictures of differences are amplified around mid-grey."""

_FIGURES = {
    "psnr": "{:.2f}",
    "baseline_psnr": "{:.2f}",
    "ssim": "{:.3f}",
    "baseline_ssim": "{:.3f}",
    "encode_milliseconds": "{:.0f}",
    "decode_milliseconds": "{:.0f}",
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
    results: Sequence[PhotoResult],
    curves: Mapping[str, Sequence[float]],
    facts: Mapping[str, str],
) -> None:
    """Write the demo's report.

    Args:
        path: the HTML file, written beside and renamed.
        results: of the held-out photos, at least one.
        curves: the losses by title, one value a step.
        facts: label and text of what else a reader should know about the run.
    """
    page = fill_template(
        "demo_report.html",
        verdict=escape(_verdict(results)),
        photos="\n".join(_photo(result) for result in results),
        rows="\n".join(_rows(results)),
        curves=data_uri(save_picture(lambda: _plot(curves), style=_STYLE)),
        facts="\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()),
        gain=str(DIFFERENCE_GAIN),
    )
    write_whole(path, page.encode("utf-8"))


def _verdict(results: Sequence[PhotoResult]) -> str:
    psnr, baseline = (fmean(getattr(result, name) for result in results) for name in ("psnr", "baseline_psnr"))
    if psnr < baseline:
        return (
            f"The model reaches {psnr:.1f} dB on photos it has not seen; bicubic resizing with the same number "
            f"of values reaches {baseline:.1f} dB. That is what to expect: the model started from random "
            "weights and trained for minutes on a handful of photos. The demo shows that everything runs, not how "
            "good the architecture is."
        )
    return (
        f"The model reaches {psnr:.1f} dB on photos it has not seen, {psnr - baseline:.1f} dB above bicubic "
        "resizing with the same number of values. It trained on a handful of photos: this says nothing yet about "
        "others."
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


def _rows(results: Sequence[PhotoResult]) -> list[str]:
    """A row for each photo, and their mean."""
    figures = [[getattr(result, name) for name in _FIGURES] for result in results]
    figures.append([fmean(column) for column in zip(*figures, strict=True)])
    heads = [
        (result.name, "×".join(map(str, result.latent_shape)), f"{result.latent_values:,} / {values:,}")
        for result, values in zip(results, (3 * math.prod(r.baseline_size) for r in results), strict=True)
    ]
    rows = []
    for head, row in zip([*heads, ("mean", "", "")], figures, strict=True):
        cells = [*map(escape, head), *(form.format(value) for form, value in zip(_FIGURES.values(), row, strict=True))]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return rows


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
