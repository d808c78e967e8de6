"""What the value of a setting must be, and the one line that says so. Needs no torch."""

import math
import reprlib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from dc_ssdae.errors import InputError, unknown_name

LONGEST_MESSAGE = 400
LARGEST_WHOLE_NUMBER = 2**63 - 1
LARGEST_DEPTH = 40
"""Levels of nesting below init_args; somewhat fewer than what the YAML reader takes."""

_WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "two numbers, such as [0.9, 0.999]",
    dict: "a mapping with class_path and init_args",
    list: "a list of names, such as [encoder.latent_head, decoder]",
    NoneType: "null",
}
_NO = object()


def mistake(message: str) -> InputError:
    """Build the error for a message, which becomes one line that is not too long to read."""
    line = " ".join(message.split())
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
    return InputError(line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 2]} …")


def shown(value: Any) -> str:
    """Spell a value as YAML does, as far as a message has room for it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE_NUMBER:
        return "a number of more than 64 bits"  # Python does not spell those of more than 4300 digits
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # such a number inside a list
        return f"a {type(value).__name__}"


def unknown(kind: str, name: Any, accepted: Iterable[str]) -> InputError:
    """As `unknown_name`, for names and lists that may be long."""
    name = f"{name[:59]}…" if isinstance(name, str) and len(name) > 60 else name
    return mistake(str(unknown_name(kind, name, accepted)))


def fitted(path: str, value: Any, hint: Any) -> Any:
    """Check a setting against its type, and make plain data of what only resembles it.

    Args:
        path: of the setting, as training.lr.
        value: what was given; a whole number fits float, a list of two numbers fits a pair.
        hint: int, float, bool, str, a Literal of words, tuple[float, float], list[str], dict[str, Any], or a union
            of them.

    Raises:
        InputError: the value does not fit.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        typed = _fit(path, value, kind)
        if typed is not _NO:
            return typed
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and isinstance(value, str):
        raise unknown(path, value, choices)
    wanted = [f"one of {', '.join(choices)}" if choices else _WANTED[get_origin(kind) or kind] for kind in kinds]
    raise mistake(f"{path} is {shown(value)}; it must be {_either(wanted)}{_advice(value, kinds)}")


def _fit(path: str, value: Any, kind: Any) -> Any:
    """The value as one kind, or `_NO`."""
    origin = get_origin(kind) or kind
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else _NO
    if origin is tuple:
        is_pair = isinstance(value, list | tuple) and len(value) == 2
        pair = [_fit(path, part, float) for part in value] if is_pair else [_NO]
        return _NO if _NO in pair else tuple(pair)
    if origin is list:
        is_list = isinstance(value, list | tuple) and all(isinstance(part, str) and part.strip() for part in value)
        return [_fit(path, part, str) for part in value] if is_list else _NO
    if origin is dict:
        return plain(path, value) if isinstance(value, Mapping) else _NO
    if origin is float and is_number:
        return _finite(path, value)
    if origin is int and is_number and isinstance(value, int):
        return _within_64_bits(path, value)
    if origin is str and isinstance(value, str):
        if "\0" in value:
            raise mistake(f"{path} is {shown(value)}; it must be text without a NUL character")
        return str.__str__(value)
    return value if origin in (bool, NoneType) and isinstance(value, origin) else _NO


def plain(path: str, value: Any, depth: int = 0) -> Any:
    """Copy what stands in a free-form mapping: null, true and false, finite numbers, text, lists, mappings.

    Raises:
        InputError: it holds something else, or is nested too deep.
    """
    if depth > LARGEST_DEPTH:
        raise mistake(f"{path[:80]}… is nested more than {LARGEST_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return _within_64_bits(path, value)
    if isinstance(value, float):
        return _finite(path, value)
    if isinstance(value, list | tuple):
        return [plain(f"{path}[{index}]", part, depth + 1) for index, part in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise mistake(f"{path} has the key {shown(key)}; keys must be text")
        return {plain(path, key): plain(f"{path}.{key}", part, depth + 1) for key, part in value.items()}
    raise mistake(f"{path} is {shown(value)}; it must be null, true or false, a number, text, a list or a mapping")


def check_range(
    path: str,
    value: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse a number outside of its limits; None is not one."""
    limits = {"at least": at_least, "at most": at_most, "above": above, "below": below}
    if value is None:
        return
    holds = (
        (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not holds:
        given = ((word, limit) for word, limit in limits.items() if limit is not None)
        wanted = " and ".join(f"{word} {limit:g}" if limit < 1e6 else f"{word} {limit}" for word, limit in given)
        raise mistake(f"{path} is {shown(value)}; it must be {wanted}")


def checked_component(path: str, given: Mapping[str, Any] | None, *, needs_class: bool) -> dict[str, Any] | None:
    """Check the form of {class_path, init_args}; whether the class is there is asked where it is needed.

    Args:
        path: of the setting, as model.encoder.
        given: what stands there; None leaves all of it to defaults.
        needs_class: whether class_path must be given.

    Returns:
        The same without what is null; None where nothing remains.
    """
    if given is None:
        return None
    for key in given:
        if key not in ("class_path", "init_args"):
            raise unknown(f"key of {path}", key, ("class_path", "init_args"))
    component = {key: value for key, value in given.items() if value is not None}
    if "class_path" in component:
        name = component["class_path"]
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise mistake(f"{path}.class_path is {shown(name)}; it must be a class name, your own as module.Class")
    elif needs_class:
        raise mistake(f"{path} has no class_path; name the class as module.Class")
    settings = component.get("init_args", {})
    if not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise mistake(f"{path}.init_args is {shown(settings)}; it must be a mapping from the settings' names")
    return component or None


def _within_64_bits(path: str, value: int) -> int:
    if abs(value) > LARGEST_WHOLE_NUMBER:
        raise mistake(f"{path} is {shown(value)}; it must be smaller")
    return int(value)


def _finite(path: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise mistake(f"{path} is {shown(value)}; it must be a finite number")
    return number


def _either(wanted: list[str]) -> str:
    return wanted[0] if len(wanted) == 1 else f"{', '.join(wanted[:-1])} or {wanted[-1]}"


def _advice(value: Any, kinds: Iterable[Any]) -> str:
    """What most likely was meant, where that is plain to see."""
    if isinstance(value, float) and int in kinds and value.is_integer() and abs(value) <= LARGEST_WHOLE_NUMBER:
        return f"; write {int(value)}"
    if str in kinds and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""
