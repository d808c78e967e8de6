"""Quality and cost of a decode for each sampler, number of steps and tolerance, of one or two models.

python studies/sampling.py --model DIR [--baseline DIR] --data PHOTOS [--help]
"""

import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.cli.common import advising_on_batches, check_outputs, load_model, say, tell_of_images, write_outputs
from dc_ssdae.cli.options import BatchOptions, ModelOptions, OutputOptions
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import open_sources
from dc_ssdae.decoding import DESCENTS, INTEGRATORS, ONE_STEP, SAMPLERS, DecoderOutput, Divergence, plan_decoding
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, check_names, counted
from dc_ssdae.evaluation.candidates import parse_candidates
from dc_ssdae.evaluation.curves import save_picture
from dc_ssdae.evaluation.metrics import each, psnr, ssim
from dc_ssdae.evaluation.profile import wait_for
from dc_ssdae.evaluation.report.page import Table, markdown, render_page
from dc_ssdae.evaluation.report.pictures import Point, draw, front, style
from dc_ssdae.figures import cells
from dc_ssdae.losses.backbones import weights_on_this_machine
from dc_ssdae.losses.perceptual import LPIPSLoss, trunk_file
from dc_ssdae.settings import setting
from dc_ssdae.timing import Spread, describe_machine, machine_line, measure_alternately

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "studies/sampling.py"
FILES = ("index.html", "study.json", "table.md", "study.png")

QUALITIES = {"psnr": ("PSNR (dB)", True), "ssim": ("SSIM", True), "lpips": ("LPIPS", False)}
"""What is measured: its title, and whether more is better."""


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Args:
        sampler: as `DCSSDAE.decode` takes it.
        num_steps: likewise.
        step_size: in units of 1/L, L the field's slope near the data; None follows from the decay.
        momentum: likewise.
        tolerance: likewise.
        descent: of `EquilibriumMatching.step_sizes`, where it is not the default.
    """

    sampler: str
    num_steps: int
    step_size: float | None = None
    momentum: float | None = None
    tolerance: float | None = None
    descent: float | None = None

    @property
    def family(self) -> str:
        """The setting without what a curve runs along: the number of steps or, with tolerances, those."""
        values = {"η·L": self.step_size, "landing, then η·L": self.descent, "μ": self.momentum}
        parts = [self.sampler, *(f"{name} = {value:g}" for name, value in values.items() if value is not None)]
        return ", ".join(parts if self.tolerance is None else [*parts, f"stopping (≤ {self.num_steps})"])

    def arguments(self, dynamics: Any) -> dict[str, Any]:
        """What `DCSSDAE.decode` takes for it."""
        given = {name: getattr(self, name) for name in ("sampler", "num_steps", "step_size", "momentum", "tolerance")}
        if self.step_size is not None:
            given["step_size"] = self.step_size / dynamics.stiffness
        elif self.descent is not None:
            given["step_size"] = dynamics.step_sizes(self.num_steps, descent=self.descent)
        return given


@dataclass(frozen=True)
class Grid:
    """What is swept.

    Args:
        steps: numbers of steps.
        samplers: among the model's; None is all of them.
        step_sizes: of descents, in units of 1/L; None stands for those that follow from the decay.
        momenta: of nesterov.
        tolerances: at which descents stop, with the largest number of steps as their cap; for λ = 1.
        descents: other distances, in units of 1/L, that the steps of gradient descent after the first cover together.
    """

    steps: Sequence[int] = (1, 2, 4, 8, 16)
    samplers: Sequence[str] | None = None
    step_sizes: Sequence[float | None] = (None, 0.5)
    momenta: Sequence[float] = (0.3,)
    tolerances: Sequence[float] = (0.2, 0.1, 0.05, 0.025)
    descents: Sequence[float] = ()

    def settings(self, dynamics: object) -> list[Setting]:
        """List the settings that fit a dynamics, none of them twice.

        Raises:
            InputError: no sampler fits, or a value is out of range.
        """
        descends = isinstance(dynamics, EquilibriumMatching)
        fitting = [ONE_STEP, *(DESCENTS if descends else INTEGRATORS if isinstance(dynamics, FlowMatching) else [])]
        settings: list[Setting] = []
        for sampler in fitting if self.samplers is None else [name for name in fitting if name in self.samplers]:
            has_sizes, is_plain = sampler in DESCENTS, sampler == "gradient_descent"
            stops: list[tuple[int, float | None]] = [*product([1] if sampler == ONE_STEP else self.steps, [None])]
            stops += product([max(self.steps)], self.tolerances if has_sizes else [])
            momenta = self.momenta if has_sizes and not is_plain else [None]
            for momentum, size, (steps, stop) in product(momenta, self.step_sizes if has_sizes else [None], stops):
                settings.append(Setting(sampler, steps, size, momentum, stop))
            ways = product(self.descents if is_plain else [], [steps for steps in self.steps if steps > 1])
            settings += [Setting(sampler, steps, descent=way) for way, steps in ways]
        if not settings:
            raise InputError(f"{type(dynamics).__name__} has none of these samplers; it has {', '.join(fitting)}")
        for one in settings:
            plan_decoding(dynamics, **one.arguments(dynamics))  # type: ignore[arg-type]
        return list(dict.fromkeys(settings))


@dataclass
class Measurement:
    """A model's decode with one setting: means over the images.

    Attributes:
        qualities: by the names in `QUALITIES`; of uint8 images, a mean over images.
        evaluations: of the decoder per image; with the fewest and the most.
        residual_rms: of the field where it was last evaluated; the median of the images.
        diverged: how many images were given up.
        seconds: per image, median and quartiles over the rounds.
        ratio: of seconds to those of one step of the same model in the same round.
    """

    model: str
    setting: Setting
    qualities: dict[str, float] = field(default_factory=dict)
    evaluations: float = 0.0
    fewest: int = 0
    most: int = 0
    residual_rms: float = 0.0
    diverged: int = 0
    seconds: Spread | None = None
    ratio: Spread | None = None


@torch.inference_mode()
def measure_sampling(
    models: Mapping[str, DCSSDAE],
    pixels: Tensor,
    grid: Grid,
    batch: int = 16,
    rounds: int = 3,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[Measurement]:
    """Decode the modes of images' latents with every setting of every model.

    All settings start from the noise that `DCSSDAE.decode` takes by default. Times are of `decode` alone, in rounds
    that go through the settings forwards and backwards in turn.

    Args:
        models: by name, in eval mode, on one device.
        pixels: uint8 (N, 3, S, S), S a multiple of each model's f.
        grid: what to sweep.
        batch: images decoded at a time.
        rounds: in which everything is timed.
        lpips: distance of float images (B, 3, S, S) in [-1, 1]: (B,); None measures none.
        advance: called after each setting's round with 1.

    Raises:
        InputError: a setting does not fit.
    """
    parts = pixels.split(batch)
    latents = {
        name: [model.encode(to_model_range(part).to(model.device)).latent_dist.mode() for part in parts]
        for name, model in models.items()
    }

    def measure(m: Measurement) -> float:
        """Decode all images; gives the seconds per image, and the first time notes what came out."""
        model, seconds = models[m.model], 0.0
        found: dict[str, list[Tensor]] = defaultdict(list)
        for z, part in zip(latents[m.model], parts, strict=True):
            wait_for(model.device)
            start = time.perf_counter()
            output = model.decode(z, **m.setting.arguments(model.dynamics))
            wait_for(model.device)
            seconds += time.perf_counter() - start
            if not m.qualities:
                for name, values in _values(output, part.to(model.device), lpips).items():
                    found[name].append(values)
        if found:
            columns = {name: torch.cat(values).double().cpu() for name, values in found.items()}
            counts = columns.pop("num_evaluations")
            m.evaluations, m.fewest, m.most = float(counts.mean()), int(counts.min()), int(counts.max())
            m.residual_rms, m.diverged = float(columns.pop("residual_rms").median()), int(columns.pop("diverged").sum())
            m.qualities = {name: float(values.mean()) for name, values in columns.items()}
        if advance is not None:
            advance(1)
        return seconds / len(pixels)

    measured = [Measurement(name, setting) for name, m in models.items() for setting in grid.settings(m.dynamics)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Divergence)  # counted in the table
        for name, model in models.items():  # memory is taken, and kernels are chosen, before anything is timed
            model.decode(latents[name][0])
        seconds = measure_alternately([partial(measure, measurement) for measurement in measured], rounds)
    one_step = {m.model: own for m, own in zip(measured, seconds, strict=True) if m.setting.sampler == ONE_STEP}
    for measurement, own in zip(measured, seconds, strict=True):
        measurement.seconds = Spread.of(own)
        if measurement.model in one_step:
            measurement.ratio = Spread.of(np.divide(own, one_step[measurement.model]).tolist())
    return measured


@dataclass(frozen=True)
class Needed:
    """The fewest evaluations per image with which each of two models reaches a quality; None where it does not."""

    target: float
    first: Measurement | None
    second: Measurement | None

    @property
    def fewer(self) -> float | None:
        """The share of evaluations that the second saves; negative where it needs more."""
        if self.first is None or self.second is None:
            return None
        return 1.0 - self.second.evaluations / self.first.evaluations


def evaluations_needed(
    first: Sequence[Measurement], second: Sequence[Measurement], quality: str = "psnr", targets: int = 9
) -> list[Needed]:
    """Compare what two models spend for the same quality.

    The targets are evenly spread from the worse of the two models' one-step qualities, or of their worst ones, to the
    best that either reaches; and the best of each is one.

    Args:
        first: measurements of a model, the baseline.
        second: of the other.
        quality: one of `QUALITIES`.
        targets: how many, at least 2.
    """
    sign = 1.0 if QUALITIES[quality][1] else -1.0

    def cheapest(measurements: Sequence[Measurement], target: float) -> Measurement | None:
        reaching = [m for m in measurements if sign * m.qualities[quality] >= target]
        return min(reaching, key=lambda m: (m.evaluations, -sign * m.qualities[quality]), default=None)

    lows, highs = [], []
    for measurements in (first, second):
        one = [m for m in measurements if m.setting.sampler == ONE_STEP] or measurements
        lows.append(min(sign * m.qualities[quality] for m in one))
        highs.append(max(sign * m.qualities[quality] for m in measurements))
    wanted = sorted({*np.linspace(min(lows), max(highs), targets).tolist(), *highs})
    return [Needed(sign * target, cheapest(first, target), cheapest(second, target)) for target in wanted]


def _values(
    output: DecoderOutput, original: Tensor, lpips: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """What there is to know of each image of a batch that does not depend on the clock."""
    image = to_uint8(output.sample.nan_to_num(0.0, 0.0, 0.0))  # mid-grey where it is not finite
    values = {"psnr": each(psnr)(original, image), "ssim": each(ssim)(original, image)}
    if lpips is not None:
        values["lpips"] = lpips(to_model_range(image), to_model_range(original))
    return values | {name: output[name] for name in ("num_evaluations", "residual_rms", "diverged")}


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
        parts = {"study": self, "picture": picture, "note": NOTE, "footer": machine_line(self.machine)}
        return render_page(Path(__file__).with_suffix(".html"), **parts)

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


def study_figure(measurements: Sequence[Measurement]) -> "Figure":
    """Quality against evaluations and against time: a pale mark for each setting, a line for each sampler.

    The line goes through the settings that are best for their number of evaluations. Marks that are worse than all
    lines are left out: a few bad settings would flatten all others.
    """
    rows = []
    groups: dict[str, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault(f"{m.model}: {m.setting.sampler}", []).append(m)
    for name in [name for name in ("psnr", "lpips") if name in measurements[0].qualities]:
        title, more = QUALITIES[name]
        points = {
            label: [Point(m.qualities[name], m.evaluations, 1000 * m.seconds.median) for m in group if m.seconds]
            for label, group in groups.items()
        }
        lines = {label: front(found, 1, False, more) for label, found in points.items()}
        ends = [point.quality for found in lines.values() for point in found]
        shown = {label: [p for p in found if min(ends) <= p.quality <= max(ends)] for label, found in points.items()}
        rows.append((title, shown, [lines, lines]))
    styles = {label: style(index, 0.5) for index, label in enumerate(groups)}
    return draw(("evaluations of the decoder per image", "milliseconds per image"), rows, styles)


@dataclass(kw_only=True)
class Options(ModelOptions, OutputOptions, BatchOptions):
    """Measure how quality and time depend on sampler, number of steps, step size and tolerance.

    Writes quality against evaluations of the decoder and against time to DIR/index.html, study.json, table.md and
    study.png; with --baseline also how many evaluations each of the two models needs for the same quality. Every image
    is decoded from the mode of its latent and from the default noise. Values of a list are separated by commas.
    Requires pip install 'dc-ssdae[eval]'.

    Args:
        baseline: another model to compare with, such as one trained by flow matching.
        data: images to measure on: a folder of images or shards, or a pattern of shards, as in data.root of a training
            run. If the folder has a subfolder validation/, its images are used.
        images: largest number of images.
        rounds: number of rounds in which every setting is timed.
        samplers: names of samplers; by default all that suit each model.
        steps: numbers of steps; by default 1,2,4,8,16.
        step_sizes: step sizes of descents, in units of 1/L, where L is the slope of the field near the data. The word
            default stands for the step size that decoding uses by default. By default default,0.5.
        momenta: momenta of nesterov; by default 0.3.
        tolerances: tolerances at which descents stop, with at most the largest number in --steps; by default
            0.2,0.1,0.05,0.025.
        descents: other total distances, in units of 1/L, that the steps of gradient descent after the first cover
            together; by default none.
        lpips: network of LPIPS; LPIPS is left out if the weights are not on this machine.
    """

    baseline: str | None = setting(None, metavar="DIR")
    data: str = setting(metavar="ROOT")
    out: Path = setting(Path("sampling-study"), metavar="DIR")
    images: int = setting(256, at_least=1, metavar="N")
    rounds: int = setting(3, at_least=1, metavar="R")
    samplers: list[str] | None = setting(None, metavar="NAME,...")
    steps: list[int] | None = setting(None, at_least=1, metavar="N,...")
    step_sizes: list[str] = setting(["default", "0.5"], metavar="X,...")
    momenta: list[float] | None = setting(None, metavar="X,...")
    tolerances: list[float] | None = setting(None, metavar="X,...")
    descents: list[float] | None = setting(None, metavar="X,...")
    lpips: Literal["vgg", "alex", "squeeze", "none"] = "vgg"


def run(options: Options) -> None:
    """Measure, write and print."""
    check_names("sampler", options.samplers or (), SAMPLERS)
    check_outputs(options, [options.out / name for name in FILES])
    given = options.given("steps", "samplers", "momenta", "tolerances", "descents")
    grid = Grid(step_sizes=[_step_size(text) for text in options.step_sizes], **given)
    specs = parse_candidates([text for text in (options.baseline, options.model) if text is not None])
    models = {spec.label: load_model(replace(options, model=spec.value)) for spec in specs}
    device = models[specs[0].label].device
    lpips, notes = _lpips(options.lpips, device)
    sources = open_sources(options.data, None, None, None)
    images = ValidationImages(sources.validation or sources.train, options.size, options.images)
    read = [images[place] for place in range(len(images))]
    broken = [image.broken for image in read if image.broken is not None]
    tell_of_images(options.program, options.size, broken, sum(image.enlarged for image in read), len(read))
    pixels = torch.stack([image.pixels for image in read if image.broken is None])
    count = options.rounds * sum(len(grid.settings(model.dynamics)) for model in models.values())
    bar = tqdm(total=count, unit="decode", leave=False, disable=None)
    with advising_on_batches(options), bar, torch.inference_mode():
        measurements = measure_sampling(models, pixels, grid, options.batch, options.rounds, lpips, bar.update)
    measured = f"{counted(len(pixels), 'image')} of {options.size} px, cut from the centre, batches of {options.batch}"
    times = f"times are of decode alone, medians of {counted(options.rounds, 'round')}"
    protocol = f"{measured}, {options.dtype}, output rounded to uint8; {times}."
    study = SamplingStudy(measurements, list(models), [protocol, *notes], describe_machine(device))
    text = study.as_markdown()
    say(text)
    picture = study.as_picture()
    contents = (study.as_page(picture), study.as_json(), text, picture)
    write_outputs(options, dict(zip(FILES, contents, strict=True)))


def _lpips(net: str, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, list[str]]:
    """Load the LPIPS distance, or say why there is none."""
    if net == "none":
        return None, []
    if weights_on_this_machine(trunk_file(net)) is None:
        return None, [f"No LPIPS: the weights of {net} are not on this machine, and nothing is downloaded."]
    return LPIPSLoss(net).to(device).distance, []


def _step_size(text: str) -> float | None:
    try:
        return None if text == "default" else float(text)
    except ValueError:
        raise InputError(f"--step_sizes holds {text!r}; it must hold numbers, or the word default") from None


if __name__ == "__main__":
    try:
        run(CommandParser(Options, PROGRAM).parse(sys.argv[1:]))
    except (InputError, OSError) as error:
        sys.exit(f"{PROGRAM}: {error}")
