"""What a probe found, for people and for programs: its page, Markdown and JSON, and several probes in one table."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torchvision.utils import make_grid

from dc_ssdae.data.images import to_pillow
from dc_ssdae.errors import InputError, counted
from dc_ssdae.evaluation.curves import COLOURS, add_legend, number_logarithmic_ticks, running_mean, save_picture
from dc_ssdae.evaluation.estimates import Estimate
from dc_ssdae.evaluation.report.caveats import ENOUGH_IMAGES
from dc_ssdae.evaluation.report.page import Table, markdown, number, render_page
from dc_ssdae.evaluation.report.pictures import MARKERS
from dc_ssdae.figures import cells
from dc_ssdae.files import finite
from dc_ssdae.probe.spectrum import Spectrum, spectrum_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECONSTRUCTIONS, SAMPLES = "reconstructions", "samples"
MOST_SAMPLES, MOST_REFERENCES = 64, 16
"""How many pictures are on the page at most."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The Fréchet distance of images from real ones.

    Args:
        features: title of the network that gives them.
        is_stand_in: whether it stands in for those that distances are published of.
        images: "reconstructions" or "samples".
        value: the distance.
        count: how many images. Reconstructions are a fair floor if they are as many as the samples, and of images
            that are not among the real ones.
        sampler: of samples, in words.
        num_steps: of the sampler; with adaptive stopping at most so many.
        evaluations: of the network per sample, on average, where they are not as many as the steps.
        variance: of the normalised latents that were sampled, averaged over channels; that of the data is 1.
    """

    features: str
    is_stand_in: bool
    images: str
    value: Estimate
    count: int
    sampler: str = ""
    num_steps: int | None = None
    evaluations: float | None = None
    variance: float | None = None

    @property
    def title(self) -> str:
        """What the distance is called: FID only where it is one."""
        is_fid = self.features == "Inception" and not self.is_stand_in
        return "FID" if is_fid else f"Fréchet distance of {self.features} features"

    @property
    def digits(self) -> int:
        """Behind the point; features of a stand-in may be large."""
        return 2 if (self.value.value or 0.0) < 100.0 else 0

    @property
    def how(self) -> str:
        """The sampler and its steps, or that it is of reconstructions."""
        if self.images == RECONSTRUCTIONS:
            return self.images
        adaptive = "" if self.evaluations is None else f"; {self.evaluations:.1f} evaluations"
        return f"{self.sampler}, {counted(self.num_steps or 0, 'step')}{adaptive}"


class Neighbours(NamedTuple):
    """A sample, uint8 (3, S, S), its nearest training images, (k, 3, S, S), and their k cosine distances."""

    sample: Tensor
    images: Tensor
    distances: Sequence[float]


class Headline(NamedTuple):
    """One of the page's first figures: what it is, its value, its interval and more, and what it means."""

    title: str
    value: str
    remark: str
    meaning: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeReport:
    """What a probe found.

    Args:
        label: of the autoencoder.
        about: settings and numbers by name, which may be nested: the data, the latent's shape, the network, the
            dynamics, the training, the hardware. "latent_shape" is c, h, w; "network", "parameters" and "steps" are in
            the page's first sentence.
        levels: shares of noise at which the field was measured, in (0, 1); 0 is the clean end for every dynamics.
        field_loss: mean squared error of the field per value at each level, divided by λ², where the dynamics has one,
            and by the latent's variance.
        loss: its mean over the levels.
        clean_error: mean squared error of the clean estimate at each level, divided by the latent's variance.
        training_curve: (step, loss) pairs.
        validation_curve: likewise, on validation latents.
        distances: of samples and reconstructions; features to trust first.
        samples: uint8 (N, 3, S, S); None where there is no decoder.
        classes: their names, where the network knows classes.
        samples_by: how they were drawn, in words.
        no_samples: why there are none.
        no_distances: why samples were not compared with images, if there are samples.
        references: real images, uint8 (M, 3, S, S).
        neighbours: of some samples.
        copying: as `copying_ratio` gives it.
        searched: number of training images among which neighbours were looked for.
        latent_spectrum: of the normalised latents.
        image_spectrum: of the images' luma.
        seconds_per_sample: of sampling and decoding.
        caveats: what else a reader must know, the outcome first.
        command: that made the report.
    """

    label: str
    about: Mapping[str, Any]
    levels: Sequence[float]
    field_loss: Sequence[float]
    loss: Estimate
    clean_error: Sequence[float]
    training_curve: Sequence[tuple[int, float]] = ()
    validation_curve: Sequence[tuple[int, float]] = ()
    distances: Sequence[Distance] = ()
    samples: Tensor | None = None
    classes: Sequence[str] | None = None
    samples_by: str = ""
    no_samples: str = "There are no samples: the latents came without a model that decodes them."
    no_distances: str = ""
    references: Tensor | None = None
    neighbours: Sequence[Neighbours] = ()
    copying: Estimate | None = None
    searched: int = 0
    latent_spectrum: Spectrum | None = None
    image_spectrum: Spectrum | None = None
    seconds_per_sample: float | None = None
    caveats: Sequence[str] = ()
    command: str = ""

    def first(self, features: str, images: str = SAMPLES) -> Distance | None:
        """The distance of the samples that are shown, or of reconstructions, by features of this title."""
        found = (each for each in self.distances if (each.features, each.images) == (features, images))
        return next((each for each in found if each.value.value is not None), None)

    def figures(self) -> dict[str, Estimate]:
        """The figures for a table of several probes: `comparison_columns` has their titles."""
        found = {"probe_loss": self.loss} | ({"probe_copying": self.copying} if self.copying else {})
        for images in (SAMPLES, RECONSTRUCTIONS):
            features = next((each.features for each in self.distances), "")
            if best := self.first(features, images):
                found[f"probe_{images}"] = best.value
        return found

    def headlines(self) -> list[Headline]:
        """The figures that count, the first of them first."""
        meaning = "Error of the field on validation latents, averaged over the levels. Lower means easier to generate."
        lines = [Headline("Validation loss", self.loss.text(4), _interval(self.loss, 4), meaning)]
        features = [each.features for each in self.distances if each.images == SAMPLES]
        if features and (samples := self.first(features[0])):
            floor = self.first(features[0], RECONSTRUCTIONS)
            beside = (
                f" Reconstructions are at {floor.value.text(floor.digits)}, the floor that the decoder sets."
                if floor
                else ""
            )
            meaning = f"How far {counted(samples.count, 'sample')} are from real images. Lower is better.{beside}"
            remark = "; ".join(part for part in (_interval(samples.value, samples.digits), samples.how) if part)
            lines.append(Headline(samples.title, samples.value.text(samples.digits), remark, meaning))
        if self.copying:
            meaning = (
                f"Distance from samples to the nearest of {counted(self.searched, 'training image')}, relative to "
            )
            meaning += "unseen images. Near 1 is good; "
            meaning += "well below 1, samples are copies; above 1, they are unlike any image."
            lines.append(Headline("Copying ratio", self.copying.text(2), _interval(self.copying, 2), meaning))
        return lines

    def all_caveats(self) -> list[str]:
        """Say what may not be compared, the outcome first."""
        stand_ins = dict.fromkeys(each.features for each in self.distances if each.is_stand_in)
        fewest = min((each.count for each in self.distances if each.images == SAMPLES), default=ENOUGH_IMAGES)
        lines = [
            "A short training ranks latents; it says little of what long training gives.",
            "Compare losses only between latents of the same shape, and probes of the same network, dynamics, levels, "
            "training and data.",
            "Read the loss beside the reconstructions: values that carry less detail are easier to predict.",
            "Intervals are of the choice of images. Another --seed of the training may move a figure further.",
        ]
        lines += [
            f"{name} features stand in for those of published distances: compare only within one table, and never "
            "with FID."
            for name in stand_ins
        ]
        if fewest < ENOUGH_IMAGES:
            lines.append(
                f"Compare Fréchet distances only over {counted(fewest, 'sample')}, as here: they fall as images are "
                "added. Published ones are of 50,000."
            )
        return [*lines, *self.caveats]

    def distance_table(self) -> Table:
        """A row for each set of images, a column for each network's distance."""
        rows: dict[tuple[str, int], dict[str, str]] = {}
        for each in self.distances:
            cell = rows.setdefault((each.how, each.count), {"images": f"{each.how}\n{counted(each.count, 'image')}"})
            cell[f"{each.title}\nlower is better"] = number(each.value, each.digits)
            if each.variance is not None:
                cell["variance of the latents\n1 is the data's"] = f"{each.variance:.2f}"
        return Table([*rows.values()], list(dict.fromkeys(head for row in rows.values() for head in row)))

    def settings_table(self) -> Table:
        """A row for each setting."""
        return Table([{"setting": name.replace("_", " "), "value": text} for name, text in self._facts().items()])

    def as_json(self) -> str:
        """Every number of the page."""
        spectra = {"latent": self.latent_spectrum, "images": self.image_spectrum}
        content = {
            "label": self.label,
            "about": dict(self.about),
            "loss": self.loss.as_json(),
            "copying": self.copying and self.copying.as_json(),
            "searched": self.searched,
            "distances": [
                {"title": each.title, **vars(each), "value": each.value.as_json()} for each in self.distances
            ],
            "levels": [*self.levels],
            "field_loss": [*self.field_loss],
            "clean_error": [*self.clean_error],
            "training_curve": [*self.training_curve],
            "validation_curve": [*self.validation_curve],
            "spectra": {
                name: {key: values.tolist() for key, values in found._asdict().items()}
                for name, found in spectra.items()
                if found is not None
            },
            "neighbours": [[*found.distances] for found in self.neighbours],
            "seconds_per_sample": self.seconds_per_sample,
            "caveats": self.all_caveats(),
            "command": self.command,
        }
        return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"

    def as_markdown(self) -> str:
        """The figures, and what a reader must know."""
        lines = []
        for line in self.headlines():
            small = f" ({line.remark})" if line.remark else ""
            lines.append(f"**{line.title}: {line.value}**{small}. {line.meaning}")
        distances: list[str | Table] = ["## Distance of the samples", self.distance_table()]
        if not self.distances:
            distances = [self.no_samples if self.samples is None else self.no_distances]
        caveats = ("## Before you compare", self.all_caveats())
        return markdown(f"# Probe of {self.label}", lines, *caveats, *distances, "## Settings", self.settings_table())

    def as_picture(self) -> bytes:
        """The samples that the page shows, in rows of eight, as PNG.

        Raises:
            InputError: there are none.
        """
        if self.samples is None:
            raise InputError(self.no_samples)
        buffer = io.BytesIO()
        to_pillow(make_grid(self.samples[:MOST_SAMPLES], pad_value=255)).save(buffer, "png")
        return buffer.getvalue()

    def as_page(self) -> bytes:
        """The page, with its pictures in it."""
        names = self.classes or []
        pictures = [] if self.samples is None else [*self.samples[:MOST_SAMPLES]]
        tiles = [(picture, names[place] if place < len(names) else "") for place, picture in enumerate(pictures)]
        known: dict[str, Any] = {
            "levels": save_picture(self._levels_figure),
            "steps": save_picture(self._steps_figure) if len({each.num_steps for each in self.distances}) > 2 else None,
            "curves": save_picture(self._curves_figure) if self.training_curve or self.validation_curve else None,
            "spectrum": None,
        }
        if (latent := self.latent_spectrum) is not None and len(latent.frequencies):
            known["spectrum"] = save_picture(lambda: spectrum_figure(latent, self.image_spectrum))
        references = [] if self.references is None else [*self.references[:MOST_REFERENCES]]
        page = Path(__file__).with_name("probe.html")
        parts = {"tiles": tiles, "references": references, "lead": self._lead(), "footer": self.command}
        return render_page(page, report=self, **known, **parts)

    @property
    def latent_shape(self) -> str:
        """As c×h×w."""
        return "×".join(map(str, self.about.get("latent_shape", ())))

    def _facts(self) -> dict[str, str]:
        """The settings in words."""
        return cells({**self.about, "latent_shape": self.latent_shape, "seconds_per_sample": self.seconds_per_sample})

    def _lead(self) -> str:
        network, parameters, steps = (self._facts().get(name, "–") for name in ("network", "parameters", "steps"))
        size = f"{network}, {parameters} parameters"
        return f"a diffusion transformer ({size}), trained for {steps} steps on latents of {self.latent_shape}"

    def _levels_figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.8, 3.2), dpi=110, layout="constrained")
        titles = ("loss of the field", "error of the clean estimate")
        for axes, title, values in zip(figure.subplots(1, 2), titles, (self.field_loss, self.clean_error), strict=True):
            axes.plot(self.levels, values, color=COLOURS[0], marker="o", markersize=3)
            axes.set(title=title, xlabel="share of noise (0: clean, 1: noise alone)", xlim=(0, 1))
            axes.set_ylim(bottom=0.0)
            axes.grid(alpha=0.25)
        axes.axhline(1.0, color="#8a94a3", linestyle="--", linewidth=1.0)
        return figure

    def _steps_figure(self) -> "Figure":
        from matplotlib.figure import Figure

        drawn = [each for each in self.distances if each.num_steps and each.value.value is not None]
        features, samplers = (
            list(dict.fromkeys(getattr(each, key) for each in drawn)) for key in ("features", "sampler")
        )
        figure = Figure(figsize=(max(8.0, 4.4 * len(features)), 3.4), dpi=110, layout="constrained")
        styles: list[dict[str, Any]] = []
        for index, name in enumerate(samplers):
            adaptive = any(each.evaluations for each in drawn if each.sampler == name)
            styles.append({"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]})
            styles[-1] |= {"markerfacecolor": "none", "linestyle": "none"} if adaptive else {"linewidth": 1.4}
        for axes, name in zip(figure.subplots(1, len(features), squeeze=False)[0], features, strict=True):
            for sampler, style in zip(samplers, styles, strict=True):
                found = [each for each in drawn if (each.features, each.sampler) == (name, sampler)]
                points = [(each.evaluations or each.num_steps or 0, each.value) for each in found]
                _draw_estimates(axes, points, style)
            if floor := self.first(name, RECONSTRUCTIONS):
                axes.axhline(floor.value.value, color="#8a94a3", linestyle="--", linewidth=1.0)
            axes.set(title=next(each.title for each in drawn if each.features == name))
            axes.set(xscale="log", xlabel="evaluations of the network per sample")
            axes.set_ylim(bottom=0.0)
            number_logarithmic_ticks(axes.xaxis, form=",.10g")
            axes.grid(alpha=0.25)
        add_legend(figure, samplers, styles)
        return figure

    def _curves_figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 3.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        looks: dict[str, dict[str, Any]] = {}
        if self.training_curve:
            steps, values = zip(*self.training_curve, strict=True)
            axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=0.6)
            looks["training, running mean"] = {"color": COLOURS[0], "linewidth": 1.6}
            axes.plot(steps, running_mean(values, max(5.0, 0.02 * len(values))), **looks["training, running mean"])
        if self.validation_curve:
            looks["validation"] = {"color": COLOURS[1], "marker": "o", "markersize": 4}
            axes.plot(*zip(*self.validation_curve, strict=True), **looks["validation"])
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.25)
        add_legend(figure, [*looks], [*looks.values()])
        return figure


def comparison_columns(reports: Sequence[ProbeReport]) -> dict[str, tuple[str, str, int, str]]:
    """Title, unit, digits and why there may be no value of `ProbeReport.figures`, for a table of several probes."""
    found = [each for report in reports for each in report.distances]
    title, none = next((each.title for each in found), "Fréchet distance"), "its latent was not probed"
    digits = min((each.digits for each in found), default=0)
    return {
        "probe_loss": ("probe's validation loss", "lower is easier to generate", 4, none),
        "probe_samples": (title, "samples, lower is better", digits, none),
        "probe_reconstructions": (title, "reconstructions", digits, none),
        "probe_copying": ("copying ratio", "near 1 is good", 2, none),
    }


def comparison_caveats(reports: Sequence[ProbeReport]) -> list[str]:
    """What must be known of several probes, and how they were trained, each once."""
    lines = [f"Probes: {report._lead()}." for report in reports]
    return list(dict.fromkeys([*lines, *(line for report in reports for line in report.all_caveats())]))


def _interval(found: Estimate, digits: int) -> str:
    """The interval, or why there is no value."""
    return found.interval_text(digits) or found.reason or ""


def _draw_estimates(axes: Any, points: Sequence[tuple[float, Estimate]], style: Mapping[str, Any]) -> None:
    """Draw values with their intervals, if they have any, by their places."""
    rows = sorted(
        (place, value, value - (value if found.low is None else found.low), (found.high or value) - value)
        for place, found in points
        if (value := found.value) is not None
    )
    places, values, *ends = zip(*rows, strict=True) if rows else ([], [], [], [])
    axes.errorbar(places, values, yerr=ends, capsize=2, elinewidth=0.8, **style)
