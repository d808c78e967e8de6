"""A run's configuration from the command line: presets and YAML files laid over each other, then flags. No torch.

jsonargparse describes the fields and types the flags. Laying mappings over each other is done here, because for it a
free-form mapping such as init_args is one value, which the next configuration would replace.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from dc_ssdae.errors import InputError, did_you_mean
from dc_ssdae.presets import (
    DEFAULT_CLASSES,
    dump_yaml,
    list_presets,
    list_recipes,
    load_preset,
    parse_yaml,
    read_yaml,
)
from dc_ssdae.training.config import BUILT_IN_LOSSES, RunConfig
from dc_ssdae.training.config import SECTIONS as SECTION_CLASSES
from dc_ssdae.training.config_checks import mistake, shown, unknown
from dc_ssdae.training.recipe import check_phase_name

SECTIONS = (*SECTION_CLASSES, "losses")

_INSIDE = {
    "model": "One setting of a part: --model.encoder.init_args.norm none.",
    "data": "One setting of a data set: --data.dataset.init_args.path PATH.",
    "distillation": "dc-ssdae distill fills it in.",
}

LONGEST_PATH = 24
"""Parts of a flag's name; deeper settings go in a file."""


class ParsedRun(NamedTuple):
    """A `config`, and the `name` of the last preset or file it came from, "" where there was none."""

    config: RunConfig
    name: str


class Words(NamedTuple):
    """The command's words, sorted; `flags` are pairs such as ("training.lr", "1e-4"), `phase_flags` by phase."""

    configs: list[str]
    recipe: str | None
    flags: list[tuple[str, str]]
    phase_flags: dict[str, list[tuple[str, str]]]
    print_config: bool


def build_run_parser(prog: str) -> jsonargparse.ArgumentParser:
    """Describe every option of a run, for --help and for the types of flags.

    Args:
        prog: the command, as "dc-ssdae train".
    """
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --config PRESET [--config FILE] [--section.name VALUE]\n"
        f"       {prog} --recipe NAME --config PRESET [--section.name VALUE]\n"
        f"       {prog} --resume RUN [--section.name VALUE]",
        description="Train an autoencoder. Configurations are laid over each other in their order, flags over all of "
        "them; what is given twice counts as given last.",
        formatter_class=argparse.HelpFormatter,
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"a YAML file, or a preset: {', '.join(list_presets())}. Of mappings, what the later one leaves out stays "
        "as it was; the init_args of another class_path are dropped",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"train in phases, one after the other: a YAML file with section phases, or {', '.join(list_recipes())}. "
        "Its phases go over the configurations, flags over all phases, and --phases.PHASE.section.name VALUE over one",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, exactly where it stopped")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for section, kind in SECTION_CLASSES.items():
        summary, descriptions = _descriptions(kind)
        group = parser.add_argument_group(section, f"{summary} {_INSIDE.get(section, '')}")
        hints = get_type_hints(kind)
        for entry in fields(kind):
            group.add_argument(
                f"--{section}.{entry.name}",
                type=hints[entry.name],
                default=None if entry.default is MISSING else entry.default,
                metavar=_metavar(hints[entry.name]),
                help=f"{descriptions[entry.name].rstrip('.')} ({_default(entry)})".replace("%", "%%"),
            )
    defaults = ", ".join(f"{name} {weight:g}" for name, weight in BUILT_IN_LOSSES.items())
    parser.add_argument_group(
        "losses",
        f"{_descriptions(RunConfig)[1]['losses']} --losses.NAME X sets a weight, 0 leaves the term out (default: "
        f"{defaults}); --losses.NAME.class_path module.Class and --losses.NAME.init_args.SETTING VALUE add your own.",
    )
    return parser


def parse_run_config(
    words: Sequence[str],
    base: Mapping[str, Any] | None = None,
    parser: jsonargparse.ArgumentParser | None = None,
) -> ParsedRun:
    """Make a run's configuration of the command's words.

    Args:
        words: --config NAME, as often as need be; flags such as --training.lr 1e-4 or --training.lr=1e-4, which go
            over all configurations wherever they stand; --print_config, --help. --debug is passed over.
        base: plain data to lay the configurations over, as `RunConfig.to_mapping` gives it.
        parser: what `build_run_parser` gives, for a caller that has it already.

    Raises:
        InputError: a word, a file or a setting is wrong; one line that names it.
        SystemExit: after --help and --print_config, with 0.
    """
    parser = parser or build_run_parser("dc-ssdae train")
    given = sort_words(words, parser)
    if given.recipe is not None:
        raise mistake("--recipe is for a new run of dc-ssdae train")
    if given.phase_flags:
        raise mistake(f"--phases.{next(iter(given.phase_flags))}: phases are those of a recipe; give --recipe NAME too")
    settings: dict[str, Any] = weights_as_mappings(base or {})
    name = ""
    for word in given.configs:
        name, layer = read_layer(word)
        if "phases" in layer:
            raise mistake(f"{word} has phases: give it by --recipe {word}")
        settings = lay_over(settings, layer)
    config = RunConfig.from_mapping(lay_over(settings, flags_as_mapping(given.flags, parser)))
    if given.print_config:
        print_text(partial(config_yaml, config))
        raise SystemExit(0)
    return ParsedRun(config, name)


def config_yaml(config: RunConfig, ascii_only: bool = False) -> str:
    """Spell a configuration out as YAML, every setting with a comment, for `read_yaml` and --config.

    Args:
        config: what to write.
        ascii_only: escape all other characters.
    """
    plain = config.to_mapping()
    lines = ["# A run's configuration; dc-ssdae train --config FILE starts one like it."]
    for section, kind in SECTION_CLASSES.items():
        if section not in plain:
            continue
        summary, descriptions = _descriptions(kind)
        lines += ["", *_comment(summary), f"{section}:"]
        for name, value in plain[section].items():
            lines += _comment(descriptions[name], "  ")
            lines += textwrap.indent(dump_yaml({name: value}, ascii_only), "  ").splitlines()
    lines += ["", *_comment(_descriptions(RunConfig)[1]["losses"])]
    lines += dump_yaml({"losses": plain["losses"]}, ascii_only).splitlines()
    return "\n".join(lines) + "\n"


def sort_words(words: Sequence[str], parser: jsonargparse.ArgumentParser) -> Words:
    configs: list[str] = []
    recipe: str | None = None
    flags: list[tuple[str, str]] = []
    phase_flags: dict[str, list[tuple[str, str]]] = {}
    print_config = False
    rest = iter(range(len(words)))
    for place in rest:
        name, equals, value = words[place].partition("=")
        if name in ("-h", "--help"):
            parser.print_help()
            raise SystemExit(0)
        if name in ("--print_config", "--debug"):
            if equals:
                raise mistake(f"{name} takes no value, but was given {shown(value)}")
            print_config |= name == "--print_config"
            continue
        phase, key = _split_phase(name)
        if name not in ("--config", "--recipe"):
            _check_flag(name if phase is None else f"--{key}", parser)
        if not equals:
            after = next(rest, None)
            value = "" if after is None or words[after].startswith("--") else words[after]
        if not value.strip():
            # Also of a script's unset variable, which must not stand for null.
            raise mistake(f"{name} has no value; write {name} VALUE or {name}=VALUE")
        if name == "--config":
            configs.append(value)
        elif name == "--recipe":
            if recipe is not None:
                raise mistake("--recipe is given twice")
            recipe = value
        elif phase is not None:
            phase_flags.setdefault(phase, []).append((key, value))
        else:
            flags.append((key, value))
    return Words(configs, recipe, flags, phase_flags, print_config)


def _split_phase(name: str) -> tuple[str | None, str]:
    """Split --phases.PHASE.section.name into the phase and the rest; of another flag, give what follows the dashes."""
    if not name.startswith("--phases."):
        return None, name.removeprefix("--")
    phase, dot, key = name.removeprefix("--phases.").partition(".")
    if not dot or not key:
        raise mistake(f"{name} names no setting of a phase; write --phases.PHASE.section.name VALUE")
    return phase, key


def _check_flag(name: str, parser: jsonargparse.ArgumentParser) -> None:
    """Refuse a word that is no flag, or the flag of a setting that there is not."""
    if not name.startswith("-") or name in ("-", "--"):
        raise mistake(
            f"unexpected word {shown(name)}; write settings as --section.name VALUE, presets as --config NAME"
        )
    key = name.removeprefix("--")
    parts = key.split(".")
    section = parts[0]
    if key in _field_hints() or _free_form(key):
        if len(parts) > LONGEST_PATH or not all(parts):
            raise mistake(f"--{key[:80]} has an empty part, or more than {LONGEST_PATH}; write it as --section.name")
        return
    if key in SECTION_CLASSES:
        raise mistake(f"--{key} is a section; give its settings one by one, as --training.lr 1e-4")
    if section in SECTION_CLASSES and len(parts) > 1 and name.startswith("--"):
        raise unknown(
            f"setting of {section}", key.partition(".")[2], (f.name for f in fields(SECTION_CLASSES[section]))
        )
    options = [option for option in parser._option_string_actions if option.startswith("--") and option != name]
    options.append("--losses.NAME")
    raise mistake(
        f"unknown option {shown(name)}{did_you_mean(name[:80], options)}; settings are --section.name with section "
        f"{', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}, and --help lists all options"
    )


def _field_hints() -> dict[str, Any]:
    """Types of all fields, by flag without its dashes."""
    return {
        f"{section}.{name}": hint
        for section, kind in SECTION_CLASSES.items()
        for name, hint in get_type_hints(kind).items()
    }


def _free_form(key: str) -> bool:
    """Whether a flag is of a free-form mapping, or of something in it."""
    mappings = [
        path for path, hint in _field_hints().items() if any(get_origin(kind) is dict for kind in get_args(hint))
    ]
    return any(key == path or key.startswith(f"{path}.") for path in (*mappings, "losses"))


def flags_as_mapping(flags: Sequence[tuple[str, str]], parser: jsonargparse.ArgumentParser) -> dict[str, Any]:
    """Nest the flags' values; of two for one setting the later one stays."""
    nested: dict[str, Any] = {}
    for key, text in flags:
        value = _flag_value(key, text, parser)
        for part in reversed(key.split(".")):
            value = {part: value}
        # Among flags a class_path drops nothing: its init_args may stand before it on the line.
        nested = lay_over(nested, weights_as_mappings(value), drops=False)
    return nested


def _flag_value(key: str, text: str, parser: jsonargparse.ArgumentParser) -> Any:
    """Give a flag's text its type; what has none that fits stays as it is, for `RunConfig` to refuse by its name."""
    try:
        read = parse_yaml(text, f"--{key}")
    except InputError:
        return text
    hint = _field_hints().get(key)
    if _free_form(key):
        is_text = hint is not None and str in get_args(hint) and not (read is None or isinstance(read, Mapping))
        return text if is_text else read
    try:
        typed = parser.parse_args([f"--{key}={text}"], defaults=False)[key]
    except argparse.ArgumentError:
        return read
    # jsonargparse reads YAML 1.1, where 1:30 is the number 90.
    return typed if isinstance(typed, str) or not isinstance(read, str) else read


def read_layer(word: str) -> tuple[str, dict[str, Any]]:
    """Read a preset or a file: its name, and its sections."""
    presets = list_presets()
    if word in presets:
        layer = load_preset(word)
        return word, weights_as_mappings({**layer, "training": {**layer.get("training", {}), "preset": word}})
    path = Path(os.path.expanduser(word))  # Path.expanduser raises where there is no such user
    if not os.path.lexists(path):
        if os.sep not in word and path.suffix not in (".yaml", ".yml"):
            raise mistake(f"--config: {unknown('preset', word, presets)}, or a YAML file")
        raise mistake(f"--config: no such file {shown(word)}{did_you_mean(path.stem, presets)}")
    layer = read_yaml(path, word)
    for section, settings in list(layer.items()):
        if section not in (*SECTIONS, "phases", "description"):
            raise unknown(f"section of {path.name}", section, (*SECTIONS, "phases", "description"))
        if settings is None:  # all its lines are comments
            del layer[section]
        elif section == "phases":
            layer[section] = checked_phases(settings, path.name)
        elif section != "description" and not isinstance(settings, Mapping):
            raise mistake(f"section {section} of {path.name} is {shown(settings)}; it must be a mapping of settings")
    return path.stem, weights_as_mappings(layer)


def weights_as_mappings(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Spell `losses: {kl: 1e-6}` as `losses: {kl: {weight: 1e-6}}`, so that it leaves the term's class as it was."""
    losses = layer.get("losses")
    if not isinstance(losses, Mapping):
        return dict(layer)
    spelt = {
        name: {"weight": term} if isinstance(term, int | float) and not isinstance(term, bool) else term
        for name, term in losses.items()
    }
    return {**layer, "losses": spelt}


def checked_phases(phases: Any, source: str) -> dict[str, Any]:
    if not isinstance(phases, Mapping) or not phases:
        raise mistake(f"section phases of {source} is {shown(phases)}; it must be a mapping from names to settings")
    accepted = ("starts_from", *(section for section in SECTIONS if section != "distillation"))
    for name, layer in phases.items():
        check_phase_name(name)
        if not isinstance(layer, Mapping):
            raise mistake(f"phases.{name} of {source} is {shown(layer)}; it must be a mapping of sections")
        for section, settings in layer.items():
            if section not in accepted:
                raise unknown(f"section of phases.{name}", section, accepted)
            if section != "starts_from" and not isinstance(settings, Mapping):
                raise mistake(f"phases.{name}.{section} of {source} is {shown(settings)}; it must be a mapping")
    return {name: weights_as_mappings(layer) for name, layer in phases.items()}


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any], drops: bool = True, path: str = "") -> dict[str, Any]:
    """Merge two mappings, the one above winning; where `drops`, another class_path drops the init_args below it."""
    merged = dict(below)
    if drops and "class_path" in above:
        default = DEFAULT_CLASSES.get(path.removeprefix("model."))
        if (above["class_path"] or default) != (below.get("class_path") or default):
            merged.pop("init_args", None)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = lay_over(under, value, drops, f"{path}.{key}".lstrip("."))
        merged[key] = value
    return merged


def print_text(spell: Callable[[bool], str]) -> None:
    """Print what `spell(ascii_only)` gives, in ASCII alone where the terminal takes no more."""
    text = spell(False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = spell(True)
    sys.stdout.write(text)


def _descriptions(kind: type) -> tuple[str, dict[str, str]]:
    """A section's description and its fields', from the docstring."""
    found = docstring_parser.parse(kind.__doc__ or "")
    summary = " ".join(part for part in (found.short_description, found.long_description) if part)
    return " ".join(summary.split()), {
        entry.arg_name: " ".join((entry.description or "").split()) for entry in found.params
    }


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _metavar(hint: Any) -> str:
    """What stands for a value in the help."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    names = {
        int: "N",
        float: "X",
        bool: "true|false",
        str: "TEXT",
        tuple: "[X, X]",
        dict: "MAPPING",
        list: "[TEXT, ...]",
    }
    words = [
        "|".join(get_args(kind)) if get_origin(kind) is Literal else names.get(get_origin(kind) or kind)
        for kind in kinds
    ]
    return "|".join(word for word in words if word)


def _default(entry: Field[Any]) -> str:
    if entry.default is MISSING:
        return "no default"
    value = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    return f"default: {value if isinstance(value, str) else shown(value)}"
