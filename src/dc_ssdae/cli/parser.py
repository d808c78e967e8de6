"""The parser of every command: errors are one line that suggests what was meant. Imports nothing heavy."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dc_ssdae.errors import InputError, unknown_name

LARGEST_SEED = 2**32 - 1
"""PyTorch's CPU generator reads no more than 32 bits of a seed: a larger one would repeat a smaller one's noise."""

T = TypeVar("T", int, float)

_NUMBER = re.compile(r"-\.?\d")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `InputError` with one line, where argparse prints the usage and exits.

    Options cannot be abbreviated: a script keeps its meaning when a later version adds an option. Every parser
    takes `--debug`, which `dc_ssdae.cli.main` looks for. The namespace holds the parser's name as `program`.

    Args:
        settings: what `argparse.ArgumentParser` takes.
    """

    def __init__(self, **settings: Any) -> None:
        self._has_commands = False
        super().__init__(**{"allow_abbrev": False, **settings})
        self.set_defaults(program=self.prog)
        # No default: a sub-command's would replace what was given before its name.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def add_subparsers(self, **kwargs: Any) -> Any:
        """As argparse's."""
        self._has_commands = True
        return super().add_subparsers(**kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but an unknown option is an error, and the first one to be told."""
        words = list(sys.argv[1:] if args is None else args)
        # argparse keeps no public list of its options; this one has those of groups too.
        accepted = list(self._option_string_actions)
        for word in self._options_among(words):
            name = word.split("=", 1)[0]
            if name not in accepted:
                raise unknown_name("option", name, [option for option in accepted if option.startswith("--")])
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise the message as an `InputError`."""
        raise InputError(message)

    def _options_among(self, words: Sequence[str]) -> Iterator[str]:
        for word in words:
            is_option = word.startswith("-") and word != "-" and not _NUMBER.match(word)
            if word == "--" or (self._has_commands and not is_option):
                return
            if is_option:
                yield word


def whole_number(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """Make a type for an option whose value is a whole number from `smallest` to `largest` (None: any)."""
    return _between(int, "a whole number", smallest, largest)


def number_between(smallest: float, largest: float | None = None) -> Callable[[str], float]:
    """Make a type for an option whose value is a finite number from `smallest` to `largest` (None: any)."""
    return _between(float, "a number", smallest, largest)


def _between(read: Callable[[str], T], kind: str, smallest: float, largest: float | None) -> Callable[[str], T]:
    limits = f"from {smallest:g} on" if largest is None else f"from {smallest} to {largest}"

    def parse(text: str) -> T:
        with suppress(ValueError):
            value = read(text)
            if smallest <= value < math.inf and (largest is None or value <= largest):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {limits}")

    return parse


def number(text: str) -> float:
    """Read a number, as an option's type; whether it is in range is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def numbers(text: str) -> float | list[float]:
    """Read one number, or several with commas between them, as an option's type."""
    return [number(part) for part in text.split(",")] if "," in text else number(text)


def filled(text: str) -> str:
    """Refuse an empty word, as an option's type: a script's unset variable would stand for the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def file_path(text: str) -> Path:
    """Make a path of a word that is not empty, as an option's type."""
    return Path(filled(text))


def device_name(text: str) -> str:
    """Check how a device is spelt, as an option's type; whether it is there is asked later, of PyTorch."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; accepted: auto, cpu, cuda, cuda:N, mps")
    return text
