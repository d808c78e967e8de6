"""All samplers on fields whose answers are known, and what they refuse."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import refusal
from torch import Tensor

from dc_ssdae.samplers import SamplerResult, euler, gradient_descent, midpoint, nesterov

INTEGRATORS: dict[str, tuple[Callable[..., SamplerResult], int]] = {"euler": (euler, 1), "midpoint": (midpoint, 2)}
"""With the order of each, which is also what a step evaluates."""

each_integrator = pytest.mark.parametrize("name", INTEGRATORS)


@each_integrator
@pytest.mark.parametrize(("num_steps", "power"), [(1, 4.0), (3, 1.0)])
def test_integrators_are_exact_on_straight_paths(name: str, num_steps: int, power: float) -> None:
    """v = x − ε, and flow matching's of one image, v(x_t, t) = (x − x_t)/t, which is never asked for at t = 0."""
    x, noise = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    for velocity in (lambda y, time: x - noise, lambda y, time: (x - y) / time.view(-1, 1, 1)):
        result = INTEGRATORS[name][0](velocity, noise, num_steps=num_steps, power=power)
        torch.testing.assert_close(result.sample, x, atol=1e-10, rtol=0.0)


@each_integrator
@pytest.mark.parametrize(("power", "start_time"), [(1.0, 1.0), (4.0, 0.6)])
def test_integrators_converge_with_their_order(name: str, power: float, start_time: float) -> None:
    """On dx/ds = x + s along s = 1 − t, from 1 at s_0: the answer is (2 + s_0) exp(1 − s_0) − 2."""
    integrate, order = INTEGRATORS[name]
    errors = []
    for num_steps in (64, 128, 256):
        seen: list[float] = []

        def velocity(y: Tensor, time: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(time.item())
            return y + 1.0 - time[:, None].double()

        start = torch.ones(1, 1, dtype=torch.float64)
        result = integrate(velocity, start, num_steps, power, start_time=start_time)
        errors.append(abs(result.sample.item() - (3.0 - start_time) * math.exp(start_time) + 2.0))
        times = [start_time * (1.0 - index / num_steps) ** power for index in range(num_steps + 1)]
        middles = [(now + after) / 2.0 for now, after in itertools.pairwise(times)]
        assert seen[::order] == pytest.approx(times[:-1])
        assert seen[order - 1 :: order] == pytest.approx(middles if name == "midpoint" else times[:-1])
    orders = [math.log2(errors[index] / errors[index + 1]) for index in range(2)]
    assert orders == pytest.approx([order] * 2, abs=0.1)


SAMPLERS: dict[str, Callable[..., Any]] = {
    "gradient descent": gradient_descent,
    "nesterov": partial(nesterov, momentum=0.6),
    "nesterov eqm": partial(nesterov, momentum=0.6, variant="eqm"),
    "euler": lambda field, x, num_steps, **settings: euler(lambda y, time: field(y), x, num_steps, **settings),
    "midpoint": lambda field, x, num_steps, **settings: midpoint(lambda y, time: field(y), x, num_steps, **settings),
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


@each_sampler
@pytest.mark.parametrize(("num_steps", "dtype"), [(1, torch.float32), (5, torch.float64), (3, torch.bfloat16)], ids=str)
def test_evaluations_and_residuals_are_reported(name: str, num_steps: int, dtype: torch.dtype) -> None:
    """The residual is that of the last evaluation: before the last step, not after it."""
    seen: list[Tensor] = []

    def field(x: Tensor) -> Tensor:
        seen.append(x)
        return 0.3 * x

    start = torch.randn(3, 2, 4).to(dtype)
    before = start.clone()
    result = SAMPLERS[name](field, start, num_steps)
    assert torch.equal(start, before)
    assert result.sample.dtype == dtype
    assert len(seen) == num_steps * (2 if name == "midpoint" else 1)
    assert result.num_evaluations.dtype == torch.int64
    assert result.num_evaluations.tolist() == [len(seen)] * 3
    expected = (0.3 * seen[-1]).float().square().flatten(1).mean(dim=1).sqrt()
    torch.testing.assert_close(result.residual_rms, expected)


@each_sampler
def test_the_trajectory_leads_from_the_start_to_the_sample(name: str) -> None:
    """It is kept only where it is asked for."""
    start = torch.randn(2, 3, 4)
    path = SAMPLERS[name](lambda x: x.sin() - 0.2, start, 4, return_trajectory=True)
    assert path.trajectory.shape == (5, 2, 3, 4)
    assert torch.equal(path.trajectory[0], start)
    assert torch.equal(path.trajectory[-1], path.sample)
    plain = SAMPLERS[name](lambda x: x.sin() - 0.2, start, 4)
    assert plain.trajectory is None
    assert torch.equal(plain.sample, path.sample)


@each_sampler
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_whose_field_is_not_finite_is_reported(name: str, value: float) -> None:
    start = torch.randn(3, 2, 4)
    spot = torch.zeros_like(start)
    spot[1, 0, 2] = value
    result = SAMPLERS[name](lambda x: x + spot, start, 3)
    assert result.diverged.dtype == torch.bool
    assert result.diverged.tolist() == [False, True, False]
    others = [0, 2]
    alone = SAMPLERS[name](lambda x: x, start[others], 3)
    for part, of_others in zip(result[:4], alone[:4], strict=True):
        assert torch.equal(part[others], of_others)


@each_sampler
def test_no_value_is_looked_at(name: str) -> None:
    """Tensors that have none do: nothing on the way waits for the device."""
    result = SAMPLERS[name](lambda x: 0.5 * x, torch.zeros(3, 2, 4, device="meta"), 4, return_trajectory=True)
    assert all(part.is_meta for part in result)


@each_sampler
def test_what_does_not_fit_is_refused(name: str) -> None:
    assert "num_steps is 0" in refusal(SAMPLERS[name], lambda x: x, torch.zeros(1, 1), 0)
    assert "the field returned" in refusal(SAMPLERS[name], lambda x: None, torch.zeros(2, 3), 2)
    assert "the field returned" in refusal(SAMPLERS[name], lambda x: x[:, :1], torch.zeros(2, 3), 2)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        *(("num_steps", bad) for bad in (0, 2.5, True)),
        *(("step_size", bad) for bad in (0.0, math.inf, "0.1")),
        *(("momentum", bad) for bad in (-0.1, 1.0, True)),
        *(("tolerance", bad) for bad in (-1.0, math.nan, "x")),
        ("variant", "other"),
    ],
)
def test_a_bad_setting_is_named_before_the_first_step(setting: str, bad: Any) -> None:
    """Also where it is the last step's alone."""

    def never(x: Tensor) -> Tensor:
        raise AssertionError

    schedules = [[0.5, 0.5, bad], lambda index: bad if index == 2 else 0.5]
    for value in [bad, *(schedules if setting in ("step_size", "momentum") else [])]:
        message = refusal(nesterov, never, torch.ones(2, 3), **{"num_steps": 3, setting: value})
        assert setting in message
        assert repr(bad) in message


def test_what_does_not_fit_the_steps_or_reach_the_data_is_refused() -> None:
    for setting in ("step_size", "momentum"):
        message = refusal(nesterov, lambda x: x, torch.zeros(1, 1), 3, **{setting: [0.5] * 2})
        assert f"{setting} lists 2 numbers for num_steps 3" in message
    assert "power is 0.0" in refusal(euler, lambda x, time: x, torch.zeros(1, 1), power=0.0)
