"""A self-contained page with pictures that flip between original and reconstruction and zoom into the same crop."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dc_ssdae.evaluation.html import data_uri, escape, fill_template, png

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
        heads = "".join(f"<th>{_two(head)}</th>" for head in self.heads)
        rows = []
        for cells, reason in zip(self.rows, self.reasons, strict=True):
            if reason is None:
                rows.append("<tr>" + "".join(f"<td>{_two(cell)}</td>" for cell in cells) + "</tr>")
            else:
                rows.append(
                    f'<tr><td>{_two(cells[0])}</td><td class="reason" colspan="{len(self.heads) - 1}">'
                    f"failed: {escape(reason)}</td></tr>"
                )
        body = "\n".join(rows)
        return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'

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
    numbers = iter(range(10**6))
    most = max((1 + len(photo.panels) for group in groups for photo in group.photos), default=1)
    originals: list[str] = []
    parts: list[str] = []
    for group in groups:
        photos = "\n".join(_photo(photo, next(numbers), originals) for photo in group.photos)
        parts.append(section(group.heading, paragraph(group.text), f'<div class="photos">{photos}</div>'))
    page = fill_template(
        "viewer.html",
        title=escape(title),
        lead=escape(lead),
        originals="\n".join(originals),
        photos="\n".join(parts),
        sections="\n".join(sections),
        footer=escape(footer),
        cell=_cell_width(most),
        photo="100%" if most > _FEW else "42rem",
    )
    return page.encode("utf-8", "backslashreplace")


def _cell_width(count: int) -> str:
    """The smallest width of a picture, with which `count` of them fill whole rows of a wide window, in CSS."""
    rows = -(-count // _MOST_IN_A_ROW)
    columns = -(-count // rows)
    page = _PAGE_WIDTH if count > _FEW else 42.0  # two photos beside each other
    return f"{(page - (columns - 1) * _GAP) / columns - 0.15:.2f}rem"


def _photo(photo: Photo, number: int, originals: list[str]) -> str:
    """A photo's row. The original, which lies beneath many pictures, is in the page once, as a style."""
    originals.append(f'  .p{number} {{ background-image: url("{data_uri(png(photo.original))}"); }}')
    cells = [
        f'<figure><div class="view" tabindex="0" role="button" aria-label="{escape(photo.name)}, original">'
        f'<div class="layer p{number}"></div></div><figcaption><b>original</b></figcaption></figure>'
    ]
    cells += [_panel(panel, photo.name, number) for panel in photo.panels]
    return f'<div class="photo"><h3>{escape(photo.name)}</h3>\n<div class="cells">{"".join(cells)}</div></div>'


def _panel(panel: Panel, name: str, number: int) -> str:
    caption = f"<figcaption><b>{escape(panel.title)}</b><br>{escape(panel.caption)}</figcaption>"
    if panel.pixels is None:
        return f'<figure><div class="view failed">{escape(panel.reason)}</div>{caption}</figure>'
    label = escape(f"{name}, {panel.title}")
    before = f'<div class="before"><div class="layer p{number}"></div></div><span class="state" hidden></span>'
    return (
        f'<figure><div class="view" tabindex="0" role="button" aria-label="{label}">'
        f'<img class="layer" src="{data_uri(png(panel.pixels))}" alt="{label}" draggable="false">'
        f"{before if panel.flips else ''}</div>{caption}</figure>"
    )


def _two(texts: tuple[str, str]) -> str:
    return escape(texts[0]) + (f"<small>{escape(texts[1])}</small>" if texts[1] else "")


def _bracketed(texts: tuple[str, str]) -> str:
    return _in_a_cell(texts[0] + (f" ({texts[1]})" if texts[1] else ""))


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
