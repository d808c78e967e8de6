"""A sampling study for people: a table, a picture, and what two models need for the same quality, in words."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dc_ssdae.decoding import DESCENTS, ONE_STEP
from dc_ssdae.evaluation.curves import COLOURS, save_picture
from dc_ssdae.evaluation.sampling_study import QUALITIES, Measurement, Needed, evaluations_needed
from dc_ssdae.timing import machine_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = (4.6, 3.4)  # inches
_DASHES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1)), (0, (3, 4)))
_LETTERS = 13  # of the legend, an inch
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class SamplingStudy:
    """Measurements of one model, or of two that are compared.

    Args:
        measurements: of all.
        models: their names, the baseline first.
        notes: what a reader must know: protocol, what is missing, whether the pair was trained equally.
        machine: as `dc_ssdae.timing.describe_machine` gives it.
    """

    measurements: Sequence[Measurement]
    models: Sequence[str]
    notes: Sequence[str]
    machine: Mapping[str, Any]

    @property
    def qualities(self) -> list[str]:
        """What was measured, of `QUALITIES`."""
        return [name for name in QUALITIES if name in self.measurements[0].qualities]

    def needed(self, quality: str) -> list[Needed]:
        """What the two models need for the same quality; nothing of one model."""
        if len(self.models) != 2:
            return []
        first, second = ([m for m in self.measurements if m.model == name] for name in self.models)
        return evaluations_needed(first, second, quality)

    def as_json(self) -> str:
        """Everything; `step_size` is in units of 1/L."""
        needed = {
            quality: [
                {
                    "target": entry.target,
                    "fewer": entry.fewer,
                    "models": [None if m is None else _as_row(m) for m in (entry.first, entry.second)],
                }
                for entry in self.needed(quality)
            ]
            for quality in self.qualities
        }
        rows = [_as_row(m) for m in self.measurements]
        content = {"machine": dict(self.machine), "notes": list(self.notes), "measurements": rows, "needed": needed}
        return json.dumps(content, indent=2) + "\n"

    def as_markdown(self) -> str:
        """The tables, what two models' comparison says, and the notes."""
        parts = [sampling_table(self.measurements)]
        for quality in self.qualities if len(self.models) == 2 else ():
            needed = self.needed(quality)
            first, second = self.models
            parts += [needed_table(needed, first, second, quality), in_words(needed, first, second, quality)]
        parts.append("\n".join(f"- {note}" for note in [*self.notes, machine_line(self.machine)]))
        return "\n\n".join(parts) + "\n"

    def as_picture(self, kind: str = "png") -> bytes:
        """Quality over evaluations and over time, and the evaluations that two models need for a PSNR.

        Args:
            kind: "png", "svg" or "pdf".

        Raises:
            InputError: matplotlib is not installed.
        """
        return save_picture(lambda: sampling_figure(self), kind)


def pareto(
    measurements: Sequence[Measurement], quality: str, cost: Callable[[Measurement], float]
) -> list[Measurement]:
    """The measurements that no other one beats in both quality and cost, from the cheapest on."""
    sign = 1.0 if QUALITIES[quality][1] else -1.0
    front: list[Measurement] = []
    for measurement in sorted(measurements, key=lambda m: (cost(m), -sign * m.qualities[quality])):
        if not front or sign * measurement.qualities[quality] > sign * front[-1].qualities[quality]:
            front.append(measurement)
    return front


def sampling_table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table with a row for each measurement."""
    qualities = [name for name in QUALITIES if any(name in m.qualities for m in measurements)]
    header = ["model", "sampler", "steps", "η · L", "μ", "tolerance", "evaluations"]
    header += [QUALITIES[name][0] for name in qualities]
    header += ["field RMS", "diverged", "ms an image", "times one step"]
    rows = [header, [":---", ":---", *["---:"] * (len(header) - 2)]]
    for m in measurements:
        setting = m.setting
        stops = setting.tolerance is not None
        size = "default" if setting.step_size is None else f"{setting.step_size:g}"
        size = size if setting.descent is None else f"landing, then {setting.descent:g}"
        rows.append(
            [
                m.model,
                setting.sampler,
                f"at most {setting.num_steps}" if stops else str(setting.num_steps),
                size if setting.sampler in DESCENTS else "",
                "" if setting.momentum is None else f"{setting.momentum:g}",
                "" if setting.tolerance is None else f"{setting.tolerance:g}",
                f"{m.evaluations:.1f} ({m.fewest} to {m.most})" if m.fewest < m.most else f"{m.evaluations:g}",
                *(f"{m.qualities[name]:.2f}" if name == "psnr" else f"{m.qualities[name]:.4f}" for name in qualities),
                f"{m.residual_rms:.4f}",
                str(m.diverged),
                "" if m.seconds is None else f"{1000 * m.seconds.median:.2f}",
                "" if m.ratio is None else f"{m.ratio.median:.2f}",
            ]
        )
    return _markdown(rows)


def needed_table(needed: Sequence[Needed], first: str, second: str, quality: str) -> str:
    """A Markdown table of the evaluations that two models need for the same quality."""
    rows = [
        [f"{QUALITIES[quality][0]} to reach", f"evaluations, {first}", f"evaluations, {second}", "compared"],
        ["---:", ":---", ":---", ":---"],
    ]
    for entry in needed:
        cells = [
            "not reached" if m is None else f"{m.evaluations:.3g} ({m.setting.family})"
            for m in (entry.first, entry.second)
        ]
        rows.append([f"{entry.target:.4g}", *cells, "" if entry.fewer is None else _compared(entry.fewer)])
    return _markdown(rows)


def in_words(needed: Sequence[Needed], first: str, second: str, quality: str) -> str:
    """What two models' comparison says, in a sentence or three."""
    name = QUALITIES[quality][0].partition(" (")[0]
    shares = [entry.fewer for entry in needed if entry.fewer is not None]
    if shares:
        low, high = _compared(min(shares)), _compared(max(shares))
        span = low if low == high else f"{low} to {high}"
        text = f"For the same {name}, {second} needs {span} evaluations than {first}."
    else:
        text = f"There is no {name} that both {first} and {second} reach."
    for model, place in ((first, "first"), (second, "second")):
        beyond = [entry.target for entry in needed if getattr(entry, place) is None]
        if beyond:
            text += f" {model} does not reach {', '.join(f'{target:.4g}' for target in beyond)}."
    return text


def _compared(fewer: float) -> str:
    return f"{100 * fewer:.0f} % fewer" if fewer >= 0 else f"{-100 * fewer:.0f} % more"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _as_row(measurement: Measurement) -> dict[str, Any]:
    row = asdict(measurement)
    return {"model": row.pop("model"), **row.pop("setting"), **row.pop("qualities"), **row}


def sampling_figure(study: SamplingStudy) -> "Figure":
    """The figure that `SamplingStudy.as_picture` saves."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    measurements, is_pair = study.measurements, len(study.models) == 2
    qualities = [name for name in ("psnr", "lpips") if any(name in m.qualities for m in measurements)]
    styles = _styles(measurements)
    labels = [f"{model}: {family}" for model, family in styles]
    columns = 3 if is_pair else 2
    width = _PANEL[0] * columns
    legend_columns = max(1, int(_LETTERS * width / (max(map(len, labels)) + 8)))
    size = (width, _PANEL[1] * len(qualities) + 0.2 * -(-len(labels) // legend_columns) + 0.2)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(qualities), columns, squeeze=False)
    for row, quality in zip(panels, qualities, strict=True):
        _draw_families(row[0], measurements, quality, lambda m: m.evaluations, styles)
        row[0].set_xlabel("evaluations of the decoder, an image")
        _draw_families(row[1], measurements, quality, lambda m: 1000.0 * (m.seconds.median if m.seconds else 0), styles)
        row[1].set_xlabel("milliseconds an image")
        for axes in row[:2]:
            axes.set_ylabel(QUALITIES[quality][0])
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if not QUALITIES[quality][1] and not axes.yaxis_inverted():
                axes.invert_yaxis()
        if is_pair:
            _draw_needed(row[2], study, quality)
    handles = [Line2D([], [], **style) for style in styles.values()]
    figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=8)
    return figure


def _styles(measurements: Sequence[Measurement]) -> dict[tuple[str, str], dict[str, Any]]:
    """By model and family: a colour for each sampler, a line for each of its families, a marker for each model."""
    models = list(dict.fromkeys(m.model for m in measurements))
    samplers = list(dict.fromkeys((m.model, m.setting.sampler) for m in measurements if m.setting.sampler != ONE_STEP))
    families = list(dict.fromkeys((m.model, m.setting.sampler, m.setting.family) for m in measurements))
    styles: dict[tuple[str, str], dict[str, Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    for model, sampler, family in families:
        marker = _MARKERS[models.index(model) % len(_MARKERS)]
        if sampler == ONE_STEP:
            styles[model, family] = {"color": "#000000", "linestyle": "none", "marker": marker, "markersize": 8}
            continue
        place = counts[model, sampler] = counts.get((model, sampler), -1) + 1
        styles[model, family] = {
            "color": COLOURS[samplers.index((model, sampler)) % (len(COLOURS) - 1)],
            "linestyle": _DASHES[place % len(_DASHES)],
            "marker": marker,
            "markersize": 4,
            "linewidth": 1.4,
            "markerfacecolor": "white" if "stopping" in family else None,
        }
    return styles


def _draw_families(
    axes: Any,
    measurements: Sequence[Measurement],
    quality: str,
    cost: Callable[[Measurement], float],
    styles: dict[tuple[str, str], dict[str, Any]],
) -> None:
    for (model, family), style in styles.items():
        mine = [m for m in measurements if (m.model, m.setting.family) == (model, family)]
        mine = sorted((m for m in mine if quality in m.qualities), key=cost)
        axes.plot([cost(m) for m in mine], [m.qualities[quality] for m in mine], **style)
    for model in dict.fromkeys(m.model for m in measurements):
        front = pareto([m for m in measurements if m.model == model and quality in m.qualities], quality, cost)
        axes.plot(
            [cost(m) for m in front], [m.qualities[quality] for m in front], color="#999999", linewidth=5, alpha=0.25
        )
    axes.grid(alpha=0.25)
    _show_the_better_half(axes, [m for m in measurements if quality in m.qualities], quality)


def _show_the_better_half(axes: Any, measurements: Sequence[Measurement], quality: str) -> None:
    """Leave out what is far worse than one step: a few bad settings would flatten all others."""
    sign = 1.0 if QUALITIES[quality][1] else -1.0
    values = [sign * m.qualities[quality] for m in measurements]
    one = [sign * m.qualities[quality] for m in measurements if m.setting.sampler == ONE_STEP] or values
    best, floor = max(values), min(one)
    floor -= max(0.6 * (best - floor), 0.01 * abs(floor))
    below = sum(value < floor for value in values)
    if below == 0 or best <= floor:
        return
    axes.set_ylim(sign * floor, sign * (best + 0.06 * (best - floor)))
    text = f"{below} worse setting{'s' * (below > 1)} below, in the table"
    axes.set_title(text, loc="right", fontsize=7, color="#666666")


def _draw_needed(axes: Any, study: SamplingStudy, quality: str) -> None:
    needed = study.needed(quality)
    title, more_is_better = QUALITIES[quality]
    for place, name in enumerate(study.models):
        chosen = [(entry.target, (entry.first, entry.second)[place]) for entry in needed]
        reached = [(target, m.evaluations) for target, m in chosen if m is not None]
        style = {"color": (COLOURS[0], "#000000")[place], "marker": _MARKERS[place], "markersize": 4}
        axes.plot([target for target, _ in reached], [count for _, count in reached], label=name, **style)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(f"{title} to reach")
    axes.set_ylabel("evaluations needed, an image")
    if not more_is_better:
        axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
