"""Quality and cost of a decode for each sampler, number of steps and tolerance, of one or two models."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.decoding import DESCENTS, INTEGRATORS, ONE_STEP, DecoderOutput, Divergence, plan_decoding
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.metrics import each, psnr, ssim
from dc_ssdae.evaluation.profile import wait_for
from dc_ssdae.timing import Spread, measure_alternately

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
        for setting in settings:
            plan_decoding(dynamics, **setting.arguments(dynamics))  # type: ignore[arg-type]
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
