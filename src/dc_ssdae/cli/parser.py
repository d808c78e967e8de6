"""The parser of every command: makes an object of the command's dataclass of options. Imports nothing heavy."""

import argparse
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dc_ssdae.errors import InputError, did_you_mean
from dc_ssdae.settings import alternatives, check_settings, documentation, is_required, metavar, setting


@dataclass(kw_only=True)
class Options:
    """Options of every command; a command adds its own as fields, which have the names of the options.

    A field's `setting` may have, besides limits: name, the option's spelling where it is not "--" and the field's name;
    alias, another spelling; positional, for words without a name; repeated, for a list whose option is given several
    times, or spaced, for a list that takes several words (else its values stand in one word, with commas between
    them); metavar, what stands for the value.

    Args:
        debug: show the traceback of an error.
        program: the command's name, for messages.
    """

    debug: bool = False
    program: str = setting("dc-ssdae", name=None)

    def __post_init__(self) -> None:
        check_settings(self, {entry.name: option_name(entry) for entry in fields(self)})

    def given(self, *names: str) -> dict[str, Any]:
        """Those of these options that are not None, by name."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def describe_more(cls, parser: "CommandParser") -> None:
        """Add to the help what `take` reads."""

    @classmethod
    def take(cls, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Take the words that are no options of the parser; gives values of fields, and the other words.

        Raises:
            InputError: one of them is wrong.
        """
        return {}, list(words)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `InputError` with one line, where argparse prints the usage and exits.

    Options cannot be abbreviated: a script keeps its meaning when a later version adds an option.

    Args:
        options: of the command; their docstring's description is the command's.
        program: the command's name.
    """

    def __init__(self, options: type[Options], program: str) -> None:
        description, documented = documentation(options)
        required = sorted(filter(is_required, fields(options)), key=lambda entry: "positional" not in entry.metadata)
        usage = " ".join([program, *map(_usage, required), "[options]"])
        super().__init__(
            program, usage, description, formatter_class=_HelpFormatter, allow_abbrev=False, exit_on_error=False
        )
        self._options, self._required = options, required
        hints = get_type_hints(options)
        # The command's own options before those that it shares.
        entries = {entry.name: entry for entry in fields(options) if option_name(entry) is not None}
        for name in dict.fromkeys(name for base in options.__mro__ for name in inspect.get_annotations(base)):
            if name in entries:
                self.add_option(entries[name], hints[name], documented[name])
        options.describe_more(self)

    def parse(self, words: Sequence[str]) -> Options:
        """Read a command's words.

        Raises:
            InputError: a word is wrong or missing; one line that names it.
            SystemExit: after --help, with 0.
        """
        given, words = self._options.take(words)
        try:
            # Intermixed, so that options may stand between the words without a name: pack SRC --size 512 DST.
            namespace, rest = self.parse_known_intermixed_args(words)
        except argparse.ArgumentError as error:
            option = str(error.argument_name).partition("/")[0]
            raise InputError(f"{option}: {error.message}", option) from error
        if rest:
            name = rest[0].partition("=")[0]
            # argparse keeps no public list of its options; this one has the options of groups too.
            hint = did_you_mean(name, self._option_string_actions)
            kind = "option" if name.startswith("-") else "word"
            raise InputError(f"unknown {kind} {name!r}{hint}; {self.prog} --help lists the options", name)
        given |= {name: value for name, value in vars(namespace).items() if value is not None}
        if missing := [option_name(entry) for entry in self._required if not given.get(entry.name)]:
            raise InputError(f"missing: {', '.join(missing)}; usage: {self.usage}", missing[0])
        return self._options(program=self.prog, **given)

    def add_option(self, entry: Field[Any], hint: Any, text: str) -> None:
        """Add an option for a field of type `hint`, with the help `text`."""
        kind = next(kind for kind in alternatives(hint) if kind is not NoneType)
        about = entry.metadata
        told = isinstance(entry.default, int | float | str | Path) and kind is not bool
        default = f" (default: {entry.default})" if told else ""
        details: dict[str, Any] = {"help": f"{text.rstrip('.')}{default}".replace("%", "%%"), "default": None}
        if kind is bool:
            details["action"] = "store_true"
        else:
            one_word_each = {"positional", "repeated", "spaced"} & about.keys() and get_origin(kind) is list
            details["type"] = reader(get_args(kind)[0] if one_word_each else hint)
            details["metavar"] = about.get("metavar", metavar(hint))
        if "positional" in about:
            self.add_argument(entry.name, nargs="*" if get_origin(kind) is list else "?", **details)
            return
        if "repeated" in about:
            details["action"] = "append"
        elif "spaced" in about:
            details["nargs"] = "+"
        names = [option_name(entry), *([about["alias"]] if "alias" in about else [])]
        self.add_argument(*names, dest=entry.name, **details)


def option_name(entry: Field[Any]) -> Any:
    """Spell a field's option; None for a field that is not an option."""
    about = entry.metadata
    return about["metavar"] if "positional" in about else about.get("name", f"--{entry.name}")


def reader(hint: Any) -> Callable[[str], Any]:
    """Make the function that reads an option's word; the values of a list are separated by commas.

    A word that is not such a value stays text, which the check of the options then refuses.
    """
    kinds = [kind for kind in alternatives(hint) if kind is not NoneType]
    several = next((kind for kind in kinds if get_origin(kind) in (list, tuple)), None)
    of = kinds[0] if several is None else get_args(several)[0]
    convert = str if get_origin(of) is Literal else of

    def read(text: str) -> Any:
        parts = [text] if several is None else [part.strip() for part in text.split(",")]
        try:
            # Path("") would be the current folder.
            values = [convert(part) if part.strip() else part for part in parts]
        except ValueError:
            return text
        return values if len(values) > 1 or several in kinds[:1] else values[0]

    return read


class _HelpFormatter(argparse.HelpFormatter):
    """Breaks no line at a hyphen, so that pip install 'dc-ssdae[eval]' can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width - len(indent))), indent)


def _usage(entry: Field[Any]) -> str:
    """Spell a required option for the usage line."""
    is_word = "positional" in entry.metadata
    return str(option_name(entry)) if is_word else f"{option_name(entry)} {entry.metadata['metavar']}"
