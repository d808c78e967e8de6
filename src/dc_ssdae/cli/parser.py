"""The parser of every command: makes an object of the command's dataclass of options. Imports nothing heavy."""

import argparse
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, NoReturn, get_args, get_origin, get_type_hints

from dc_ssdae.errors import InputError, did_you_mean
from dc_ssdae.settings import alternatives, check_settings, documentation, is_required, metavar


@dataclass(kw_only=True)
class Options:
    """Options of every command; a command adds its own as fields, which have the names of the options.

    A field's `setting` may have, besides limits: name, the option's spelling where it is not "--" and the field's name;
    alias, another spelling; positional, for words without a name; repeated, for a list whose option is given several
    times, or spaced, for a list that takes several words (else its values stand in one word, with commas between
    them); metavar, what stands for the value.

    Args:
        debug: show the traceback of an error.
    """

    program: ClassVar[str] = "dc-ssdae"
    usage: ClassVar[str | None] = None
    debug: bool = False

    def __post_init__(self) -> None:
        check_settings(self, {entry.name: option_name(entry) for entry in fields(self)})

    @classmethod
    def extend(cls, parser: "CommandParser") -> None:
        """Add options to the parser that are not fields."""

    @classmethod
    def read_rest(cls, words: Sequence[str], given: dict[str, Any], parser: "CommandParser") -> dict[str, Any]:
        """Turn words that the parser does not know into values of fields, which override those `given`.

        Raises:
            InputError: they mean nothing.
        """
        return parser.refuse(words[0])


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `InputError` with one line, where argparse prints the usage and exits.

    Options cannot be abbreviated: a script keeps its meaning when a later version adds an option.

    Args:
        options: of the command; their docstring's description is the command's.
    """

    def __init__(self, options: type[Options]) -> None:
        description, documented = documentation(options)
        required = sorted(filter(is_required, fields(options)), key=lambda entry: "positional" not in entry.metadata)
        usage = options.usage or " ".join([options.program, *map(_usage, required), "[options]"])
        super().__init__(
            prog=options.program,
            usage=usage,
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self._options, self._required = options, required
        hints = get_type_hints(options)
        # The command's own options before those that it shares.
        entries = {entry.name: entry for entry in fields(options) if option_name(entry) is not None}
        for name in dict.fromkeys(name for base in options.__mro__ for name in inspect.get_annotations(base)):
            if name in entries:
                self.add_option(self, entries[name], hints[name], documented[name])
        options.extend(self)

    def parse(self, words: Sequence[str]) -> Options:
        """Read a command's words.

        Raises:
            InputError: a word is wrong or missing; one line that names it.
            SystemExit: after --help, with 0.
        """
        try:
            # Intermixed, so that options may stand between the words without a name: pack SRC --size 512 DST.
            namespace, rest = self.parse_known_intermixed_args(words)
        except argparse.ArgumentError as error:
            option = str(error.argument_name).partition("/")[0]
            raise InputError(f"{option}: {error.message}", option) from error
        given = vars(namespace)
        if rest:
            given |= self._options.read_rest(rest, given, self)
        if missing := [option_name(entry) for entry in self._required if given[entry.name] in (None, [])]:
            raise InputError(f"missing: {', '.join(missing)}; usage: {self.usage}", missing[0])
        return self._options(**{name: value for name, value in given.items() if value is not None})

    def refuse(self, word: str) -> NoReturn:
        """Refuse a word that is not an option of the command.

        Raises:
            InputError: suggests what was meant.
        """
        if not word.startswith("-"):
            raise InputError(f"unexpected word {word!r}; {self.prog} --help lists what is accepted")
        # argparse keeps no public list of its options; this one has those of groups too.
        options = [option for option in self._option_string_actions if option.startswith("--")]
        name = word.partition("=")[0]
        hint = did_you_mean(name, options)
        raise InputError(f"unknown option {name!r}{hint}; {self.prog} --help lists the options", name)

    def error(self, message: str) -> NoReturn:
        """Raise the message as an `InputError`."""
        raise InputError(message)

    def add_option(self, group: Any, entry: Field[Any], hint: Any, text: str) -> None:
        """Add an option for a field of type `hint` to the parser or a group of it, with the help `text`."""
        kind = next(kind for kind in alternatives(hint) if kind is not NoneType)
        details: dict[str, Any] = {"help": _with_default(entry, text).replace("%", "%%")}
        names = [option_name(entry), *([entry.metadata["alias"]] if "alias" in entry.metadata else [])]
        if kind is bool:
            group.add_argument(*names, dest=entry.name, action="store_true", default=None, **details)
            return
        details["metavar"] = entry.metadata.get("metavar", metavar(hint))
        if "positional" in entry.metadata:
            several = get_origin(kind) is list
            of = get_args(kind)[0] if several else kind
            group.add_argument(entry.name, nargs="*" if several else "?", type=reader(of), default=None, **details)
            return
        elif "repeated" in entry.metadata:
            details |= {"action": "append", "type": reader(get_args(kind)[0])}
        elif "spaced" in entry.metadata:
            details |= {"nargs": "+", "type": reader(get_args(kind)[0])}
        else:
            details["type"] = reader(hint)
        group.add_argument(*names, dest=entry.name, default=None, **details)


def option_name(entry: Field[Any]) -> Any:
    """Spell a field's option; None for a field that is not an option."""
    if "positional" in entry.metadata:
        return entry.metadata["metavar"]
    return entry.metadata.get("name", f"--{entry.name}")


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
    several = "positional" in entry.metadata and "list" in str(entry.type)
    value = "" if "positional" in entry.metadata else f" {entry.metadata.get('metavar', 'VALUE')}"
    return f"{option_name(entry)}{value}{' ...' * several}"


def _with_default(entry: Field[Any], text: str) -> str:
    """Append the default to an option's help, where it is a plain value."""
    default = None if is_required(entry) else entry.default
    told = isinstance(default, int | float | str | Path | tuple) and not isinstance(default, bool)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text.rstrip('.')} (default: {shown})" if told and default != () else text.rstrip(".")
