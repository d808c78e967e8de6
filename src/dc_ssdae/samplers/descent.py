"""The loop that gradient descent and Nesterov's method share: steps, and stopping image by image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dc_ssdae.errors import InputError, counted
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
"""A number for all steps, one for each, or a function of the step's index from 0."""

DIVERGENCE_RATIO = 10.0
"""An image whose field grows to more than so many times its first root mean square is given up."""


def descend(
    field: Callable[..., Tensor],
    x_init: Tensor,
    num_steps: int,
    step_size: Schedule,
    momentum: Schedule = 0.0,
    steps_from_lookahead: bool = True,
    tolerance: float | None = None,
    condition: Tensor | Sequence[Tensor] = (),
    bucket: bool = False,
    return_trajectory: bool = False,
) -> SamplerResult:
    """Descend a field that points uphill.

    Args:
        field: f, called with x (B, …) and the tensors of `condition`, giving x's shape.
        x_init: (B, …), where the descent starts.
        num_steps: the most evaluations of the field that an image gets, at least 1.
        step_size: η > 0.
        momentum: μ in [0, 1); the field is evaluated at y = x + μ (x − x_prev), in the first step at x.
        steps_from_lookahead: the next x is y − η f(y), with which velocity builds up; else x − η f(y).
        tolerance: an image stops with the step in which the root mean square of its field is below it, and the
            following evaluations are of the others alone. None never stops, and needs no look at values on the way.
        condition: one or several tensors (B, …) that the field is given too: the rows of the images that are left.
        bucket: for a compiled field: fill up the images that are left to a power of two, at least two, by repeating
            one, so that the field meets few shapes, and tell torch.compile that the batch varies.
        return_trajectory: keep every state.

    Raises:
        InputError: a setting is out of range, or the field returns another shape.
    """
    sizes, momenta = resolve_step_sizes(step_size, num_steps), resolve_momenta(momentum, num_steps)
    tolerance = check_tolerance(tolerance)
    condition = [condition] if isinstance(condition, Tensor) else list(condition)
    if bucket:
        # torch.compile looks at strides and inference mode; the images that are left are contiguous and of the mode
        # they are picked in, so that all must be from the first evaluation on. It also marks copies, not the caller's.
        x_init, *condition = (part.clone(memory_format=torch.contiguous_format) for part in (x_init, *condition))
    images = _Images(x_init, condition, bucket, return_trajectory)
    x = previous = x_init
    for index, (eta, mu) in enumerate(zip(sizes, momenta, strict=True)):
        y = x if mu == 0.0 or index == 0 else x + mu * (x - previous)
        gradient = images.evaluate(field, y)
        following = (y if steps_from_lookahead else x) - eta * gradient
        x, previous = images.advance(y, gradient, x, following, tolerance)
        if images.count == 0:
            break
    return images.result(num_steps)


def resolve_step_sizes(step_size: Schedule, num_steps: int) -> list[float]:
    """List the step sizes of a descent.

    Raises:
        InputError: one is not positive and finite, or there are not as many as steps.
    """
    return _resolve("step_size", step_size, num_steps, lambda value: value > 0.0, "positive and finite")


def resolve_momenta(momentum: Schedule, num_steps: int) -> list[float]:
    """List the momenta of a descent.

    Raises:
        InputError: one is outside [0, 1), or there are not as many as steps.
    """
    return _resolve("momentum", momentum, num_steps, lambda value: 0.0 <= value < 1.0, "at least 0 and below 1")


def _resolve(
    name: str, schedule: Schedule, num_steps: int, accepts: Callable[[float], bool], wanted: str
) -> list[float]:
    check_num_steps(num_steps)
    values: list[Any]
    if callable(schedule):
        values = [schedule(index) for index in range(num_steps)]
    elif isinstance(schedule, Sequence) and not isinstance(schedule, str | bytes):
        values = list(schedule)
        if len(values) != num_steps:
            raise InputError(
                f"{name} lists {counted(len(values), 'number')} for num_steps {num_steps}; give one a step"
            )
    else:
        values = [schedule] * num_steps
    return [check_number(name, value, accepts, f"{wanted}: a number, one a step, or a function") for value in values]


class _Images:
    """What is known of the images on their way, and of those that have left the batch.

    Attributes:
        count: of the images that are left.
    """

    def __init__(self, x_init: Tensor, condition: list[Tensor], bucket: bool, return_trajectory: bool) -> None:
        check_start(x_init)
        batch = self.count = x_init.shape[0]
        self._condition = condition
        for tensor in self._condition:
            if tensor.shape[:1] != x_init.shape[:1]:
                raise InputError(
                    f"condition has shape {tuple(tensor.shape)}; it needs a row for each of {counted(batch, 'image')}"
                )
        self._batch = batch
        self._bucket = bucket
        # Of all images:
        self._sample = x_init
        self._evaluations = torch.zeros(batch, dtype=torch.int64, device=x_init.device)
        self._residual = torch.full((batch,), torch.inf, device=x_init.device)
        self._diverged = torch.zeros(batch, dtype=torch.bool, device=x_init.device)
        self._trajectory = [x_init] if return_trajectory else None
        # Of those that are left, whose places are `rows`, or all:
        self._rows: Tensor | None = None
        self._lost = self._diverged
        self._best, self._best_rms = x_init, self._residual
        self._first_rms: Tensor | None = None

    def evaluate(self, field: Callable[..., Tensor], y: Tensor) -> Tensor:
        """The field at y of the images that are left."""
        arguments = [y, *self._condition]
        missing = 0
        if self._bucket:
            missing = min(self._batch, 1 << (max(self.count, 2) - 1).bit_length()) - self.count
            if missing > 0:
                places = self._padding(missing)
                arguments = [part[places] for part in arguments]
            for part in arguments:
                mark_varying_batch(part)
        try:
            value = check_field(field(*arguments), arguments[0])
            return value[self._rows] if missing > 0 and len(value) == self._batch else value[: self.count]
        except (InputError, RuntimeError, ValueError) as error:
            if self.count == self._batch or self._condition:
                raise
            raise InputError(
                f"the field fails on the {self.count} of {self._batch} images that are left "
                f"({' '.join(str(error).split())}); pass what belongs to single images as condition"
            ) from error

    def _padding(self, missing: int) -> Tensor:
        """Which of the images that are left fill the rows: where all fit, each its own row, as a field may hold on to
        the others; elsewhere the first ones theirs in order."""
        assert self._rows is not None
        order = torch.arange(self.count, device=self._rows.device)
        if self.count + missing == self._batch:
            return self._rows.new_zeros(self._batch).index_copy(0, self._rows, order)
        return torch.cat([order, order.new_zeros(missing)])

    def advance(
        self, y: Tensor, gradient: Tensor, x: Tensor, following: Tensor, tolerance: float | None
    ) -> tuple[Tensor, Tensor]:
        """Take in an evaluation at y and the step to `following` that it led to, and let those that are done leave.

        Returns:
            The state and the one before of the images that are left.
        """
        rms = root_mean_square(gradient)
        self._evaluations = self._put(self._evaluations, self._get(self._evaluations) + (~self._lost).long())
        self._first_rms = rms if self._first_rms is None else self._first_rms
        lost = self._lost | ~rms.isfinite() | (rms > DIVERGENCE_RATIO * self._first_rms)
        better = ~lost & (rms < self._best_rms)
        self._best = torch.where(_as_rows(better, y), y, self._best)
        self._best_rms = torch.where(better, rms, self._best_rms)
        self._lost = lost = lost | ~is_finite(following)
        rms = torch.where(lost, self._best_rms, rms)
        following = torch.where(_as_rows(lost, y), self._best, following)
        previous = torch.where(_as_rows(lost, y), self._best, x)
        self._residual = self._put(self._residual, rms)
        self._diverged = self._put(self._diverged, lost)
        self._sample = self._put(self._sample, following)
        if self._trajectory is not None:
            self._trajectory.append(self._sample)
        if tolerance is not None:
            moving = ~(lost | (rms < tolerance))
            if not bool(moving.all()):
                kept = moving.nonzero().flatten()
                following, previous = following[kept], previous[kept]
                self._leave_only(kept)
        return following, previous

    def result(self, num_steps: int) -> SamplerResult:
        """The outcome."""
        trajectory = None
        if self._trajectory is not None:
            unused = num_steps + 1 - len(self._trajectory)
            trajectory = torch.stack([*self._trajectory, *[self._sample] * unused])
        return SamplerResult(self._sample, self._evaluations, self._residual, self._diverged, trajectory)

    def _leave_only(self, kept: Tensor) -> None:
        self._rows = kept if self._rows is None else self._rows[kept]
        self.count = len(kept)
        self._condition = [part[kept] for part in self._condition]
        self._lost, self._best, self._best_rms = self._lost[kept], self._best[kept], self._best_rms[kept]
        assert self._first_rms is not None
        self._first_rms = self._first_rms[kept]

    def _get(self, values: Tensor) -> Tensor:
        return values if self._rows is None else values[self._rows]

    def _put(self, values: Tensor, new: Tensor) -> Tensor:
        return new if self._rows is None else values.index_copy(0, self._rows, new)


def mark_varying_batch(tensor: Tensor) -> None:
    """Tell torch.compile that the first side of a tensor varies, so that another batch compiles nothing anew."""
    import torch._dynamo  # takes a second, which only a compiled field needs

    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _as_rows(mask: Tensor, like: Tensor) -> Tensor:
    """A (B,) mask in a shape that broadcasts against (B, …)."""
    return mask.view(-1, *[1] * (like.ndim - 1))
