"""Losses and evaluations of runs as a picture: one panel per loss term and metric, one colour per run."""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dc_ssdae.errors import InputError, counted, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES: Mapping[str, str] = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
"""What is drawn of evaluations, with the panels' titles."""

FORMATS = ("png", "svg", "pdf")

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by the colour-blind too (Okabe and Ito 2008). Further runs have them again, dashed and dotted."""

DASHES = ("-", "--", ":")

_LOSS = "loss/"
_MOST_STEPS, _LARGEST = 10**15, 1e100  # beyond them a line is damaged, or a value as good as infinite
_COLUMNS, _PANEL = 3, (4.0, 2.9)  # inches; at 100 dots each, three panels are 1200 pixels wide
_SMOOTHED = (0.02, 5.0)  # share of a run's points over which the smoothed line averages; at least so many points
_MOST_POINTS = 4000  # of a line: more are thinned out, which no picture shows
_LABEL = (0.045, 0.027)  # of a phase: its width, and the height of a letter, as shares of a panel's
_LONGEST_PHASE, _LONGEST_RUN = 24, 60  # letters


@dataclass
class Curve:
    """Values over training; None where one is not a finite number."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, step: int, value: float | None) -> None:
        """Append a point."""
        self.steps.append(step)
        self.values.append(value)

    def finite(self) -> tuple[list[int], list[float]]:
        """The steps and values of the points that are finite numbers."""
        points = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None]
        return [step for step, _ in points], [value for _, value in points]


class Phase(NamedTuple):
    """Where a phase of a run begins, on the axis of all its phases."""

    start: int
    name: str


@dataclass
class RunCurves:
    """What a run wrote down.

    Args:
        name: of its folder.
        end: steps of all its phases.
        losses: by the term's name; a curve for each of a recipe's phases that has the term.
        measures: of evaluations, by name, likewise.
        phases: of a recipe.
        random_backbones: loss terms whose network has random weights.
        notes: a line on each file that is damaged.
    """

    name: str
    end: int = 0
    losses: dict[str, list[Curve]] = field(default_factory=dict)
    measures: dict[str, list[Curve]] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
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
        if names.count(run.name) > 1:
            run.name = str(folder)
    return runs


def read_run(folder: Path) -> RunCurves:
    """Read what a run wrote down; of a recipe's, all phases, one after the other.

    Args:
        folder: of the run: with metrics.jsonl and perhaps evaluations.jsonl; or with recipe.yaml and the phases' runs,
            1-NAME, 2-NAME and so on, and perhaps distilled.

    Raises:
        InputError: it is no run, or has no losses yet.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    run = RunCurves(folder.resolve().name)
    if (folder / "recipe.yaml").is_file():
        for path in _phase_folders(folder):
            start = run.end
            _read_part(run, path)
            if run.end > start:
                run.phases.append(Phase(start, re.sub(r"^\d+-", "", path.name)))
    elif (folder / "metrics.jsonl").is_file():
        _read_part(run, folder)
    else:
        raise InputError(f"{folder} is no run, or has not begun: metrics.jsonl is missing")
    if not run.losses:
        raise InputError(f"{folder} has no losses to draw yet")
    return run


def draw_curves(runs: Sequence[RunCurves], kind: str = "png") -> bytes:
    """Draw runs over steps: losses, on a logarithmic scale if all are positive, and evaluations.

    Of losses the raw values are faint, and the line is their running mean. What is not finite is a cross at the lower
    edge.

    Args:
        runs: at least one.
        kind: one of `FORMATS`.

    Returns:
        The file's content.

    Raises:
        InputError: matplotlib is not installed.
    """
    return save_picture(partial(curves_figure, runs), kind)


PICTURE_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
"""matplotlib's settings for all pictures of figures."""


def save_picture(draw: "Callable[[], Figure]", kind: str = "png", style: Mapping[str, Any] = PICTURE_STYLE) -> bytes:
    """Draw a figure in a style, and give the content of its file.

    Args:
        draw: makes the figure.
        kind: one of `FORMATS`.
        style: matplotlib's settings.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'dc-ssdae[eval]'") from None
    buffer = io.BytesIO()
    with matplotlib.rc_context(dict(style)):
        draw().savefig(buffer, format=kind)
    return buffer.getvalue()


def curves_figure(runs: Sequence[RunCurves]) -> "Figure":
    """The figure that `draw_curves` saves; panels that are not needed are invisible."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses = sorted(dict.fromkeys(name for run in runs for name in run.losses), key=lambda name: name != "total")
    measures = [name for name in MEASURES if any(name in run.measures for run in runs)]
    count = len(losses) + len(measures)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    width = _PANEL[0] * max(columns, 2)
    labels = _legend(runs)
    label_columns = max(1, min(len(labels), int(14 * width / (max(map(len, labels)) + 6))))  # 14 letters are an inch
    height = _PANEL[1] * rows + 0.2 * (1 + -(-len(labels) // label_columns))
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten().tolist()
    panels[0].set_xlim(*_steps_shown(runs))
    for axes, name in zip(panels, losses, strict=False):
        is_random = any(name in run.random_backbones for run in runs)
        axes.set_title(f"loss: {name}" + ("\n(random backbone: means nothing)" if is_random else ""))
        _draw_losses(axes, [run.losses.get(name, []) for run in runs])
    for axes, name in zip(panels[len(losses) :], measures, strict=False):
        axes.set_title(f"evaluation: {MEASURES[name]}")
        _draw_measure(axes, [run.measures.get(name, []) for run in runs])
    for axes in panels[:count]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.25)
        _draw_phases(axes, runs)
        if axes.get_yscale() == "log":
            number_logarithmic_ticks(axes.yaxis)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=label_columns, frameon=False)
    return figure


def picture_format(path: Path) -> str:
    """The format that a file's name asks for; PNG without a suffix.

    Raises:
        InputError: it is another than png, svg and pdf.
    """
    kind = path.suffix[1:].lower() or "png"
    if kind not in FORMATS:
        raise unknown_name("kind of picture", path.suffix, [f".{known}" for known in FORMATS])
    return kind


def running_mean(values: Sequence[float], window: float) -> list[float]:
    """Exponential running mean over about `window` values, fewer at the start, where it is the first of them."""
    keep = 1.0 - 1.0 / max(1.0, window)
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def _phase_folders(folder: Path) -> list[Path]:
    numbered = [path for path in folder.iterdir() if re.match(r"\d+-", path.name)]
    numbered.sort(key=lambda path: (int(path.name.partition("-")[0]), path.name))
    return [path for path in (*numbered, folder / "distilled") if (path / "metrics.jsonl").is_file()]


def _read_part(run: RunCurves, folder: Path) -> None:
    """Add the lines of a run, or of a phase, whose steps go on from the run's end."""
    start = run.end
    losses: dict[str, Curve] = {}
    measures: dict[str, Curve] = {}
    for entry in _lines(folder / "metrics.jsonl", run.notes):
        step = start + entry["step"]
        run.end = max(run.end, step + 1)
        for key, value in entry.items():
            if key.startswith(_LOSS):
                losses.setdefault(key.removeprefix(_LOSS), Curve()).add(step, _number(value))
        random = entry.get("random_backbones")
        if isinstance(random, list):
            run.random_backbones.update(name for name in random if isinstance(name, str))
    for entry in _lines(folder / "evaluations.jsonl", run.notes):
        for name in MEASURES:
            if name in entry:
                measures.setdefault(name, Curve()).add(start + entry["step"], _number(entry[name]))
    for parts, curves in ((run.losses, losses), (run.measures, measures)):
        for name, curve in curves.items():
            parts.setdefault(name, []).append(curve)


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; those that are damaged become one note."""
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            step = entry.get("step") if isinstance(entry, dict) else None
            if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MOST_STEPS:
                yield entry
            elif line.strip():
                damaged += 1
    if damaged:
        notes.append(f"{path}: {counted(damaged, 'damaged line')} left out")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _LARGEST else None


def _style(index: int) -> dict[str, Any]:
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash}


def _legend(runs: Sequence[RunCurves]) -> dict[str, Any]:
    """Labels, and the lines they stand for."""
    from matplotlib.lines import Line2D

    legend: dict[str, Any] = {}
    for index, run in enumerate(runs):
        label = shorten(run.name, _LONGEST_RUN)
        # matplotlib leaves out what begins with an underscore.
        label = f"\u200b{label}" if label.startswith("_") else label
        legend[label if label not in legend else f"{label} ({index + 1})"] = Line2D(
            [], [], linewidth=1.6, **_style(index)
        )
    parts = [curve for run in runs for curves in (*run.losses.values(), *run.measures.values()) for curve in curves]
    if any(None in curve.values for curve in parts):
        legend["not finite"] = Line2D([], [], color="#666666", marker="x", linestyle="none", markersize=5)
    return legend


def _steps_shown(runs: Sequence[RunCurves]) -> tuple[float, float]:
    end = max(1, *(run.end for run in runs))
    labels = _phase_labels(runs, end)
    return -0.02 * end, 1.02 * max(end, *(place + _LABEL[0] * end for place, _, _ in labels), 0)


def _draw_losses(axes: Any, runs: Sequence[Sequence[Curve]]) -> None:
    everything = [value for curves in runs for curve in curves for value in curve.values if value is not None]
    if everything and min(everything) > 1.0 / _LARGEST:
        axes.set_yscale("log")
    for index, curves in enumerate(runs):
        style = _style(index)
        window = max(_SMOOTHED[0] * sum(len(curve.values) for curve in curves), _SMOOTHED[1])
        for curve in curves:
            steps, values = curve.finite()
            every = max(1, len(values) // _MOST_POINTS)
            axes.plot(steps[::every], values[::every], color=style["color"], alpha=0.25, linewidth=0.6, rasterized=True)
            axes.plot(steps[::every], running_mean(values, window)[::every], linewidth=1.6, **style)
            _draw_crosses(axes, curve, style["color"])


def _draw_measure(axes: Any, runs: Sequence[Sequence[Curve]]) -> None:
    for index, curves in enumerate(runs):
        style = _style(index)
        for curve in curves:
            axes.plot(*curve.finite(), marker="o", markersize=3, linewidth=1.2, **style)
            _draw_crosses(axes, curve, style["color"])


def _draw_crosses(axes: Any, curve: Curve, colour: str) -> None:
    lost = [step for step, value in zip(curve.steps, curve.values, strict=True) if value is None]
    lost = lost[:: max(1, len(lost) // _MOST_POINTS)]
    if lost:
        edge = axes.get_xaxis_transform()  # the height as a share of the panel's
        axes.plot(lost, [0.0] * len(lost), "x", color=colour, markersize=5, transform=edge, clip_on=False)


def number_logarithmic_ticks(axis: Any, most: int = 6, widest: float = 3.5, form: str = "g") -> None:
    """Plain numbers at a logarithmic axis, as many as there is room for.

    Args:
        axis: of matplotlib's.
        most: numbers at an axis of less than a decade.
        widest: decades up to which there are three numbers a decade.
        form: of the numbers.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = (math.log10(edge) for edge in axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high - low < widest else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs) if high - low > 0.7 else MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axis.set_minor_formatter(NullFormatter())


def _phase_labels(runs: Sequence[RunCurves], end: int) -> list[tuple[float, str, str]]:
    """Step, name and colour of the phases' names, apart from each other; each at its start, or soon after."""
    owners: dict[Phase, list[int]] = {}
    for index, run in enumerate(runs):
        for phase in run.phases:
            owners.setdefault(phase, []).append(index)
    labels: list[tuple[float, str, str]] = []
    for phase, indices in sorted(owners.items()):
        place = max(phase.start, labels[-1][0] + _LABEL[0] * end) if labels else float(phase.start)
        colour = COLOURS[indices[0] % len(COLOURS)] if len(indices) == 1 < len(runs) else "#555555"
        labels.append((place, shorten(phase.name, _LONGEST_PHASE), colour))
    return labels


def _draw_phases(axes: Any, runs: Sequence[RunCurves]) -> None:
    """Mark where phases begin, with their names above the curves."""
    labels = _phase_labels(runs, max(run.end for run in runs))
    if not labels:
        return
    needed = 0.02 + _LABEL[1] * max(len(name) for _, name, _ in labels)
    scale = axes.yaxis.get_transform()
    bottom, top = (float(edge) for edge in scale.transform(axes.get_ylim()))
    higher = bottom + (top - bottom) / (1 - needed)
    axes.set_ylim(top=float(scale.inverted().transform([higher])[0]))
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)] if len(runs) > 1 else "#555555"
        for phase in run.phases:
            axes.axvline(phase.start, color=colour, alpha=0.4, linewidth=0.8)
    for place, name, colour in labels:
        edge = axes.get_xaxis_transform()
        style = {"rotation": 90, "fontsize": 7, "color": colour, "verticalalignment": "top"}
        axes.annotate(name, (place, 0.99), xycoords=edge, xytext=(2, 0), textcoords="offset points", **style)


def shorten(name: str, longest: int) -> str:
    """Cut letters out of the middle of a name that is longer than `longest`."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
