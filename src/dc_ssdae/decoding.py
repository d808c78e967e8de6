"""Decoding as a choice of sampler: what `DCSSDAE.decode` does with a start, a field and its settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from dc_ssdae.dynamics import Dynamics, EquilibriumMatching, FlowMatching
from dc_ssdae.dynamics.corruption import field_of
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.latent import draw_noise
from dc_ssdae.networks.blocks import check_latent_shape
from dc_ssdae.samplers import SamplerResult, Schedule, euler, gradient_descent, midpoint, nesterov
from dc_ssdae.samplers.descent import resolve_momenta, resolve_step_sizes
from dc_ssdae.samplers.result import check_num_steps, check_tolerance, is_finite, root_mean_square

ONE_STEP = "one_step"
DESCENTS = ("gradient_descent", "nesterov", "nesterov_eqm")
INTEGRATORS = {"euler": euler, "midpoint": midpoint}
"""Of flow matching, by name."""

SAMPLERS = (ONE_STEP, *DESCENTS, *INTEGRATORS)
"""What `DCSSDAE.decode` takes as `sampler`."""

DEFAULT_NOISE_SEED = 0
KEPT_NOISES = 4
"""Sizes of image whose default noise is kept; of 1024 px it has 12 MiB."""

DEFAULT_NUM_STEPS = 4
"""Of samplers that take several. (Measured; docs/results.md: more cost more, and none was better.)"""

DEFAULT_MOST_STEPS = 16
"""Of a descent that stops by itself."""

DEFAULT_MOMENTUM = 0.3
STOPPING_STEP = 1.0
"""Of a descent that stops by itself, after its first step, in units of 1/L. (Measured; docs/results.md.)"""


class Divergence(RuntimeWarning):
    """Images of a decode diverged; what was given for them is the best state they had."""


@dataclass
class DecoderOutput(BaseOutput):
    """What `DCSSDAE.decode` gives. diffusers has such a class, which takes seconds to import, without the rest.

    Args:
        sample: images (B, 3, H, W), about [-1, 1].
        num_evaluations: (B,) int64, evaluations of the decoder spent on each image.
        residual_rms: (B,) float32, root mean square of the field, or velocity, where it was last evaluated.
        diverged: (B,) bool, images that the sampler gave up; `sample` has their best state.
        trajectory: (steps + 1, B, 3, H, W) float32, from the start to the sample, where it was asked for.
    """

    sample: Tensor
    num_evaluations: Tensor | None = None
    residual_rms: Tensor | None = None
    diverged: Tensor | None = None
    trajectory: Tensor | None = None


class DecodingPlan(NamedTuple):
    """A sampler and its settings; the last three are a descent's."""

    sampler: str
    num_steps: int
    step_size: Sequence[float] = ()
    momentum: Sequence[float] = ()
    tolerance: float | None = None


def plan_decoding(
    dynamics: Dynamics,
    sampler: str | None = None,
    num_steps: int | None = None,
    step_size: Schedule | None = None,
    momentum: Schedule | None = None,
    tolerance: float | None = None,
    start: float = 0.0,
) -> DecodingPlan:
    """Choose what a decode leaves open, and check that what it gives fits the dynamics.

    Args:
        dynamics: of the model.
        sampler: one of `SAMPLERS`. None is one_step, unless the other settings speak of several steps.
        num_steps: at least 1; with a tolerance, the most that an image gets.
        step_size: η of a descent. None follows from the decay, by `EquilibriumMatching.step_sizes`; with a tolerance
            the first is of these, and the others are `STOPPING_STEP`/L.
        momentum: μ of nesterov.
        tolerance: of a descent, for λ = 1; the field's root mean square is compared with λ times as much.
        start: γ of the state that the decode starts from.

    Raises:
        InputError: a setting is unknown, out of range, or of another sampler or dynamics.
    """
    if num_steps is not None:
        check_num_steps(num_steps)
    if sampler is not None and (not isinstance(sampler, str) or sampler not in SAMPLERS):
        raise unknown_name("sampler", sampler, SAMPLERS)
    given = {"step_size": step_size, "momentum": momentum, "tolerance": tolerance}
    named = [name for name, value in given.items() if value is not None]
    if sampler is None:
        sampler = _default_sampler(dynamics, num_steps, named)
    _check_fits(sampler, dynamics, num_steps)
    if sampler not in DESCENTS:
        if named:
            raise InputError(f"{named[0]} is for a descent of equilibrium matching; sampler {sampler!r} has none")
        return DecodingPlan(sampler, num_steps or (1 if sampler == ONE_STEP else DEFAULT_NUM_STEPS))
    if sampler == "gradient_descent" and momentum is not None:
        raise InputError("momentum is for sampler 'nesterov' or 'nesterov_eqm'; gradient_descent has none")
    assert isinstance(dynamics, EquilibriumMatching)
    num_steps = num_steps or (DEFAULT_NUM_STEPS if tolerance is None else DEFAULT_MOST_STEPS)
    lands = step_size is None
    if step_size is None:
        step_size = dynamics.step_sizes(num_steps, start)
        if tolerance is not None:
            step_size = [step_size[0], *[STOPPING_STEP / dynamics.stiffness] * (num_steps - 1)]
    lands = lands and (momentum is None or isinstance(momentum, int | float))
    if momentum is None:
        momentum = 0.0 if sampler == "gradient_descent" else DEFAULT_MOMENTUM
    momenta = resolve_momenta(momentum, num_steps)
    if lands:
        # What the first step covers, from noise to the image, is no velocity to go on with.
        momenta = [0.0, 0.0, *momenta[2:]][:num_steps]
    tolerance = check_tolerance(tolerance)
    if tolerance is not None:
        tolerance *= dynamics.gradient_scale
    return DecodingPlan(sampler, num_steps, resolve_step_sizes(step_size, num_steps), momenta, tolerance)


def _default_sampler(dynamics: Dynamics, num_steps: int | None, named: Sequence[str]) -> str:
    """The sampler that the other settings, of which `named` are given, ask for."""
    several = num_steps is not None and num_steps > 1
    if isinstance(dynamics, EquilibriumMatching) and (several or named):
        return "nesterov" if "momentum" in named else "gradient_descent"
    if several and not isinstance(dynamics, FlowMatching):
        raise InputError(
            f"num_steps is {num_steps}; several steps are for EquilibriumMatching, FlowMatching and classes "
            f"derived from them, which {type(dynamics).__name__} is not"
        )
    return "euler" if several else ONE_STEP


def _check_fits(sampler: str, dynamics: Dynamics, num_steps: int | None) -> None:
    descends, integrates = isinstance(dynamics, EquilibriumMatching), isinstance(dynamics, FlowMatching)
    if (sampler in DESCENTS and not descends) or (sampler in INTEGRATORS and not integrates):
        fitting = (ONE_STEP, *DESCENTS) if descends else (ONE_STEP, *INTEGRATORS) if integrates else (ONE_STEP,)
        kind = type(dynamics).__name__
        raise InputError(f"this model's dynamics, {kind}, has no sampler {sampler!r}; it has {', '.join(fitting)}")
    if sampler == ONE_STEP and num_steps is not None and num_steps > 1:
        raise InputError(f"num_steps is {num_steps}; sampler 'one_step' has one")


def run_plan(
    plan: DecodingPlan,
    dynamics: Dynamics,
    predict: Callable[..., Tensor],
    x: Tensor,
    z: Tensor,
    start: float = 0.0,
    bucket: bool = False,
    return_trajectory: bool = False,
    reports: bool = True,
) -> SamplerResult:
    """Decode as planned.

    Args:
        plan: of `plan_decoding` for these dynamics.
        dynamics: of the model.
        predict: gives what the dynamics' methods take as prediction, of x (b, 3, H, W), z (b, c, h, w) and, where the
            dynamics conditions on time, time (b,).
        x: (B, 3, H, W), float32: to start from.
        z: (B, c, h, w).
        start: γ of x.
        bucket: as the samplers'.
        return_trajectory: keep every state.
        reports: whether anything but the sample is wanted; one step gives empty tensors else.
    """

    def field(state: Tensor, z: Tensor, *time: Tensor) -> Tensor:
        return field_of(dynamics, state, predict(state, z, *time), time[0] if time else None)

    if plan.sampler == ONE_STEP:
        level = torch.full((x.shape[0],), level_of(dynamics, start), device=x.device)
        time = (level,) if dynamics.conditions_on_time else ()
        prediction = predict(x, z, *time)
        sample = dynamics.clean_estimate(x, prediction, level)
        if not reports:
            return SamplerResult(sample, *[sample.new_empty(0)] * 3)
        count = torch.ones(x.shape[0], dtype=torch.int64, device=x.device)
        residual = root_mean_square(field_of(dynamics, x, prediction, time[0] if time else None))
        trajectory = torch.stack([x, sample]) if return_trajectory else None
        return SamplerResult(sample, count, residual, ~is_finite(sample), trajectory)
    if integrate := INTEGRATORS.get(plan.sampler):
        return integrate(
            lambda state, time: field(state, z, time),
            x,
            plan.num_steps,
            start_time=1.0 - start,
            return_trajectory=return_trajectory,
        )
    shared: dict[str, Any] = {
        "num_steps": plan.num_steps,
        "step_size": plan.step_size,
        "tolerance": plan.tolerance,
        "condition": z,
        "bucket": bucket,
        "return_trajectory": return_trajectory,
    }
    if plan.sampler == "gradient_descent":
        return gradient_descent(field, x, **shared)
    variant = "eqm" if plan.sampler == "nesterov_eqm" else "standard"
    return nesterov(field, x, momentum=plan.momentum, variant=variant, **shared)


def level_of(dynamics: Dynamics, start: float) -> float:
    """The dynamics' level of a state with share γ of the image: `noise_level` for 0, the data's for 1."""
    return dynamics.noise_level + start * (1.0 - 2.0 * dynamics.noise_level)


def default_noise(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise that `DCSSDAE.decode` starts every image from by default, the same on every device; a copy of it.

    Row by row, the noise of an image with fewer pixels is the beginning of that of a larger one.

    Args:
        height: H in pixels, a multiple of f.
        width: W in pixels, a multiple of f.
        device: where it is wanted.

    Returns:
        (3, H, W) float32, standard normal; `expand(B, -1, -1, -1)` makes it the `noise` of a batch.
    """
    return _draw_default_noise(height, width, torch.device(device))


# An operator, because no graph of torch.compile or AOTInductor can hold a generator; with it one holds for all sizes.
# A CUDA graph (mode "reduce-overhead") must leave it out, because it draws on the CPU.
@torch.library.custom_op("dc_ssdae::default_noise", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _draw_default_noise(height: int, width: int, device: torch.device) -> Tensor:
    return _kept_noise(height, width, device).clone()  # a graph may write into what it gets


@lru_cache(maxsize=KEPT_NOISES)
def _kept_noise(height: int, width: int, device: torch.device) -> Tensor:
    fixed = torch.Generator().manual_seed(DEFAULT_NOISE_SEED)
    with torch.inference_mode(False):  # what is kept must do for training too
        return torch.randn(3, height, width, generator=fixed, dtype=torch.float32).to(device)


@_draw_default_noise.register_fake
def _(height: int, width: int, device: torch.device) -> Tensor:
    return torch.empty(3, height, width, device=device, dtype=torch.float32)


def start_noise(
    z: Tensor,
    shape: tuple[int, int, int, int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    noise: Tensor | None,
) -> Tensor:
    """The noise that a decode of z starts from: given, drawn, or by default the same for every image.

    Args:
        z: (B, c, h, w), for its device.
        shape: (B, 3, H, W).
        generator: one for all images, or one for each.
        noise: of that shape, in place of a generator.

    Returns:
        Float32, contiguous: strides that changed with the first step would make torch.compile compile twice.

    Raises:
        InputError: noise and generator are both given, or one does not fit.
    """
    if noise is not None:
        if generator is not None:
            raise InputError("give noise or generator, not both")
        if tuple(noise.shape) != shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}; this latent needs {shape}")
        _check_finite("noise", noise)
        return noise.to(device=z.device, dtype=torch.float32).contiguous()
    if generator is None:
        return default_noise(*shape[2:], z.device).expand(shape).contiguous()
    return draw_noise(shape, generator, z.device)


def noised_draft(dynamics: Dynamics, draft: Tensor, noise: Tensor, start: float) -> Tensor:
    """γ · draft + (1 − γ) · noise, γ being `start`: (B, 3, H, W) float32, of images (B, 3, H, W) in [-1, 1].

    Raises:
        InputError: the draft does not fit.
    """
    if draft.shape != noise.shape or not draft.is_floating_point():
        kind = str(draft.dtype).removeprefix("torch.")
        raise InputError(
            f"draft is {kind} of shape {tuple(draft.shape)}; this latent needs floating-point images of "
            f"{tuple(noise.shape)} in [-1, 1]"
        )
    _check_finite("draft", draft)
    draft = draft.to(device=noise.device, dtype=torch.float32)
    level = torch.full((len(noise),), level_of(dynamics, start), device=noise.device)
    return dynamics.corrupt(draft, noise, level).x_level


def _check_finite(name: str, images: Tensor) -> None:
    if _can_look(images) and not bool(images.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinite values")


def _can_look(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device, or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_latent(z: Tensor, channels: int) -> None:
    """Refuse latents that cannot be decoded.

    Raises:
        InputError: the shape is not (B, channels, h, w), or, on the CPU, values are not finite; names the images.
    """
    check_latent_shape(z, channels)
    if not _can_look(z):
        return
    finite = is_finite(z)
    if not bool(finite.all()):
        places = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, places[:8])) + (", …" if len(places) > 8 else "")
        raise InputError(f"z holds NaN or infinite values, in rows {shown} of 0 to {len(z) - 1}")
