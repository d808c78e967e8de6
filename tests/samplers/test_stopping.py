"""Images that stop, or are given up, one by one: what each gets must not depend on those beside it."""

import itertools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import refusal
from torch import Tensor

from dc_ssdae.decoding import DESCENTS
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import SamplerResult, gradient_descent

BATCH = 6
each_descent = pytest.mark.parametrize("name", DESCENTS)


def rms(images: Tensor) -> Tensor:
    return images.double().square().flatten(1).mean(dim=1).sqrt()


class Case:
    """Images at distances from 0 to 30 of their goals, each with a slope of its own, and a field that keeps a record.

    f is made of operations that round alike wherever an element lies, so that all of this holds bit for bit.

    Attributes:
        rows: how many images each evaluation had.
        sizes: the root mean squares of f of each image, by its place.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        goal, way = (torch.randn(BATCH, 3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
        distances = torch.tensor([3.0, 0.0, 30.0, 0.02, 1.0, 3.0], dtype=torch.float64)
        way = way / rms(way).view(-1, 1, 1, 1) * distances.view(-1, 1, 1, 1)
        self.goal, self.start = goal.to(dtype), goal.to(dtype) + way.to(dtype)
        self.slope = torch.tensor([0.5, 1.0, 1.9, 1.2, 0.8, 1.5], dtype=dtype).view(-1, 1, 1, 1)
        self.place = torch.arange(BATCH)
        self.rows: list[int] = []
        self.sizes: dict[int, list[float]] = defaultdict(list)

    def field(self, x: Tensor, goal: Tensor, slope: Tensor, place: Tensor) -> Tensor:
        assert torch.equal(goal, self.goal[place])
        assert torch.equal(slope, self.slope[place])
        way = x - goal
        value = slope * way - 0.2 * way / (1.0 + way * way)
        self.rows.append(len(x))
        for index, size in zip(place.tolist(), rms(value).tolist(), strict=True):
            self.sizes[index].append(size)
        return value

    def run(self, name: str, places: list[int] | None = None, num_steps: int = 60, **settings: Any) -> SamplerResult:
        kept = self.place if places is None else torch.tensor(places)
        settings = {"tolerance": 1e-2, "step_size": 0.6, **settings}
        condition = [self.goal[kept], self.slope[kept], kept]
        return DESCENTS[name](self.field, self.start[kept], num_steps, condition=condition, **settings)


def assert_same(one: SamplerResult, other: SamplerResult, places: list[int] | slice = slice(None)) -> None:
    """All that is known of the images `one` holds is what `other` has at these places, bit for bit."""
    for mine, theirs in zip(one[:4], other[:4], strict=True):
        assert torch.equal(mine, theirs[places])


@each_descent
def test_an_image_leaves_after_its_first_evaluation_below_the_tolerance_and_stays_where_it_is(name: str) -> None:
    case = Case()
    result = case.run(name, return_trajectory=True)
    assert_same(Case().run(name), result)
    assert case.rows == sorted(case.rows, reverse=True)
    assert case.rows[0] == BATCH
    assert len(set(case.rows)) > 3
    assert len(case.rows) == result.num_evaluations.max() < 60
    assert [len(case.sizes[place]) for place in range(BATCH)] == result.num_evaluations.tolist()
    assert result.trajectory.shape == (61, *case.start.shape)
    for place, sizes in case.sizes.items():
        assert (result.trajectory[len(sizes) :, place] == result.sample[place]).all()
        assert result.residual_rms[place].item() == pytest.approx(sizes[-1], rel=1e-6)
        assert sizes[-1] < 1e-2
        assert min(sizes[:-1], default=1.0) >= 1e-2


@each_descent
@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=st.permutations(range(BATCH)), cuts=st.sets(st.integers(1, BATCH - 1)))
def test_any_order_and_any_split_gives_the_same_bits(name: str, order: list[int], cuts: set[int]) -> None:
    case = Case()
    together = case.run(name)
    for first, last in itertools.pairwise([0, *sorted(cuts), BATCH]):
        assert_same(case.run(name, order[first:last]), together, order[first:last])


@each_descent
def test_the_cap_on_steps_holds_and_a_tolerance_of_zero_never_stops(name: str) -> None:
    """Not even at the goal; it does what None does."""
    free = Case().run(name).num_evaluations
    capped = Case().run(name, num_steps=4)
    assert capped.num_evaluations.tolist() == free.clamp(max=4).tolist()
    assert (capped.residual_rms < 1e-2).tolist() == (free <= 4).tolist()
    case = Case()
    result = case.run(name, num_steps=9, tolerance=0.0)
    assert result.residual_rms[1] == 0.0
    assert result.num_evaluations.tolist() == [9] * BATCH
    assert case.rows == [BATCH] * 9
    assert_same(result, Case().run(name, num_steps=9, tolerance=None))


@each_descent
@pytest.mark.parametrize(("settled", "bucket"), [(1, False), (2, False), (2, True)])
def test_a_field_that_holds_on_to_all_images_is_not_answered_wrongly(name: str, settled: int, bucket: bool) -> None:
    """With one image left its tensor broadcasts, with two it does not fit."""
    goal = torch.randn(3, 2, 4)
    start = goal.clone()
    start[settled:] += 1.0
    with pytest.raises((InputError, RuntimeError)):
        DESCENTS[name](lambda x: x - goal, start, 20, tolerance=1e-2, bucket=bucket)
    wrong = [torch.zeros(3, 1), torch.zeros(1, 2)]
    assert "a row for each of 3 images" in refusal(DESCENTS[name], lambda x, *rest: x, goal, condition=wrong)


@each_descent
def test_padding_lets_no_image_meet_anothers_tensors(name: str) -> None:
    """Of eight images six are left: padded to eight, they fit what a field holds of all eight, but not in its order."""
    goal = torch.arange(8.0)[:, None].expand(8, 3).clone()
    start = goal.clone()
    start[2:] += 1.0
    sample = DESCENTS[name](lambda x: x - goal, start, 6, tolerance=1e-3, bucket=True).sample
    torch.testing.assert_close(sample, goal, atol=0.1, rtol=0.0)


def test_gradients_pass_to_images_that_have_left() -> None:
    """On f = h (x − x*) an image that took k steps has ∂x/∂x_0 = (1 − ηh)^k, ∂x/∂x* = 1 − (1 − ηh)^k."""
    case = Case(torch.float64)
    start, goal = case.start.clone().requires_grad_(), case.goal.clone().requires_grad_()
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    result = gradient_descent(
        lambda x, goal: slope * (x - goal), start, 60, 0.6, tolerance=1e-2, condition=goal, return_trajectory=True
    )
    assert len(set(result.num_evaluations.tolist())) > 3
    result.sample.sum().backward()
    counts = result.num_evaluations.double().view(-1, 1, 1, 1)
    left = ((1.0 - 0.6 * 0.7) ** counts).expand_as(start)
    torch.testing.assert_close(start.grad, left)
    torch.testing.assert_close(goal.grad, 1.0 - left)
    by_hand = (-0.6 * counts * (1.0 - 0.6 * 0.7) ** (counts - 1.0) * (case.start - case.goal)).sum()
    torch.testing.assert_close(slope.grad, by_hand)


# Giving up. The field of these follows a script: image by image the root mean square of every evaluation, in turn.

INF, NAN = math.inf, math.nan
HEALTHY = [8.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
# The script, and at which evaluation the image is given up; what follows would tempt to take it back.
LOST: dict[str, tuple[list[float], int]] = {
    "nan": ([4.0, 2.0, NAN, 0.5, 0.5, 0.5, 0.5, 0.5], 2),
    "grown": ([2.0, 1.0, 3.0, 15.0, 20.5, 0.5, 0.5, 0.5], 4),
    "nan at first": ([NAN, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 0),
    "nan at last": ([8.0, 4.0, 6.0, 5.0, 5.0, 5.0, 5.0, NAN], 7),
}
either_tolerance = pytest.mark.parametrize("tolerance", [None, 0.3])


class Script:
    """f of a script, of one sign or the other in each element; what is not finite is so in one element alone."""

    def __init__(self, *scripts: list[float]) -> None:
        self.scripts = torch.tensor(scripts, dtype=torch.float32)
        self.start, self.sign = torch.randn(len(scripts), 3, 4), torch.randn(3, 4).sign()
        self.rows: list[int] = []
        self.states: dict[int, list[Tensor]] = defaultdict(list)

    def field(self, x: Tensor, place: Tensor) -> Tensor:
        for index, state in zip(place.tolist(), x, strict=True):
            self.states[index].append(state)
        sizes = self.scripts[place, len(self.rows)]
        self.rows.append(len(x))
        values = sizes.view(-1, 1, 1) * self.sign
        values[:, 1:] = values[:, 1:].nan_to_num(1.0, 1.0, 1.0)
        return values

    def run(self, name: str, places: list[int] | None = None, **settings: Any) -> SamplerResult:
        kept = torch.arange(len(self.start)) if places is None else torch.tensor(places)
        self.rows.clear()
        self.states.clear()
        return DESCENTS[name](self.field, self.start[kept], 8, 0.25, condition=kept, **settings)


@each_descent
@pytest.mark.parametrize("loss", LOST)
@either_tolerance
def test_an_image_that_diverges_falls_back_to_its_best_state(name: str, loss: str, tolerance: float | None) -> None:
    sizes, when = LOST[loss]
    script = Script([size * 0.5 for size in HEALTHY], sizes, HEALTHY)
    result = script.run(name, tolerance=tolerance, return_trajectory=True)
    assert result.diverged.tolist() == [False, True, False]
    assert result.num_evaluations[1] == when + 1
    states = script.states[1]
    assert len(states) == (8 if tolerance is None else when + 1), "it leaves the batch where images may leave"
    assert torch.equal(states[0], script.start[1])
    best = min(range(when), key=lambda step: sizes[step]) if when else 0
    assert torch.equal(result.sample[1], states[best])
    assert result.residual_rms[1] == (sizes[best] if when else INF)
    assert (result.trajectory[when + 1 :, 1] == states[best]).all()
    assert all(torch.equal(state, states[best]) for state in states[when + 1 :])
    assert len({state.sum().item() for state in states[: when + 1]}) == when + 1, "the states tell nothing"
    assert_same(script.run(name, [0, 2], tolerance=tolerance), result, [0, 2])  # its neighbours do not notice


@each_descent
@either_tolerance
def test_growing_to_ten_times_the_first_is_not_yet_diverging(name: str, tolerance: float | None) -> None:
    script = Script([1.0, 10.0, 10.0, 9.0, 10.0, 10.0, 10.0, 10.0], [1.0, 10.0, 10.0, 9.0, 10.00001, 1.0, 1.0, 1.0])
    result = script.run(name, tolerance=tolerance)
    assert result.diverged.tolist() == [False, True]
    assert result.num_evaluations.tolist() == [8, 5]
    assert result.residual_rms.tolist() == [10.0, 1.0]


@each_descent
@either_tolerance
def test_a_step_to_what_is_not_finite_is_taken_back(name: str, tolerance: float | None) -> None:
    """The field is finite, the state behind the step is not."""
    start = torch.tensor([[3e38, 1.0], [1.0, 1.0]])
    result = DESCENTS[name](lambda x: -x, start, 2, 1.0, tolerance=tolerance)
    assert result.diverged.tolist() == [True, False]
    assert torch.equal(result.sample[0], start[0])
    assert result.num_evaluations.tolist() == [1, 2]
    assert result.residual_rms[0].item() == pytest.approx(3e38 / math.sqrt(2.0), rel=1e-6)
    assert result.sample[1, 0] > 2.0
