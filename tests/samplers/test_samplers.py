"""All samplers on fields whose answers are known, and what they refuse."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import SamplerResult, euler, gradient_descent, midpoint, nesterov


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


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


INTEGRATORS: dict[str, tuple[Callable[..., SamplerResult], int]] = {"euler": (euler, 1), "midpoint": (midpoint, 2)}
"""With the order of each, which is also what a step evaluates."""

each_integrator = pytest.mark.parametrize("name", INTEGRATORS)


@each_integrator
@pytest.mark.parametrize("num_steps", [1, 3, 8])
@pytest.mark.parametrize("power", [1.0, 4.0])
def test_integrators_are_exact_on_straight_paths(name: str, num_steps: int, power: float) -> None:
    """v = x − ε, and flow matching's of one image, v(x_t, t) = (x − x_t)/t, which is never asked for at t = 0."""
    x, noise = double(2, 3, 4), double(2, 3, 4)
    for velocity in (lambda y, time: x - noise, lambda y, time: (x - y) / time.view(-1, 1, 1)):
        result = INTEGRATORS[name][0](velocity, noise, num_steps=num_steps, power=power)
        torch.testing.assert_close(result.sample, x, atol=1e-10, rtol=0.0)


@each_integrator
@pytest.mark.parametrize("power", [1.0, 4.0])
def test_integrators_converge_with_their_order(name: str, power: float) -> None:
    """On dx/ds = x + s along s = 1 − t, from 1: the answer is 2 e − 2."""
    integrate, order = INTEGRATORS[name]
    errors = []
    for num_steps in (64, 128, 256):
        start = torch.ones(1, 1, dtype=torch.float64)
        result = integrate(lambda y, time: y + 1.0 - time[:, None].double(), start, num_steps, power)
        assert result.num_evaluations.tolist() == [num_steps * order]
        errors.append(abs(result.sample.item() - 2.0 * (math.e - 1.0)))
    orders = [math.log2(errors[index] / errors[index + 1]) for index in range(2)]
    assert orders == pytest.approx([order] * 2, abs=0.1)


def test_midpoint_against_its_formula() -> None:
    """With start_time, and in the times at which it evaluates."""
    start, times, seen = double(2, 3), [0.6 * (1.0 - k / 3) ** 4 for k in range(4)], []

    def velocity(y: Tensor, time: Tensor) -> Tensor:
        seen.append(time[0].item())
        return (y * time[:, None]).sin()

    result = midpoint(velocity, start, 3, start_time=0.6, return_trajectory=True)
    states, middles = [start], []
    for now, after in itertools.pairwise(times):
        middles += [now, (now + after) / 2]
        half = states[-1] + (now - after) / 2 * velocity(states[-1], double(2).fill_(now))
        states.append(states[-1] + (now - after) * velocity(half, double(2).fill_((now + after) / 2)))
    assert seen[:6] == pytest.approx(middles)
    torch.testing.assert_close(result.trajectory, torch.stack(states), atol=1e-12, rtol=0.0)


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


SAMPLERS: dict[str, Callable[..., Any]] = {
    "gradient descent": lambda field, x, num_steps, **settings: gradient_descent(field, x, num_steps, 0.5, **settings),
    "nesterov": lambda field, x, num_steps, **settings: nesterov(field, x, num_steps, 0.5, 0.6, **settings),
    "nesterov eqm": lambda field, x, num_steps, **settings: nesterov(
        field, x, num_steps, 0.5, 0.6, variant="eqm", **settings
    ),
    "euler": lambda field, x, num_steps, **settings: euler(lambda y, time: field(y), x, num_steps, **settings),
    "midpoint": lambda field, x, num_steps, **settings: midpoint(lambda y, time: field(y), x, num_steps, **settings),
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_variant = pytest.mark.parametrize("variant", ["standard", "eqm"])


@each_sampler
def test_a_zero_of_the_field_is_a_fixed_point(name: str) -> None:
    start = double(2, 3)
    result = SAMPLERS[name](lambda x: (x - start) * x.exp(), start, 9)
    assert torch.equal(result.sample, start)
    assert result.residual_rms.tolist() == [0.0, 0.0]
    assert not result.diverged.any()


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
    assert len(seen) == num_steps * (2 if name == "midpoint" else 1)
    assert result.num_evaluations.dtype == torch.int64
    assert result.num_evaluations.tolist() == [len(seen)] * 3
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
@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_trajectory_leads_from_the_start_to_the_sample(name: str, num_steps: int) -> None:
    """Every state is that of a run of so many steps; it is kept only where it is asked for."""
    start = torch.randn(2, 3, 4)
    path = SAMPLERS[name](lambda x: x.sin() - 0.2, start, num_steps, return_trajectory=True)
    assert path.trajectory.shape == (num_steps + 1, 2, 3, 4)
    assert torch.equal(path.trajectory[0], start)
    assert torch.equal(path.trajectory[-1], path.sample)
    plain = SAMPLERS[name](lambda x: x.sin() - 0.2, start, num_steps)
    assert plain.trajectory is None
    assert torch.equal(plain.sample, path.sample)
    if name not in INTEGRATORS:  # whose times depend on their number
        for step in range(1, num_steps):
            shorter = SAMPLERS[name](lambda x: x.sin() - 0.2, start, step)
            assert torch.equal(path.trajectory[step], shorter.sample)


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
@pytest.mark.parametrize("num_steps", [0, 2.0, True])
def test_what_is_no_count_of_steps_is_refused(name: str, num_steps: Any) -> None:
    with pytest.raises(InputError, match=f"num_steps is {num_steps}"):
        SAMPLERS[name](lambda x: x, torch.zeros(1, 1), num_steps)


@each_sampler
@pytest.mark.parametrize("value", [None, torch.zeros(2, 1)])
def test_a_field_of_another_shape_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match="the field returned"):
        SAMPLERS[name](lambda x: value, torch.zeros(2, 3), 2)


@each_variant
def test_every_step_has_its_own_size_and_momentum(variant: str) -> None:
    """Listed or by a function; on f = x the next x is y or x, less η y. The first momentum has no effect."""
    sizes, momenta = [0.9, 0.1, 0.5, 1.7], [0.8, 0.9, 0.0, 0.4]
    start = double(2, 3)
    states = [start, (1.0 - sizes[0]) * start]
    for eta, mu in zip(sizes[1:], momenta[1:], strict=True):
        y = states[-1] + mu * (states[-1] - states[-2])
        states.append((y if variant == "standard" else states[-1]) - eta * y)
    for forms in ((sizes, momenta), (tuple(sizes), tuple(momenta)), (sizes.__getitem__, momenta.__getitem__)):
        result = nesterov(lambda x: x, start, 4, *forms, variant=variant, return_trajectory=True)
        torch.testing.assert_close(result.trajectory, torch.stack(states))


@pytest.mark.parametrize(("setting", "bad"), [("step_size", 0.0), ("step_size", math.nan), ("momentum", 1.0)])
def test_a_bad_number_for_the_last_step_is_refused_before_the_first(setting: str, bad: float) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError

    for schedule in (bad, [0.5, 0.5, bad], lambda index: bad if index == 2 else 0.5):
        with pytest.raises(InputError, match=f"{setting} is {bad}"):
            nesterov(never, torch.zeros(1, 1), 3, **{setting: schedule})
    for count in (0, 2, 4):
        with pytest.raises(InputError, match=f"{setting} lists {count} numbers for num_steps 3"):
            nesterov(never, torch.zeros(1, 1), 3, **{setting: [0.5] * count})


# One-line values of any kind, of which a number may be a good one: those are sorted out below.
THINGS = st.one_of(
    st.floats(),
    st.integers(-(10**9), 10**9),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.floats(0.1, 1.0) | st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    st.complex_numbers(),
)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


ACCEPTS: dict[str, Callable[[Any], bool]] = {
    "num_steps": lambda value: is_number(value) and isinstance(value, int) and value >= 1,
    "step_size": lambda value: is_number(value) and value > 0,
    "momentum": lambda value: is_number(value) and 0 <= value < 1,
    "tolerance": lambda value: is_number(value) and value >= 0,
    "variant": lambda value: value in ("standard", "eqm"),
}


@pytest.mark.parametrize("setting", ACCEPTS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bad_setting_is_named_in_one_line(setting: str, data: st.DataObject) -> None:
    value = data.draw(THINGS.filter(lambda value: not ACCEPTS[setting](value)))
    with pytest.raises(InputError) as error:
        nesterov(lambda x: x, torch.ones(2, 3), **{"num_steps": 3, setting: value})
    assert setting in str(error.value)
    assert repr(value) in str(error.value) or isinstance(value, list)
    assert len(str(error.value).splitlines()) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_good_setting_is_refused(data: st.DataObject) -> None:
    """Nor does any lose its bound on evaluations, or give a sample that is not finite."""
    size = st.floats(0.0, exclude_min=True, allow_infinity=False) | st.integers(1, 10**9)
    momentum = st.floats(0.0, 1.0, exclude_max=True) | st.just(0)
    num_steps = data.draw(st.integers(1, 6))
    step_size = data.draw(size | st.lists(size, min_size=num_steps, max_size=num_steps))
    result = nesterov(
        lambda x: x - 1.0,
        torch.randn(2, 3),
        num_steps,
        (lambda index: step_size[index]) if isinstance(step_size, list) and data.draw(st.booleans()) else step_size,
        data.draw(momentum | st.lists(momentum, min_size=num_steps, max_size=num_steps)),
        data.draw(st.none() | st.floats(0.0, allow_infinity=False) | st.integers(0, 10**9)),
        variant=data.draw(st.sampled_from(["standard", "eqm"])),
    )
    assert result.sample.isfinite().all()
    assert (result.num_evaluations >= 1).all()
    assert (result.num_evaluations <= num_steps).all()


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_powers_that_do_not_reach_the_data_are_refused(power: float) -> None:
    with pytest.raises(InputError, match="power is"):
        euler(lambda x, time: x, torch.zeros(1, 1), power=power)
