"""Losses and evaluations of runs as a picture: one panel per loss term and metric, one colour per run."""

import io
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, cycle, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dc_ssdae.errors import InputError, check_names, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES: Mapping[str, str] = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
"""What is drawn of evaluations, with the panels' titles."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by the colour-blind too (Okabe and Ito 2008). Further runs have them again, dashed and dotted."""

DASHES = ("-", "--", ":")

PICTURE_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
"""matplotlib's settings for all pictures of figures."""

_LETTERS_PER_INCH = 13  # of a legend


@dataclass
class RunCurves:
    """What a run, or a recipe's phases one after the other, wrote down.

    Args:
        name: of its folder.
        starts: steps before each phase, by the phase's name; empty for a run that is no recipe's.
        values: by loss/TERM and metric: (step, value) pairs; the steps go on from phase to phase, and a value is
            infinite where it is not finite.
        random_backbones: loss terms whose network has random weights.
        notes: a line on each file that is damaged.
    """

    name: str
    starts: dict[str, int] = field(default_factory=dict)
    values: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    random_backbones: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_runs(folders: Sequence[Path]) -> list[RunCurves]:
    """Read what runs wrote down; those with the same name are called by their paths.

    Raises:
        InputError: a folder is no run, or has no losses yet.
    """
    names = [folder.resolve().name for folder in folders]
    pairs = zip(folders, names, strict=True)
    return [read_run(folder, str(folder) if names.count(name) > 1 else name) for folder, name in pairs]


def read_run(folder: Path, name: str = "") -> RunCurves:
    """Read what a run wrote down; of a recipe's, all phases, one after the other.

    Args:
        folder: of the run: with metrics.jsonl and perhaps evaluations.jsonl; or with recipe.yaml and the phases' runs,
            1-NAME, 2-NAME and so on, and perhaps distilled.
        name: what to call it, by default as the folder.

    Raises:
        InputError: it is no run, or has no losses yet.
    """
    run, end, places = RunCurves(name or folder.resolve().name), 0, {"": folder}
    if (folder / "recipe.yaml").is_file():
        numbered = [path for path in folder.iterdir() if re.match(r"\d+-", path.name)]
        numbered.sort(key=lambda path: int(path.name.partition("-")[0]))
        places = {path.name.partition("-")[2]: path for path in numbered} | {"distilled": folder / "distilled"}
    for phase, place in places.items():
        start = end
        for row in _rows(run, place / "metrics.jsonl") + _rows(run, place / "evaluations.jsonl"):
            step = start + row["step"]
            end = max(end, step)
            run.random_backbones |= {*row.get("random_backbones", ())}
            for key, value in row.items():
                if key in TITLES or key.startswith("loss/"):
                    run.values[key].append((step, math.inf if value is None else value))
        if phase and end > start:
            run.starts[phase] = start
    if not run.values.keys() - TITLES.keys():
        raise InputError(f"{folder} is no training run, or has no losses yet: see its metrics.jsonl")
    return run


def _rows(run: RunCurves, path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, null for numbers that are not finite; damaged ones become one note."""
    rows, lines = [], path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line, parse_constant=lambda _: None)
            rows.append({**row, "step": int(row["step"])})
    if len(rows) < len(lines):
        run.notes.append(f"{path}: {counted(len(lines) - len(rows), 'damaged line')} left out")
    return rows


def save_picture(draw: "Callable[[], Figure]", kind: str = "png") -> bytes:
    """Draw a figure, and give the content of its file.

    Args:
        draw: makes the figure.
        kind: of the file, such as png, svg or pdf.

    Raises:
        InputError: matplotlib is not installed, or knows no such kind.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'dc-ssdae[eval]'") from None
    buffer = io.BytesIO()
    with matplotlib.rc_context(dict(PICTURE_STYLE)):
        figure = draw()
        check_names("kind of picture", [kind], figure.canvas.get_supported_filetypes())
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def curves_figure(runs: Sequence[RunCurves]) -> "Figure":
    """Draw runs over steps: losses, on a logarithmic scale if all are positive, and evaluations.

    Losses are running means; of a single run the values are there too, faint. What is not finite is a cross at the
    lower edge.

    Args:
        runs: at least one.
    """
    from matplotlib.figure import Figure

    found = dict.fromkeys(name for run in runs for name in run.values)
    names = sorted(found, key=lambda name: (name in TITLES, name != "loss/total"))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.0 * max(columns, 2), 2.8 * rows + 0.4), dpi=100, layout="constrained")
    phases = [*dict.fromkeys(phase for run in runs for phase in run.starts)]
    looks = cycle({"color": colour, "linestyle": dash} for dash, colour in product(DASHES, COLOURS))
    styles = [*islice(looks, len(runs))]
    axes = None
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place, sharex=axes)
        _draw_panel(axes, runs, name, phases, styles)
    if phases:
        numbered = ", ".join(f"{number} {phase}" for number, phase in enumerate(phases, 1))
        figure.supxlabel(textwrap.fill(f"phases: {numbered}", 56 * columns), fontsize="medium")
    if len(runs) == 1:
        figure.suptitle(as_label(runs[0].name, 64))
    return figure


def _draw_panel(
    axes: Any, runs: Sequence[RunCurves], name: str, phases: Sequence[str], styles: Sequence[Mapping[str, Any]]
) -> None:
    """Draw one loss term or metric of all runs, and the numbers of the phases where they begin."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    title, is_loss = TITLES.get(name, name.replace("/", ": ")), name.startswith("loss/")
    is_random = any(name == f"loss/{term}" for run in runs for term in run.random_backbones)
    axes.set_title(f"{title}\n(random backbone: means nothing)" if is_random else title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    if is_loss and min(value for run in runs for _, value in run.values.get(name, ())) > 0:
        axes.set_yscale("log")
    across, ends = axes.get_xaxis_transform(), []
    for index, (run, style) in enumerate(zip(runs, styles, strict=True)):
        colour = style["color"]
        for phase, start in run.starts.items():
            axes.axvline(start, color=colour, linewidth=0.8, alpha=0.4)
            at_top = {"textcoords": "offset points", "va": "top", "fontsize": "small", "color": colour}
            axes.annotate(str(phases.index(phase) + 1), (start, 1.0), (2, -8 * index), across, **at_top)
        points = np.array(run.values.get(name) or np.empty((0, 2)))
        for part in np.split(points, np.searchsorted(points[:, 0], [*run.starts.values()][1:], "right")):
            is_finite = np.isfinite(part[:, 1])
            lost, (steps, values) = part[~is_finite, 0], part[is_finite].T
            if is_loss and len(runs) == 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6, rasterized=True)
            means = running_mean(values, max(5.0, 0.02 * len(values))) if is_loss else values
            axes.plot(steps, means, linewidth=1.6, marker="" if is_loss else "o", markersize=3, **style)
            if len(lost):
                axes.plot(lost, 0.0 * lost, "x", color=colour, markersize=5, transform=across, clip_on=False)
                axes.set_xlabel("step (×: not finite)")
        is_finite = np.isfinite(points[:, 1])
        if len(runs) > 1 and is_finite.any():
            ends.append((means[-1] if len(means) else points[is_finite][-1, 1], run.name, colour))
    if axes.get_yscale() == "log":
        number_logarithmic_ticks(axes.yaxis)
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the names of lines beside the panel, each at the height where its line ends, apart from each other."""
    axes.get_ylim()  # the limits follow from the data when they are asked for
    to_panel = axes.transData + axes.transAxes.inverted()
    places = sorted((to_panel.transform((0.0, value))[1], name, colour) for value, name, colour in ends)
    lowest = 0.0
    for above, (height, name, colour) in zip(range(len(places))[::-1], places, strict=True):
        place = min(max(height, lowest), 1.0 - 0.08 * above)
        lowest = place + 0.08
        axes.annotate(
            as_label(name, 18), (1.01, place), None, "axes fraction", color=colour, fontsize="small", va="center"
        )


def as_label(name: str, longest: int) -> str:
    """A name as matplotlib shows all of it, or its end if it has more letters than `longest`."""
    # matplotlib leaves out labels that begin with an underscore, and knows no stray bytes.
    text = f"\u200b{name.encode('utf-8', 'backslashreplace').decode()}"
    return text if len(text) <= longest else f"…{text[-longest:]}"


def add_legend(figure: Any, names: Sequence[str], styles: Sequence[Mapping[str, Any]]) -> None:
    """Name lines or marks below the panels of a figure, which grows by as much.

    Args:
        figure: of matplotlib, with constrained layout.
        names: of the lines or marks.
        styles: matplotlib's settings of each.
    """
    from matplotlib.lines import Line2D

    texts = [as_label(name, 64) for name in names]
    letters = _LETTERS_PER_INCH * figure.get_figwidth()
    columns = max(1, min(4, int(letters / (4 + max(map(len, texts), default=1)))))
    figure.set_figheight(figure.get_figheight() + 0.28 * -(-len(texts) // columns) + 0.2)
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend([Line2D([], [], **style) for style in styles], texts, **place)


def running_mean(values: Sequence[float], window: float) -> list[float]:
    """Exponential running mean over about `window` values, fewer at the start, where it is the first of them."""
    keep = 1.0 - 1.0 / max(1.0, window)
    sums = accumulate(values, lambda total, value: keep * total + value)
    weights = accumulate([1.0] * len(values), lambda total, one: keep * total + one)
    return [total / weight for total, weight in zip(sums, weights, strict=True)]


def number_logarithmic_ticks(axis: Any, most: int = 6, widest: float = 3.5, form: str = "g") -> None:
    """Plain numbers at a logarithmic axis, as many as there is room for.

    Args:
        axis: of matplotlib's.
        most: numbers at an axis of less than a decade.
        widest: decades up to which there are three numbers per decade.
        form: of the numbers.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = (math.log10(edge) for edge in axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high - low < widest else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs) if high - low > 0.7 else MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axis.set_minor_formatter(NullFormatter())
