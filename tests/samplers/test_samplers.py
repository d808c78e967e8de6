"""Gradient descent and Euler on fields whose answers are known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import euler, gradient_descent


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("num_steps", [1, 2, 6])
@pytest.mark.parametrize("product", [0.1, 0.5, 1.0, 1.5, 1.9, 2.5])
@pytest.mark.parametrize("slope", [0.5, 1.0, 5.0])
def test_gradient_descent_contracts_by_one_minus_step_times_slope(slope: float, product: float, num_steps: int) -> None:
    """On f = L (x − x*) the distance is (1 − ηL)^n of the first, above ηL = 2 it grows."""
    start, goal = double(2, 3, 4), double(2, 3, 4)
    result = gradient_descent(lambda x: slope * (x - goal), start, num_steps=num_steps, step_size=product / slope)
    expected = goal + (1.0 - product) ** num_steps * (start - goal)
    torch.testing.assert_close(result.sample, expected, atol=1e-10, rtol=1e-10)


def test_gradient_descent_on_a_quadratic_with_several_slopes() -> None:
    slopes = torch.tensor([0.2, 1.0, 1.9], dtype=torch.float64)
    start = double(4, 3)
    result = gradient_descent(lambda x: slopes * x, start, num_steps=5, step_size=1.0)
    torch.testing.assert_close(result.sample, (1.0 - slopes) ** 5 * start)


def test_a_zero_of_the_field_is_a_fixed_point() -> None:
    start = double(2, 3)
    result = gradient_descent(lambda x: (x - start) * x.exp(), start, num_steps=9, step_size=0.7)
    assert torch.equal(result.sample, start)
    assert result.residual_rms.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_one_step_of_one_over_stiffness_lands_on_the_data(scale: float) -> None:
    """For the linear decay and its true field, from anywhere on the way: η = 1/λ is the clean estimate."""
    dynamics = EquilibriumMatching("linear", scale)
    x, noise = double(3, 3, 2, 2), double(3, 3, 2, 2)
    for level in (0.0, 0.4, 0.9):
        record = dynamics.corrupt(x, noise, torch.full((3,), level, dtype=torch.float64))
        result = gradient_descent(lambda y: scale * (y - x), record.x_level, 1, 1.0 / dynamics.stiffness)
        torch.testing.assert_close(result.sample, x, atol=1e-12, rtol=0.0)
        estimate = dynamics.clean_estimate(record.x_level, record.target, record.level)
        torch.testing.assert_close(result.sample, estimate, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 25])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_euler_is_exact_on_a_straight_path(num_steps: int, power: float) -> None:
    x, noise = double(2, 3, 4), double(2, 3, 4)
    result = euler(lambda y, time: x - noise, noise, num_steps=num_steps, power=power)
    torch.testing.assert_close(result.sample, x, atol=1e-12, rtol=0.0)


def test_euler_is_exact_on_flow_matchings_field_of_one_image() -> None:
    """v(x_t, t) = (x − x_t)/t, which is straight along every path to x."""
    x, noise = double(2, 3, 4), double(2, 3, 4)
    result = euler(lambda y, time: (x - y) / time.view(-1, 1, 1), noise, num_steps=6)
    torch.testing.assert_close(result.sample, x, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_euler_converges_with_first_order(power: float) -> None:
    """On x' = x along s = 1 − t, from 1: the answer is e. Halving the steps halves the error."""
    errors = []
    for num_steps in (64, 128, 256, 512):
        sample = euler(lambda y, time: y, torch.ones(1, 1, dtype=torch.float64), num_steps, power).sample
        errors.append(abs(sample.item() - math.e))
    orders = [math.log2(errors[index] / errors[index + 1]) for index in range(3)]
    assert all(abs(order - 1.0) < 0.05 for order in orders), orders


def test_euler_converges_on_a_field_of_time() -> None:
    """v = 3 (1 − t)² integrates to 1; the left sums of n uniform steps are short by 3/(2n) − 1/(2n²)."""
    start = torch.zeros(1, 1)
    for num_steps in (1, 4, 16):
        result = euler(lambda y, time: 3.0 * (1.0 - time[:, None]) ** 2, start, num_steps, power=1.0)
        expected = 1.0 - 3.0 / (2.0 * num_steps) + 1.0 / (2.0 * num_steps**2)
        assert result.sample.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("power", [1.0, 4.0])
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_euler_evaluates_on_its_time_grid(num_steps: int, power: float) -> None:
    """At t_i = (1 − i/n)^power, i below n: from pure noise on, and never at t = 0."""
    times: list[Tensor] = []

    def velocity(y: Tensor, time: Tensor) -> Tensor:
        times.append(time)
        return torch.zeros_like(y)

    euler(velocity, torch.zeros(2, 3), num_steps=num_steps, power=power)
    assert all(time.shape == (2,) for time in times)
    expected = torch.tensor([(1.0 - index / num_steps) ** power for index in range(num_steps)])
    torch.testing.assert_close(torch.stack(times), expected[:, None].expand(-1, 2))


def test_euler_bends_the_grid_by_the_fourth_power() -> None:
    times: list[float] = []
    euler(lambda y, time: times.append(time[0].item()) or y, torch.zeros(1, 1), num_steps=2)
    assert times == [1.0, 0.5**4]


SAMPLERS: dict[str, Callable[..., Any]] = {
    "gradient descent": lambda field, x, num_steps: gradient_descent(field, x, num_steps=num_steps, step_size=0.5),
    "euler": lambda field, x, num_steps: euler(lambda y, time: field(y), x, num_steps=num_steps),
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


@each_sampler
@pytest.mark.parametrize("num_steps", [1, 5])
def test_evaluations_and_residuals_are_reported(name: str, num_steps: int) -> None:
    """The residual is that of the last evaluation: before the last step, not after it."""
    seen: list[Tensor] = []

    def field(x: Tensor) -> Tensor:
        seen.append(x)
        return 0.3 * x

    start = torch.randn(3, 2, 4)
    result = SAMPLERS[name](field, start, num_steps)
    assert len(seen) == num_steps
    assert result.num_evaluations.dtype == torch.int64
    assert result.num_evaluations.tolist() == [num_steps] * 3
    expected = (0.3 * seen[-1]).square().flatten(1).mean(dim=1).sqrt()
    assert result.residual_rms.dtype == torch.float32
    torch.testing.assert_close(result.residual_rms, expected)


@each_sampler
def test_the_start_is_left_alone_and_the_dtype_kept(name: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        start = torch.randn(2, 3).to(dtype)
        before = start.clone()
        result = SAMPLERS[name](lambda x: x, start, 3)
        assert torch.equal(start, before)
        assert result.sample.dtype == dtype
        assert not torch.equal(result.sample, start)


@each_sampler
def test_gradients_pass_through(name: str) -> None:
    start = double(2, 3).requires_grad_()
    SAMPLERS[name](lambda x: x, start, 2).sample.sum().backward()
    assert start.grad is not None
    assert (start.grad != 0.0).all()


@each_sampler
@pytest.mark.parametrize("num_steps", [0, -3])
def test_step_counts_below_one_are_refused(name: str, num_steps: int) -> None:
    with pytest.raises(InputError, match=f"num_steps is {num_steps};"):
        SAMPLERS[name](lambda x: x, torch.zeros(1, 1), num_steps)


@each_sampler
def test_a_field_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"shape \(2, 1\) for an x of \(2, 3\)"):
        SAMPLERS[name](lambda x: x[:, :1], torch.zeros(2, 3), 2)


@pytest.mark.parametrize("step_size", [0.0, -0.5, math.nan])
def test_step_sizes_that_do_not_descend_are_refused(step_size: float) -> None:
    with pytest.raises(InputError, match="step_size is"):
        gradient_descent(lambda x: x, torch.zeros(1, 1), step_size=step_size)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_powers_that_do_not_reach_the_data_are_refused(power: float) -> None:
    with pytest.raises(InputError, match="power is"):
        euler(lambda x, time: x, torch.zeros(1, 1), power=power)
