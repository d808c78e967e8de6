"""Gradient descent on a field that points uphill."""

from collections.abc import Callable

import torch
from torch import Tensor

from dc_ssdae.errors import InputError
from dc_ssdae.samplers.result import SamplerResult, check_field, check_num_steps, root_mean_square


def gradient_descent(
    field: Callable[[Tensor], Tensor], x_init: Tensor, num_steps: int = 8, step_size: float = 0.5
) -> SamplerResult:
    """Descend x ← x − η f(x) (SPEC section 2, "Gradient descent decode").

    Args:
        field: f, (B, …) -> (B, …).
        x_init: (B, …), where the descent starts.
        num_steps: at least 1.
        step_size: η > 0; stable below 2/L where f ≈ L (x − x*).

    Raises:
        InputError: a setting is out of range, or the field returns another shape.
    """
    check_num_steps(num_steps)
    if not step_size > 0.0:
        raise InputError(f"step_size is {step_size}; it must be positive")
    x = x_init
    gradient = x
    for _ in range(num_steps):
        gradient = check_field(field(x), x)
        x = x - step_size * gradient
    evaluations = torch.full((x.shape[0],), num_steps, dtype=torch.int64, device=x.device)
    return SamplerResult(x, evaluations, root_mean_square(gradient))
