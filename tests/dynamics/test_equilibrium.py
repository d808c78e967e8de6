"""Equilibrium matching against closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import gradient_descent

CASES: list[tuple[dict[str, Any], float]] = [
    ({"decay": "linear"}, 1.0),
    ({"decay": "linear", "gradient_scale": 4.0}, 4.0),
    ({"decay": "truncated"}, 1.0),
    ({"decay": "truncated", "decay_kink": 0.25, "gradient_scale": 0.5}, 0.5),
    ({"decay": "piecewise", "gradient_scale": 4.0}, 4.0),
    ({"decay": "piecewise", "decay_kink": 0.6, "decay_start": 0.5}, 1.0),
]
"""Settings, and λ."""

each_case = pytest.mark.parametrize(("settings", "scale"), CASES)


def kink_of(settings: dict[str, Any]) -> float:
    return settings.get("decay_kink", 0.8)


def closed_form(settings: dict[str, Any], level: float) -> float:
    """c(γ) as the paper prints it, in plain Python."""
    if settings["decay"] == "linear":
        return 1.0 - level
    kink = kink_of(settings)
    if level > kink:
        return (1.0 - level) / (1.0 - kink)
    start = settings.get("decay_start", {"truncated": 1.0, "piecewise": 1.4}[settings["decay"]])
    return start - (start - 1.0) * level / kink


def levels(settings: dict[str, Any]) -> Tensor:
    """Both ends, both sides of the kink, and where (1 − γ)/c(γ) is nearly or exactly 0/0."""
    kink = kink_of(settings)
    return torch.tensor([0.0, 0.3, kink - 1e-9, kink, kink + 1e-9, 1.0 - 1e-4, 1.0], dtype=torch.float64)


def images(batch: int) -> tuple[Tensor, Tensor]:
    shape = (batch, 3, 4, 6)
    return 2.0 * torch.rand(shape, dtype=torch.float64) - 1.0, torch.randn(shape, dtype=torch.float64)


@each_case
def test_target_and_clean_estimate_are_exact_at_every_level(settings: dict[str, Any], scale: float) -> None:
    dynamics = EquilibriumMatching(**settings)
    level = levels(settings)
    x, noise = images(len(level))
    record = dynamics.corrupt(x, noise, level)
    factors = torch.tensor([scale * closed_form(settings, value) for value in level.tolist()], dtype=torch.float64)
    gamma = level.view(-1, 1, 1, 1)
    torch.testing.assert_close(record.x_level, gamma * x + (1.0 - gamma) * noise)
    torch.testing.assert_close(record.target, factors.view(-1, 1, 1, 1) * (noise - x), atol=1e-7, rtol=0.0)
    torch.testing.assert_close(dynamics.clean_estimate(record.x_level, record.target, level), x, atol=1e-12, rtol=0.0)
    # The paper's plus sign would put the estimate on the far side of the noise.
    wrong = dynamics.clean_estimate(record.x_level, -record.target, level)
    torch.testing.assert_close(wrong, x + 2.0 * (1.0 - gamma) * (noise - x), atol=1e-12, rtol=0.0)
    single = dynamics.corrupt(x.float(), noise.float(), level.float())
    estimate = dynamics.clean_estimate(single.x_level, single.target, level.float())
    torch.testing.assert_close(estimate, x.float(), atol=1e-5, rtol=0.0)


@each_case
def test_the_estimate_passes_finite_gradients_at_every_level(settings: dict[str, Any], scale: float) -> None:
    level = levels(settings).requires_grad_()
    _, noise = images(len(level))
    prediction = torch.randn_like(noise, requires_grad=True)
    EquilibriumMatching(**settings).clean_estimate(noise, prediction, level).square().sum().backward()
    assert level.grad is None or level.grad.isfinite().all()  # the linear decay's does not depend on the level
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad.flatten(1).any(dim=1).all()


@each_case
def test_stiffness_is_the_slope_at_the_data(settings: dict[str, Any], scale: float) -> None:
    dynamics = EquilibriumMatching(**settings)
    x, noise = images(1)
    record = dynamics.corrupt(x, noise, torch.tensor([0.99], dtype=torch.float64))
    torch.testing.assert_close(record.target, dynamics.stiffness * (record.x_level - x))


@each_case
@pytest.mark.parametrize("start_level", [0.0, 0.3, 0.95, 1.0])
def test_the_first_step_lands_and_the_others_stay(settings: dict[str, Any], scale: float, start_level: float) -> None:
    """In the true field of one image, λ c(γ)(ε − x), at the state's own γ; at the data c(γ) is 0."""
    x, noise = images(1)
    way = noise - x

    def field(state: Tensor) -> Tensor:
        level = 1.0 - ((state - x) * way).sum().item() / way.square().sum().item()
        return scale * closed_form(settings, level) * way

    start = start_level * x + (1.0 - start_level) * noise
    sizes = EquilibriumMatching(**settings).step_sizes(3, start_level)
    path = gradient_descent(field, start, 3, sizes, return_trajectory=True).trajectory
    assert path is not None
    torch.testing.assert_close(path[1:], x.expand(3, *x.shape), atol=1e-12, rtol=0.0)


@each_case
def test_step_sizes_share_the_descent_after_the_first(settings: dict[str, Any], scale: float) -> None:
    """Alike, at most 1/L each, and together descent/L where that many steps can go so far."""
    dynamics = EquilibriumMatching(**settings)
    assert dynamics.step_sizes(1) == pytest.approx([1.0 / (scale * closed_form(settings, 0.0))], rel=1e-12)
    for num_steps, descent in ((2, 0.3), (4, 2.5), (9, 100.0)):
        first, *others = dynamics.step_sizes(num_steps, descent=descent)
        assert [first] == dynamics.step_sizes(1)
        assert others == [others[0]] * (num_steps - 1)
        assert sum(others) == pytest.approx(min(descent, num_steps - 1) / dynamics.stiffness, rel=1e-12)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_linear_decays_loss_is_the_error_of_the_estimate(scale: float) -> None:
    dynamics = EquilibriumMatching("linear", scale)
    level = torch.tensor([0.0, 0.3, 0.8, 1.0])
    x, noise = (tensor.float() for tensor in images(4))
    record = dynamics.corrupt(x, noise, level)
    prediction = scale * torch.randn_like(x)
    loss = dynamics.loss(record, prediction)
    error = dynamics.clean_estimate(record.x_level, prediction, level) - x
    torch.testing.assert_close(loss, error.square().flatten(1).mean(dim=1), atol=1e-6, rtol=1e-5)
    half = dynamics.loss(record, record.target.bfloat16())
    assert half.dtype == torch.float32
    assert half.max() < 1e-4 < loss.min()


def test_levels_are_uniform_but_for_the_share_of_pure_noise() -> None:
    def draw(seed: int, **settings: float) -> Tensor:
        return EquilibriumMatching(**settings).sample_level(20_000, generator=torch.Generator().manual_seed(seed))

    level = draw(4, pure_noise=0.25)
    assert level.dtype == torch.float32
    for share, found in ((0.25, level), (0.0, draw(5))):
        others = found[found > 0.0]
        assert 1.0 - len(others) / len(found) == pytest.approx(share, abs=0.01)
        counts = torch.histc(others, bins=10, min=0.0, max=1.0) / len(others)
        torch.testing.assert_close(counts, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert torch.equal(level, draw(4, pure_noise=0.25))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decay": "linar"}, "'linar' (did you mean 'linear'?)"),
        ({"gradient_scale": 0.0}, "gradient_scale"),
        ({"gradient_scale": math.nan}, "gradient_scale"),
        ({"gradient_scale": math.inf}, "gradient_scale"),
        ({"decay": "linear", "decay_kink": 0.5}, "decay_kink"),
        ({"decay": "linear", "decay_start": 1.2}, "decay_start"),
        ({"decay": "truncated", "decay_start": 1.2}, "decay_start"),
        ({"decay": "truncated", "decay_kink": 0.0}, "kink"),
        ({"decay": "truncated", "decay_kink": math.nan}, "kink"),
        ({"decay": "piecewise", "decay_kink": 1.0}, "kink"),
        ({"decay": "piecewise", "decay_start": 0.0}, "start"),
        ({"decay": "piecewise", "decay_start": math.inf}, "start"),
        ({"pure_noise": -0.1}, "pure_noise"),
        ({"pure_noise": 1.0}, "pure_noise"),
        ({"pure_noise": math.nan}, "pure_noise"),
        ({"prediction": "noise"}, "prediction"),
        ({"prediction": "image", "decay": "truncated"}, "linear decay"),
        ({"prediction": "image", "explicit_energy": "dot"}, "explicit_energy"),
        ({"explicit_energy": "cross"}, "explicit_energy"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        EquilibriumMatching(**settings)
    assert named in str(error.value)
