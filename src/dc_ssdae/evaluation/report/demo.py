"""The demo's report: one page with held-out photos by two models, and the losses of the one that it trained."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dc_ssdae.evaluation.curves import curves_figure, read_run, save_picture
from dc_ssdae.evaluation.reconstruction import PhotoResult
from dc_ssdae.evaluation.report.page import Panel, Photo, Table, difference_panel, render_page
from dc_ssdae.figures import cells


def demo_page(shipped: Sequence[PhotoResult], trained: Sequence[PhotoResult], run: Path, facts: str) -> bytes:
    """Make the demo's report.

    Args:
        shipped: of the held-out photos by the model that comes with the package, at least one.
        trained: of the same photos by the model that the demo has trained.
        run: folder of its training run, whose losses are drawn.
        facts: what else a reader should know about the run.
    """
    models = []
    for results in (shipped, trained):
        means = {name: fmean(result.figures[name] for result in results) for name in results[0].figures}
        rows = [{"photo": result.name, **result.figures} for result in results] + [{"photo": "mean", **means}]
        table = Table([{head.replace("_", "\n"): cell for head, cell in cells(row).items()} for row in rows])
        gain = means["psnr_bicubic"] - means["psnr"]
        verdict = f"{means['psnr']:.1f} dB on photos it has not seen, {abs(gain):.1f} dB "
        verdict += "below bicubic resizing" if gain > 0 else "above bicubic resizing"
        models.append((verdict, [_photo(result) for result in results], table))
    curves = save_picture(lambda: curves_figure([read_run(run)]))
    return render_page("demo.html", models=models, curves=curves, footer=facts)


def _photo(result: PhotoResult) -> Photo:
    figures = result.figures
    panels = [
        Panel("reconstruction", f"{figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}", result.reconstruction),
        difference_panel(result.original, result.reconstruction),
        Panel("bicubic", f"{figures['psnr_bicubic']:.2f} dB, SSIM {figures['ssim_bicubic']:.3f}", result.baseline),
    ]
    return Photo(result.name, result.original, panels)
