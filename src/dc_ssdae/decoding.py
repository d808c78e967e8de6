"""Decoding as a choice of sampler: what `DCSSDAE.decode` does with a start, a field and its settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from dc_ssdae.dynamics import Dynamics, EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, check_names
from dc_ssdae.latent import Generators, draw_noise
from dc_ssdae.samplers import SamplerResult, Schedule, euler, gradient_descent, midpoint, nesterov
from dc_ssdae.samplers.descent import resolve_schedule
from dc_ssdae.samplers.result import check_num_steps, check_tolerance

ONE_STEP = "one_step"
DESCENTS: Mapping[str, Callable[..., SamplerResult]] = {
    "gradient_descent": gradient_descent,
    "nesterov": nesterov,
    "nesterov_eqm": partial(nesterov, variant="eqm"),
}
"""Of equilibrium matching, by name."""

INTEGRATORS: Mapping[str, Callable[..., SamplerResult]] = {"euler": euler, "midpoint": midpoint}
"""Of flow matching, by name."""

SAMPLERS = (ONE_STEP, *DESCENTS, *INTEGRATORS)
"""What `DCSSDAE.decode` takes as `sampler`."""

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


def samplers_of(dynamics: Dynamics) -> tuple[str, ...]:
    """Those of `SAMPLERS` that a model with such a dynamics can be decoded with."""
    is_descent, is_flow = isinstance(dynamics, EquilibriumMatching), isinstance(dynamics, FlowMatching)
    return (ONE_STEP, *(DESCENTS if is_descent else INTEGRATORS if is_flow else ()))


def plan_decoding(
    dynamics: Dynamics,
    sampler: str | None = None,
    num_steps: int | None = None,
    step_size: Schedule | None = None,
    momentum: Schedule | None = None,
    tolerance: float | None = None,
    start: float = 0.0,
) -> tuple[str, dict[str, Any]]:
    """Choose what a decode leaves open, and check that what it gives fits the dynamics.

    Args:
        dynamics: of the model.
        sampler: one of `SAMPLERS`. None is one_step, unless the other settings ask for several steps.
        num_steps: at least 1; with a tolerance, the most per image.
        step_size: η of a descent. None follows from the decay, by `EquilibriumMatching.step_sizes`; with a tolerance
            the first is of these, and the others are `STOPPING_STEP`/L.
        momentum: μ of nesterov.
        tolerance: of a descent, for λ = 1; the field's root mean square is compared with λ times as much.
        start: γ of the state that the decode starts from.

    Returns:
        The sampler's name, and the settings that its function takes; one_step has none.

    Raises:
        InputError: a setting is unknown, out of range, or of another sampler or dynamics.
    """
    check_num_steps(1 if num_steps is None else num_steps)
    several = num_steps is not None and num_steps > 1
    descends, integrates = isinstance(dynamics, EquilibriumMatching), isinstance(dynamics, FlowMatching)
    given = {"num_steps": several or None, "step_size": step_size, "tolerance": tolerance, "momentum": momentum}
    named = [name for name, value in given.items() if value is not None]
    if sampler is None and descends and named:
        sampler = "nesterov" if "momentum" in named else "gradient_descent"
    elif sampler is None:
        sampler = "euler" if integrates and several else ONE_STEP
    check_names(f"sampler of {type(dynamics).__name__}", [sampler], samplers_of(dynamics))
    takes = {ONE_STEP: (), "gradient_descent": ("num_steps", "step_size", "tolerance")}
    accepted = takes.get(sampler, ("num_steps",) if integrates else given)
    check_names(f"setting of sampler {sampler!r} of {type(dynamics).__name__}", named, accepted)
    if sampler == ONE_STEP:
        return sampler, {}
    if not isinstance(dynamics, EquilibriumMatching):
        return sampler, {"num_steps": num_steps or DEFAULT_NUM_STEPS, "start_time": 1.0 - start}

    tolerance = check_tolerance(tolerance)
    num_steps = num_steps or (DEFAULT_NUM_STEPS if tolerance is None else DEFAULT_MOST_STEPS)
    lands = step_size is None and (momentum is None or isinstance(momentum, int | float))
    if step_size is None:
        step_size = dynamics.step_sizes(num_steps, start)
        if tolerance is not None:
            step_size = [step_size[0], *[STOPPING_STEP / dynamics.stiffness] * (num_steps - 1)]
    sizes = resolve_schedule("step_size", step_size, num_steps)
    threshold = None if tolerance is None else tolerance * dynamics.gradient_scale
    settings: dict[str, Any] = {"num_steps": num_steps, "step_size": sizes, "tolerance": threshold}
    if sampler != "gradient_descent":
        momenta = resolve_schedule("momentum", DEFAULT_MOMENTUM if momentum is None else momentum, num_steps)
        # What the first step covers, from noise to the image, is no velocity to go on with.
        settings["momentum"] = [0.0, 0.0, *momenta[2:]][:num_steps] if lands else momenta
    return sampler, settings


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


@lru_cache(maxsize=4)  # sizes of image; the noise for 1024 px has 12 MiB
def _kept_noise(height: int, width: int, device: torch.device) -> Tensor:
    fixed = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):  # what is kept must do for training too
        return torch.randn(3, height, width, generator=fixed, dtype=torch.float32).to(device)


@_draw_default_noise.register_fake
def _(height: int, width: int, device: torch.device) -> Tensor:
    return torch.empty(3, height, width, device=device, dtype=torch.float32)


def starting_noise(z: Tensor, shape: tuple[int, ...], generator: Generators, noise: Tensor | None) -> Tensor:
    """The noise that a decode of z starts from: given, drawn, or by default the same for every image.

    Args:
        z: (B, c, h, w), for its device.
        shape: (B, 3, H, W).
        generator: one for all images, or one per image.
        noise: of that shape, in place of a generator.

    Returns:
        Float32, contiguous: strides that changed with the first step would make torch.compile compile twice.

    Raises:
        InputError: noise and generator are both given, or something does not fit.
    """
    if noise is not None and generator is not None:
        raise InputError("give noise or generator, not both")
    if noise is not None:
        return as_start("noise", noise, z, shape).contiguous()
    if generator is not None:
        return draw_noise(shape, generator, z.device)
    return default_noise(shape[2], shape[3], z.device).expand(shape).contiguous()


def as_start(name: str, images: Tensor, z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images of that shape, as float32 on z's device.

    Raises:
        InputError: the shape or type does not fit.
    """
    if tuple(images.shape) != shape or not images.is_floating_point():
        raise InputError(f"{name} is {images.dtype} of shape {tuple(images.shape)}; it must be floats of shape {shape}")
    check_finite(name, images)
    return images.to(device=z.device, dtype=torch.float32)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse values that are not finite, where looking at them neither waits for a device nor breaks a graph.

    Raises:
        InputError: there are some.
    """
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinite values")
