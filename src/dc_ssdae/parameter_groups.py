"""Named groups of a model's tensors, of which a phase of training chooses those that it trains."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.components import COMPONENTS
from dc_ssdae.errors import InputError, check_names


def parameter_groups(model: DCSSDAE) -> dict[str, list[str]]:
    """Sort the tensors of a model into its named groups.

    A class of encoders, decoders or dynamics declares its groups by a method `parameter_groups()`, which gives, in the
    order in which data pass through, each group's name and the names of the submodules, parameters and buffers it
    holds, as they begin in the class's own state dict. A class without that method is one group.

    Args:
        model: on any device, the meta device too.

    Returns:
        By full name ("encoder.latent_head", or "encoder" for a class without the method), encoder first, then decoder
        and dynamics: the names of the group's parameters and buffers in the model's state dict. Every tensor of the
        state dict is in exactly one group; a group without any is left out.

    Raises:
        InputError: a class's declaration leaves a tensor out, or claims it for two groups.
    """
    groups: dict[str, list[str]] = {}
    # Most dynamics are no module.
    modules = {part: module for part in COMPONENTS if isinstance(module := getattr(model, part), nn.Module)}
    for part, module in modules.items():
        tensors = [name for name, value in module.state_dict().items() if isinstance(value, Tensor)]
        declare: Any = getattr(module, "parameter_groups", None)
        declared = {f"{part}.{group}": held for group, held in declare().items()} if declare else {part: tensors}
        beginnings = {group: tuple(f"{name}." for name in held) for group, held in declared.items()}
        groups |= {group: [] for group in declared}
        for tensor in tensors:
            holders = [group for group, names in beginnings.items() if f"{tensor}.".startswith(names)]
            if len(holders) != 1:
                where = " and ".join(map(repr, holders)) or "no group"
                owner = f"parameter_groups of {part} {model.config[part]['class_path']}"
                raise InputError(f"{owner}: tensor {tensor!r} is in {where}, and must be in one")
            groups[holders[0]].append(f"{part}.{tensor}")
    return {group: held for group, held in groups.items() if held}


def group_sizes(model: DCSSDAE) -> dict[str, int]:
    """Count the parameters of each group, buffers excluded; the sum is the model's number of parameters.

    Args:
        model: on any device, the meta device too.

    Raises:
        InputError: as `parameter_groups` does.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {name: sum(sizes.get(tensor, 0) for tensor in held) for name, held in parameter_groups(model).items()}


def select_groups(groups: Mapping[str, list[str]], wanted: Sequence[str]) -> list[str]:
    """Find the groups that selectors mean.

    A selector is a group's name ("encoder.latent_head"), or the beginning of several up to a dot ("decoder",
    "encoder.stages"). In place of a number a negative one counts from the end, in the order of the groups:
    "encoder.stages.-1" is the last stage, "encoder.stages.-2" the one before.

    Args:
        groups: as `parameter_groups` gives them.
        wanted: the selectors.

    Returns:
        The groups' full names, each once, in the order of `groups`.

    Raises:
        InputError: a selector means no group.
    """
    selectors = {".".join(name.split(".")[:count]) for name in groups for count in range(1, name.count(".") + 2)}
    chosen: set[str] = set()
    for selector in wanted:
        meaning = _counted_from_start(selector, groups)
        check_names("parameter group", [meaning], selectors)
        # A name of its own means that group alone, also where others begin with it.
        chosen |= {meaning} if meaning in groups else {name for name in groups if name.startswith(f"{meaning}.")}
    return [name for name in groups if name in chosen]


def _counted_from_start(selector: str, groups: Iterable[str]) -> str:
    """Replace each negative number by the one that it stands for; as it is where there are not so many."""
    before = ""
    for step in selector.split("."):
        following = [name.removeprefix(before).split(".")[0] for name in groups if name.startswith(before)]
        numbers = list(dict.fromkeys(filter(str.isdecimal, following)))
        is_there = re.fullmatch("-[1-9][0-9]*", step) and -int(step) <= len(numbers)
        before += f"{numbers[int(step)] if is_there else step}."
    return before.removesuffix(".")
