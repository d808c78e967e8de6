"""What pages are made of: pictures as data URIs, escaped text, the jinja2 templates beside this file."""

import base64
import html
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dc_ssdae.data.images import to_pillow


def png(pixels: Tensor) -> bytes:
    """Compress an image, uint8 (3, H, W), as PNG."""
    buffer = io.BytesIO()
    to_pillow(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """Make a PNG part of a page."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def escape(text: object) -> str:
    """Make text safe between tags and within attributes."""
    return html.escape(str(text))


def fill_template(name: str, **parts: Any) -> str:
    """Fill a template of this package, with text escaped; `picture | uri` makes uint8 (3, H, W) a data URI."""
    return _environment().get_template(name).render(parts)


@lru_cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = lambda pixels: data_uri(png(pixels))
    return environment
