"""What MkDocs adds to the pages when it builds the site: everything that the code itself knows.

The references of commands and of settings are made from the parsers and dataclasses of the command line, the tables of
presets and results from the presets and from what the studies wrote. In a page, a line `[Table NAME](FILE)` stands for
the table NAME, and `[Card](FILE)` for a model's card.
"""

import importlib
import logging
import re
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dc_ssdae.cli.main import COMMANDS, PROGRAM
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.presets import dump_yaml, list_presets, load_preset
from dc_ssdae.settings import documentation, is_required, metavar
from dc_ssdae.training.config import BUILT_IN_LOSSES, MAY_CHANGE, SECTIONS

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("mkdocs.hooks.dc_ssdae")
TABLE = re.compile(r"^\[Table (\w+)\]\([^)]*\)$", re.MULTILINE)
CARD = re.compile(r"^\[Card\]\(([^)]*)\)$", re.MULTILINE)
EXTERNAL = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?https?:[^\s>]*|<link[^>]*stylesheet[^>]*https?:[^\s>]*")

ABOUT_COMMANDS = """# Commands

This page is made from the command line's own parser: it says the same as `dc-ssdae COMMAND --help`.

No command silently replaces an existing file: run again with the same `--out`, it refuses to start without
`--overwrite`. `pack` and `latents` continue where they stopped, and so do `train` and `distill` with `--resume`.

The exit code is 0; 2 if the input cannot be used, with one line that says why; and 130 after Ctrl-C. Every command
takes `--debug`, which shows the traceback of an error."""

ABOUT_CONFIGURATION = """# Configuration

This page is made from the typed configuration: it lists every setting of a run. In a YAML file a setting stands in its
section; on the command line it is `--section.name VALUE`. A setting marked ↻ may be changed when a run is
[resumed](../resuming.md). `dc-ssdae train --config PRESET --print_config` prints all settings with their values."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, content in (("commands", commands()), ("configuration", configuration())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables and cards in their places."""
    markdown = TABLE.sub(lambda place: table(place[1]), markdown)
    return CARD.sub(lambda place: card((Path(config.docs_dir) / place[1]).resolve()), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, which fails a strict build, of what a browser would fetch from another server."""
    for found in EXTERNAL.findall(output):
        LOG.warning("%s loads from another server: %s", page.file.src_uri, found)
    return output


def commands() -> str:
    """The page on all commands."""
    rows = [[f"[`{name}`](#dc-ssdae-{name.replace(' ', '-')})", about] for name, about in COMMANDS.items()]
    overview = rows_as_table(["command", "what it does"], rows)
    return "\n\n".join([ABOUT_COMMANDS, overview, *map(command, COMMANDS)]) + "\n"


def command(name: str) -> str:
    """One command: its description, its usage and its options."""
    first, _, second = name.partition(" ")
    options = getattr(importlib.import_module(f"dc_ssdae.cli.{first}"), f"{second.capitalize()}Options")
    parser = CommandParser(options, f"{PROGRAM} {name}")
    parts = [f"## {PROGRAM} {name}", escaped(parser.description or ""), f"```\n{parser.usage}\n```"]
    rows, has_settings = [], False
    for group in parser._action_groups:
        has_settings |= group.title in SECTIONS
        if group.title not in {*SECTIONS, "losses"}:
            rows += [option(action) for action in group._group_actions if action.dest not in ("help", "debug")]
    parts.append(rows_as_table(["option", "what it does", "default"], rows))
    if has_settings:
        parts.append("All [settings of a run](configuration.md) are options too: `--section.name VALUE`.")
    return "\n\n".join(parts)


def option(action: Any) -> list[str]:
    """A row for an option: its names, what it does and its default."""
    value = "" if action.nargs == 0 else f" {action.metavar}"
    names = "<br>".join(f"`{name}{value}`" for name in action.option_strings) or f"`{action.metavar}`"
    text = action.help.replace("%%", "%")
    text, _, default = text.removesuffix(")").partition(" (default: ") if " (default: " in text else (text, "", "")
    return [names, escaped(text), f"`{default}`" if default else ""]


def configuration() -> str:
    """The page on all settings of a run."""
    parts = [ABOUT_CONFIGURATION]
    for section, kind in SECTIONS.items():
        (summary, described), hints = documentation(kind), get_type_hints(kind)
        rows = []
        for entry in fields(kind):
            mark = " ↻" if entry.name in MAY_CHANGE[section] else ""
            default = "required" if is_required(entry) else f"`{dump_yaml(entry.default).strip()}`"
            name = f"`{section}.{entry.name}`{mark}<br>`{metavar(hints[entry.name])}`"
            rows.append([name, escaped(described[entry.name]), default])
        parts += [
            f"## {section}",
            escaped(summary),
            rows_as_table(["setting and value", "what it is", "default"], rows),
        ]
    weights = rows_as_table(
        ["term", "weight"], [[f"`{name}`", f"{weight:g}"] for name, weight in BUILT_IN_LOSSES.items()]
    )
    about = "Terms by name, each a weight or a mapping with `weight`, `class_path` and `init_args`; 0 removes a term."
    parts += ["## losses", f"{about} [The objective](../training.md#the-objective) describes them.", weights]
    return "\n\n".join(parts) + "\n"


@cache
def table(name: str) -> str:
    """A table by its name: of the presets, or one of `studies/tables.py`."""
    if name == "presets":
        return presets()
    sys.path.insert(0, str(ROOT / "studies"))
    try:
        return str(importlib.import_module("tables").TABLES[name]())
    finally:
        sys.path.remove(str(ROOT / "studies"))


def presets() -> str:
    """What each preset is and costs."""
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.profile import compression_ratio, count_flops, count_parameters, latent_shape

    rows = []
    for name in list_presets():
        with torch.device("meta"):
            model = DCSSDAE.from_preset(name)
        parameters, flops = count_parameters(model), count_flops(model, 256)
        shape = "×".join(map(str, latent_shape(model, 256, 256)))
        sizes = (f"{parameters[part] / 1e6:,.2f}" for part in ("encoder", "decoder"))
        costs = (f"{count / 1e9:,.0f}" for count in flops)
        ratio = f"{compression_ratio(model):.0f}"
        rows.append([f"`{name}`", load_preset(name)["description"], shape, ratio, *sizes, *costs])
    head = ["preset", "what it is", "latent at 256 px", "ratio", "encoder, M", "decoder, M", "encode", "decode step"]
    return rows_as_table(head, rows)


def card(file: Path) -> str:
    """A model's card without its front matter and title, its headings one level down."""
    text = file.read_text(encoding="utf-8").partition("\n---\n")[2].partition("\n# ")[2].partition("\n")[2]
    return re.sub(r"^## ", "### ", text, flags=re.MULTILINE)


def rows_as_table(head: list[str], rows: list[list[str]], words: int = 3) -> str:
    """A Markdown table; the columns after the first `words` hold numbers."""
    lines = [head, ["---:" if column >= words else "---" for column in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Help text for a cell of a table: what Markdown or HTML would read as theirs stays as it is."""
    return re.sub(r"([|<>*_\[\]`{}])", r"\\\1", text)
