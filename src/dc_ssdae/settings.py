"""Typed settings: dataclasses whose fields state their limits and whose docstrings describe them. Needs no torch."""

import math
import operator
from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from dc_ssdae.errors import InputError, check_type, unknown_name, wrong_value

LARGEST_SEED = 2**32 - 1
"""PyTorch's CPU generator reads no more than 32 bits of a seed: a larger one would repeat a smaller one's noise."""

_LIMITS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


def setting(default: Any = MISSING, **metadata: Any) -> Any:
    """Declare a field of a dataclass of settings.

    Args:
        default: the field's default; of a list, each object gets a copy. Without one, the setting is required.
        metadata: limits of the number, or of each number in a list: at_least, at_most, above, below. What else a
            command's option may have is described in `dc_ssdae.cli.parser`.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_settings(settings: Any, names: Mapping[str, str] | str) -> None:
    """Check each field of a dataclass against its type and limits; a whole number becomes a float if the type is float.

    Args:
        settings: an object of the dataclass, which may be frozen.
        names: what a message calls each field; or a prefix of their own names, such as "training.".

    Raises:
        InputError: the first value that does not fit; says what would.
    """
    hints = get_type_hints(type(settings))
    for entry in fields(settings):
        name = f"{names}{entry.name}" if isinstance(names, str) else names[entry.name]
        value = check_value(name, getattr(settings, entry.name), hints[entry.name], entry.metadata)
        object.__setattr__(settings, entry.name, value)


def check_value(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """Check a value against a type hint and limits; gives it, converted from int to float or list to tuple if need be.

    Raises:
        InputError: it does not fit; names it and what would.
    """
    kinds = alternatives(hint)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value) if abs(value) < 2**63 else math.inf
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        value = tuple(value)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and isinstance(value, str) and value not in choices and str not in kinds:
        raise unknown_name(name, value, choices, name)
    parts = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(part, str) and not part.strip() for part in parts):
        # A script's unset variable would stand for the current folder.
        raise InputError(f"{name} is empty; give it a value, or leave it out", name)
    check_type(name, value, hint)
    for part in parts:
        if isinstance(part, int | float) and not isinstance(part, bool):
            known = [word for word in _LIMITS if word in limits]
            if not all(_LIMITS[word](part, limits[word]) for word in known) or not math.isfinite(part):
                wanted = " and ".join(f"{word.replace('_', ' ')} {limits[word]}" for word in known) or "a finite number"
                raise wrong_value(name, part, wanted)
    return value


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, such as (int, NoneType) for `int | None`."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_required(entry: Field[Any]) -> bool:
    """Whether a field has no default."""
    return entry.default is MISSING and entry.default_factory is MISSING


def documentation(kind: type) -> tuple[str, dict[str, str]]:
    """Read the description of a dataclass and of each field, one line each, from its and its bases' docstrings."""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found = docstring_parser.parse(base.__doc__ or "" if base is not object else "")
        described |= {entry.arg_name: " ".join((entry.description or "").split()) for entry in found.params}
    summary = " ".join(part for part in (found.short_description, found.long_description) if part)
    return " ".join(summary.split()), described


def metavar(hint: Any) -> str:
    """Choose what stands for a value in help, such as N for a whole number."""
    names = {int: "N", float: "X", bool: "true|false", tuple: "[X, X]", dict: "MAPPING", list: "[TEXT, ...]"}
    kinds = [kind for kind in alternatives(hint) if kind is not NoneType]
    return "|".join(
        "|".join(get_args(kind)) if get_origin(kind) is Literal else names.get(get_origin(kind) or kind, "TEXT")
        for kind in kinds
    )
