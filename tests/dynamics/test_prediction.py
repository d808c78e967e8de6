"""A network that answers the image: the field and the velocity follow from it, in closed form."""

import pytest
import torch
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.samplers import euler, gradient_descent, midpoint, nesterov


def images(batch: int) -> tuple[Tensor, Tensor]:
    return 2.0 * torch.rand(batch, 3, 4, 6) - 1.0, torch.randn(batch, 3, 4, 6)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_field_of_an_image_is_the_linear_decays(scale: float) -> None:
    """λ (x_γ − x) = λ (1 − γ)(ε − x), and the loss of an answer is that of the field which follows from it."""
    image = EquilibriumMatching(gradient_scale=scale, prediction="image")
    field = EquilibriumMatching(gradient_scale=scale)
    x, noise = images(4)
    level = torch.tensor([0.0, 0.3, 0.9, 1.0])
    record, expected = image.corrupt(x, noise, level), field.corrupt(x, noise, level)
    assert torch.equal(record.target, x)
    assert torch.equal(record.x_level, expected.x_level)
    torch.testing.assert_close(image.field_of(record.x_level, x), expected.target, atol=1e-5, rtol=0.0)
    answer = x + 0.1 * torch.randn_like(x)
    assert torch.equal(image.clean_estimate(record.x_level, answer, level), answer)
    follows = image.field(lambda y: answer, record.x_level)
    torch.testing.assert_close(image.loss(record, answer), field.loss(expected, follows), atol=1e-6, rtol=1e-5)
    estimate = field.clean_estimate(record.x_level, follows, level)
    torch.testing.assert_close(estimate, answer, atol=1e-5, rtol=0.0)


def test_the_velocity_of_an_image_is_flow_matchings() -> None:
    """v = (D − x_t)/t; the loss is the velocity's from t = 0.05 on, and no more than that below."""
    image, field = FlowMatching(prediction="image"), FlowMatching()
    x, noise = images(4)
    level = torch.tensor([0.01, 0.05, 0.4, 1.0])
    record, expected = image.corrupt(x, noise, level), field.corrupt(x, noise, level)
    assert torch.equal(record.target, x)
    torch.testing.assert_close(image.field_of(record.x_level, x, level), expected.target, atol=1e-4, rtol=0.0)
    answer = x + 0.1 * torch.randn_like(x)
    follows = image.field(lambda y: answer, record.x_level, level)
    ours, theirs = image.loss(record, answer), field.loss(expected, follows)
    torch.testing.assert_close(ours[1:], theirs[1:], atol=1e-5, rtol=1e-4)
    assert ours[0].item() == pytest.approx(((answer[0] - x[0]) / 0.05).square().mean().item(), rel=1e-4)
    assert torch.equal(image.clean_estimate(record.x_level, answer, level), answer)
    assert image.field_of(x, answer, torch.zeros(4)).isfinite().all()


def test_descents_go_to_the_image_and_land_with_their_first_step() -> None:
    """x ← (1 − ηλ) x + ηλ D."""
    dynamics = EquilibriumMatching(gradient_scale=4.0, prediction="image")
    goal, noise = images(2)

    def field(x: Tensor) -> Tensor:
        return dynamics.field(lambda y: goal, x)

    assert dynamics.step_sizes(1) == [0.25]
    torch.testing.assert_close(gradient_descent(field, noise, 1, 0.25).sample, goal, atol=1e-6, rtol=0.0)
    after_two = gradient_descent(field, noise, 2, 0.1).sample
    torch.testing.assert_close(after_two, 0.36 * noise + 0.64 * goal, atol=1e-6, rtol=0.0)
    stopped = nesterov(field, noise, 16, 0.2, tolerance=0.01)
    assert stopped.num_evaluations.max() < 16
    torch.testing.assert_close(stopped.sample, goal, atol=0.01, rtol=0.0)


@pytest.mark.parametrize("sampler", [euler, midpoint])
@pytest.mark.parametrize("start_time", [1.0, 0.3, 0.0])
def test_integrators_end_on_the_image(sampler, start_time: float) -> None:
    """The last of Euler's steps lands on D, with no division by a small time."""
    dynamics = FlowMatching(prediction="image")
    goal, noise = images(2)
    start = start_time * noise + (1.0 - start_time) * goal
    sample = sampler(lambda x, t: dynamics.field(lambda y: goal, x, t), start, 30, start_time=start_time).sample
    torch.testing.assert_close(sample, goal, atol=1e-5, rtol=0.0)
