"""The optimisers, and their state as named tensors and plain numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn
from torch.optim import Optimizer

from dc_ssdae.errors import InputError
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.ema import Evaluated
from dc_ssdae.training.tensors import like, local_parts


def build_optimizer(module: nn.Module, config: TrainingConfig) -> Optimizer:
    """Make the optimiser that a configuration names, for every parameter that trains.

    Raises:
        InputError: nothing trains.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("no parameter of the model trains")
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].device.type in ("cpu", "cuda"), **settings)
    optimizer = RAdamScheduleFree(parameters, **settings)
    optimizer.train()
    return optimizer


def evaluated_weights(optimizer: Optimizer, model: nn.Module) -> Evaluated:
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
        points = local_parts(parameters, moving), local_parts(moving, moving)
        values = torch._foreach_lerp(*points, 1.0 - 1.0 / beta1)
        return {**parameters, **dict(zip(moving, values, strict=True))}

    return evaluated


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Take an optimiser's state apart.

    Args:
        optimizer: PyTorch's own, not a wrapper of it.
        module: whose parameters it trains; they give the names.

    Returns:
        The tensors themselves, named PARAMETER/KEY, sharded as they are, not copies; and the settings of each group.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, groups


@torch.no_grad()
def load_optimizer_state(
    optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Put a state into a fresh optimiser of the same kind, for the same parameters.

    Args:
        optimizer: PyTorch's own, not a wrapper of it.
        module: whose parameters it trains.
        tensors: as `optimizer_state` gives them, but whole.
        groups: as `optimizer_state` gives them.

    Raises:
        InputError: the settings are those of another kind of optimiser, or of another version.
    """
    parameters = dict(module.named_parameters())
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        if missing := sorted(set(group) - {"params"} ^ set(saved)):
            raise InputError(f"the optimiser's state is of another kind or version: {', '.join(missing)} do not match")
        for key, value in saved.items():
            if key != "fused":
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        if key == "step":  # a fused optimiser keeps its counts beside the parameters, the others on the CPU
            beside = parameter.device if optimizer.param_groups[0].get("fused") else "cpu"
            optimizer.state[parameter][key] = tensor.to(beside, copy=True)
        else:
            optimizer.state[parameter][key] = like(tensor, parameter)
