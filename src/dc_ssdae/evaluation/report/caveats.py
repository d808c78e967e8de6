"""What a reader must know before comparing figures: the protocol in words, and what may not be compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dc_ssdae.data.loader import BrokenImage, enlarged_caveat
from dc_ssdae.errors import counted
from dc_ssdae.evaluation.arena import Entry
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.evaluation.evaluate import Evaluation, EvaluationSettings
from dc_ssdae.evaluation.metric_networks import NOT_ASKED, MetricSuite
from dc_ssdae.evaluation.report.page import Table, fill, markdown
from dc_ssdae.timing import machine_line

ENOUGH_IMAGES = 10_000
"""Below them a distance between sets says more about how many images there are than about the model."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one or several models, and how they were measured.

    Args:
        entries: the models.
        settings: of the evaluation.
        suite: its metrics.
        data: name of the data set.
        total: images of the data set.
        machine: as `describe_machine` gives it.
        command: that made the report.
        dtype: of the networks.
        decoding: how models of this package decode, where that is not their default.
    """

    entries: Sequence[Entry]
    settings: EvaluationSettings
    suite: MetricSuite
    data: str
    total: int
    machine: Mapping[str, Any]
    command: str
    dtype: str
    decoding: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> dict[str, Evaluation]:
        """The evaluations of the models that finished, by label."""
        return {entry.label: entry.evaluation for entry in self.entries if entry.evaluation is not None}

    @property
    def images(self) -> int:
        """How many images were measured, the same for all models that finished; 0 where none did."""
        return next((found.images for found in self.finished.values()), 0)

    @property
    def broken(self) -> Sequence[BrokenImage]:
        """The images that could not be read, the same for all models that finished."""
        return next((found.broken for found in self.finished.values()), ())

    def caveats(self) -> list[str]:
        """Say what may not be compared, the outcome first."""
        found, images, size = self.finished, self.images, self.settings.size
        random = [
            entry.label for entry in self.entries if entry.label in found and RANDOM_WEIGHTS in entry.candidate.remarks
        ]
        means = f"Quality means nothing for {', '.join(random)} ({RANDOM_WEIGHTS}): compare cost and shape."
        lines = [means] if random else []
        lines += [f"{METRICS[name].title}: {note}." for name, note in self.suite.notes.items()]
        known = {name for each in found.values() for name, metric in each.metrics.items() if metric.value is not None}
        titles = " and ".join(METRICS[name].title for name in self.suite.distances if name in known)
        if titles and images < ENOUGH_IMAGES:
            falling = "these distances fall as images are added. Published ones are of 50,000."
            lines.append(f"Compare {titles} only over {counted(images, 'image')}, as here: {falling}")
        lines += enlarged_caveat(max((each.enlarged for each in found.values()), default=0), images, size)
        return [*lines, f"Compare only with figures of the protocol {self.settings.protocol.name} at {size} px."]

    def missing(self) -> list[str]:
        """Say which metrics were not taken, and why."""
        missing = self.suite.missing.items()
        return [f"No {METRICS[name].title}: {reason}." for name, reason in missing if reason != NOT_ASKED]

    def protocol(self) -> list[str]:
        """Say how the figures were measured."""
        return [*fill("protocol.txt", report=self, metrics=METRICS).splitlines(), machine_line(self.machine)]

    def _json(self, content: Mapping[str, Any], **protocol: Any) -> str:
        """What was found, the protocol and what else it depends on, and what a reader must know."""
        own = {"size": self.settings.size, "data": self.data, "seed": self.settings.seed, "weights": self.suite.files}
        settings = {**asdict(self.settings.protocol), **own, "decoding": dict(self.decoding), **protocol}
        about = {"caveats": self.caveats(), "machine": dict(self.machine), "command": self.command}
        return json.dumps({**content, "protocol": settings, **about}, indent=2, allow_nan=False) + "\n"

    def _markdown(self, title: str, table: Table, *more: str | Sequence[str]) -> str:
        caveats = ("## Before you compare", self.caveats(), "## Protocol", self.protocol())
        return markdown(f"# {title}", table, self.missing(), *more, *caveats)
