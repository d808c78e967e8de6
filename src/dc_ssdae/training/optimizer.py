"""The optimisers, and their state as named tensors and plain numbers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.tensors import like, local_part


class OptimizerState(NamedTuple):
    """What an optimiser holds: `tensors` named PARAMETER/KEY, and `groups`, JSON's numbers and words by group.

    `names` are the tensors that there were when the state was saved; None where that was not written down.
    """

    tensors: dict[str, Tensor]
    groups: list[dict[str, Any]]
    names: list[str] | None = None


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Make the optimiser that a configuration names, for every parameter that trains.

    Raises:
        InputError: nothing trains.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("no parameter of the model trains")
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        return torch.optim.AdamW(parameters, fused=fused, **settings)
    optimizer = RAdamScheduleFree(parameters, **settings)
    optimizer.train()
    return optimizer


def evaluated_weights(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """Make what the average of a model asks for the values at which parameters are to be evaluated, by name.

    A schedule-free optimiser holds y, where gradients are taken, and means x = y + (1 - 1/β₁)(z - y) to be used
    (Defazio et al. 2024, "The Road Less Scheduled", section 2). For others it is the parameter. Of a sharded
    parameter, the local part.
    """
    owners = dict(model.named_parameters(remove_duplicate=False))

    def evaluated(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        moving = {name: state["z"] for name in parameters if "z" in (state := optimizer.state.get(owners[name], {}))}
        if not moving:
            return parameters
        (beta1,) = {group["betas"][0] for group in optimizer.param_groups}
        points = [local_part(parameters[name]) for name in moving]
        values = torch._foreach_lerp(points, [local_part(z) for z in moving.values()], 1.0 - 1.0 / beta1)
        return {**parameters, **dict(zip(moving, values, strict=True))}

    return evaluated


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> OptimizerState:
    """Take an optimiser's state apart; the tensors themselves, sharded as they are, not copies.

    Args:
        optimizer: PyTorch's own, not a wrapper of it.
        module: whose parameters it trains; they give the names.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return OptimizerState(tensors, groups, sorted(tensors))


@torch.no_grad()
def load_optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module, state: OptimizerState) -> None:
    """Put a state of whole tensors into a fresh optimiser of the same kind.

    Raises:
        InputError: a tensor is missing, belongs to no parameter or has another shape; or the groups are others.
    """
    parameters = dict(module.named_parameters())
    if len(state.groups) != len(optimizer.param_groups):
        raise InputError(f"the optimiser's state has {len(state.groups)} groups, not {len(optimizer.param_groups)}")
    for group, saved in zip(optimizer.param_groups, state.groups, strict=True):
        if missing := sorted(set(group) - {"params"} ^ set(saved)):
            raise InputError(f"the optimiser's state is of another kind or version: {', '.join(missing)} do not match")
        for key, value in saved.items():
            if key != "fused":
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    for name, tensor in state.tensors.items():
        owner, _, key = name.rpartition("/")
        if owner not in parameters:
            raise InputError(f"the optimiser's state has a tensor {name} that belongs to no parameter of this model")
        parameter = parameters[owner]
        if key == "step":  # a fused optimiser keeps its counts beside the parameters, the others on the CPU
            beside = parameter.device if optimizer.param_groups[0].get("fused") else "cpu"
            optimizer.state[parameter][key] = tensor.to(beside, copy=True)
        elif tensor.shape != parameter.shape:
            shapes = tuple(tensor.shape), tuple(parameter.shape)
            raise InputError(f"the optimiser's state has {name} of shape {shapes[0]}; the parameter has {shapes[1]}")
        else:
            optimizer.state[parameter][key] = like(tensor, parameter)
    if missing := sorted(set(state.names or ()) - set(state.tensors)):
        raise InputError(f"the optimiser's state lacks {len(missing)} tensors, {missing[0]} among them; it is damaged")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
