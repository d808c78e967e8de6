"""A self-contained page with pictures that flip between original and reconstruction and zoom into the same crop."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dc_ssdae.evaluation.html import data_uri, escape, fill_template

_PAGE_WIDTH, _GAP = 87.5, 0.75  # rem; of a window of 1440 pixels
_FEW, _MOST_IN_A_ROW = 4, 10  # pictures of a photo


@dataclass(frozen=True)
class Panel:
    """One picture of a photo.

    Args:
        title: whose it is.
        caption: what to read below it.
        pixels: uint8 (3, S, S); None where there is none.
        reason: why there is none.
        flips: whether the original lies beneath.
    """

    title: str
    caption: str = ""
    pixels: Tensor | None = None
    reason: str = ""
    flips: bool = True


@dataclass(frozen=True)
class Photo:
    """A photo, uint8 (3, S, S), and its panels."""

    name: str
    original: Tensor
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Group:
    """Photos under a heading, with a sentence on why these."""

    heading: str
    text: str
    photos: Sequence[Photo]


@dataclass(frozen=True)
class Table:
    """A table; cells are a text and a smaller one below it, or one reason for a whole row."""

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[tuple[str, str]]]
    reasons: Sequence[str | None]

    def html(self) -> str:
        """As HTML, in a box that scrolls sideways."""
        return fill_template("table.html", table=self, rows=zip(self.rows, self.reasons, strict=True))

    def markdown(self) -> str:
        """As Markdown, with the smaller texts in brackets."""
        heads = [_bracketed(head) for head in self.heads]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for cells, reason in zip(self.rows, self.reasons, strict=True):
            texts = [_bracketed(cell) for cell in cells]
            if reason is not None:
                texts = [texts[0], f"failed: {_in_a_cell(reason)}", *[""] * (len(heads) - 2)]
            lines.append(f"| {' | '.join(texts)} |")
        return "\n".join(lines)


def section(heading: str, *content: str) -> str:
    """A part of the page, of content that is HTML already."""
    return f"<h2>{escape(heading)}</h2>\n" + "\n".join(content)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def warning(lines: Sequence[str]) -> str:
    """A box with what may not be compared."""
    return f'<div class="caveats"><b>Before you compare</b>{bullets(lines)}</div>'


def picture(content: bytes, description: str) -> str:
    """A PNG as part of the page."""
    return f'<div class="scroll"><img class="plot" src="{data_uri(content)}" alt="{escape(description)}"></div>'


def render_page(
    title: str,
    lead: str,
    groups: Sequence[Group],
    sections: Sequence[str],
    footer: str,
) -> bytes:
    """Build the page.

    Args:
        title: of it, plain text like all the others.
        lead: a sentence or two for who reads no further.
        groups: of photos; they come first.
        sections: HTML, as `section` gives it.
        footer: how it was made.
    """
    most = max((1 + len(photo.panels) for group in groups for photo in group.photos), default=1)
    page = fill_template(
        "viewer.html",
        title=title,
        lead=lead,
        groups=groups,
        sections="\n".join(sections),
        footer=footer,
        cell=_cell_width(most),
        photo_width="100%" if most > _FEW else "42rem",
    )
    return page.encode("utf-8", "backslashreplace")


def _cell_width(count: int) -> str:
    """The smallest width of a picture, with which `count` of them fill whole rows of a wide window, in CSS."""
    rows = -(-count // _MOST_IN_A_ROW)
    columns = -(-count // rows)
    page = _PAGE_WIDTH if count > _FEW else 42.0  # two photos beside each other
    return f"{(page - (columns - 1) * _GAP) / columns - 0.15:.2f}rem"


def _bracketed(texts: tuple[str, str]) -> str:
    return _in_a_cell(texts[0] + (f" ({texts[1]})" if texts[1] else ""))


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
