"""YAML of plain data: null, true and false, numbers, text, lists and mappings. Needs no torch.

Read as YAML 1.2 where 1.1 surprises: 1e-6 is a number, 010 is ten, and 1:30 and 2026-01-31 are text. `dump_yaml` puts
in quotes what either version would read as something other than text.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dc_ssdae.errors import InputError

LARGEST_FILE = 256 * 1024
"""Bytes. A configuration has a few thousand; the limit keeps weights given in its place from being read."""

LARGEST_DEPTH = 48
"""Levels of nesting."""

LARGEST_COUNT = 50_000
"""Values, each alias counted as what it stands for: ten lines of aliases can stand for more than memory holds."""

LARGEST_WHOLE_NUMBER = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|[-+]?0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def parse_yaml(text: str, name: str) -> Any:
    """Read one value.

    Args:
        text: YAML.
        name: of the text, for messages.

    Returns:
        The value; None for empty text.

    Raises:
        InputError: the text is not YAML, a key stands twice in a mapping, a number does not fit in 64 bits, or an
            alias refers to what it is part of; one line with `name` and the line's number.
    """
    loader = None
    try:
        loader = _PlainLoader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        if problem.startswith("but "):  # the second half of PyYAML's sentence
            problem = f"{error.context}, {problem}"
        raise InputError(f"{_end_of(name)}{place}: {problem[:200]}") from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"{_end_of(name)} is not text: it holds {_character(error.character)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"{_end_of(name)} is not YAML: {' '.join(str(error).split())[:200]}") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(source: str | Path, name: str | None = None) -> dict[str, Any]:
    """Read a mapping.

    Args:
        source: text, or the path of a file in UTF-8.
        name: what to call it in messages; the path by default.

    Raises:
        InputError: the file cannot be read or is not YAML, or it does not hold a mapping.
    """
    name = name or (str(source) if isinstance(source, Path) else "the YAML")
    value = parse_yaml(_read_text(source, name) if isinstance(source, Path) else source, name)
    if value is None:
        raise InputError(f"{_end_of(name)} is empty; it must hold settings")
    if not isinstance(value, dict):
        raise InputError(f"{_end_of(name)} does not hold a mapping, lines such as `key: value`")
    return value


def dump_yaml(value: Any, ascii_only: bool = False) -> str:
    """Write plain data so that `parse_yaml` gives it back; a list of plain values takes one line.

    Args:
        value: null, true or false, numbers, text, lists and mappings.
        ascii_only: escape all other characters.
    """
    return yaml.dump(
        value,
        Dumper=_PlainDumper,
        sort_keys=False,
        allow_unicode=not ascii_only,
        default_flow_style=None,
        width=2**20,
    )


def _read_text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except IsADirectoryError as error:
        raise InputError(f"{_end_of(name)} is a folder, not a YAML file") from error
    except OSError as error:
        raise InputError(f"{_end_of(name)}: {(error.strerror or 'cannot be read').lower()}") from error
    except ValueError as error:  # a NUL character in the name
        raise InputError(f"{_end_of(name)!r} is not the name of a file") from error
    if len(content) > LARGEST_FILE:
        raise InputError(f"{_end_of(name)} has more than {LARGEST_FILE // 1024} KiB; that is no configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{_end_of(name)} is not text in UTF-8; is it a YAML file?") from error


def _end_of(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= 120 else f"…{line[-119:]}"


def _character(given: Any) -> str:
    """Spell a character out of PyYAML's error, which holds text, bytes or a number."""
    return f"the character {chr(given) if isinstance(given, int) else given!a}"


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, for plain data alone and within limits. Filled in below."""

    # PyYAML adds to those of the base class unless a class has its own.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0
        self._sizes: dict[int, int] = {}  # by id of the node, which the graph keeps alive; only complete nodes

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refusal(f"tags such as {event.tag} are not accepted; text goes in quotes", event.start_mark)
        before = self._count
        self._depth += 1
        if self._depth > LARGEST_DEPTH:
            raise _refusal(f"nested more than {LARGEST_DEPTH} deep", event.start_mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if not is_alias:
            self._sizes[id(node)] = self._count - before + 1
        elif id(node) not in self._sizes:
            raise _refusal(f"the alias *{event.anchor} stands inside what it refers to", event.start_mark)
        self._count = before + self._sizes[id(node)]
        if self._count > LARGEST_COUNT:
            raise _refusal(f"more than {LARGEST_COUNT} values", event.start_mark)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal("a key must be a word, not a list or mapping", key_node.start_mark)
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, str) and (isinstance(key, bool) or not isinstance(key, int)):
                raise _refusal(f"the key {key_node.value!r} is not read as text; put it in quotes", key_node.start_mark)
            if key in seen:
                raise _refusal(f"the key {key_node.value!r} stands there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _PlainDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which here also knows what `_PlainLoader` would not read as text. Filled in below."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refusal(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _text(dumper: _PlainDumper, value: str) -> yaml.ScalarNode:
    # Between single quotes PyYAML would fold the line breaks that Unicode has beside "\n".
    return dumper.represent_scalar(f"{_TAG}str", value, style=None if value.isprintable() else '"')


def _mapping(dumper: _PlainDumper, value: dict[Any, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping(f"{_TAG}map", value, flow_style=False)


def _whole_number(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    value = int(digits, 16) if "x" in digits else int(digits) if len(digits) < 40 else LARGEST_WHOLE_NUMBER + 1
    if abs(value) > LARGEST_WHOLE_NUMBER:
        raise _refusal(f"the number {node.value[:20]}… does not fit in 64 bits", node.start_mark)
    return value


def _fill_in(loader: type[_PlainLoader], dumper: type[_PlainDumper]) -> None:
    """Register what a plain word may be; the order counts, an int is also a float."""
    digits = list("-+0123456789")
    words = {
        "bool": (_BOOL, list("yYnNtTfFoO")),
        "int": (_INT, digits),
        "float": (_FLOAT, [*digits, "."]),
        "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
        "merge": (re.compile(r"<<"), ["<"]),
    }
    for kind, (pattern, first) in words.items():
        whole = re.compile(rf"(?:{pattern.pattern})\Z")
        loader.add_implicit_resolver(f"{_TAG}{kind}", whole, first)
        dumper.add_implicit_resolver(f"{_TAG}{kind}", whole, first)
    for kind in ("null", "bool", "float", "str", "seq", "map"):
        loader.add_constructor(f"{_TAG}{kind}", getattr(yaml.SafeLoader, f"construct_yaml_{kind}"))
    loader.add_constructor(f"{_TAG}int", _whole_number)
    dumper.add_representer(str, _text)
    dumper.add_representer(dict, _mapping)


_fill_in(_PlainLoader, _PlainDumper)
