"""What an evaluation found, for people and for programs: report.html, report.md, report.json and images.csv."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dc_ssdae.errors import counted
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.caveats import Report, caveats, protocol_lines
from dc_ssdae.evaluation.estimates import METRICS, Estimate, MetricInfo
from dc_ssdae.evaluation.evaluate import BITS, EVALUATIONS, KL, Evaluation, Reconstructed
from dc_ssdae.evaluation.metric_networks import MSE, NOT_ASKED
from dc_ssdae.evaluation.report import DIFFERENCE_GAIN, difference
from dc_ssdae.evaluation.statistics import ACTIVE_VARIANCE, LatentProfile
from dc_ssdae.evaluation.viewer import Group, Panel, Photo, Table, bullets, paragraph, render_page, section, warning
from dc_ssdae.provenance import name_of_path, short_name
from dc_ssdae.timing import machine_line

OTHERS: Mapping[str, MetricInfo] = {
    KL: MetricInfo("KL", "nats per image", False, 1),
    BITS: MetricInfo("file size", "bit/px", False, 3),
    EVALUATIONS: MetricInfo("evaluations", "of the decoder, per image", False, 2),
}
MOST_CHANNELS = 32
"""Of a latent, that a page lists one by one."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Report):
    """The results of one model.

    Args:
        label: what the model is called.
        remarks: what to know about it.
        evaluation: as `evaluate` gives it.
    """

    label: str
    remarks: Sequence[str]
    evaluation: Evaluation

    @property
    def ranking(self) -> str | None:
        """The metric by which images are the worst and the best; None where no metric is of single images."""
        names = [name for name in ("lpips", "psnr", "dreamsim", "ssim") if name in self.suite.images]
        trusted = [name for name in names if name not in self.suite.notes]
        return next(iter(trusted or names), None)

    def ranked(self) -> list[int]:
        """Places of the images, the worst first."""
        if self.ranking is None:
            return []
        values = self.evaluation.values[self.ranking]
        sign = 1.0 if METRICS[self.ranking].more_is_better else -1.0
        return [int(place) for place in np.argsort(sign * values, kind="stable") if not math.isnan(values[place])]

    def as_csv(self) -> str:
        """A line an image: its place, name and values; an image that cannot be read has the reason instead."""
        names = [name for name in (*METRICS, MSE, *OTHERS) if name in self.evaluation.values]
        names = [name for name in names if not np.isnan(self.evaluation.values[name]).all()]
        broken = dict(zip(self.evaluation.broken_places, self.evaluation.broken, strict=True))
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["place", "name", *names, "broken"])
        for place, name in enumerate(self.evaluation.names):
            values = [float(self.evaluation.values[key][place]) for key in names]
            cells = ["" if math.isnan(value) else repr(value) for value in values]
            writer.writerow([place, name, *cells, broken[place].reason if place in broken else ""])
        return stream.getvalue()

    def as_json(self) -> str:
        """Everything but the single images' values."""
        found = self.evaluation
        content = {
            "model": self.label,
            "remarks": list(self.remarks),
            "metrics": {name: {**found.metrics[name].as_json(), "unit": info.unit} for name, info in METRICS.items()},
            "others": {
                name: {**found.others[name].as_json(), "unit": info.unit}
                for name, info in OTHERS.items()
                if name in found.others
            },
            "images": found.images,
            "broken": {image.name: image.reason for image in found.broken},
            "latent_shape": None if found.latent_shape is None else list(found.latent_shape),
            "latent": None if found.latent is None else found.latent.as_json(),
            "protocol": {**self.protocol_settings(), "dtype": self.dtype},
            "caveats": self.caveats(),
            "machine": dict(self.machine),
            "command": self.command,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def as_provenance(self) -> dict[str, Any]:
        """The figures, their intervals and notes, as a model's `provenance` has them."""
        metrics = {
            name: {
                **{key: value for key in ("value", "low", "high") if (value := getattr(found, key)) is not None},
                **({} if found.note is None else {"note": short_name(found.note)}),
            }
            for name, found in self.evaluation.metrics.items()
            if found.as_json()["value"] is not None
        }
        entry = {
            "protocol": self.settings.protocol.name,
            "data": name_of_path(self.data) or "images",
            "images": self.evaluation.images,
            "image_size": self.settings.size,
            "decoding": dict(self.decoding),
            "metrics": metrics,
        }
        return entry if self.dtype == "float32" else {**entry, "dtype": self.dtype}

    def as_markdown(self) -> str:
        """The figures, and what a reader must know."""
        parts = [f"# {self.label}", self._figures().markdown()]
        if self.evaluation.latent is not None:
            parts += ["## Latent", _list(self._latent_lines(self.evaluation.latent))]
        parts += ["## Before you compare", _list(self.caveats()), "## Protocol", _list(self._protocol())]
        return "\n\n".join(part for part in parts if part) + "\n"

    def as_page(self, worst: Sequence[Reconstructed], best: Sequence[Reconstructed]) -> bytes:
        """The page.

        Args:
            worst: images, the worst first.
            best: likewise.
        """
        found = self.evaluation
        groups = []
        if self.ranking is not None:
            info = METRICS[self.ranking]
            order = f"by {info.title}, {'lowest' if info.more_is_better else 'highest'} first"
            groups.append(Group("Worst images", f"{len(worst)} of {found.images:,}, {order}.", self._photos(worst)))
            order = f"by {info.title}, {'highest' if info.more_is_better else 'lowest'} first"
            groups.append(Group("Best images", f"{len(best)} of {found.images:,}, {order}.", self._photos(best)))
        taken = [(info, found.metrics[name]) for name, info in METRICS.items() if name not in self.suite.missing]
        figures = ", ".join(
            f"{info.title} {value.text(info.digits)}{f' {info.unit}' if info.unit else ''}" for info, value in taken
        )
        remarks = f" ({', '.join(self.remarks)})" if self.remarks else ""
        size = self.settings.size
        sections = [section("Figures", warning(self.caveats()), self._figures().html())]
        if found.latent is not None:
            lines = bullets(self._latent_lines(found.latent))
            sections.append(section("Latent", lines, *self._channels(found.latent)))
        if found.broken:
            lines = bullets([image.reason for image in found.broken[:20]])
            left_out = paragraph(f"{counted(len(found.broken), 'image')} cannot be read.")
            sections.append(section("Left out", left_out, lines))
        sections.append(section("Protocol", bullets(self._protocol())))
        return render_page(
            f"Evaluation of {self.label}",
            f"{figures} on {counted(found.images, 'image')} of {size}×{size} px{remarks}.",
            groups,
            sections,
            self.command,
        )

    def caveats(self) -> list[str]:
        """What may not be compared."""
        random = [self.label] if RANDOM_WEIGHTS in self.remarks else []
        found = self.evaluation
        return caveats(self.settings, self.suite, [found.metrics], found.images, random, found.enlarged)

    def _protocol(self) -> list[str]:
        lines = protocol_lines(
            self.settings, self.suite, self.data, self.evaluation.images, len(self.evaluation.broken), self.total
        )
        decoding = ", ".join(f"{name} {value}" for name, value in self.decoding.items())
        lines.append(f"Model computed in {self.dtype}" + (f"; decoded with {decoding}." if decoding else "."))
        return [*lines, machine_line(self.machine)]

    def _figures(self) -> Table:
        found = self.evaluation
        rows = []
        for infos, values in ((METRICS, found.metrics), (OTHERS, found.others)):
            for name, info in infos.items():
                if name in values and values[name].reason != NOT_ASKED:
                    better = "" if infos is OTHERS else ("more" if info.more_is_better else "less") + " is better"
                    value, interval = values[name].text(info.digits), values[name].interval_text(info.digits)
                    unit = f" {info.unit}" if info.unit and values[name].value is not None else ""
                    rows.append([(info.title, better), (f"{value}{unit}", values[name].reason or ""), (interval, "")])
        return Table([("metric", ""), ("value", ""), ("95 % interval", "")], rows, [None] * len(rows))

    def _latent_lines(self, latent: LatentProfile) -> list[str]:
        channels = len(latent.mean)
        size = self.settings.size
        shape = self.evaluation.latent_shape or ()
        ratio = 3 * size**2 / max(1, math.prod(shape))
        lines = [
            f"{'×'.join(map(str, shape))} (c×h×w) at {size} px: {ratio:.1f} image values for each latent value, "
            f"{math.prod(shape[1:]):,} positions.",
            f"Effective dimensions: {latent.effective_dimensions:.1f} of {counted(channels, 'channel')} (participation "
            "ratio of the covariance of the posterior's mean).",
            f"Active channels: {latent.active_channels} of {channels} (variance of the mean above {ACTIVE_VARIANCE}).",
        ]
        if latent.kl is None:
            lines.append("No KL: the encoder is deterministic.")
        else:
            values = max(1, math.prod(shape))
            lines.append(f"KL from N(0, 1): {sum(latent.kl) / values:.3f} nats per latent value.")
        low, middle, high = min(latent.std), statistics.median(latent.std), max(latent.std)
        lines.append(f"Standard deviation of channels: {low:.3f} to {high:.3f}, median {middle:.3f}.")
        return lines

    def _channels(self, latent: LatentProfile) -> list[str]:
        """A table of the channels, where they are few enough to look at."""
        if len(latent.mean) > MOST_CHANNELS:
            return [paragraph(f"report.json has mean, standard deviation and KL of all {len(latent.mean)} channels.")]
        heads = [("channel", ""), ("mean", ""), ("std", ""), *([("KL", "nats per image")] if latent.kl else [])]
        rows = []
        for channel, (mean, std) in enumerate(zip(latent.mean, latent.std, strict=True)):
            cells = [(str(channel), ""), (f"{mean:.3f}", ""), (f"{std:.3f}", "")]
            rows.append([*cells, *([(f"{latent.kl[channel]:,.1f}", "")] if latent.kl else [])])
        return [Table(heads, rows, [None] * len(rows)).html()]

    def _photos(self, shown: Sequence[Reconstructed]) -> list[Photo]:
        photos = []
        for image in shown:
            values = {name: self.evaluation.values[name][image.place] for name in METRICS if name in self.suite.images}
            caption = ", ".join(
                f"{METRICS[name].title} {Estimate(value).text(METRICS[name].digits)} {METRICS[name].unit}".rstrip()
                for name, value in values.items()
            )
            panels = [
                Panel("reconstruction", caption, image.output),
                Panel(
                    "difference",
                    f"×{DIFFERENCE_GAIN}, grey is none",
                    difference(image.original, image.output),
                    flips=False,
                ),
            ]
            photos.append(Photo(image.name, image.original, panels))
        return photos


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
