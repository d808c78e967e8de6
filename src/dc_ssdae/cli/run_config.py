"""A run's configuration from the command line: presets and YAML files laid over each other, then settings. No torch."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from dc_ssdae.cli.common import say
from dc_ssdae.cli.parser import CommandParser, Options
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.presets import dump_yaml, list_presets, load_preset, parse_yaml, read_yaml
from dc_ssdae.settings import alternatives, documentation, is_required, metavar, setting
from dc_ssdae.training.config import BUILT_IN_LOSSES, SECTIONS, RunConfig, lay_over


@dataclass(kw_only=True)
class RunOptions(Options):
    """For commands that take a run's configuration.

    Args:
        config: a YAML file, or the name of a preset (see dc-ssdae info). Give it several times to override single
            settings of an earlier one; a new class_path also drops the init_args of the old class.
        print_config: print the resulting configuration and exit.
        settings: the other words, as pairs such as ("training.lr", "1e-4").
    """

    config: list[str] = setting([], repeated=True, metavar="NAME")
    print_config: bool = False
    settings: list[tuple[str, str]] = setting([], name=None)

    def exit_with(self, text: str) -> None:
        """Print the configuration and exit, where --print_config asks for it."""
        if self.print_config:
            say(text.rstrip())
            raise SystemExit(0)

    @classmethod
    def describe_more(cls, parser: CommandParser) -> None:
        """Describe the settings of a run."""
        for section, kind in SECTIONS.items():
            summary, described = documentation(kind)
            group, hints = parser.add_argument_group(section, summary), get_type_hints(kind)
            for entry in fields(kind):
                default = "no default" if is_required(entry) else f"default: {dump_yaml(entry.default).strip()}"
                text = f"{described[entry.name].rstrip('.')} ({default})".replace("%", "%%")
                group.add_argument(f"--{section}.{entry.name}", metavar=metavar(hints[entry.name]), help=text)
        losses = documentation(RunConfig)[1]["losses"]
        defaults = ", ".join(f"{name} {weight:g}" for name, weight in BUILT_IN_LOSSES.items())
        summary = f"{losses} --losses.NAME X sets a weight; 0 removes the term (default: {defaults})."
        parser.add_argument_group("losses", summary)

    @classmethod
    def take(cls, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Take the words --section.name VALUE and --section.name=VALUE.

        Raises:
            InputError: a setting has no value; an empty one, such as a script's unset variable, would stand for null.
        """
        settings, others, rest = [], [], iter(words)
        for word in rest:
            name, equals, value = word.partition("=")
            if not name.startswith("--") or "." not in name:
                others.append(word)
                continue
            value = value if equals else next(rest, "")
            if not value.strip() or value.startswith("--"):
                raise InputError(f"{name} has no value; write {name} VALUE or {name}=VALUE")
            settings.append((name.removeprefix("--"), value))
        return {"settings": settings}, others


def read_run_config(options: RunOptions, base: Mapping[str, Any] | None = None) -> tuple[RunConfig, str]:
    """Make a run's configuration from a command's options.

    Args:
        options: configurations, which are laid over each other in their order, and settings, which go over all of them.
        base: plain data to lay the configurations over, as `RunConfig.to_mapping` gives it.

    Returns:
        The configuration, and the name of the last preset or file it came from, "" where there was none.

    Raises:
        InputError: a file or a setting is wrong; one line that names it.
        SystemExit: after --print_config, with 0.
    """
    name, settings = read_layers(options.config, base or {})
    config = RunConfig.from_mapping(lay_over(settings, read_settings(options.settings)))
    options.exit_with(config_yaml(config))
    return config, name


def read_config_of(folder: Path) -> dict[str, Any]:
    """Read the configuration of the run that a model's folder belongs to; empty for a model without a run."""
    file = folder.resolve().parent / "config.yaml"  # RUN/model of a recipe leads to the model of its last phase
    return RunConfig.from_mapping(read_yaml(file)).to_mapping() if folder.name == "model" and file.is_file() else {}


def read_layers(words: Sequence[str], settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Lay presets and files, in their order, over settings; gives the last one's name, "" for none, and the sections.

    Raises:
        InputError: there is no such preset or file, or it is no configuration.
    """
    name, presets = "", list_presets()
    for word in words:
        path = Path(os.path.expanduser(word))  # Path.expanduser raises where there is no such user
        if word in presets:
            name, layer = word, lay_over(load_preset(word), {"training": {"preset": word}})
        elif path.exists():
            # A section without a value is one whose lines are all comments.
            name, layer = path.stem, {key: value for key, value in read_yaml(path).items() if value is not None}
        else:
            raise unknown_name("preset or YAML file", word, presets)
        settings = lay_over(settings, layer)
    return name, dict(settings)


def read_settings(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Nest dotted settings; of two values for one setting the later one counts.

    A word is read as YAML, unless the setting is text; whether the value fits is checked later.
    """
    nested: dict[str, Any] = {}
    for key, text in pairs:
        section, _, name = key.rpartition(".")
        hints = get_type_hints(SECTIONS.get(section.rpartition(".")[2], type(None)))
        try:
            value = parse_yaml(text, f"--{key}")
        except InputError:
            value = text
        if str in alternatives(hints.get(name)) and not isinstance(value, Mapping | None):
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        # Here a class_path drops nothing: its init_args may stand before it on the line.
        nested = lay_over(nested, value, drops=False)
    return nested


def config_yaml(config: RunConfig) -> str:
    """Spell a configuration out as YAML, every setting with a comment, for `read_yaml` and --config."""
    plain = config.to_mapping()
    lines = ["# A run's configuration; dc-ssdae train --config FILE starts one like it.", ""]
    for section in filter(plain.__contains__, SECTIONS):
        summary, described = documentation(SECTIONS[section])
        settings = [_comment(described[name]) + dump_yaml({name: value}) for name, value in plain[section].items()]
        lines += [f"{_comment(summary)}{section}:", textwrap.indent("".join(settings), "  ")]
    lines.append(_comment(documentation(RunConfig)[1]["losses"]) + dump_yaml({"losses": plain["losses"]}))
    return "\n".join(lines)


def _comment(text: str) -> str:
    return textwrap.fill(text, width=98, initial_indent="# ", subsequent_indent="# ") + "\n"
