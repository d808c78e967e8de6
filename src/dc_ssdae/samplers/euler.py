"""Euler's and the midpoint method along a velocity, from noise at t = 1 to data at t = 0."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dc_ssdae.samplers.result import (
    SamplerResult,
    check_field,
    check_num_steps,
    check_number,
    check_share,
    check_start,
    is_finite,
    root_mean_square,
)


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_init: Tensor,
    num_steps: int = 8,
    power: float = 4.0,
    *,
    start_time: float = 1.0,
    return_trajectory: bool = False,
    in_the_middle: bool = False,
) -> SamplerResult:
    """Integrate x ← x + (t_i − t_{i+1}) v(x, t_i) over t_i = (1 − i/n)^power.

    Args:
        velocity: v of ((B, …), times (B,)) -> (B, …), pointing from noise to data.
        x_init: (B, …), at `start_time`: pure noise for 1.
        num_steps: n, at least 1.
        power: bends the steps towards the data; 1 is uniform.
        start_time: in [0, 1]; all t_i are multiplied with it.
        return_trajectory: keep every state.
        in_the_middle: as `midpoint` does it.

    Raises:
        InputError: a setting is out of range, or the velocity returns another shape.
    """
    check_num_steps(num_steps)
    check_start(x_init)
    power = check_number("power", power, lambda value: value > 0.0, "positive and finite")
    start_time = check_share("start_time", start_time)
    times = times_of(num_steps, power, start_time)
    x = speed = x_init
    states = [x]

    def evaluate(state: Tensor, time: float) -> Tensor:
        times = state.new_full(state.shape[:1], time, dtype=torch.promote_types(state.dtype, torch.float32))
        return check_field(velocity(state, times), state)

    for now, after in itertools.pairwise(times):
        speed = evaluate(x, now)
        if in_the_middle:
            middle = 0.5 * (now + after)
            speed = evaluate(x + (now - middle) * speed, middle)
        x = x + (now - after) * speed
        states.append(x)
    evaluations = x.new_full(x.shape[:1], num_steps * (1 + in_the_middle), dtype=torch.int64)
    trajectory = torch.stack(states) if return_trajectory else None
    return SamplerResult(x, evaluations, root_mean_square(speed), ~is_finite(x), trajectory)


def times_of(num_steps: int, power: float = 4.0, start_time: float = 1.0) -> list[float]:
    """The times t_0 … t_n of the states of `euler` and `midpoint`, whose arguments these are."""
    return [start_time * (1.0 - index / num_steps) ** power for index in range(num_steps + 1)]


def midpoint(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_init: Tensor,
    num_steps: int = 8,
    power: float = 4.0,
    **settings: Any,
) -> SamplerResult:
    """Integrate over the same times as `euler`, each step with the velocity in its middle, where half a step leads.

    x ← x + (t_i − t_{i+1}) v(y, s), s = (t_i + t_{i+1})/2, y = x + (t_i − s) v(x, t_i): of second order, by two
    evaluations per step, and never one at t = 0.

    Args:
        velocity: as `euler`'s.
        x_init: as `euler`'s.
        num_steps: n, at least 1; twice as many evaluations.
        power: as `euler`'s.
        settings: start_time and return_trajectory, as `euler`'s.

    Raises:
        InputError: a setting is out of range, or the velocity returns another shape.
    """
    return euler(velocity, x_init, num_steps, power, in_the_middle=True, **settings)
