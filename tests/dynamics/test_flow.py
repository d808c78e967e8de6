"""Flow matching against closed forms (SPEC section 2)."""

import math

import pytest
import torch
from torch import Tensor

from dc_ssdae.dynamics import FlowMatching
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import euler


def images(batch: int) -> tuple[Tensor, Tensor]:
    return 2.0 * torch.rand(batch, 3, 4, 6) - 1.0, torch.randn(batch, 3, 4, 6)


def test_the_record_is_the_straight_line() -> None:
    x, noise = images(3)
    level = torch.tensor([0.0, 0.25, 1.0])
    record = FlowMatching().corrupt(x, noise, level)
    assert torch.equal(record.x_level[0], x[0])
    assert torch.equal(record.x_level[2], noise[2])
    torch.testing.assert_close(record.x_level[1], 0.75 * x[1] + 0.25 * noise[1])
    assert torch.equal(record.target, x - noise)
    assert torch.equal(record.level, level)


def test_clean_estimate_of_the_true_velocity_is_exact() -> None:
    dynamics = FlowMatching()
    level = torch.tensor([0.0, 1e-4, 0.3, 0.8, 1.0 - 1e-4, 1.0])
    x, noise = images(len(level))
    record = dynamics.corrupt(x, noise, level)
    torch.testing.assert_close(dynamics.clean_estimate(record.x_level, x - noise, level), x, atol=1e-5, rtol=0.0)


def test_a_wrong_sign_is_far_off() -> None:
    dynamics = FlowMatching()
    level = torch.tensor([0.5, 0.8, 1.0])
    x, noise = images(3)
    record = dynamics.corrupt(x, noise, level)
    wrong = dynamics.clean_estimate(record.x_level, noise - x, level)
    assert (wrong - x).square().flatten(1).mean(dim=1).sqrt().min() > 0.9


def test_decoding_pure_noise_in_one_step_is_exact_and_equals_euler() -> None:
    dynamics = FlowMatching()
    assert dynamics.noise_level == 1.0
    assert dynamics.conditions_on_time
    x, noise = images(2)
    level = torch.full((2,), dynamics.noise_level)
    estimate = dynamics.clean_estimate(noise, x - noise, level)
    torch.testing.assert_close(estimate, x, atol=1e-5, rtol=0.0)
    assert torch.equal(euler(lambda y, time: x - noise, noise, num_steps=1).sample, estimate)


def test_levels_are_logit_normal() -> None:
    count = 20_000
    level = FlowMatching().sample_level(count, generator=torch.Generator().manual_seed(6))
    assert level.shape == (count,)
    assert level.dtype == torch.float32
    error = 5.0 / math.sqrt(count)
    assert abs(level.mean().item() - 0.5) < 0.25 * error
    logits = level.double().logit()
    assert abs(logits.mean().item()) < error
    assert abs(logits.std().item() - 1.0) < error
    # Of a standard normal, 68.27 % lie within one standard deviation.
    assert abs((logits.abs() < 1.0).double().mean().item() - 0.6827) < 0.5 * error
    assert torch.equal(level, FlowMatching().sample_level(count, generator=torch.Generator().manual_seed(6)))


def test_loss() -> None:
    dynamics = FlowMatching()
    x, noise = images(3)
    record = dynamics.corrupt(x, noise, torch.rand(3))
    assert dynamics.loss(record, record.target).tolist() == [0.0, 0.0, 0.0]
    offset = torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1, 1)
    loss = dynamics.loss(record, record.target + offset)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]))
    assert dynamics.loss(record, record.target.bfloat16()).dtype == torch.float32


def test_shapes_that_do_not_fit_are_named() -> None:
    x, noise = images(2)
    level = torch.full((2,), 0.5)
    dynamics = FlowMatching()
    record = dynamics.corrupt(x, noise, level)
    with pytest.raises(InputError, match=r"noise has shape \(1, 3, 4, 6\)"):
        dynamics.corrupt(x, noise[:1], level)
    with pytest.raises(InputError, match=r"one number per image is \(2,\)"):
        dynamics.corrupt(x, noise, level[:1])
    with pytest.raises(InputError, match=r"prediction has shape \(2, 3, 4, 5\)"):
        dynamics.clean_estimate(x, noise[..., :5], level)
    with pytest.raises(InputError, match=r"prediction has shape \(2, 1, 4, 6\)"):
        dynamics.loss(record, noise[:, :1])
