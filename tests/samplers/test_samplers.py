"""All samplers on fields whose answers are known, and what they refuse."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import SamplerResult, Schedule, euler, gradient_descent, midpoint, nesterov


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
    "gradient descent": lambda field, x, num_steps, **settings: gradient_descent(field, x, num_steps, 0.5, **settings),
    "nesterov": lambda field, x, num_steps, **settings: nesterov(field, x, num_steps, 0.5, 0.6, **settings),
    "nesterov eqm": lambda field, x, num_steps, **settings: nesterov(
        field, x, num_steps, 0.5, 0.6, variant="eqm", **settings
    ),
    "euler": lambda field, x, num_steps, **settings: euler(lambda y, time: field(y), x, num_steps, **settings),
    "midpoint": lambda field, x, num_steps, **settings: midpoint(lambda y, time: field(y), x, num_steps, **settings),
}
DESCENTS: dict[str, Callable[..., SamplerResult]] = {
    "gradient descent": gradient_descent,
    "nesterov": nesterov,
    "nesterov eqm": partial(nesterov, variant="eqm"),
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_variant = pytest.mark.parametrize("variant", ["standard", "eqm"])
each_descent = pytest.mark.parametrize("name", DESCENTS)


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
def test_no_images_give_no_images(name: str) -> None:
    result = SAMPLERS[name](lambda x: x, torch.zeros(0, 2, 4), 4, return_trajectory=True)
    assert result.sample.shape == (0, 2, 4)
    assert result.trajectory.shape == (5, 0, 2, 4)
    assert [len(part) for part in result[1:4]] == [0, 0, 0]


@each_sampler
@pytest.mark.parametrize("num_steps", [0, -3, 2.0, 2.5, True, "3", None, math.nan, [2]])
def test_what_is_no_count_of_steps_is_refused(name: str, num_steps: Any) -> None:
    with pytest.raises(InputError) as error:
        SAMPLERS[name](lambda x: x, torch.zeros(1, 1), num_steps)
    assert str(error.value) == f"num_steps is {num_steps!r}; it must be a whole number from 1 on"


@each_sampler
def test_a_field_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(InputError) as error:
        SAMPLERS[name](lambda x: x[:, :1], torch.zeros(2, 3), 2)
    assert "the field returned shape (2, 1)" in str(error.value)


@each_sampler
@pytest.mark.parametrize("value", [None, 1.0, (torch.zeros(2, 3),), [[0.0] * 3] * 2])
def test_a_field_of_no_tensor_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        SAMPLERS[name](lambda x: value, torch.zeros(2, 3), 2)
    assert f"the field returned a {type(value).__name__}" in str(error.value)


@each_descent
@pytest.mark.parametrize("slope", [0.5, 1.0, 8.0])
def test_one_step_of_one_over_the_slope_lands_exactly(name: str, slope: float) -> None:
    """Whole numbers and powers of two round nowhere."""
    start, goal = torch.randint(-9, 9, (2, 3, 4, 5)).float()
    result = DESCENTS[name](lambda x: slope * (x - goal), start, 1, 1.0 / slope)
    assert torch.equal(result.sample, goal)


@each_descent
def test_step_sizes_may_be_a_number_a_sequence_or_a_function(name: str) -> None:
    start = torch.randn(2, 3)
    asked: list[int] = []

    def constant(index: int) -> float:
        asked.append(index)
        return 0.25

    forms: list[Schedule] = [0.25, [0.25] * 5, (0.25,) * 5, constant]
    results = [DESCENTS[name](torch.sin, start, 5, form).sample for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)
    assert asked == [0, 1, 2, 3, 4]
    assert torch.equal(DESCENTS[name](torch.sin, start, 2, 1).sample, DESCENTS[name](torch.sin, start, 2, 1.0).sample)


@pytest.mark.parametrize("as_function", [False, True])
def test_every_step_has_its_own_size(as_function: bool) -> None:
    sizes = [0.9, 0.1, 0.5, 1.7]
    start = double(2, 3)
    form: Schedule = sizes.__getitem__ if as_function else sizes
    path = gradient_descent(lambda x: x, start, 4, form, return_trajectory=True).trajectory
    assert path is not None
    for step, size in enumerate(sizes):
        torch.testing.assert_close(path[step + 1], (1.0 - size) * path[step])


@each_descent
@pytest.mark.parametrize("form", ["all", "a list", "a function"])
@pytest.mark.parametrize(
    "bad", [0, 0.0, -0.5, math.nan, math.inf, -math.inf, "0.5", True, False, None, torch.tensor(0.5), 0.5j]
)
def test_step_sizes_that_do_not_descend_are_refused(name: str, bad: Any, form: str) -> None:
    """Also as the last of them, before the field is evaluated once."""
    step_size = {"all": bad, "a list": [0.5, 0.5, bad], "a function": lambda index: bad if index == 2 else 0.5}[form]
    called: list[Tensor] = []
    with pytest.raises(InputError) as error:
        DESCENTS[name](lambda x: called.append(x) or x, torch.zeros(1, 1), 3, step_size)
    assert str(error.value).startswith(f"step_size is {bad!r}; it must be ")
    assert "\n" not in str(error.value)
    assert not called


@pytest.mark.parametrize("setting", ["step_size", "momentum"])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_schedules_that_are_not_one_a_step_are_refused(setting: str, count: int) -> None:
    with pytest.raises(InputError) as error:
        nesterov(lambda x: x, torch.zeros(1, 1), 3, **{setting: [0.5] * count})
    numbers = "1 number" if count == 1 else f"{count} numbers"
    assert f"{setting} lists {numbers} for num_steps 3" in str(error.value)


@each_variant
def test_momenta_may_be_a_number_a_sequence_or_a_function(variant: str) -> None:
    start = torch.randn(2, 3)
    asked: list[int] = []

    def constant(index: int) -> float:
        asked.append(index)
        return 0.25

    forms: list[Schedule] = [0.25, [0.25] * 5, (0.25,) * 5, constant, [0.9, *[0.25] * 4]]  # the first has no effect
    results = [nesterov(torch.sin, start, 5, 0.5, form, variant=variant).sample for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("as_function", [False, True])
def test_every_step_has_its_own_momentum(as_function: bool) -> None:
    """On f = x with η = ½ the next x is half of y."""
    momenta = [0.0, 0.9, 0.0, 0.4]
    form: Schedule = momenta.__getitem__ if as_function else momenta
    path = nesterov(lambda x: x, double(2, 3), 4, 0.5, form, return_trajectory=True).trajectory
    assert path is not None
    for step in range(1, 4):
        expected = 0.5 * (path[step] + momenta[step] * (path[step] - path[step - 1]))
        torch.testing.assert_close(path[step + 1], expected)


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


@pytest.mark.parametrize("value", [b"\1\1\1", torch.eye(2), [torch.eye(2)] * 3, 10**400], ids=range(4))
def test_step_sizes_of_odd_kinds_are_refused_in_one_line(value: Any) -> None:
    with pytest.raises(InputError) as error:
        gradient_descent(lambda x: x, torch.zeros(1, 1), 3, value)
    assert "step_size" in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("setting", ["momentum", "tolerance"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", True, {}, 1j])
def test_momenta_and_tolerances_out_of_range_are_named(setting: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        nesterov(lambda x: x, torch.zeros(1, 1), **{setting: value})
    assert str(error.value).startswith(f"{setting} is {value!r}; it must be ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [1, 1.0, 1.5, None, -0.1, "0.1"])
@pytest.mark.parametrize("form", ["all", "a list", "a function"])
def test_a_momentum_outside_of_0_to_1_is_refused(bad: Any, form: str) -> None:
    momentum = {"all": bad, "a list": [0.5, 0.5, bad], "a function": lambda index: bad if index == 2 else 0.5}[form]
    with pytest.raises(InputError) as error:
        nesterov(lambda x: x, torch.zeros(1, 1), 3, momentum=momentum)
    assert str(error.value).startswith(f"momentum is {bad!r}; it must be at least 0 and below 1")


def test_an_unknown_variant_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown variant of nesterov 'standart' \(did you mean 'standard'\?\)"):
        nesterov(lambda x: x, torch.zeros(1, 1), variant="standart")


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_powers_that_do_not_reach_the_data_are_refused(power: float) -> None:
    with pytest.raises(InputError, match="power is"):
        euler(lambda x, time: x, torch.zeros(1, 1), power=power)
