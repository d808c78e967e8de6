"""YAML 1.2 of plain data: null, true and false, numbers, text, lists and mappings. Needs no torch."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

from dc_ssdae.errors import InputError

LARGEST_FILE = 256 * 1024
"""Bytes. A configuration has a few thousand; the limit keeps weights given in its place from being read."""


def parse_yaml(text: str, name: str) -> Any:
    """Read one value; None for empty text.

    Args:
        text: YAML.
        name: of the text, for messages.

    Raises:
        InputError: the text is not YAML, or a mapping has a key twice; one line with `name` and the line's number.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{name}{place}: {' '.join(str(error.problem or error.context).split())[:200]}") from error
    except (YAMLError, ValueError) as error:
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())[:200]}") from error


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
    if not isinstance(value, dict):
        raise InputError(f"{name} does not hold a mapping, lines such as `key: value`")
    return value


def dump_yaml(value: Any) -> str:
    """Write plain data so that `parse_yaml` gives it back; a list of plain values takes one line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.Representer = None, 2**20, _Representer
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("...\n")


class _Representer(SafeRepresenter):
    """Writes 1e-06 as 1.0e-06, which readers of YAML 1.1 take for a number too, mappings as lines, and no aliases."""

    def represent_float(self, data: float) -> Any:
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e", 1)
        return node

    def represent_str(self, data: str) -> Any:
        # Between single quotes the line breaks that Unicode has beside "\n" would be folded.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    def represent_dict(self, data: Any) -> Any:
        return self.represent_mapping("tag:yaml.org,2002:map", data, flow_style=False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(dict, _Representer.represent_dict)


def _read_text(path: Path, name: str) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{name} has more than {LARGEST_FILE // 1024} KiB; that is no configuration")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: {(error.strerror or 'cannot be read').lower()}") from error
    except ValueError as error:
        raise InputError(f"{name} is not text in UTF-8; is it a YAML file?") from error
