"""What the arena found, for people and for programs: table.md, table.json, pareto.png and index.html."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dc_ssdae.evaluation.arena import Entry
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.curves import save_picture
from dc_ssdae.evaluation.estimates import METRICS, Estimate
from dc_ssdae.evaluation.evaluate import BITS, EVALUATIONS, Reconstructed
from dc_ssdae.evaluation.report.caveats import Report
from dc_ssdae.evaluation.report.page import Panel, Photo, Table, number, psnr_panel, render_page
from dc_ssdae.evaluation.report.pictures import arena_figure

COLUMNS: Mapping[str, tuple[str, str, int, str]] = {
    **{name: (info.title, info.unit, info.digits, "not measured") for name, info in METRICS.items()},
    "latent_shape": ("latent", "c×h×w", 0, "it has no latent"),
    "compression": ("ratio", "image / latent values", 1, "it has no latent"),
    "tokens": ("tokens", "per image", 0, "it has no latent"),
    BITS: ("file", "bit/px", 2, "it writes no files"),
    "parameters": ("parameters", "M", 2, "it has none, or they are not known"),
    "encode": ("encode", "images/s", 1, "not apart from decoding"),
    "decode": ("decode", "images/s", 1, "not measured"),
    "memory": ("memory", "MiB", 0, "the device does not tell"),
    EVALUATIONS: ("evaluations", "of the decoder", 1, "not counted"),
}
"""Title, unit, digits behind the point, and why a model may have no value, by the name in table.json."""


@dataclass(frozen=True, kw_only=True)
class ArenaReport(Report):
    """The results of `run_arena`.

    Args:
        rounds: in which speed was measured.
        more_columns: for `Entry.more`: title, unit, digits, and why there may be no value, by name.
        more_caveats: on these.
    """

    rounds: int
    more_columns: Mapping[str, tuple[str, str, int, str]] = field(default_factory=dict)
    more_caveats: Sequence[str] = ()

    @property
    def columns(self) -> Mapping[str, tuple[str, str, int, str]]:
        """Every column after the model's name."""
        return {**COLUMNS, **self.more_columns}

    def as_json(self) -> str:
        """Columns with their units, a row for each model, and how they came about."""
        columns = {"model": "", **{name: unit for name, (_, unit, *_) in self.columns.items()}}
        rows = [self._row(entry) for entry in self.entries]
        speed = {"batch": self.batch, "rounds": self.rounds, "dtype": self.dtype, "interval": "quartiles"}
        return self._json({"columns": columns, "rows": rows, "speed": speed}, images=self.images)

    def as_markdown(self) -> str:
        """The table, and what a reader must know."""
        return self._markdown("Autoencoder arena", self.table())

    def as_picture(self) -> bytes:
        """Quality against tokens and against decoding speed, as PNG."""
        return save_picture(lambda: arena_figure([entry for entry in self.entries if entry.evaluation is not None]))

    def as_page(self, pareto: bytes) -> bytes:
        """The page, with the picture in it."""
        shown = next((entry.shown for entry in self.entries if entry.evaluation is not None), {})
        photos = [Photo(i.name, i.original, [_panel(entry, i) for entry in self.entries]) for i in shown.values()]
        return render_page("arena.html", report=self, pictures=photos, pareto=pareto, footer=self.command)

    def caveats(self) -> list[str]:
        """Say what may not be compared, the outcome first."""
        speed = "Compare speed and memory only within this table: same machine, batch, precision."
        return [*super().caveats(), speed, *self.more_caveats]

    def table(self) -> Table:
        """A row for each model; columns in which no model has a value are left out."""
        rows = []
        for entry in self.entries:
            remark = ", ".join(entry.candidate.remarks) if entry.failed is None else f"failed: {entry.failed}"
            row = {"model": f"{entry.label}\n{remark}"}
            for name, found in self._figures(entry).items():
                title, unit, digits, _ = self.columns[name]
                if isinstance(found, tuple):
                    row[f"{title}\n{unit}"] = "×".join(map(str, found))
                elif found.value is not None or (name in METRICS and name not in self.suite.missing):
                    row[f"{title}\n{unit}"] = number(found, digits)
            rows.append(row)
        return Table(rows, ["model", *(f"{title}\n{unit}" for title, unit, *_ in self.columns.values())])

    @property
    def batch(self) -> int:
        """Over how many images at a time speed was measured."""
        return min(self.settings.batch_size, self.images)

    def _row(self, entry: Entry) -> dict[str, Any]:
        row: dict[str, Any] = {"model": entry.label, "remarks": entry.candidate.remarks}
        row |= {} if entry.failed is None else {"failed": entry.failed}
        for name, found in (self._figures(entry) or dict.fromkeys(self.columns, Estimate(reason="failed"))).items():
            row[name] = {"value": found, "low": None, "high": None} if isinstance(found, tuple) else found.as_json()
        return row

    def _figures(self, entry: Entry) -> dict[str, Any]:
        """The latent's shape, and an estimate for each other column; nothing of a model that failed."""
        if (found := entry.evaluation) is None:
            return {}
        shape, parameters = found.latent_shape, entry.candidate.count_parameters()
        numbers = {
            "compression": None if shape is None else 3 * self.settings.size**2 / math.prod(shape),
            "tokens": entry.tokens,
            "parameters": parameters and parameters / 1e6,
            "memory": entry.memory and entry.memory / 2**20,
        }
        known: dict[str, Any] = {name: Estimate(value) for name, value in numbers.items() if value is not None}
        known |= {
            "latent_shape": shape,
            "encode": entry.encode,
            "decode": entry.decode,
            **found.metrics,
            **found.others,
            **entry.more,
        }
        return {name: known.get(name) or Estimate(reason=reason) for name, (*_, reason) in self.columns.items()}


def _panel(entry: Entry, original: Reconstructed) -> Panel:
    if original.place not in entry.shown:
        return Panel(entry.label, f"failed: {entry.failed}")
    remark = f", {RANDOM_WEIGHTS}" if RANDOM_WEIGHTS in entry.candidate.remarks else ""
    return psnr_panel(entry.label, original.original, entry.shown[original.place].output, remark)
