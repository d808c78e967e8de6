"""Equilibrium matching against closed forms (SPEC section 2)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_ssdae.dynamics import Corruption, EquilibriumMatching
from dc_ssdae.dynamics.equilibrium import make_decay
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import gradient_descent

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"decay": "linear"},
    "truncated": {"decay": "truncated"},
    "truncated early": {"decay": "truncated", "decay_kink": 0.25},
    "piecewise": {"decay": "piecewise"},
    "piecewise rising": {"decay": "piecewise", "decay_kink": 0.6, "decay_start": 0.5},
}
KINK = {"linear": 0.8, "truncated": 0.8, "truncated early": 0.25, "piecewise": 0.8, "piecewise rising": 0.6}
SCALES = [0.5, 1.0, 4.0]

each_decay = pytest.mark.parametrize("name", SETTINGS)
each_scale = pytest.mark.parametrize("scale", SCALES)


def closed_form(name: str, level: float) -> float:
    """c(γ) as the specification prints it, in plain Python."""
    if name == "linear":
        return 1.0 - level
    kink = KINK[name]
    if level > kink:
        return (1.0 - level) / (1.0 - kink)
    start = {"truncated": 1.0, "truncated early": 1.0, "piecewise": 1.4, "piecewise rising": 0.5}[name]
    return start - (start - 1.0) * level / kink


def levels(name: str) -> list[float]:
    kink = KINK[name]
    return [0.0, 0.3, kink, kink - 1e-6, kink + 1e-6, 1.0 - 1e-4, 1.0]


def images(batch: int) -> tuple[Tensor, Tensor]:
    return 2.0 * torch.rand(batch, 3, 4, 6) - 1.0, torch.randn(batch, 3, 4, 6)


def oracle(name: str, scale: float, record: Corruption) -> Tensor:
    """The true field λ c(γ) (ε − x), by the closed form in float64."""
    factors = torch.tensor([scale * closed_form(name, level) for level in record.level.double().tolist()])
    return (factors.double().view(-1, 1, 1, 1) * (record.noise - record.x).double()).float()


@each_decay
def test_decay_at_closed_form_points(name: str) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name])
    points = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    expected = torch.tensor([closed_form(name, point) for point in points])
    torch.testing.assert_close(dynamics.decay(torch.tensor(points)), expected)


def test_decays_start_and_end() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert EquilibriumMatching("linear").decay(ends).tolist() == [1.0, 0.0]
    assert EquilibriumMatching("truncated").decay(ends).tolist() == [1.0, 0.0]
    torch.testing.assert_close(EquilibriumMatching("piecewise").decay(ends), torch.tensor([1.4, 0.0]))


@each_decay
def test_decay_is_continuous_at_the_kink(name: str) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name])
    kink = KINK[name]
    around = torch.tensor([kink - 1e-9, kink, kink + 1e-9], dtype=torch.float64)
    expected = 1.0 - kink if name == "linear" else 1.0
    torch.testing.assert_close(dynamics.decay(around), torch.full_like(around, expected), atol=1e-7, rtol=0.0)
    ratio = dynamics.decay.distance_ratio(around)
    torch.testing.assert_close(ratio, ratio[1].expand(3), atol=1e-7, rtol=0.0)


@each_decay
@each_scale
def test_clean_estimate_of_the_true_field_is_exact(name: str, scale: float) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    level = torch.tensor(levels(name))
    x, noise = images(len(level))
    record = dynamics.corrupt(x, noise, level)
    torch.testing.assert_close(record.target, oracle(name, scale, record), atol=2e-6 * scale, rtol=1e-5)
    for field in (record.target, oracle(name, scale, record)):
        estimate = dynamics.clean_estimate(record.x_level, field, level)
        torch.testing.assert_close(estimate, x, atol=1e-5, rtol=0.0)


@each_decay
@each_scale
def test_clean_estimate_in_double_precision(name: str, scale: float) -> None:
    """Away from rounding the estimate is exact to 1e-12, at γ = 1 too, where (1 − γ)/c(γ) is 0/0."""
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    level = torch.tensor(levels(name), dtype=torch.float64)
    x, noise = (tensor.double() for tensor in images(len(level)))
    record = dynamics.corrupt(x, noise, level)
    estimate = dynamics.clean_estimate(record.x_level, record.target, level)
    torch.testing.assert_close(estimate, x, atol=1e-12, rtol=0.0)


@each_decay
@each_scale
def test_decoding_pure_noise_in_one_step_is_exact(name: str, scale: float) -> None:
    """x̂ = ε − f(ε; z)/(λ c(0)), from what a decoder sees: ε alone."""
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    assert dynamics.noise_level == 0.0
    assert not dynamics.conditions_on_time
    x, noise = images(3)
    level = torch.full((3,), dynamics.noise_level)
    record = dynamics.corrupt(x, noise, level)
    assert torch.equal(record.x_level, noise)
    field = oracle(name, scale, record)
    estimate = dynamics.clean_estimate(noise, field, level)
    torch.testing.assert_close(estimate, x, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(estimate, noise - field / (scale * closed_form(name, 0.0)), atol=1e-5, rtol=0.0)


@each_decay
@each_scale
def test_the_papers_plus_sign_is_far_off(name: str, scale: float) -> None:
    """With x_γ + f in place of x_γ − f the estimate lies on the noise's far side: x̂ − x = 2 (1 − γ)(ε − x)."""
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    level = torch.tensor([0.0, 0.3, 0.5])
    x, noise = images(3)
    record = dynamics.corrupt(x, noise, level)
    wrong = dynamics.clean_estimate(record.x_level, -record.target, level)
    expected = x + 2.0 * (1.0 - level.view(-1, 1, 1, 1)) * (noise - x)
    torch.testing.assert_close(wrong, expected, atol=1e-4, rtol=0.0)
    assert (wrong - x).square().flatten(1).mean(dim=1).sqrt().min() > 0.9


@each_decay
def test_descending_the_target_reaches_the_data(name: str) -> None:
    """The field points uphill: a small step against it brings x_γ nearer to x, a step along it farther away."""
    dynamics = EquilibriumMatching(**SETTINGS[name])
    x, noise = images(4)
    record = dynamics.corrupt(x, noise, torch.full((4,), 0.4))
    before = (record.x_level - x).square().flatten(1).mean(dim=1)
    downhill = (record.x_level - 0.1 * record.target - x).square().flatten(1).mean(dim=1)
    uphill = (record.x_level + 0.1 * record.target - x).square().flatten(1).mean(dim=1)
    assert (downhill < before).all()
    assert (uphill > before).all()


@each_decay
@each_scale
def test_stiffness_is_minus_the_slope_at_the_data(name: str, scale: float) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    step = 1e-6
    ends = dynamics.decay(torch.tensor([1.0 - step, 1.0], dtype=torch.float64))
    slope = (ends[1] - ends[0]).item() / step
    assert dynamics.stiffness == pytest.approx(-scale * slope, rel=1e-6)
    assert dynamics.stiffness == pytest.approx(scale if name == "linear" else scale / (1.0 - KINK[name]))


@each_decay
def test_near_the_data_the_field_is_stiffness_times_distance(name: str) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=4.0)
    x, noise = (tensor.double() for tensor in images(1))
    record = dynamics.corrupt(x, noise, torch.tensor([0.99], dtype=torch.float64))
    torch.testing.assert_close(record.target, dynamics.stiffness * (record.x_level - x))


@each_decay
@each_scale
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("start_level", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_step_sizes_land_on_the_data_from_any_level(
    name: str, scale: float, num_steps: int, start_level: float
) -> None:
    """The true field of one image, λ c(γ)(ε − x), at the state's own γ: the first step lands, the others stay."""
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    x, noise = (tensor.double() for tensor in images(1))
    way = noise - x

    def field(state: Tensor) -> Tensor:
        level = 1.0 - ((state - x) * way).sum().item() / way.square().sum().item()
        return scale * closed_form(name, level) * way

    start = start_level * x + (1.0 - start_level) * noise
    sizes = dynamics.step_sizes(num_steps, start_level)
    path = gradient_descent(field, start, num_steps, sizes, return_trajectory=True).trajectory
    assert path is not None
    torch.testing.assert_close(path[1:], x.expand(num_steps, *x.shape), atol=1e-12, rtol=0.0)


@each_decay
@each_scale
def test_one_step_size_is_that_of_the_clean_estimate(name: str, scale: float) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    assert dynamics.step_sizes(1) == pytest.approx([1.0 / (scale * closed_form(name, 0.0))], rel=1e-12)
    for level in (0.2, 0.7, 0.99):
        expected = (1.0 - level) / (scale * closed_form(name, level))
        assert dynamics.step_sizes(1, level) == pytest.approx([expected], rel=1e-12)
        if name == "linear":
            assert dynamics.step_sizes(1, level) == [1.0 / scale]


@each_decay
@each_scale
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_step_sizes_from_the_data_itself_are_finite(name: str, scale: float, num_steps: int) -> None:
    """There c(γ) is 0, but the ratio (1 − γ)/(λ c(γ)) is 1/L."""
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    sizes = dynamics.step_sizes(num_steps, 1.0)
    assert len(sizes) == num_steps
    assert all(math.isfinite(size) and size > 0.0 for size in sizes)
    assert sizes[0] == pytest.approx(1.0 / dynamics.stiffness, rel=1e-12)


@each_decay
@each_scale
@pytest.mark.parametrize("descent", [0.3, 1.0, 2.5, 100.0])
def test_the_step_sizes_after_the_first_share_the_descent(name: str, scale: float, descent: float) -> None:
    """Alike, at most 1/L each, and together descent/L where that many steps can go so far."""
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    for num_steps in (2, 3, 4, 9):
        first, *others = dynamics.step_sizes(num_steps, descent=descent)
        assert [first] == dynamics.step_sizes(1)
        assert others == [others[0]] * (num_steps - 1)
        assert sum(others) == pytest.approx(min(descent, num_steps - 1) / dynamics.stiffness, rel=1e-12)


@each_scale
def test_the_linear_decays_loss_is_the_error_of_the_estimate(scale: float) -> None:
    dynamics = EquilibriumMatching("linear", scale)
    level = torch.tensor([0.0, 0.3, 0.8, 1.0])
    x, noise = images(4)
    record = dynamics.corrupt(x, noise, level)
    prediction = scale * torch.randn_like(x)
    estimate = dynamics.clean_estimate(record.x_level, prediction, level)
    loss = dynamics.loss(record, prediction)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (estimate - x).square().flatten(1).mean(dim=1), atol=1e-6, rtol=1e-5)


@each_decay
def test_the_scale_of_the_field_does_not_change_the_loss(name: str) -> None:
    x, noise = images(3)
    level = torch.tensor([0.1, 0.5, 0.9])
    answer = torch.randn_like(x)
    losses = []
    for scale in SCALES:
        dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
        losses.append(dynamics.loss(dynamics.corrupt(x, noise, level), scale * answer))
    assert losses[0].min() > 0.1
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[1])


def test_the_loss_of_the_target_is_zero_and_of_half_precision_is_float32() -> None:
    dynamics = EquilibriumMatching("truncated", 4.0)
    x, noise = images(2)
    record = dynamics.corrupt(x, noise, torch.tensor([0.2, 0.9]))
    assert dynamics.loss(record, record.target).tolist() == [0.0, 0.0]
    assert dynamics.loss(record, record.target.bfloat16()).dtype == torch.float32


def test_the_mean_estimate_is_the_posterior_mean_for_the_linear_decay() -> None:
    """Averaging the field over γ (all that a network without γ can learn) and estimating commute."""
    dynamics = EquilibriumMatching()
    x, noise = images(1)
    record = dynamics.corrupt(x, noise, torch.tensor([0.37]))
    fields = torch.randn(5, *x.shape[1:])
    level = torch.full((5,), 0.37)
    estimates = dynamics.clean_estimate(record.x_level.expand_as(fields), fields, level)
    of_mean = dynamics.clean_estimate(record.x_level, fields.mean(dim=0, keepdim=True), level[:1])
    torch.testing.assert_close(estimates.mean(dim=0, keepdim=True), of_mean)


@each_decay
@each_scale
def test_the_estimate_passes_finite_gradients_at_every_level(name: str, scale: float) -> None:
    dynamics = EquilibriumMatching(**SETTINGS[name], gradient_scale=scale)
    level = torch.tensor(levels(name), requires_grad=True)
    x, noise = images(len(level))
    prediction = torch.randn_like(x, requires_grad=True)
    dynamics.clean_estimate(noise, prediction, level).square().sum().backward()
    # The linear decay's estimate does not ask for the level at all.
    assert (level.grad is None) == (name == "linear")
    assert level.grad is None or level.grad.isfinite().all()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad.flatten(1).any(dim=1).all()


def test_levels_are_uniform_and_follow_the_generator() -> None:
    dynamics = EquilibriumMatching()
    level = dynamics.sample_level(20_000, generator=torch.Generator().manual_seed(4))
    assert level.shape == (20_000,)
    assert level.dtype == torch.float32
    assert level.min() >= 0.0
    assert level.max() <= 1.0
    error = 5.0 / math.sqrt(len(level))
    assert abs(level.mean().item() - 0.5) < error * math.sqrt(1.0 / 12.0)
    for quantile in (0.1, 0.5, 0.9):
        assert abs((level < quantile).float().mean().item() - quantile) < 0.5 * error
    assert torch.equal(level, dynamics.sample_level(20_000, generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(level, dynamics.sample_level(20_000))


def test_defaults_are_the_papers() -> None:
    dynamics = EquilibriumMatching()
    assert dynamics.gradient_scale == 1.0
    assert dynamics.decay == make_decay("linear")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decay": "linar"}, "'linar' (did you mean 'linear'?)"),
        ({"gradient_scale": 0.0}, "gradient_scale is 0.0"),
        ({"gradient_scale": -1.0}, "gradient_scale is -1.0"),
        ({"gradient_scale": math.nan}, "gradient_scale is nan"),
        ({"gradient_scale": math.inf}, "gradient_scale is inf"),
        ({"decay": "linear", "decay_kink": 0.5}, "decay_kink"),
        ({"decay": "linear", "decay_start": 1.2}, "decay_start"),
        ({"decay": "truncated", "decay_start": 1.2}, "decay_start"),
        ({"decay": "truncated", "decay_kink": 0.0}, "kink is 0.0"),
        ({"decay": "truncated", "decay_kink": 1.0}, "kink is 1.0"),
        ({"decay": "truncated", "decay_kink": math.nan}, "kink is nan"),
        ({"decay": "piecewise", "decay_kink": -0.1}, "kink is -0.1"),
        ({"decay": "piecewise", "decay_start": 0.0}, "start is 0.0"),
        ({"decay": "piecewise", "decay_start": math.inf}, "start is inf"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        EquilibriumMatching(**settings)
    assert named in str(error.value)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_a_level_that_is_not_one_number_per_image_is_named(shape: tuple[int, ...]) -> None:
    x, noise = images(2)
    dynamics = EquilibriumMatching()
    level = torch.full(shape, 0.5)
    with pytest.raises(InputError, match=r"one number per image is \(2,\)"):
        dynamics.corrupt(x, noise, level)
    with pytest.raises(InputError, match=r"one number per image is \(2,\)"):
        dynamics.clean_estimate(x, noise, level)


def test_tensors_of_another_shape_are_named() -> None:
    x, noise = images(2)
    level = torch.full((2,), 0.5)
    dynamics = EquilibriumMatching()
    record = dynamics.corrupt(x, noise, level)
    with pytest.raises(InputError, match=r"noise has shape \(1, 3, 4, 6\)"):
        dynamics.corrupt(x, noise[:1], level)
    with pytest.raises(InputError, match=r"prediction has shape \(2, 3, 4, 5\)"):
        dynamics.clean_estimate(x, noise[..., :5], level)
    with pytest.raises(InputError, match=r"prediction has shape \(2, 1, 4, 6\)"):
        dynamics.loss(record, noise[:, :1])


def test_pure_noise_is_shown_as_often_as_asked_and_the_other_levels_stay_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    level = EquilibriumMatching(pure_noise=0.25).sample_level(20_000, generator=generator)
    others = level[level > 0]
    assert 1.0 - len(others) / len(level) == pytest.approx(0.25, abs=0.01)
    counts = torch.histc(others, bins=10, min=0.0, max=1.0) / len(others)
    torch.testing.assert_close(counts, torch.full((10,), 0.1), atol=0.01, rtol=0)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_of_pure_noise_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="pure_noise"):
        EquilibriumMatching(pure_noise=share)
