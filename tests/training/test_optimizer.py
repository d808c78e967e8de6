"""An optimiser taken apart, written down and put together again goes on with the same bits."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.training.config import OptimizerName, TrainingConfig
from dc_ssdae.training.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from dc_ssdae.training.tensors import like, whole

State = tuple[dict[str, Tensor], list[dict[str, Any]]]

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "schedule_free_radam")


class Layers(nn.Module):
    """Convolutions in channels-last order, odd sizes beyond a vector register, a scalar, and an unused weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(5, 7, 3)
        self.conv.to(memory_format=torch.channels_last)
        self.vector = nn.Parameter(torch.randn(1037, generator=generator))
        self.matrix = nn.Parameter(torch.randn(37, 53, generator=generator))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def config(name: OptimizerName, **settings: Any) -> TrainingConfig:
    return TrainingConfig(optimizer=name, lr=0.05, weight_decay=0.02, **settings)


def train(module: Layers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps whose gradients depend on their number and on the weights."""
    for step in steps:
        set_learning_rate(optimizer, 0.05 / (1 + step))
        for name, parameter in module.named_parameters():
            if name in ("unused", "frozen"):
                continue
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = like(noise, parameter) + 0.1 * parameter.detach()
        optimizer.step()
        optimizer.zero_grad()


def written_and_read(state: State) -> State:
    """Through the formats of a checkpoint."""
    tensors, groups = state
    return load(save(whole(tensors))), json.loads(json.dumps(groups, allow_nan=False))


def fresh(weights: dict[str, Tensor]) -> Layers:
    """A module that holds whole, contiguous weights, as a checkpoint's reader makes it."""
    module = Layers()
    module.load_state_dict(whole(weights))
    return module


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_interrupted_it_ends_with_the_same_bits(name: OptimizerName) -> None:
    interrupted_at = 4  # RAdam rectifies from the sixth step on
    module = Layers()
    optimizer = build_optimizer(module, config(name))
    train(module, optimizer, range(interrupted_at))
    state = written_and_read(optimizer_state(optimizer, module))
    again = fresh(module.state_dict())
    resumed = build_optimizer(again, config(name))
    load_optimizer_state(resumed, again, *state)
    assert again.conv.weight.stride() == module.conv.weight.stride()

    for trained, by in ((module, optimizer), (again, resumed)):
        train(trained, by, range(interrupted_at, 14))
    for key, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    ends = [optimizer_state(by, trained) for trained, by in ((module, optimizer), (again, resumed))]
    (tensors, groups), (others, other_groups) = ends
    assert groups == other_groups
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert torch.equal(others[key], tensor), key
        assert others[key].dtype == tensor.dtype, key
        assert others[key].stride() == tensor.stride(), f"{key} is in another memory order"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_and_groups(name: OptimizerName) -> None:
    module = Layers()
    optimizer = build_optimizer(module, config(name, betas=(0.8, 0.95)))
    train(module, optimizer, range(3))
    tensors, (group,) = optimizer_state(optimizer, module)
    keys = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "schedule_free_radam": {"z", "exp_avg_sq"}}[name]
    trained = ("conv.weight", "conv.bias", "vector", "matrix", "scalar")
    assert set(tensors) == {f"{parameter}/{key}" for parameter in trained for key in keys}
    assert "params" not in group
    assert tuple(group["betas"]) == (0.8, 0.95)
    assert tensors["vector/exp_avg_sq"] is optimizer.state[module.vector]["exp_avg_sq"], "copied for nothing"


def test_nothing_to_train_is_refused() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model trains"):
        build_optimizer(module, config("adamw"))


def test_another_optimisers_state_is_refused() -> None:
    module = Layers()
    optimizer = build_optimizer(module, config("schedule_free_radam"))
    train(module, optimizer, range(1))
    state = optimizer_state(optimizer, module)
    with pytest.raises(InputError, match="of another kind or version"):
        load_optimizer_state(build_optimizer(module, config("adamw")), module, *state)
