"""Images, and the many ways in which an image file can be broken."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dc_ssdae.data.sources import ImageSource
from dc_ssdae.errors import InputError


def image_array(number: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth image, uint8 (height, width, 3), that tells its number from others."""
    y, x = np.mgrid[0:height, 0:width]
    bands = [(x * 5 + number * 11) % 256, (y * 7 + number * 5) % 256, np.full_like(x, number * 17 % 256)]
    return np.stack(bands, axis=-1).astype(np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bytes(width: int, height: int, bits: int, colour: int, rows: bytes, key: bytes | None = None) -> bytes:
    """A PNG made by hand, for what Pillow does not write. `rows` are raw: filter byte, then samples."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    transparent = b"" if key is None else chunk(b"tRNS", key)
    parts = [chunk(b"IHDR", header), transparent, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def broken_contents() -> dict[str, bytes]:
    """Content by file name: each is broken in another way."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    jpeg, png, webp = (encoded(noise, kind) for kind in ("JPEG", "PNG", "WEBP"))
    data_start = png.index(b"IDAT") + 4
    wrong_checksum = bytearray(png)
    wrong_checksum[data_start + 40] ^= 0xFF
    floats = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(floats, "TIFF")
    return {
        "zero_bytes.jpg": b"",
        "cut_short.jpg": jpeg[: len(jpeg) // 2],
        "header_alone.jpg": jpeg[:20],
        "random_bytes.jpg": np.random.default_rng(1).bytes(3000),
        "zeros.webp": bytes(2000),
        "text.png": b"<html><body>404 Not Found</body></html>\n" * 20,
        "cut_short.png": png[: len(png) // 2],
        "cut_short.webp": webp[: len(webp) // 2],
        "wrong_checksum.png": bytes(wrong_checksum),
        "bomb.png": png_bytes(20_000, 20_000, 8, 2, bytes(1000)),
        "floats.tiff": floats.getvalue(),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }


def write_broken_files(folder: Path) -> list[str]:
    """Write files that are broken in every way of `broken_contents`, and in those that only file systems know."""
    for name, content in broken_contents().items():
        (folder / name).write_bytes(content)
    os.symlink("nowhere", folder / "dangling_link.jpg")
    os.symlink("circle.jpg", folder / "circle.jpg")
    os.mkfifo(folder / "pipe.png")
    return sorted(path.name for path in folder.iterdir())


def write_images(folder: Path, count: int, suffix: str = ".png", first: int = 0) -> list[Path]:
    """Write `count` images; each has the number `first` + its place as `image_array` shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"image_{number:03d}{suffix}" for number in range(first, first + count)]
    for number, path in enumerate(paths, first):
        Image.fromarray(image_array(number)).save(path)
    return paths


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar with tarfile alone: a second opinion on what WebDataset's writer gives."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def check_refusals(source: ImageSource, indices: Iterable[int]) -> None:
    """Each of these images is refused in one line that names it."""
    for index in indices:
        with pytest.raises(InputError) as caught:
            source.read(index)
        assert len(str(caught.value).splitlines()) == 1
        assert repr(source.name(index)) in str(caught.value)
