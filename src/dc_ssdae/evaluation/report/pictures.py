"""Pictures of what quality costs."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dc_ssdae.evaluation.arena import Entry
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.curves import COLOURS, add_legend, number_logarithmic_ticks
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.files import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>hp"


class Point(NamedTuple):
    """Quality, and two costs; NaN for one that is not known."""

    quality: float
    first: float
    second: float


# Title of a quality, points by label, and for each cost lines by label.
Row = tuple[str, Mapping[str, Sequence[Point]], Sequence[Mapping[str, Sequence[Point]]]]


def front(points: Sequence[Point], place: int, more_cost: bool, more_quality: bool) -> list[Point]:
    """The points that no other one beats in both quality and cost, from the best cost on.

    Args:
        points: in any order; those whose cost is NaN are left out.
        place: of the cost in a point.
        more_cost: whether more of the cost is better.
        more_quality: whether more quality is better.
    """
    cost_sign, sign = (1 if more else -1 for more in (more_cost, more_quality))
    known = [point for point in points if not math.isnan(point[place])]
    found: list[Point] = []
    for point in sorted(known, key=lambda point: (cost_sign * point[place], sign * point.quality), reverse=True):
        if not found or sign * point.quality > sign * found[-1].quality:
            found.append(point)
    return found


def arena_figure(entries: Sequence[Entry]) -> "Figure":
    """Quality (PSNR, LPIPS and rFID) against tokens and against decoding speed, of the models that finished."""
    rows: list[Row] = []
    styles, rivals = {}, []
    for index, entry in enumerate(entries):
        is_random = RANDOM_WEIGHTS in entry.candidate.remarks
        styles[entry.label] = style(index, 0.35 if is_random else 1.0)
        styles[entry.label] |= {"markerfacecolor": "none"} if entry.candidate.is_baseline else {}
        rivals += [] if entry.candidate.is_baseline or is_random else [entry.label]
    for name in ("psnr", "lpips", "rfid"):
        info, points = METRICS[name], {}
        for entry in entries:
            value = finite(entry.evaluation.metrics[name].value) if entry.evaluation else None
            if value is not None:
                speed = None if entry.decode is None else entry.decode.value
                points[entry.label] = [Point(value, entry.tokens or math.nan, speed or math.nan)]
        best = [points[label][0] for label in rivals if label in points]
        fronts = [{"": front(best, place, place == 2, info.more_is_better)} for place in (1, 2)]
        unit, better = f" in {info.unit}" if info.unit else "", "more" if info.more_is_better else "less"
        title = f"{info.title}{unit} ({better} is better)"
        rows += [(title, points, fronts)] if points else []
    return draw(("tokens per image (fewer is better)", "images decoded per second (more is better)"), rows, styles)


def draw(costs: tuple[str, str], rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw a row for each quality, a panel for each of two costs, and a legend below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.3 * max(1, len(rows))), dpi=110, layout="constrained")
    panels = figure.subplots(max(1, len(rows)), 2, squeeze=False)
    for (quality, points, lines), row in zip(rows, panels, strict=False):
        for place, (axes, cost) in enumerate(zip(row, costs, strict=True), 1):
            drawn = [(found, styles[label]) for label, found in points.items()]
            for label, found in lines[place - 1].items():
                drawn.append((found, {"color": styles[label]["color"] if label else "#8a94a3", "zorder": 0}))
            for found, style in drawn:
                axes.plot([point[place] for point in found], [point.quality for point in found], **style)
            axes.set(xscale="log", xlabel=cost, ylabel=quality)
            axes.grid(alpha=0.25)
            low, high = axes.get_xlim()
            axes.set_xlim(low / 1.25, high * 1.25)
            number_logarithmic_ticks(axes.xaxis, most=4, widest=2.5, form=",.10g")
    add_legend(figure, [*styles], [*styles.values()])
    return figure


def style(index: int, alpha: float) -> dict[str, Any]:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "alpha": alpha, "markersize": 7, "linestyle": "none"}
