"""Nesterov's accelerated gradient on a field that points uphill."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dc_ssdae.errors import unknown_name
from dc_ssdae.samplers.descent import Schedule, descend
from dc_ssdae.samplers.result import SamplerResult

VARIANTS = ("standard", "eqm")


def nesterov(
    field: Callable[..., Tensor],
    x_init: Tensor,
    num_steps: int = 8,
    step_size: Schedule = 0.5,
    momentum: Schedule = 0.3,
    tolerance: float | None = None,
    *,
    variant: str = "standard",
    condition: Tensor | Sequence[Tensor] = (),
    bucket: bool = False,
    return_trajectory: bool = False,
) -> SamplerResult:
    """Descend by y = x + μ (x − x_prev), x ← y − η f(y), with x_prev = x at first (SPEC section 2; Nesterov 1983).

    Where f ≈ L (x − x*) it is stable for η L < 2 (1 + μ)/(1 + 2 μ). With curvatures from m to L, η = 1/L and
    μ = (√L − √m)/(√L + √m) the distance shrinks by 1 − √(m/L) a step.

    Args:
        field: as `gradient_descent`'s.
        x_init: (B, …).
        num_steps: at least 1.
        step_size: η, as `gradient_descent`'s.
        momentum: μ in [0, 1), likewise one for all steps, a sequence or a function. The first is of no effect, because
            x_prev is x there.
        tolerance: as `gradient_descent`'s; of f at y, where it is evaluated.
        variant: "standard", or "eqm", the sampler that the authors of equilibrium matching released: it evaluates f
            at y and steps from x, x ← x − η f(y), so that no velocity builds up; it is stable for η L < 2/(1 + 2 μ).
        condition: as `gradient_descent`'s.
        bucket: as `gradient_descent`'s.
        return_trajectory: keep every x.

    Raises:
        InputError: a setting is unknown or out of range, or the field returns another shape.
    """
    if variant not in VARIANTS:
        raise unknown_name("variant of nesterov", variant, VARIANTS)
    return descend(
        field,
        x_init,
        num_steps,
        step_size,
        momentum=momentum,
        steps_from_lookahead=variant == "standard",
        tolerance=tolerance,
        condition=condition,
        bucket=bucket,
        return_trajectory=return_trajectory,
    )
