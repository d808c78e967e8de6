"""What pages are made of: pictures as data URIs, escaped text, the template files beside this one."""

import base64
import html
import io
from importlib import resources
from string import Template

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


def fill_template(name: str, **parts: str) -> str:
    """Fill a template file of this room; every `$part` of it must be given."""
    return Template((resources.files(__package__) / name).read_text(encoding="utf-8")).substitute(parts)
