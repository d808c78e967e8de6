"""What an evaluation found, for people and for programs: report.html, report.md, report.json and images.csv."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dc_ssdae.evaluation.estimates import METRICS, Estimate, MetricInfo
from dc_ssdae.evaluation.evaluate import BITS, EVALUATIONS, KL, Evaluation, Reconstructed
from dc_ssdae.evaluation.metric_networks import MSE
from dc_ssdae.evaluation.report.caveats import Report
from dc_ssdae.evaluation.report.page import Panel, Photo, Table, difference_panel, fill, number, render_page
from dc_ssdae.evaluation.statistics import ACTIVE_VARIANCE
from dc_ssdae.files import finite
from dc_ssdae.provenance import name_of_path, short_name

OTHERS: Mapping[str, MetricInfo] = {
    KL: MetricInfo("KL", "nats per image", False, 1),
    BITS: MetricInfo("file size", "bit/px", False, 3),
    EVALUATIONS: MetricInfo("evaluations", "of the decoder, per image", False, 2),
}


class EvaluationReport(Report):
    """The results of one model, the only entry."""

    @property
    def evaluation(self) -> Evaluation:
        """What was found."""
        return self.finished[self.entries[0].label]

    @property
    def ranking(self) -> str | None:
        """The metric by which images are the worst and the best; None where no metric is of single images."""
        names = [name for name in ("lpips", "psnr", "dreamsim", "ssim") if name in self.suite.images]
        return min(names, key=lambda name: name in self.suite.notes, default=None)  # trusted ones first

    def ranked(self) -> list[int]:
        """Places of the images, the worst first."""
        if self.ranking is None:
            return []
        values = self.evaluation.values[self.ranking]
        order = np.argsort(values if METRICS[self.ranking].more_is_better else -values, kind="stable")
        return [int(place) for place in order if not math.isnan(values[place])]

    def as_csv(self) -> str:
        """A line per image: its place, name and values; an image that cannot be read has the reason instead."""
        found = self.evaluation
        names = [name for name in (*METRICS, MSE, *OTHERS) if not np.isnan(found.values.get(name, np.nan)).all()]
        columns = [["" if math.isnan(value) else value for value in found.values[name].tolist()] for name in names]
        reasons = [""] * len(found.names)
        for place, image in zip(found.broken_places, found.broken, strict=True):
            reasons[place] = image.reason
        stream = io.StringIO()
        rows = zip(range(len(reasons)), found.names, *columns, reasons, strict=True)
        csv.writer(stream, lineterminator="\n").writerows([["place", "name", *names, "broken"], *rows])
        return stream.getvalue()

    def as_json(self) -> str:
        """Everything but the single images' values."""
        entry, found = self.entries[0], self.evaluation
        figures = {"metrics": _with_units(METRICS, found.metrics), "others": _with_units(OTHERS, found.others)}
        images = {"images": found.images, "broken": {image.name: image.reason for image in found.broken}}
        latent = {"latent_shape": found.latent_shape, "latent": found.latent and found.latent.as_json()}
        about = {"model": entry.label, "remarks": entry.candidate.remarks}
        return self._json({**about, **figures, **images, **latent}, dtype=self.dtype)

    def as_provenance(self) -> dict[str, Any]:
        """The figures, their intervals and notes, as a model's `provenance` has them."""
        metrics = {}
        for name, found in self.evaluation.metrics.items():
            if finite(found.value) is not None:
                cell = replace(found, note=found.note and short_name(found.note)).as_json()
                metrics[name] = {key: value for key, value in cell.items() if value is not None}
        about: dict[str, Any] = {"protocol": self.settings.protocol.name, "data": name_of_path(self.data) or "images"}
        about |= {"images": self.images, "image_size": self.settings.size, "decoding": dict(self.decoding)}
        return {**about, "metrics": metrics, **({} if self.dtype == "float32" else {"dtype": self.dtype})}

    def as_markdown(self) -> str:
        """The figures, and what a reader must know."""
        latent = self.latent_lines()
        return self._markdown(self.entries[0].label, self.table(), *(["## Latent", latent] if latent else []))

    def as_page(self, worst: Sequence[Reconstructed], best: Sequence[Reconstructed]) -> bytes:
        """The page.

        Args:
            worst: images, the worst first.
            best: likewise.
        """
        values = {n: found.value for n, found in self.evaluation.metrics.items() if n not in self.suite.missing}
        parts: dict[str, Any] = {"worst": [*map(self._photo, worst)], "best": [*map(self._photo, best)]}
        parts |= {"figures": _in_words(values), "ranking": METRICS[self.ranking] if self.ranking else None}
        return render_page("evaluation.html", report=self, footer=self.command, **parts)

    def table(self) -> Table:
        """A row for each figure."""
        found, rows = {**self.evaluation.metrics, **self.evaluation.others}, []
        for name, info in {**METRICS, **OTHERS}.items():
            if name in found and name not in self.suite.missing:
                value = number(found[name], info.digits)
                rows.append({"metric": f"{info.title}\n{info.unit}", "value\n95 % interval": value})
        return Table(rows)

    def latent_lines(self) -> list[str]:
        """Describe the latent; nothing where there is no posterior."""
        found, size = self.evaluation, self.settings.size
        values = math.prod(found.latent_shape or ())
        parts = {"found": found, "size": size, "values": values, "active": ACTIVE_VARIANCE}
        return [] if found.latent is None else fill("latent.txt", **parts).splitlines()

    def _photo(self, image: Reconstructed) -> Photo:
        caption = _in_words({name: values[image.place] for name, values in self.evaluation.values.items()})
        panels = [Panel("reconstruction", caption, image.output), difference_panel(image.original, image.output)]
        return Photo(image.name, image.original, panels)


def _with_units(infos: Mapping[str, MetricInfo], found: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {name: {**found[name].as_json(), "unit": info.unit} for name, info in infos.items() if name in found}


def _in_words(values: Mapping[str, float | None]) -> str:
    texts = [(Estimate(values[name]).text(info.digits), info) for name, info in METRICS.items() if name in values]
    return ", ".join(f"{info.title} {text} {info.unit}".rstrip() for text, info in texts)
