"""A sampling study for people: tables, a picture, and what two models need for the same quality, in words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dc_ssdae.evaluation.curves import save_picture
from dc_ssdae.evaluation.report.page import Table, markdown, render_page
from dc_ssdae.evaluation.report.pictures import study_figure
from dc_ssdae.evaluation.sampling_study import QUALITIES, Measurement, Needed, evaluations_needed
from dc_ssdae.figures import cells
from dc_ssdae.timing import machine_line

NOTE = (
    "step_size and descent are in units of 1/L, seconds are per image, num_steps is the most where there is a "
    "tolerance; – stands for a default, or for a quality that is not reached."
)


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

    def needed(self) -> dict[str, list[Needed]]:
        """By quality, what the two models need for the same; nothing of one model."""
        parts = [[m for m in self.measurements if m.model == name] for name in self.models]
        qualities = [name for name in QUALITIES if name in self.measurements[0].qualities]
        return {name: evaluations_needed(parts[0], parts[1], name) if len(parts) == 2 else [] for name in qualities}

    def as_json(self) -> str:
        """Everything; `step_size` is in units of 1/L."""
        needed = {}
        for quality, entries in self.needed().items():
            models = [[m and _as_row(m) for m in (entry.first, entry.second)] for entry in entries]
            found = zip(entries, models, strict=True)
            needed[quality] = [{"target": e.target, "fewer": e.fewer, "models": rows} for e, rows in found]
        rows = [_as_row(m) for m in self.measurements]
        content = {"machine": dict(self.machine), "notes": list(self.notes), "measurements": rows, "needed": needed}
        return json.dumps(content, indent=2) + "\n"

    def as_markdown(self) -> str:
        """The tables, what two models' comparison says, and the notes."""
        return markdown(*self.comparisons(), self.table(), [NOTE, *self.notes, machine_line(self.machine)])

    def as_page(self, picture: bytes) -> bytes:
        """The page, with the picture in it."""
        return render_page("study.html", study=self, picture=picture, note=NOTE, footer=machine_line(self.machine))

    def as_picture(self) -> bytes:
        """Quality over evaluations and over time, as PNG.

        Raises:
            InputError: matplotlib is not installed.
        """
        return save_picture(lambda: study_figure(self.measurements))

    def table(self) -> Table:
        """A row for each measurement, with the names that study.json has."""
        rows = [cells({k: v for k, v in _as_row(m).items() if k not in ("fewest", "most")}) for m in self.measurements]
        return Table(rows, list(dict.fromkeys(name for m in self.measurements for name in _as_row(m))))

    def comparisons(self) -> list[Table]:
        """For each quality the evaluations that two models need for the same."""
        tables = []
        for quality, needed in self.needed().items() if len(self.models) == 2 else ():
            heads = [f"{QUALITIES[quality][0]} to reach", *(f"evaluations\n{model}" for model in self.models), "saved"]
            rows = []
            for entry in needed:
                counts = [m and f"{m.evaluations:.3g}\n{m.setting.family}" for m in (entry.first, entry.second)]
                saved = None if entry.fewer is None else f"{100 * entry.fewer:.0f} %"
                rows.append(cells(dict(zip(heads, (f"{entry.target:.4g}", *counts, saved), strict=True))))
            tables.append(Table(rows, heads))
        return tables


def _as_row(measurement: Measurement) -> dict[str, Any]:
    row = asdict(measurement)
    return {"model": row.pop("model"), **row.pop("setting"), **row.pop("qualities"), **row}
