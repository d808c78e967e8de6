"""What pages and Markdown are made of: tables, pictures, and the jinja2 templates beside this file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from torch import Tensor

from dc_ssdae.data.images import to_pillow
from dc_ssdae.errors import counted
from dc_ssdae.evaluation.estimates import Estimate
from dc_ssdae.evaluation.metrics import psnr

DIFFERENCE_GAIN = 2
"""How much the pictures of differences are amplified around mid-grey."""


@dataclass(frozen=True)
class Table:
    """A table; what follows a line break in a head or a cell is smaller.

    Args:
        rows: cells by the heads of their columns, which need not be in all rows.
        heads: the heads in order; those that no row has are left out. By default those of the first row.
    """

    rows: Sequence[Mapping[str, str]]
    heads: Sequence[str] = ()

    def lines(self) -> list[list[str]]:
        """The heads, then each row's cells."""
        heads = [head for head in self.heads or self.rows[0] if any(head in row for row in self.rows)]
        return [heads, *([row.get(head, "–") for head in heads] for row in self.rows)]

    def markdown(self) -> str:
        """As Markdown, with the smaller texts in brackets."""
        lines = [[_in_one_line(cell) for cell in line] for line in self.lines()]
        lines.insert(1, [":---", *["---:"] * (len(lines[0]) - 1)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(found: Estimate, digits: int) -> str:
    """A figure as a cell: with its interval, or the reason why it has no value."""
    small = found.interval_text(digits) or (found.reason if found.value is None else "")
    return f"{found.text(digits)}\n{small}"


def markdown(*parts: str | Table | Sequence[str]) -> str:
    """Join paragraphs, tables and lists of lines; what is empty is left out."""
    lists = [part if isinstance(part, str | Table) else "\n".join(f"- {line}" for line in part) for part in parts]
    return "\n\n".join(part.markdown() if isinstance(part, Table) else part for part in lists if part) + "\n"


class Panel(NamedTuple):
    """A picture of a photo, uint8 (3, H, W), or why there is none, as the caption; most flip to the original."""

    title: str
    caption: str = ""
    pixels: Tensor | None = None
    flips: bool = True


class Photo(NamedTuple):
    """A photo, uint8 (3, H, W), and its panels."""

    name: str
    original: Tensor
    panels: Sequence[Panel]


def difference(original: Tensor, output: Tensor, gain: int = DIFFERENCE_GAIN) -> Tensor:
    """What differs between two images, uint8 (3, H, W), amplified around mid-grey."""
    return (128 + gain * (output.int() - original.int())).clamp(0, 255).byte()


def difference_panel(original: Tensor, output: Tensor) -> Panel:
    """A picture of what differs between two images, uint8 (3, H, W)."""
    return Panel("difference", f"×{DIFFERENCE_GAIN}, grey is none", difference(original, output), flips=False)


def psnr_panel(title: str, original: Tensor, output: Tensor, remark: str = "") -> Panel:
    """A reconstruction, uint8 (3, H, W) as the original, with its PSNR below."""
    return Panel(title, f"{Estimate(psnr(original, output)).text(2)} dB{remark}", output)


def data_uri(picture: Tensor | bytes) -> str:
    """Make a picture, uint8 (3, H, W) or the content of a PNG, part of a page."""
    if isinstance(picture, Tensor):
        buffer = io.BytesIO()
        to_pillow(picture).save(buffer, format="PNG", optimize=True)
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def fill(template: str | Path, **parts: Any) -> str:
    """Fill a template of this folder, or one elsewhere that may extend these; texts are escaped where it is HTML."""
    path = Path(__file__).parent / template
    folders = FileSystemLoader([path.parent, Path(__file__).parent])
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, loader=folders, autoescape=select_autoescape(), undefined=StrictUndefined
    )
    environment.filters |= {"uri": data_uri, "counted": counted}
    return environment.get_template(path.name).render(parts)


def render_page(template: str | Path, **parts: Any) -> bytes:
    """Make a page, which needs nothing from elsewhere; `title`, `lead` and `footer` are on every one."""
    return fill(template, **parts).encode("utf-8", "backslashreplace")


def _in_one_line(cell: str) -> str:
    text, _, small = cell.replace("|", "\\|").partition("\n")
    return " ".join((f"{text} ({small})" if small else text).split())
