"""The average against its closed form, and that lending it to a model leaves no trace."""

import contextlib
from collections.abc import Iterable

import pytest
import torch
from states import copies
from tiny import different
from torch import nn

from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.optimizer import build_optimizer, evaluated_weights

DECAY = 0.9


def network() -> nn.Sequential:
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))
    return layers.to(memory_format=torch.channels_last)


def take_steps(model: nn.Module, average: ExponentialMovingAverage, steps: Iterable[int]) -> None:
    """Move every parameter and, by a forward pass, the batch norm's statistics; and the average after them."""
    for step in steps:
        model(torch.randn(4, 3, 6, 6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model, step)


@pytest.mark.parametrize("start", [0, 3])
def test_it_is_the_closed_form(start: int) -> None:
    """After k steps: d^k w_0 + (1 - d) sum of d^(k - i) w_i, w_0 being the weights at `start`."""
    model = network()
    average = ExponentialMovingAverage(model, DECAY, start)
    history = [copies(model.state_dict())]
    for step in range(1, 9):
        take_steps(model, average, [step])
        history.append(copies(model.state_dict()))
        if step <= start:  # of every step, because any may be thrown away
            assert different(average.state_dict(), history[-1]) == set()
    steps = 8 - start
    parameters = dict(model.named_parameters())
    for name, tensor in average.state_dict().items():
        if name not in parameters:
            assert torch.equal(tensor, history[-1][name]), name
            continue
        values = [state[name].double() for state in history[start:]]
        expected = DECAY**steps * values[0] + sum(
            (1 - DECAY) * DECAY ** (steps - i) * values[i] for i in range(1, steps + 1)
        )
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(tensor, history[-1][name]), f"{name} is no average"


@pytest.mark.parametrize("tied", [False, True])
def test_lending_it_leaves_the_very_bits(tied: bool) -> None:
    """Also where what it is lent for fails, and where one weight has two names, as a user's class may have."""
    model = network()
    if tied:
        model[1].register_parameter("second_name", model[2].weight)
    average = ExponentialMovingAverage(model, DECAY)
    take_steps(model, average, [1])
    weights, averaged = copies(model.state_dict()), copies(average.state_dict())
    with contextlib.suppress(KeyError), average.applied_to(model):
        assert different(model.state_dict(), averaged) == set()
        raise KeyError("in the middle")
    assert different(model.state_dict(), weights) == set()
    assert different(average.state_dict(), averaged) == set()


def test_the_weights_that_a_schedule_free_optimiser_means_are_averaged() -> None:
    model = network()
    config = TrainingConfig(optimizer="schedule_free_radam", lr=0.1)
    optimizer = build_optimizer(model, config)
    average = ExponentialMovingAverage(model, 0.0)  # keeps only the newest value
    evaluated = evaluated_weights(optimizer, model)
    for step in range(1, 9):
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step, evaluated)
    trained = copies(model.state_dict())
    optimizer.eval()  # schedulefree's own way to the weights to be used
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], tensor, atol=1e-7, rtol=1e-6)
    assert not torch.equal(trained["0.weight"], model.state_dict()["0.weight"])
