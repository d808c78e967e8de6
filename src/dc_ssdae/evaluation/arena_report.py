"""What the arena found, for people and for programs: table.md, table.json, pareto.png and index.html."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dc_ssdae.data.loader import BrokenImage
from dc_ssdae.errors import counted
from dc_ssdae.evaluation.arena import Entry
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.caveats import Report, caveats, decoding_lines, missing_lines, protocol_lines
from dc_ssdae.evaluation.curves import COLOURS, number_logarithmic_ticks, save_picture, shorten
from dc_ssdae.evaluation.estimates import METRICS, Estimate
from dc_ssdae.evaluation.evaluate import BITS, EVALUATIONS
from dc_ssdae.evaluation.metrics import psnr
from dc_ssdae.evaluation.viewer import (
    Group,
    Panel,
    Photo,
    Table,
    bullets,
    paragraph,
    picture,
    render_page,
    section,
    warning,
)
from dc_ssdae.timing import Spread, machine_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEGEND, _LONGEST_LABEL = 140, 64  # letters that the legend's width holds, and the most of a label
MARKERS = "osD^vP*X<>hp"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        title: for people.
        unit: "" for none.
        value: an entry's, with interval or reason.
        digits: behind the point; None shows the value as it is.
    """

    title: str
    unit: str
    value: Callable[[Entry], dict[str, Any]]
    digits: int | None = None


@dataclass(frozen=True, kw_only=True)
class ArenaReport(Report):
    """The arena's results.

    Args:
        entries: as `run_arena` gives them.
        rounds: in which speed was measured.
        columns: by name; derived.
    """

    entries: Sequence[Entry]
    rounds: int
    columns: Mapping[str, Column] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _columns(self.settings.size))

    @property
    def images(self) -> int:
        """How many were measured, the same for all that finished; 0 where none did."""
        return next((entry.evaluation.images for entry in self._finished if entry.evaluation is not None), 0)

    @property
    def broken(self) -> Sequence[BrokenImage]:
        """What could not be read, the same for all that finished."""
        return next((entry.evaluation.broken for entry in self._finished if entry.evaluation is not None), [])

    @property
    def _finished(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.failed is None]

    def as_json(self) -> str:
        """Columns with their units, a row for each model, and how they came about."""
        rows = []
        for entry in self.entries:
            row: dict[str, Any] = {"model": entry.label, "remarks": entry.remarks}
            if entry.failed is not None:
                row["failed"] = entry.failed
                rows.append({**row, **{name: _empty("failed") for name in self.columns}})
            else:
                rows.append({**row, **{name: column.value(entry) for name, column in self.columns.items()}})
        content = {
            "columns": {"model": "", **{name: column.unit for name, column in self.columns.items()}},
            "rows": rows,
            "protocol": {**self.protocol_settings(), "images": self.images},
            "caveats": self.caveats(),
            "speed": {"batch": self._batch, "rounds": self.rounds, "dtype": self.dtype, "interval": "quartiles"},
            "machine": dict(self.machine),
            "command": self.command,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def as_markdown(self) -> str:
        """The table, and what a reader must know."""
        lines = [
            self._table().markdown(),
            "",
            *(f"- {line}" for line in (*self.caveats(), *missing_lines(self.suite))),
            "",
            *(f"- {line}" for line in self._protocol()),
        ]
        return "\n".join(lines) + "\n"

    def as_picture(self) -> bytes:
        """Quality against tokens and against decoding speed, as PNG."""
        return save_picture(lambda: _draw(self._finished))

    def as_page(self, pareto: bytes) -> bytes:
        """The page, with the picture in it."""
        photos = self._photos()
        failed = [entry for entry in self.entries if entry.failed is not None]
        lead = (
            f"{len(self._finished)} of {counted(len(self.entries), 'autoencoder')} reconstructed the same "
            f"{counted(self.images, 'image')} of {self.settings.size}×{self.settings.size} px"
            + (f"; {', '.join(entry.label for entry in failed)} failed." if failed else ".")
        )
        chosen = (
            f"{len(photos)} of the {counted(self.images, 'image')}, evenly spread over the data set, "
            "not chosen by result. "
        )
        return render_page(
            "Autoencoder arena",
            lead,
            [Group("Pictures", chosen + "PSNR is of the picture above it.", photos)],
            [
                section(
                    "Figures",
                    warning(self.caveats()),
                    self._table().html(),
                    bullets([*self._notes(), *missing_lines(self.suite)]),
                ),
                section(
                    "What quality costs",
                    picture(pareto, "Quality against tokens per image and against decoding speed"),
                    paragraph(
                        "Grey line: models that no other one beats in both. Hollow or dotted: baselines, dotted where "
                        "there are no tokens. Pale: random weights."
                    ),
                ),
                section("Protocol", bullets(self._protocol())),
            ],
            self.command,
        )  # fmt: skip

    def caveats(self) -> list[str]:
        """What may not be compared."""
        metrics = [entry.evaluation.metrics for entry in self._finished if entry.evaluation is not None]
        random = [entry.label for entry in self._finished if RANDOM_WEIGHTS in entry.remarks]
        enlarged = max(
            (entry.evaluation.enlarged for entry in self._finished if entry.evaluation is not None), default=0
        )
        lines = caveats(self.settings, self.suite, metrics, self.images, random, enlarged)
        lines.append("Speed and memory are of this machine, batch and precision: compare them within this table alone.")
        return lines

    @property
    def _batch(self) -> int:
        return max((entry.batch for entry in self._finished), default=0)

    def _protocol(self) -> list[str]:
        device = "allocated on the GPU" if str(self.machine.get("device", "")).startswith("cuda") else "resident"
        return [
            *protocol_lines(self.settings, self.suite, self.data, self.images, len(self.broken), self.total),
            *decoding_lines(self.decoding),
            f"Speed: medians of {self.rounds} rounds in alternating order over a batch of {self._batch}, {self.dtype}, "
            f"encoding and decoding timed apart, with their quartiles. Memory: the most that was {device} while that "
            "batch was encoded and decoded, the weights among it.",
            machine_line(self.machine),
        ]

    def _notes(self) -> list[str]:
        """What the table's heads leave open."""
        return [
            "Ratio: image values (three a pixel) for each latent value; bits are left aside.",
            "Tokens: what a diffusion transformer sees of an image with patches of one latent position; with patches "
            "of p×p positions, p² times fewer.",
        ]

    def _table(self) -> Table:
        used = {
            name: column
            for name, column in self.columns.items()
            if any(column.value(entry)["value"] is not None for entry in self._finished)
            or (name in METRICS and name not in self.suite.missing)
        }
        heads = [("model", ""), *((column.title, column.unit) for column in used.values())]
        rows = []
        for entry in self.entries:
            values = [
                ("", "") if entry.failed is not None else _cell(column.value(entry), column.digits, name in METRICS)
                for name, column in used.items()
            ]
            rows.append([(entry.label, ", ".join(entry.remarks)), *values])
        return Table(heads, rows, [entry.failed for entry in self.entries])

    def _photos(self) -> list[Photo]:
        places = sorted(set.intersection(*({*entry.shown} for entry in self._finished))) if self._finished else []
        photos = []
        for place in places:
            panels = []
            for entry in self.entries:
                if entry.failed is not None:
                    panels.append(Panel(entry.label, "", None, f"failed: {entry.failed}"))
                    continue
                shown = entry.shown[place]
                value = Estimate(psnr(shown.original, shown.output)).text(2)
                remark = f", {RANDOM_WEIGHTS}" if RANDOM_WEIGHTS in entry.remarks else ""
                panels.append(Panel(entry.label, f"{value} dB{remark}", shown.output))
            first = next(entry.shown[place] for entry in self._finished)
            photos.append(Photo(first.name, first.original, panels))
        return photos


def _columns(size: int) -> dict[str, Column]:
    def plain(get: Callable[[Entry], Any], reason: str) -> Callable[[Entry], dict[str, Any]]:
        def value(entry: Entry) -> dict[str, Any]:
            found = get(entry)
            if found is None:
                return _empty(reason)
            if isinstance(found, Estimate):
                return found.as_json()
            if isinstance(found, Spread):
                note = {} if entry.splits else {"note": "encoding and decoding in one"}
                return {"value": found.median, "low": found.low, "high": found.high, **note}
            return {"value": found, "low": None, "high": None}

        return value

    def metric(name: str, reason: str = "not measured") -> Callable[[Entry], dict[str, Any]]:
        return plain(lambda e: e.evaluation and (e.evaluation.metrics | e.evaluation.others).get(name), reason)

    no_latent = "it has no latent"
    return {
        **{name: Column(info.title, info.unit, metric(name), info.digits) for name, info in METRICS.items()},
        "latent_shape": Column(
            "latent", "c×h×w", plain(lambda e: None if e.latent_shape is None else list(e.latent_shape), no_latent)
        ),
        "compression": Column("ratio", "image / latent values", plain(lambda e: e.compression(size), no_latent), 1),
        "tokens": Column("tokens", "per image", plain(lambda e: e.tokens, no_latent), 0),
        "bits_per_pixel": Column("file", "bit/px", metric(BITS, "it writes no files"), 2),
        "parameters": Column("parameters", "M", plain(_millions, "not known"), 2),
        "encode": Column("encode", "images/s", plain(lambda e: e.encode, "not apart from decoding"), 1),
        "decode": Column("decode", "images/s", plain(lambda e: e.decode, "not measured"), 1),
        "memory": Column("memory", "MiB", plain(_mebibytes, "the device does not tell"), 0),
        EVALUATIONS: Column("evaluations", "of the decoder", metric(EVALUATIONS, "not counted"), 1),
    }  # fmt: skip


def _millions(entry: Entry) -> float | None:
    return None if entry.parameters is None else entry.parameters / 1e6


def _mebibytes(entry: Entry) -> float | None:
    return None if entry.memory is None else entry.memory / 2**20


def _empty(reason: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "reason": reason}


def _cell(cell: Mapping[str, Any], digits: int | None, with_reason: bool) -> tuple[str, str]:
    """A value, and its interval or the reason why there is none, as texts."""
    value, low, high = cell["value"], cell["low"], cell["high"]
    if value is None:
        return ("∞", "") if cell.get("reason") == "infinite" else ("–", cell.get("reason", "") if with_reason else "")
    if isinstance(value, list):
        return "×".join(map(str, value)), ""
    if digits is None:
        return str(value), ""
    interval = "" if low is None or high is None or low == high else f"{low:,.{digits}f} to {high:,.{digits}f}"
    return f"{value:,.{digits}f}", interval


def _draw(entries: Sequence[Entry]) -> "Figure":
    """A row for each quality that there is (at most three), a column for tokens and one for speed."""
    from matplotlib.figure import Figure

    def quality(entry: Entry, name: str) -> float | None:
        found = None if entry.evaluation is None else entry.evaluation.metrics[name].value
        return found if found is not None and math.isfinite(found) else None

    wanted = [name for name in ("psnr", "lpips", "rfid") if any(quality(e, name) is not None for e in entries)]
    names = wanted or ["psnr"]
    longest = max((min(len(entry.label), _LONGEST_LABEL) for entry in entries), default=1)
    rows = -(-len(entries) // max(1, min(4, _LEGEND // (4 + longest))))
    height = 3.3 * len(names) + 0.28 * rows + 0.4
    figure = Figure(figsize=(10.5, height), dpi=110, layout="constrained")
    grid = figure.subplots(len(names), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for name, row in zip(names, grid, strict=True):
        info = METRICS[name]
        costs: list[tuple[str, Callable[[Entry], float | None], bool]] = [
            ("tokens per image", lambda e: e.tokens, False),
            ("decoding, images/s", lambda e: None if e.decode is None else e.decode.median, True),
        ]
        for axes, (title, cost, more_is_better) in zip(row, costs, strict=True):
            points = []
            for index, entry in enumerate(entries):
                style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                y, x = quality(entry, name), cost(entry)
                random = RANDOM_WEIGHTS in entry.remarks
                style["markerfacecolor"] = "none" if entry.is_baseline else style["color"]
                if y is None:
                    continue
                if x is None:
                    axes.axhline(y, color=style["color"], linestyle=":", linewidth=1.2)
                    continue
                (handle,) = axes.plot(x, y, linestyle="none", markersize=8, alpha=0.35 if random else 1.0, **style)
                handles.setdefault(entry.label, handle)
                if not random and not entry.is_baseline:
                    points.append((x if more_is_better else -x, y if info.more_is_better else -y))
            front = _front(points)
            axes.plot(
                [x if more_is_better else -x for x, _ in front],
                [y if info.more_is_better else -y for _, y in front],
                color="#8a94a3",
                linewidth=1.0,
                zorder=0,
            )
            axes.set_xscale("log")
            axes.set_xlabel(f"{title} ({'more' if more_is_better else 'fewer'} is better)")
            unit = f" ({info.unit})" if info.unit else ""
            axes.set_ylabel(f"{info.title}{unit}, {'more' if info.more_is_better else 'less'} is better")
            axes.grid(alpha=0.25)
            low, high = axes.get_xlim()
            axes.set_xlim(low / 1.25, high * 1.25)
            number_logarithmic_ticks(axes.xaxis, most=4, widest=2.5, form=",.10g")
    labels = [entry.label for entry in entries if entry.label in handles]
    if labels:
        shown = [handles[label] for label in labels]
        # matplotlib leaves out what begins with an underscore, reads $ as mathematics, and knows no stray bytes.
        texts = [shorten(label.encode("utf-8", "backslashreplace").decode(), _LONGEST_LABEL) for label in labels]
        columns = max(1, min(4, _LEGEND // (4 + max(map(len, texts)))))
        texts = [f"\u200b{text}" for text in texts]
        legend = figure.legend(shown, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points where more is better in both, those that no other one beats in both, by their first number."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front
