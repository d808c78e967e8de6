"""Quality and cost of a decode for each sampler, number of steps and tolerance, of one or two models."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.decoding import DESCENTS, INTEGRATORS, ONE_STEP, Divergence, plan_decoding
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.metrics import psnr, ssim
from dc_ssdae.evaluation.profile import wait_for
from dc_ssdae.timing import Spread, alternating

QUALITIES: Mapping[str, tuple[str, bool]] = {
    "psnr": ("PSNR (dB)", True),
    "ssim": ("SSIM", True),
    "lpips": ("LPIPS", False),
}
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
        parts = [self.sampler]
        if self.sampler in DESCENTS:
            parts.append("η by default" if self.step_size is None else f"η = {self.step_size:g}/L")
        if self.descent is not None:
            parts[-1] = f"landing, then {self.descent:g}/L"
        if self.momentum is not None:
            parts.append(f"μ = {self.momentum:g}")
        if self.tolerance is not None:
            parts.append(f"stopping (≤ {self.num_steps})")
        return ", ".join(parts)

    def arguments(self, dynamics: object) -> dict[str, Any]:
        """What `DCSSDAE.decode` takes for it."""
        step_size: float | list[float] | None = self.step_size
        if isinstance(dynamics, EquilibriumMatching):
            if self.step_size is not None:
                step_size = self.step_size / dynamics.stiffness
            elif self.descent is not None:
                step_size = dynamics.step_sizes(self.num_steps, descent=self.descent)
        settings = {name: getattr(self, name) for name in ("sampler", "num_steps", "momentum", "tolerance")}
        return {**settings, "step_size": step_size}


@dataclass(frozen=True)
class Grid:
    """What is swept.

    Args:
        steps: numbers of steps.
        samplers: among the model's; None is all of them.
        step_sizes: of descents, in units of 1/L; None stands for those that follow from the decay.
        momenta: of nesterov.
        tolerances: at which descents stop, with the largest number of steps as their cap; for λ = 1.
        descents: other ways, in units of 1/L, that the steps of gradient descent after the first share.
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
        wanted = fitting if self.samplers is None else [name for name in fitting if name in self.samplers]
        if not wanted:
            raise InputError(f"{type(dynamics).__name__} has none of these samplers; it has {', '.join(fitting)}")
        settings: list[Setting] = []
        for sampler in wanted:
            if sampler == ONE_STEP:
                settings.append(Setting(ONE_STEP, 1))
            elif sampler in INTEGRATORS:
                settings += [Setting(sampler, steps) for steps in self.steps]
            else:
                for momentum in self.momenta if sampler != "gradient_descent" else (None,):
                    for size in self.step_sizes:
                        settings += [Setting(sampler, steps, size, momentum) for steps in self.steps]
                        most = max(self.steps)
                        settings += [Setting(sampler, most, size, momentum, stop) for stop in self.tolerances]
                if sampler == "gradient_descent":
                    settings += [
                        Setting(sampler, steps, descent=way)
                        for way in self.descents
                        for steps in self.steps
                        if steps > 1
                    ]
        for setting in settings:
            plan_decoding(dynamics, **setting.arguments(dynamics))  # type: ignore[arg-type]
        return list(dict.fromkeys(settings))


@dataclass
class Measurement:
    """A model's decode with one setting: means over the images.

    Attributes:
        qualities: by the names in `QUALITIES`; of uint8 images, a mean over images.
        evaluations: of the decoder, an image; with the fewest and the most.
        residual_rms: of the field where it was last evaluated; the median of the images.
        diverged: how many images were given up.
        seconds: an image, median and quartiles over the rounds.
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
    work = [(name, setting) for name, model in models.items() for setting in grid.settings(model.dynamics)]
    latents = {name: _latents(model, pixels, batch) for name, model in models.items()}
    measured = {pair: Measurement(*pair) for pair in work}
    seconds: dict[tuple[str, Setting], list[float]] = {pair: [] for pair in work}
    for name, model in models.items():  # memory is taken, and kernels are chosen, before anything is timed
        _decode(model, latents[name][:1], {})
    for round_ in range(rounds):
        for index in alternating(len(work), round_):
            pair = name, setting = work[index]
            model = models[name]
            taken, outputs = 0.0, []
            for part in latents[name]:
                wait_for(model.device)
                start = time.perf_counter()
                outputs += _decode(model, [part], setting.arguments(model.dynamics))
                wait_for(model.device)
                taken += time.perf_counter() - start
            seconds[pair].append(taken / len(pixels))
            if round_ == 0:
                _fill_in(measured[pair], outputs, pixels, batch, lpips)
            if advance is not None:
                advance(1)
    for (name, setting), measurement in measured.items():
        measurement.seconds = Spread.of(seconds[name, setting])
        if (name, Setting(ONE_STEP, 1)) in seconds:
            one = seconds[name, Setting(ONE_STEP, 1)]
            ratios = [mine / theirs for mine, theirs in zip(seconds[name, setting], one, strict=True)]
            measurement.ratio = Spread.of(ratios)
    return list(measured.values())


@dataclass(frozen=True)
class Needed:
    """The fewest evaluations, an image, with which each of two models reaches a quality; None where it does not."""

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
    best that either reaches.

    Args:
        first: measurements of a model, the baseline.
        second: of the other.
        quality: one of `QUALITIES`.
        targets: how many, at least 2.
    """
    more_is_better = QUALITIES[quality][1]
    sign = 1.0 if more_is_better else -1.0

    def lowest(measurements: Sequence[Measurement]) -> float:
        one = [m for m in measurements if m.setting.sampler == ONE_STEP] or measurements
        return min(sign * m.qualities[quality] for m in one)

    def cheapest(measurements: Sequence[Measurement], target: float) -> Measurement | None:
        reaching = [m for m in measurements if sign * m.qualities[quality] >= target]
        return min(reaching, key=lambda m: (m.evaluations, -sign * m.qualities[quality]), default=None)

    low = min(lowest(first), lowest(second))
    high = max(sign * m.qualities[quality] for m in [*first, *second])
    steps = [low + (high - low) * place / (targets - 1) for place in range(targets)]
    steps[-1] = high
    # What each reaches at its best is of interest too: there one of the two ends.
    ends = {max(sign * m.qualities[quality] for m in measurements) for measurements in (first, second)}
    return [
        Needed(sign * target, cheapest(first, target), cheapest(second, target)) for target in sorted({*steps, *ends})
    ]


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


@torch.inference_mode()
def _latents(model: DCSSDAE, pixels: Tensor, batch: int) -> list[Tensor]:
    parts = to_model_range(pixels).split(batch)
    return [model.encode(part.to(model.device)).latent_dist.mode() for part in parts]


@torch.inference_mode()
def _decode(model: DCSSDAE, latents: Sequence[Tensor], arguments: Mapping[str, Any]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Divergence)  # counted in the table
        return [model.decode(z, **arguments) for z in latents]


def _fill_in(
    measurement: Measurement,
    outputs: Sequence[Any],
    pixels: Tensor,
    batch: int,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    originals = pixels.split(batch)
    images = [to_uint8(output.sample.nan_to_num(0.0, 0.0, 0.0)).cpu() for output in outputs]  # mid-grey if not finite
    pairs = [pair for part in zip(originals, images, strict=True) for pair in zip(*part, strict=True)]
    means = {
        "psnr": sum(psnr(original, image) for original, image in pairs) / len(pairs),
        "ssim": sum(ssim(original, image) for original, image in pairs) / len(pairs),
    }
    if lpips is not None:
        parts = [
            lpips(to_model_range(part).to(output.sample.device), to_model_range(original).to(output.sample.device))
            for part, original, output in zip(images, originals, outputs, strict=True)
        ]
        means["lpips"] = float(torch.cat(parts).double().mean())
    counts = torch.cat([output.num_evaluations for output in outputs]).cpu()
    measurement.qualities = means
    measurement.evaluations = float(counts.double().mean())
    measurement.fewest, measurement.most = int(counts.min()), int(counts.max())
    measurement.residual_rms = float(torch.cat([output.residual_rms for output in outputs]).median())
    measurement.diverged = int(sum(int(output.diverged.sum()) for output in outputs))
