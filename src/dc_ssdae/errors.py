"""The one exception that means "what you gave is wrong", as opposed to a bug in this package."""

import difflib
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from types import NoneType, UnionType
from typing import Any, get_args


class InputError(ValueError):
    """A user's value, file or setting cannot be used; the message is one line that says what would be right.

    Args:
        message: the line.
        field: name of the setting or option that is wrong, such as training.lr; None where it is none, or not known.
    """

    in_one_process = False
    """Whether other processes of the same run may not know of it; else they raise it too, and the main one tells it."""

    def __init__(self, message: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def prefixed(subject: str) -> Iterator[None]:
    """Let the message of an `InputError` begin with what it is about: "SUBJECT: message"."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}", error.field) from None


class MissingInputError(InputError, FileNotFoundError):
    """A folder or file is not there; also an OSError, which diffusers' callers catch."""


class _Lenient:
    """A stream that ignores what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


@contextmanager
def lenient_stderr() -> Iterator[None]:
    """Let no log end the work: what standard error cannot take is lost.

    It may be a file on a full disk, a pipe whose reader has gone, or a terminal that was closed.
    """
    before = sys.stderr
    try:
        with redirect_stderr(_Lenient(before)):
            yield
    finally:
        try:
            before.flush()
        except (OSError, ValueError):
            # The interpreter flushes it once more at its end, and would exit with a failure.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), before.fileno())


def shown(value: object) -> str:
    """What a value of any size and depth looks like, in one line that is not too long."""
    text = " ".join((repr(value) if isinstance(value, str) else reprlib.repr(value)).split())
    return text if len(text) <= 160 else f"{text[:159]}…"


def counted(number: int, thing: str) -> str:
    """A number of things in words: "1 image", "24 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on whatever device."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    says_so = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return says_so or isinstance(error, MemoryError)


@contextmanager
def advising_on_memory(advice: str) -> Iterator[None]:
    """Say in one line what to do where the memory is not enough.

    Args:
        advice: what follows "out of memory", such as " with --batch 64; try a smaller one".

    Raises:
        InputError: there was not enough memory, on whatever device.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory{advice}") from error


def unknown_name(kind: str, name: object, accepted: Iterable[str], field: str | None = None) -> InputError:
    """Build the error for a name that is not among the accepted ones, with the closest match suggested.

    Args:
        kind: what the name stands for, as a reader would say it ("preset", "setting of DCEncoder").
        name: what was given.
        accepted: every name that would have been right.
        field: of the error.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(accepted)
    hint = did_you_mean(str(name), names)
    return InputError(f"unknown {kind} {shown(name)}{hint}; accepted: {', '.join(names) or 'none'}", field)


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """Give " (did you mean 'NAME'?)", or nothing where nothing is close."""
    close = difflib.get_close_matches(name, sorted(accepted), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_at_least(smallest: int, **values: int) -> None:
    """Refuse whole numbers below `smallest`.

    Args:
        smallest: the least that is accepted.
        values: the settings by name.

    Raises:
        InputError: names the first that is too small.
    """
    for name, value in values.items():
        if value < smallest:
            raise InputError(f"{name} is {value}; it must be at least {smallest}")


def check_names(kind: str, given: Iterable[Any], accepted: Iterable[str], prefix: str | None = None) -> None:
    """Refuse the first of the given names that is not accepted.

    Args:
        kind: what the names stand for, as a reader would say it.
        given: the names.
        accepted: every name that would be right.
        prefix: with the name behind it, the field of the error, such as "training."; None leaves the field out.

    Raises:
        InputError: names it and the accepted ones.
    """
    accepted = list(accepted)
    for name in given:
        if name not in accepted:
            raise unknown_name(kind, name, accepted, None if prefix is None else f"{prefix}{name}")


def wrong_value(name: str, value: object, wanted: str) -> InputError:
    """Build the error for a setting's value that does not fit: `name` is `value`; it must be `wanted`."""
    return InputError(f"{name} is {shown(value)}; it must be {wanted}", name)


_PLAIN_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of its setting's type: to Python the string "false" would be true.

    Args:
        name: of the setting, for the message.
        value: what was given, of any size and depth.
        hint: the type hint that it must fit; a bool fits only where bool is named.

    Raises:
        InputError: it does not fit.
    """
    from typeguard import CollectionCheckStrategy, TypeCheckError
    from typeguard import check_type as check

    wrong = isinstance(value, bool) and not any(kind in (bool, Any) for kind in (hint, *get_args(hint)))
    try:
        check(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        wrong = True
    if wrong:
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        spelt = hint.__name__ if isinstance(hint, type) else re.sub(r"[a-z_]+[.]", "", str(hint))
        known = " or ".join(_PLAIN_TYPES.get(kind, "") for kind in kinds)
        raise wrong_value(name, value, known if all(kind in _PLAIN_TYPES for kind in kinds) else f"of type {spelt}")


def as_json(name: str, value: Any) -> Any:
    """Give a value as it comes back from JSON: with lists for tuples.

    Raises:
        InputError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        raise wrong_value(name, value, "made of numbers, text, true, false, null, lists and mappings") from None
