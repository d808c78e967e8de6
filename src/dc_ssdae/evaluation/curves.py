"""Losses and evaluations of runs as a picture: one panel per loss term and metric, one colour per run."""

import io
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, cycle, product
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

_LONGEST_LABEL = 18  # letters


@dataclass
class Part:
    """What a run, or a phase of a recipe, wrote down.

    Args:
        phase: its name; "" for a run that is no phase.
        start: steps of the phases before it.
        values: by loss/TERM and metric: (step, value) pairs; the steps go on from phase to phase, and a value is
            infinite where it is not finite.
    """

    phase: str
    start: int
    values: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class RunCurves:
    """What a run wrote down.

    Args:
        name: of its folder.
        parts: the run, or a recipe's phases.
        random_backbones: loss terms whose network has random weights.
        notes: a line on each file that is damaged.
    """

    name: str
    parts: list[Part] = field(default_factory=list)
    random_backbones: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_runs(folders: Sequence[Path]) -> list[RunCurves]:
    """Read what runs wrote down; those with the same name are called by their paths.

    Raises:
        InputError: a folder is no run, or has no losses yet.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        run.name = str(folder) if names.count(run.name) > 1 else run.name
    return runs


def read_run(folder: Path) -> RunCurves:
    """Read what a run wrote down; of a recipe's, all phases, one after the other.

    Args:
        folder: of the run: with metrics.jsonl and perhaps evaluations.jsonl; or with recipe.yaml and the phases' runs,
            1-NAME, 2-NAME and so on, and perhaps distilled.

    Raises:
        InputError: it is no run, or has no losses yet.
    """
    run, end, places = RunCurves(folder.resolve().name), 0, [folder]
    is_recipe = (folder / "recipe.yaml").is_file()
    if is_recipe:
        numbered = [path for path in folder.iterdir() if re.match(r"\d+-", path.name)]
        places = [*sorted(numbered, key=lambda path: int(path.name.partition("-")[0])), folder / "distilled"]
    for place in places:
        part = Part(re.sub(r"^\d+-", "", place.name) if is_recipe else "", end)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            for row in _rows(place / name, run.notes):
                end = max(end, part.start + row["step"])
                run.random_backbones |= {*row.get("random_backbones", ())}
                for key, value in row.items():
                    if key in TITLES or key.startswith("loss/"):
                        part.values[key].append((part.start + row["step"], math.inf if value is None else value))
        if part.values:
            run.parts.append(part)
    if not any(key not in TITLES for part in run.parts for key in part.values):
        raise InputError(f"{folder} is no training run, or has no losses yet: see its metrics.jsonl")
    return run


def _rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, null for numbers that are not finite; damaged ones become one note."""
    damaged = 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            yield {**row, "step": int(row["step"])}
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        notes.append(f"{path}: {counted(damaged, 'damaged line')} left out")


def draw_curves(runs: Sequence[RunCurves], kind: str = "png") -> bytes:
    """Draw runs over steps: losses, on a logarithmic scale if all are positive, and evaluations.

    Losses are running means; of a single run the values are there too, faint. What is not finite is a cross at the
    lower edge.

    Args:
        runs: at least one.
        kind: of the file, such as png, svg or pdf.

    Returns:
        The file's content.

    Raises:
        InputError: matplotlib is not installed, or knows no such kind.
    """
    return save_picture(partial(curves_figure, runs), kind)


def save_picture(draw: "Callable[[], Figure]", kind: str = "png", style: Mapping[str, Any] = PICTURE_STYLE) -> bytes:
    """Draw a figure in a style, and give the content of its file.

    Args:
        draw: makes the figure.
        kind: of the file, such as png, svg or pdf.
        style: matplotlib's settings.

    Raises:
        InputError: matplotlib is not installed, or knows no such kind.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'dc-ssdae[eval]'") from None
    buffer = io.BytesIO()
    with matplotlib.rc_context(dict(style)):
        figure = draw()
        check_names("kind of picture", [kind], figure.canvas.get_supported_filetypes())
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def curves_figure(runs: Sequence[RunCurves]) -> "Figure":
    """The figure that `draw_curves` saves."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    found = dict.fromkeys(name for run in runs for part in run.parts for name in part.values)
    names = sorted(found, key=lambda name: (name in TITLES, name != "loss/total"))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.0 * max(columns, 2), 2.8 * rows + 0.4), dpi=100, layout="constrained")
    phases = [*dict.fromkeys(part.phase for run in runs for part in run.parts if part.phase)]
    axes = None
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place, sharex=axes)
        is_random = any(name == f"loss/{term}" for run in runs for term in run.random_backbones)
        title = TITLES.get(name, name.replace("/", ": "))
        axes.set_title(f"{title}\n(random backbone: means nothing)" if is_random else title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
        _draw_panel(axes, runs, name, phases)
    if phases:
        numbered = ", ".join(f"{number} {phase}" for number, phase in enumerate(phases, 1))
        figure.supxlabel(textwrap.fill(f"phases: {numbered}", 56 * columns), fontsize="medium")
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    return figure


def _draw_panel(axes: Any, runs: Sequence[RunCurves], name: str, phases: Sequence[str]) -> None:
    """Draw one loss term or metric of all runs, and the numbers of the phases where they begin."""
    is_loss = name.startswith("loss/")
    if is_loss and min(value for run in runs for part in run.parts for _, value in part.values.get(name, ())) > 0:
        axes.set_yscale("log")
    ends: dict[int, tuple[float, str, str]] = {}
    for index, (run, (dash, colour)) in enumerate(zip(runs, cycle(product(DASHES, COLOURS)))):
        for part in run.parts:
            if part.phase:
                grey = colour if len(runs) > 1 else "#666666"
                at_top = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
                axes.axvline(part.start, color=grey, linewidth=0.8, alpha=0.4)
                number = str(phases.index(part.phase) + 1)
                axes.annotate(number, (part.start, 1.0), xytext=(2, -8 * index), color=grey, fontsize="small", **at_top)
            steps, values = np.array(part.values.get(name) or np.empty((0, 2))).T
            is_finite = np.isfinite(values)
            lost, steps, values = steps[~is_finite], steps[is_finite], values[is_finite]
            if is_loss and len(runs) == 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6, rasterized=True)
            means = running_mean(values, max(5.0, 0.02 * len(values))) if is_loss else values
            axes.plot(steps, means, dash, color=colour, linewidth=1.6, marker="" if is_loss else "o", markersize=3)
            if len(lost):
                at_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
                axes.plot(lost, 0.0 * lost, "x", color=colour, markersize=5, **at_edge)
                axes.set_xlabel("step (×: not finite)")
            if len(means):
                ends[index] = (means[-1], run.name, colour)
    if axes.get_yscale() == "log":
        number_logarithmic_ticks(axes.yaxis)
    if len(runs) > 1:
        _label_ends(axes, [*ends.values()])


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the names of lines beside the panel, each at the height where its line ends, apart from each other."""
    axes.get_ylim()  # the limits follow from the data when they are asked for
    to_panel = axes.transData + axes.transAxes.inverted()
    places = sorted((to_panel.transform((0.0, value))[1], name, colour) for value, name, colour in ends)
    lowest = 0.0
    for above, (height, name, colour) in zip(range(len(places))[::-1], places, strict=True):
        place = min(max(height, lowest), 1.0 - 0.08 * above)
        lowest = place + 0.08
        beside = {"xycoords": "axes fraction", "xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(shorten(name, _LONGEST_LABEL), (1.0, place), color=colour, fontsize="small", **beside)


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


def shorten(name: str, longest: int) -> str:
    """Cut letters out of the middle of a name that is longer than `longest`."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
