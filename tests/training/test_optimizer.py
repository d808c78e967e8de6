"""An optimiser taken apart, written down and put together again goes on with the same bits."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from states import different
from torch import nn

from dc_ssdae.errors import InputError
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
)
from dc_ssdae.training.tensors import like, whole

OPTIMIZERS: tuple[str, ...] = ("adamw", "schedule_free_radam")


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


def config(name: str, **settings: Any) -> TrainingConfig:
    return TrainingConfig(optimizer=name, lr=0.05, weight_decay=0.02, **settings)


def train(module: Layers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps whose gradients depend on their number and on the weights."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        for name, parameter in module.named_parameters():
            if name in ("unused", "frozen"):
                continue
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = like(noise, parameter) + 0.1 * parameter.detach()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_interrupted_it_ends_with_the_same_bits(name: str) -> None:
    interrupted_at = 4  # RAdam rectifies from the sixth step on
    module, again = Layers(), Layers()
    optimizer = build_optimizer(module, config(name))
    train(module, optimizer, range(interrupted_at))
    tensors, groups = optimizer_state(optimizer, module)
    # Through the formats of a checkpoint, whose tensors are whole and contiguous.
    written = load(save(whole(tensors))), json.loads(json.dumps(groups, allow_nan=False))
    again.load_state_dict(whole(module.state_dict()))
    resumed = build_optimizer(again, config(name))
    load_optimizer_state(resumed, again, *written)

    ends = []
    for trained, by in ((module, optimizer), (again, resumed)):
        train(trained, by, range(interrupted_at, 14))
        ends.append((trained.state_dict(), *optimizer_state(by, trained)))
    assert ends[0][2] == ends[1][2]
    for one, other in zip(ends[0][:2], ends[1][:2], strict=True):
        assert different(one, other) == set()
        strides = [{key: tensor.stride() for key, tensor in held.items()} for held in (one, other)]
        assert strides[0] == strides[1], "in another memory order"


def test_nothing_to_train_and_another_optimisers_state_are_refused() -> None:
    with pytest.raises(InputError, match="no parameter of the model trains"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), config("adamw"))
    module = Layers()
    optimizer = build_optimizer(module, config("schedule_free_radam"))
    train(module, optimizer, range(1))
    with pytest.raises(InputError, match="of another kind or version"):
        load_optimizer_state(build_optimizer(module, config("adamw")), module, *optimizer_state(optimizer, module))
