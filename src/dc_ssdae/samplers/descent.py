"""Gradient descent and Nesterov's method on a field that points uphill, stopping image by image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dc_ssdae.errors import InputError, counted, unknown_name
from dc_ssdae.samplers.result import (
    SamplerResult,
    check_field,
    check_num_steps,
    check_number,
    check_start,
    check_tolerance,
    is_finite,
    root_mean_square,
)

Schedule = float | Sequence[float] | Callable[[int], float]
"""One number for all steps, a sequence with one per step, or a function of the step's index from 0."""

DIVERGENCE_RATIO = 10.0
"""An image is given up when the root mean square of its field exceeds its first one by this factor."""

VARIANTS = ("standard", "eqm")

SCHEDULES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "step_size": (lambda value: value > 0.0, "positive and finite"),
    "momentum": (lambda value: 0.0 <= value < 1.0, "at least 0 and below 1"),
}
"""The settings that may change from step to step: which numbers are accepted, and how that is said."""


def gradient_descent(
    field: Callable[..., Tensor],
    x_init: Tensor,
    num_steps: int = 8,
    step_size: Schedule = 0.5,
    tolerance: float | None = None,
    **settings: Any,
) -> SamplerResult:
    """Descend x ← x − η f(x).

    An image whose field is not finite, or grows to more than 10 times its first root mean square, is given up: it
    falls back to its best state, where the field was smallest.

    Args:
        field: f, (B, …) -> (B, …), any floating dtype; pointing uphill. With `condition`, called with it too.
        x_init: (B, …), where the descent starts.
        num_steps: at least 1; with a tolerance, the most evaluations per image.
        step_size: η > 0; stable below 2/L where f ≈ L (x − x*). One for all steps, a sequence with one per step, or
            a function of the step's index from 0.
        tolerance: an image stops when the root mean square of its f is below it; that step is still applied. It
            leaves the batch, so that later steps cost less, and the field meets fewer rows. None does all steps, and
            looks at no values on the way, for which a GPU would have to be waited for.
        settings: condition, bucket and return_trajectory, as `nesterov`'s.

    Raises:
        InputError: a setting is out of range, or the field returns another shape.
    """
    return nesterov(field, x_init, num_steps, step_size, 0.0, tolerance, **settings)


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
    """Descend by y = x + μ (x − x_prev), x ← y − η f(y), with x_prev = x at first (Nesterov 1983).

    Where f ≈ L (x − x*) it is stable for η L < 2 (1 + μ)/(1 + 2 μ). With curvatures from m to L, η = 1/L and
    μ = (√L − √m)/(√L + √m) the distance shrinks by 1 − √(m/L) per step. Images are given up as by `gradient_descent`.

    Args:
        field: as `gradient_descent`'s.
        x_init: (B, …).
        num_steps: at least 1.
        step_size: η, as `gradient_descent`'s.
        momentum: μ in [0, 1), likewise one for all steps, a sequence or a function. The first has no effect, because
            x_prev is x there.
        tolerance: as `gradient_descent`'s; of f at y, where it is evaluated.
        variant: "standard", or "eqm", the sampler that the authors of equilibrium matching released: it evaluates f
            at y and steps from x, x ← x − η f(y), so that no velocity builds up; it is stable for η L < 2/(1 + 2 μ).
        condition: one or several tensors (B, …) that belong to the images, such as their latents: the field gets the
            rows of the images that are left, after x.
        bucket: for a compiled field: fill up the shrinking batch to powers of two, at least two, by repeating images,
            and mark it as varying, so that torch.compile compiles once.
        return_trajectory: keep every x.

    Raises:
        InputError: a setting is unknown or out of range, or the field returns another shape.
    """
    if variant not in VARIANTS:
        raise unknown_name("variant of nesterov", variant, VARIANTS)
    step_sizes = resolve_schedule("step_size", step_size, num_steps)
    momenta = [0.0, *resolve_schedule("momentum", momentum, num_steps)[1:]]
    tolerance = check_tolerance(tolerance)
    check_start(x_init)
    batch = x_init.shape[0]  # not len, which would make it a constant in an exported program
    condition = [condition] if isinstance(condition, Tensor) else list(condition)
    for part in condition:
        if part.shape[:1] != x_init.shape[:1]:
            raise InputError(
                f"condition has shape {tuple(part.shape)}; it needs a row for each of {counted(batch, 'image')}"
            )
    if bucket:
        # torch.compile looks at strides and inference mode; the images that are left are contiguous and of the mode
        # they are picked in, so that all must be from the first evaluation on. It also marks copies, not the caller's.
        x_init, *condition = (part.clone(memory_format=torch.contiguous_format) for part in (x_init, *condition))
    unknown = torch.full((batch,), torch.inf, device=x_init.device)
    never = torch.zeros(batch, dtype=torch.int64, device=x_init.device)
    images = _Images(x_init, never, unknown, never > 0, x_init, x_init, unknown, unknown)
    states = [x_init]
    rows: Tensor | None = None  # of the images that are left; None where all are
    for eta, mu in zip(step_sizes, momenta, strict=True):
        left = images if rows is None else _Images(*(part[rows] for part in images))
        x = left.sample
        y = x if mu == 0.0 else x + mu * (x - left.previous)
        gradient = _evaluate(field, y, condition, batch, rows, bucket)
        left = left.step(y, gradient, (y if variant == "standard" else x) - eta * gradient)
        images = left if rows is None else images.put(rows, left)
        if return_trajectory:
            states.append(images.sample)
        if tolerance is not None:
            moving = ~(images.diverged | (images.residual_rms < tolerance))
            if not bool(moving.all()):
                rows = moving.nonzero().flatten()
                if len(rows) == 0:
                    break
    states += [images.sample] * (num_steps + 1 - len(states))
    return SamplerResult(*images[:4], torch.stack(states) if return_trajectory else None)


class _Images(NamedTuple):
    """What is known of images on their way, a row each; the first four are the sampler's result."""

    sample: Tensor
    num_evaluations: Tensor
    residual_rms: Tensor
    diverged: Tensor
    previous: Tensor
    best: Tensor
    best_rms: Tensor
    first_rms: Tensor

    def put(self, rows: Tensor, others: "_Images") -> "_Images":
        """Replace rows."""
        return _Images(*(part.index_copy(0, rows, other) for part, other in zip(self, others, strict=True)))

    def step(self, y: Tensor, gradient: Tensor, following: Tensor) -> "_Images":
        """Go on to `following`, where the gradient at y leads; images that are given up go back to their best state."""
        rms = root_mean_square(gradient)
        first_rms = torch.where(self.num_evaluations == 0, rms, self.first_rms)
        evaluations = self.num_evaluations + (~self.diverged).long()
        lost = self.diverged | ~rms.isfinite() | (rms > DIVERGENCE_RATIO * first_rms)
        better = ~lost & (rms < self.best_rms)
        best = torch.where(_as_rows(better, y), y, self.best)
        best_rms = torch.where(better, rms, self.best_rms)
        lost = lost | ~is_finite(following)
        rms = torch.where(lost, best_rms, rms)
        lost_rows = _as_rows(lost, y)
        previous = torch.where(lost_rows, best, self.sample)
        following = torch.where(lost_rows, best, following)
        return _Images(following, evaluations, rms, lost, previous, best, best_rms, first_rms)


def _evaluate(
    field: Callable[..., Tensor],
    y: Tensor,
    condition: Sequence[Tensor],
    batch: int,
    rows: Tensor | None,
    bucket: bool,
) -> Tensor:
    """The field at y of the images that are left, whose places in the whole batch are `rows`, or all."""
    arguments = [y, *(part if rows is None else part[rows] for part in condition)]
    count, places = y.shape[0], None
    if bucket:
        size = min(batch, 1 << (max(count, 2) - 1).bit_length())
        if rows is not None and size > count:
            order = torch.arange(count, device=y.device)
            # Where all images fit, each takes its own row, because a field may hold on to the others' tensors.
            places = rows if size == batch else order
            filled = order.new_zeros(size).index_copy(0, places, order)
            arguments = [part[filled] for part in arguments]
        for part in arguments:
            mark_varying_batch(part)
    value = check_field(field(*arguments), arguments[0])
    return value if places is None else value[places]


def resolve_schedule(name: str, schedule: Schedule, num_steps: int) -> list[float]:
    """List the numbers of all steps.

    Args:
        name: of the setting, one of `SCHEDULES`.
        schedule: what was given for it.
        num_steps: how many steps there are.

    Raises:
        InputError: a number is out of range, or there are not as many as steps.
    """
    accepts, wanted = SCHEDULES[name]
    check_num_steps(num_steps)
    if callable(schedule):
        schedule = [schedule(index) for index in range(num_steps)]
    is_listed = isinstance(schedule, Sequence) and not isinstance(schedule, str | bytes)
    values: Sequence[Any] = schedule if is_listed else [schedule] * num_steps  # type: ignore[assignment]
    if len(values) != num_steps:
        raise InputError(f"{name} lists {counted(len(values), 'number')} for num_steps {num_steps}; give one per step")
    return [check_number(name, value, accepts, f"{wanted}: a number, one per step, or a function") for value in values]


def mark_varying_batch(tensor: Tensor) -> None:
    """Tell torch.compile that the first side of a tensor varies, so that another batch compiles nothing anew."""
    import torch._dynamo  # takes a second, which only a compiled field needs

    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _as_rows(mask: Tensor, like: Tensor) -> Tensor:
    """A (B,) mask in a shape that broadcasts against (B, …)."""
    return mask.view(-1, *[1] * (like.ndim - 1))
