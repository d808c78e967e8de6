"""What every sampler gives back, and the checks they share."""

from typing import NamedTuple

from torch import Tensor

from dc_ssdae.errors import InputError


class SamplerResult(NamedTuple):
    """A sampler's outcome.

    sample: (B, …), the last iterate.
    num_evaluations: (B,) int64, evaluations of the field spent on each image.
    residual_rms: (B,) float32, root mean square of the field where it was last evaluated.
    """

    sample: Tensor
    num_evaluations: Tensor
    residual_rms: Tensor


def root_mean_square(field: Tensor) -> Tensor:
    """Root mean square over everything but the batch: (B, …) -> (B,) float32."""
    return field.float().square().flatten(1).mean(dim=1).sqrt()


def check_num_steps(num_steps: int) -> None:
    """Refuse a step count that is no whole number from one on.

    Raises:
        InputError: names the value.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise InputError(f"num_steps is {num_steps!r}; it must be a whole number from 1 on")


def check_field(value: Tensor, x: Tensor) -> Tensor:
    """Pass on a field's value where it has x's shape.

    Raises:
        InputError: names both shapes.
    """
    if value.shape != x.shape:
        raise InputError(f"the field returned shape {tuple(value.shape)} for an x of {tuple(x.shape)}")
    return value
