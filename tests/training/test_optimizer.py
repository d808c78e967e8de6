"""An optimiser's state: put into another, it is the same and in the same memory order; what does not fit is refused."""

import pytest
import torch
from tiny import different
from torch import nn

from dc_ssdae.errors import InputError
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state
from dc_ssdae.training.tensors import whole


@pytest.mark.parametrize(("name", "other"), [("adamw", "schedule_free_radam"), ("schedule_free_radam", "adamw")])
def test_a_state_is_put_into_an_optimiser_of_its_kind_alone(name: str, other: str) -> None:
    """In the parameters' own memory order, because arithmetic may round otherwise in another."""
    module = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module, TrainingConfig(optimizer=name))
    module(torch.randn(2, 5, 8, 8)).square().mean().backward()
    optimizer.step()
    tensors, groups = optimizer_state(optimizer, module)
    again = build_optimizer(module, TrainingConfig(optimizer=name, lr=1.0))
    load_optimizer_state(again, module, whole(tensors), groups)
    found = optimizer_state(again, module)
    assert found[1] == groups
    assert different(found[0], tensors) == set()
    assert [tensor.stride() for tensor in found[0].values()] == [tensor.stride() for tensor in tensors.values()]
    with pytest.raises(InputError, match="of another kind or version"):
        load_optimizer_state(build_optimizer(module, TrainingConfig(optimizer=other)), module, tensors, groups)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter of the model trains"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainingConfig())
