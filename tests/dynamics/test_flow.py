"""Flow matching against closed forms; and the shapes that both dynamics refuse."""

import pytest
import torch
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError
from dc_ssdae.samplers import euler


def images(batch: int) -> tuple[Tensor, Tensor]:
    return 2.0 * torch.rand(batch, 3, 4, 6) - 1.0, torch.randn(batch, 3, 4, 6)


def test_the_record_is_the_straight_line_and_the_estimate_is_exact() -> None:
    dynamics = FlowMatching()
    level = torch.tensor([0.0, 0.25, 1.0])
    x, noise = images(3)
    record = dynamics.corrupt(x, noise, level)
    assert torch.equal(record.x_level[0], x[0])
    assert torch.equal(record.x_level[2], noise[2])
    torch.testing.assert_close(record.x_level[1], 0.75 * x[1] + 0.25 * noise[1])
    assert torch.equal(record.target, x - noise)
    torch.testing.assert_close(dynamics.clean_estimate(record.x_level, x - noise, level), x, atol=1e-5, rtol=0.0)


def test_one_step_from_pure_noise_is_eulers() -> None:
    dynamics = FlowMatching()
    x, noise = images(2)
    estimate = dynamics.clean_estimate(noise, x - noise, torch.full((2,), dynamics.noise_level))
    torch.testing.assert_close(estimate, x, atol=1e-5, rtol=0.0)
    assert torch.equal(euler(lambda y, time: x - noise, noise, num_steps=1).sample, estimate)


def test_levels_are_logit_normal() -> None:
    level = FlowMatching().sample_level(20_000, generator=torch.Generator().manual_seed(6))
    assert level.dtype == torch.float32
    logits = level.double().logit()
    assert abs(logits.mean().item()) < 0.03
    assert abs(logits.std().item() - 1.0) < 0.03
    # Of a standard normal, 68.27 % lie within one standard deviation.
    assert abs((logits.abs() < 1.0).double().mean().item() - 0.6827) < 0.02
    assert torch.equal(level, FlowMatching().sample_level(20_000, generator=torch.Generator().manual_seed(6)))


def test_loss() -> None:
    dynamics = FlowMatching()
    x, noise = images(3)
    record = dynamics.corrupt(x, noise, torch.rand(3))
    loss = dynamics.loss(record, record.target + torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1, 1))
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]))
    assert dynamics.loss(record, record.target.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dynamics", [EquilibriumMatching("truncated"), FlowMatching()])
def test_shapes_that_do_not_fit_are_named(dynamics: EquilibriumMatching | FlowMatching) -> None:
    x, noise = images(2)
    level = torch.full((2,), 0.5)
    record = dynamics.corrupt(x, noise, level)
    with pytest.raises(InputError, match=r"noise has shape \(1, 3, 4, 6\)"):
        dynamics.corrupt(x, noise[:1], level)
    for wrong in (level[0], level[:1], level[:, None]):
        with pytest.raises(InputError, match=r"one number per image is \(2,\)"):
            dynamics.corrupt(x, noise, wrong)
        with pytest.raises(InputError, match=r"one number per image is \(2,\)"):
            dynamics.clean_estimate(x, noise, wrong)
    with pytest.raises(InputError, match=r"prediction has shape \(2, 3, 4, 5\)"):
        dynamics.clean_estimate(x, noise[..., :5], level)
    with pytest.raises(InputError, match=r"prediction has shape \(2, 1, 4, 6\)"):
        dynamics.loss(record, noise[:, :1])
