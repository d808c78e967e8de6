"""Named groups of a model's tensors, of which a phase of training chooses those that it trains."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.errors import InputError, check_type, unknown_name

_GROUP_NAME = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")
_INDEX_FROM_END = re.compile(r"-[1-9][0-9]{0,8}")


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
        InputError: a class's declaration leaves a tensor out, claims it for two groups, or names what is not there.
    """
    groups = {}
    for part in ("encoder", "decoder", "dynamics"):
        module = getattr(model, part)
        if not isinstance(module, nn.Module):  # most dynamics have no tensors
            continue
        tensors = [name for name, value in module.state_dict().items() if isinstance(value, Tensor)]
        declare: Any = getattr(module, "parameter_groups", None)
        if not callable(declare):
            sorted_tensors = {part: tensors}
        else:
            owner = f"parameter_groups of {part} {model.config[part]['class_path']}"
            declared = declare()
            check_type(owner, declared, dict[str, list[str] | tuple[str, ...]])
            sorted_tensors = {f"{part}.{name}": held for name, held in _sort(tensors, declared, owner).items()}
        groups.update({name: [f"{part}.{tensor}" for tensor in held] for name, held in sorted_tensors.items() if held})
    return groups


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
        wanted: the selectors, at least one.

    Returns:
        The groups' full names, each once, in the order of `groups`.

    Raises:
        InputError: a selector means no group; or there is no selector.
    """
    if isinstance(wanted, str):
        raise InputError(f"parameter groups are given as a list, such as [{wanted!r}]")
    selectors = {".".join(name.split(".")[:count]) for name in groups for count in range(1, name.count(".") + 2)}
    if not wanted:
        raise InputError(f"no parameter group is named; name at least one of {', '.join(sorted(selectors))}")
    chosen: set[str] = set()
    for selector in wanted:
        meant = _meant_by(selector, groups)
        if not meant:
            raise unknown_name("parameter group", selector, selectors)
        chosen.update(meant)
    return [name for name in groups if name in chosen]


def _sort(tensors: Sequence[str], declared: Mapping[str, Sequence[str]], owner: str) -> dict[str, list[str]]:
    """Give each declared group the tensors that it holds, in the order of `tensors`."""
    for group, prefixes in declared.items():
        if not _GROUP_NAME.fullmatch(group):
            raise InputError(f"{owner} names a group {group!r}; use letters, digits, _, - and dots")
        for prefix in prefixes:
            if not any(_is_in(prefix, tensor) for tensor in tensors):
                raise InputError(f"{owner}: {group!r} holds {prefix!r}, which is no tensor's name")
    groups: dict[str, list[str]] = {group: [] for group in declared}
    for tensor in tensors:
        holders = [group for group, prefixes in declared.items() if any(_is_in(prefix, tensor) for prefix in prefixes)]
        if len(holders) != 1:
            where = " and ".join(map(repr, holders)) or "no group"
            raise InputError(f"{owner}: tensor {tensor!r} is in {where}, and must be in one")
        groups[holders[0]].append(tensor)
    return groups


def _is_in(prefix: str, tensor: str) -> bool:
    return f"{tensor}.".startswith(f"{prefix}.")


def _meant_by(selector: str, names: Iterable[str]) -> list[str]:
    candidates = [name.split(".") for name in names]
    resolved = []
    for place, step in enumerate(str(selector).split(".")):
        candidates = [steps for steps in candidates if len(steps) > place]
        if _INDEX_FROM_END.fullmatch(step):
            numbers = list(dict.fromkeys(steps[place] for steps in candidates if steps[place].isdecimal()))
            if len(numbers) < -int(step):
                return []
            step = numbers[int(step)]
        candidates = [steps for steps in candidates if steps[place] == step]
        resolved.append(step)
    # A name of its own means that group alone, also where others begin with it.
    return [".".join(steps) for steps in candidates if steps == resolved] or [".".join(steps) for steps in candidates]
