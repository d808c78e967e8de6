"""What every sampler gives back, and the checks they share."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dc_ssdae.errors import InputError, shown


class SamplerResult(NamedTuple):
    """A sampler's outcome.

    sample: (B, …), the last iterate; of an image that diverged, the best state it had.
    num_evaluations: (B,) int64, evaluations of the field spent on each image.
    residual_rms: (B,) float32, root mean square of the field where it was last evaluated; of an image that diverged,
        in the state it fell back to, infinite where it had none.
    diverged: (B,) bool, whether the image was given up.
    trajectory: (steps + 1, B, …), the start and the state after every step, where it was asked for. An image that has
        stopped stays as it is.
    """

    sample: Tensor
    num_evaluations: Tensor
    residual_rms: Tensor
    diverged: Tensor
    trajectory: Tensor | None = None


def root_mean_square(field: Tensor) -> Tensor:
    """Root mean square over everything but the batch: (B, …) -> (B,) float32.

    Summed in float64, so that an image's value does not depend on the batch it is in, and no square is too large;
    Apple's GPUs have no float64.
    """
    wide = torch.float32 if field.device.type == "mps" else torch.float64
    return field.flatten(1).to(wide).square().mean(dim=1).sqrt().float()


def is_finite(images: Tensor) -> Tensor:
    """Which images (B, …) hold finite numbers alone: (B,) bool."""
    return images.isfinite().flatten(1).all(dim=1)


def check_num_steps(num_steps: int) -> None:
    """Refuse a step count that is no whole number from one on.

    Raises:
        InputError: names the value.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise InputError(f"num_steps is {shown(num_steps)}; it must be a whole number from 1 on")


def check_number(name: str, value: Any, accepts: Callable[[float], bool], wanted: str) -> float:
    """Refuse what is no finite number, or not one that is accepted.

    Args:
        name: of the setting, for the message.
        value: what was given.
        accepts: tells of a number whether it is.
        wanted: what is accepted, for the message.

    Raises:
        InputError: names the value.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted, which a whole number beyond every float does not survive.
    if not is_number or not abs(value) <= sys.float_info.max or not accepts(value):
        raise InputError(f"{name} is {shown(value)}; it must be {wanted}")
    return float(value)


def check_tolerance(tolerance: float | None) -> float | None:
    """Refuse a tolerance that is no finite number from 0 on; None has none.

    Raises:
        InputError: names the value.
    """
    if tolerance is None:
        return None
    return check_number("tolerance", tolerance, lambda value: value >= 0.0, "finite and at least 0, or None")


def check_share(name: str, value: float) -> float:
    """Refuse a number outside [0, 1].

    Raises:
        InputError: names the value.
    """
    return check_number(name, value, lambda number: 0.0 <= number <= 1.0, "from 0 to 1")


def check_start(x_init: Tensor) -> None:
    """Refuse a start that is no batch.

    Raises:
        InputError: names its shape.
    """
    if x_init.ndim < 2:
        raise InputError(f"x_init has shape {tuple(x_init.shape)}; it needs a batch dimension and at least one more")


def check_field(value: Tensor, x: Tensor) -> Tensor:
    """Refuse a field's value that has not x's shape.

    Raises:
        InputError: names both shapes.
    """
    if not isinstance(value, Tensor) or value.shape != x.shape:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"the field returned {given}; it must return a tensor of x's shape, {tuple(x.shape)}")
    return value
