"""Reading every kind of file people have, refusing the rest in one line, writing, the two pixel ranges."""

import io
import itertools
import os
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features
from PIL.PngImagePlugin import PngInfo

from dc_ssdae.data.images import (
    _decode,
    read_image,
    read_image_bytes,
    read_pillow_image,
    to_model_range,
    to_uint8,
    write_png,
)
from dc_ssdae.errors import InputError

ALPHA = "alpha composited over white"
GREY = "greyscale repeated to three channels"
DEPTH = "16-bit reduced to 8 bits"


def photo_like(height: int = 12, width: int = 20, channels: int = 3) -> np.ndarray:
    """Different values in every pixel and channel, so that a swapped axis or channel shows."""
    values = np.arange(height * width * channels) * 7919 % 251
    return values.astype(np.uint8).reshape(height, width, channels)


def blocks() -> np.ndarray:
    """Four flat quadrants of different colours, which survive JPEG compression nearly unchanged; 32x64."""
    colours = np.array([[[250, 20, 30], [20, 240, 40]], [[30, 40, 230], [240, 240, 60]]], dtype=np.uint8)
    return colours.repeat(16, axis=0).repeat(32, axis=1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bytes(width: int, height: int, bits: int, colour: int, rows: bytes, key: bytes | None = None) -> bytes:
    """A PNG made by hand, for what Pillow does not write. `rows` are raw: filter byte, then samples."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if key is not None:
        parts.append(chunk(b"tRNS", key))
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def tiff_bytes(
    bits: int, samples: bytes, width: int, height: int, order: str = "<", extra: Mapping[int, int | bytes] = {}
) -> bytes:
    """A TIFF made by hand, greyscale unless `extra` says otherwise: tags by number, as a value or as a raw entry."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(samples), **extra}
    start = 8 + 2 + 12 * len(tags) + 4
    body = b""
    for tag, value in sorted(tags.items()):
        value = start if tag == 273 else value
        body += (
            value
            if isinstance(value, bytes)
            else struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + body + bytes(4) + samples


def encoded(kind: str, array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def saved(image: Image.Image, path: Path, mode: str, **options: object) -> Path:
    """Save and make sure that Pillow opens the file in the mode under test."""
    image.save(path, **options)
    with Image.open(path) as reopened:
        assert reopened.mode == mode
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def as_hwc(pixels: torch.Tensor) -> np.ndarray:
    assert pixels.dtype == torch.uint8
    assert pixels.ndim == 3
    assert pixels.shape[0] == 3
    assert pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def refusal(path: Path | str) -> str:
    """The message of the refusal, which must be one line that names the file."""
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert repr(str(path)) in message
    return message


# --- pixel modes ---


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm", ".webp", ".jp2"])
def test_rgb_is_read_unchanged(tmp_path: Path, suffix: str) -> None:
    lossless = {".webp": {"lossless": True}}.get(suffix, {})
    array = photo_like()
    pixels, notes = read_image(saved(Image.fromarray(array), tmp_path / f"x{suffix}", "RGB", **lossless))
    np.testing.assert_array_equal(as_hwc(pixels), array)
    assert notes == []


def test_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    path = saved(Image.fromarray(blocks()), tmp_path / "x.jpg", "RGB", quality=95)
    pixels, notes = read_image(str(path))
    np.testing.assert_allclose(as_hwc(pixels).astype(int)[4:12, 4:28], blocks().astype(int)[4:12, 4:28], atol=3)
    assert notes == []


def test_greyscale_and_black_and_white(tmp_path: Path) -> None:
    array = photo_like(channels=1)[..., 0]
    pixels, notes = read_image(saved(Image.fromarray(array), tmp_path / "grey.png", "L"))
    np.testing.assert_array_equal(as_hwc(pixels), array[..., None].repeat(3, axis=2))
    assert notes == [GREY]

    bits = array > 100
    pixels, notes = read_image(saved(Image.fromarray(bits), tmp_path / "bits.png", "1"))
    np.testing.assert_array_equal(as_hwc(pixels), np.where(bits, 255, 0)[..., None].repeat(3, axis=2))
    assert notes == [GREY]


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 4), ("LA", 2)])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_alpha_is_composited_over_white(tmp_path: Path, suffix: str, mode: str, channels: int) -> None:
    array = photo_like(channels=channels)
    pixels, notes = read_image(saved(Image.fromarray(array, mode), tmp_path / f"x{suffix}", mode))
    alpha = array[..., -1:] / 255
    expected = array[..., :-1] * alpha + 255 * (1 - alpha)
    assert np.abs(as_hwc(pixels) - expected).max() <= 1
    assert notes == ([ALPHA] if mode == "RGBA" else [GREY, ALPHA])


def test_opaque_alpha_changes_nothing_and_is_not_remarked(tmp_path: Path) -> None:
    array = photo_like(channels=4)
    array[..., 3] = 255
    pixels, notes = read_image(saved(Image.fromarray(array), tmp_path / "x.png", "RGBA"))
    np.testing.assert_array_equal(as_hwc(pixels), array[..., :3])
    assert notes == []


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    indices = (np.arange(12 * 20) % 4).astype(np.uint8).reshape(12, 20)
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 128], [255, 255, 255]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())  # turns the mode into P
    return image, indices, colours


def test_palette(tmp_path: Path) -> None:
    image, indices, colours = palette_image()
    pixels, notes = read_image(saved(image, tmp_path / "x.png", "P"))
    np.testing.assert_array_equal(as_hwc(pixels), colours[indices])
    assert notes == []


@pytest.mark.parametrize(("suffix", "transparency"), [(".png", 1), (".png", bytes([255, 0, 255, 255])), (".gif", 1)])
def test_palette_with_a_transparent_colour(tmp_path: Path, suffix: str, transparency: int | bytes) -> None:
    image, indices, colours = palette_image()
    path = saved(image, tmp_path / f"x{suffix}", "P", transparency=transparency)
    pixels, notes = read_image(path)
    colours[1] = 255
    np.testing.assert_array_equal(as_hwc(pixels), colours[indices])
    assert notes == [ALPHA]


def test_palette_with_an_alpha_channel(tmp_path: Path) -> None:
    image, indices, colours = palette_image()
    with_alpha = image.convert("PA")
    with_alpha.putalpha(Image.fromarray(np.where(indices == 2, 0, 255).astype(np.uint8)))
    pixels, notes = read_image(saved(with_alpha, tmp_path / "x.tiff", "PA"))
    colours[2] = 255
    np.testing.assert_array_equal(as_hwc(pixels), colours[indices])
    assert notes == [ALPHA]


def test_transparent_colour_without_a_palette(tmp_path: Path) -> None:
    rgb = written(tmp_path / "rgb.png", png_bytes(2, 1, 8, 2, bytes([0, 7, 8, 9, 7, 8, 10]), b"\0\7\0\10\0\11"))
    pixels, notes = read_image(rgb)
    assert as_hwc(pixels).tolist() == [[[255, 255, 255], [7, 8, 10]]]
    assert notes == [ALPHA]
    grey = written(tmp_path / "grey.png", png_bytes(2, 1, 8, 0, bytes([0, 7, 9]), b"\0\7"))
    pixels, notes = read_image(grey)
    assert as_hwc(pixels).tolist() == [[[255] * 3, [9] * 3]]
    assert notes == [GREY, ALPHA]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key"),
    [(2, 0, b"\0\x60", b"\0\1"), (4, 0, b"\0\x12", b"\0\1"), (16, 2, bytes(13), bytes(6))],
)
def test_transparent_colour_that_pillow_would_miss_is_refused(
    tmp_path: Path, bits: int, colour: int, row: bytes, key: bytes
) -> None:
    message = refusal(written(tmp_path / "x.png", png_bytes(2, 1, bits, colour, row, key)))
    assert "transparent colour" in message
    without_key = written(tmp_path / "y.png", png_bytes(2, 1, bits, colour, row))
    assert read_image(without_key).pixels.shape == (3, 1, 2)


def test_cmyk_jpeg_of_adobe_kind(tmp_path: Path) -> None:
    inks = np.zeros((16, 32, 4), dtype=np.uint8)
    inks[:, :16] = [0, 255, 255, 0]  # red
    inks[:, 16:] = [0, 0, 0, 255]  # black
    path = saved(Image.fromarray(inks, "CMYK"), tmp_path / "x.jpg", "CMYK", quality=100)
    assert b"Adobe" in path.read_bytes()  # the marker that says the inks are stored inverted
    pixels, notes = read_image(path)
    np.testing.assert_allclose(as_hwc(pixels)[8, 4].astype(int), [255, 0, 0], atol=3)
    np.testing.assert_allclose(as_hwc(pixels)[8, 28].astype(int), [0, 0, 0], atol=3)
    assert notes == ["CMYK converted to RGB"]


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "CMYK"])
def test_other_colour_spaces_come_back_as_the_colours_they_were(tmp_path: Path, mode: str) -> None:
    if mode == "LAB" and not features.check("littlecms2"):
        pytest.skip("this Pillow has no colour management")
    muted = blocks() // 2 + 60  # saturated colours lose more in 8-bit LAB
    path = saved(Image.fromarray(muted).convert(mode), tmp_path / "x.tiff", mode)
    pixels, notes = read_image(path)
    assert np.abs(as_hwc(pixels).astype(int) - muted).max() <= 6
    assert notes == [f"{mode} converted to RGB"]


def test_modes_that_no_readable_format_stores() -> None:
    hsv = Image.fromarray(blocks()).convert("HSV")
    pixels, notes = read_pillow_image(hsv, "hsv")
    assert np.abs(as_hwc(pixels).astype(int) - blocks()).max() <= 6
    assert notes == ["HSV converted to RGB"]

    premultiplied = Image.new("RGBA", (4, 2), (200, 100, 50, 128)).convert("RGBa")
    pixels, notes = read_pillow_image(premultiplied, "premultiplied")
    expected = np.array([200, 100, 50]) * 128 / 255 + 127
    assert np.abs(as_hwc(pixels) - expected).max() <= 2
    assert notes == [ALPHA]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_deeper_than_sixteen_bits_is_refused(tmp_path: Path, mode: str) -> None:
    path = saved(Image.new(mode, (4, 3), 5), tmp_path / "x.tiff", mode)
    assert "32-bit" in refusal(path)
    assert "8 or 16 bits" in refusal(path)


def test_other_modes_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="RGBX"):
        _decode(Image.new("RGBX", (4, 3)))


# --- sixteen bits ---


@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [
        ("x.png", "<u2", "I;16"),
        ("little.tiff", "<u2", "I;16"),
        ("big.tiff", ">u2", "I;16B"),
        ("x.pgm", "<u2", "I"),
        ("x.jp2", "<u2", "I;16"),
    ],
)
def test_sixteen_bit_greyscale_is_scaled_and_rounded(tmp_path: Path, name: str, dtype: str, mode: str) -> None:
    values = np.arange(65536).reshape(256, 256)
    path = saved(Image.fromarray(values.astype(dtype)), tmp_path / name, mode)
    pixels, notes = read_image(path)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(as_hwc(pixels), expected[..., None].repeat(3, axis=2))
    assert notes == [DEPTH, GREY]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bit_modes_of_every_byte_order(mode: str) -> None:
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65535]])
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (4, 2), values.astype(order).tobytes())
    pixels, notes = read_pillow_image(image, "sixteen bits")
    np.testing.assert_array_equal(as_hwc(pixels)[..., 1], [[0, 0, 1, 1], [4, 128, 254, 255]])
    assert notes == [DEPTH, GREY]


def test_sixteen_bit_greyscale_with_a_transparent_value(tmp_path: Path) -> None:
    rows = b"\0" + struct.pack(">3H", 1000, 1001, 50000)
    path = written(tmp_path / "x.png", png_bytes(3, 1, 16, 0, rows, struct.pack(">H", 1000)))
    pixels, notes = read_image(path)
    assert as_hwc(pixels)[0, :, 0].tolist() == [255, 4, 195]
    assert notes == [DEPTH, GREY, ALPHA]


def test_sixteen_bit_colour_is_remarked(tmp_path: Path) -> None:
    samples = struct.pack(">3H", 0, 32768, 65535)
    pixels, notes = read_image(written(tmp_path / "rgb.png", png_bytes(1, 1, 16, 2, b"\0" + samples)))
    assert as_hwc(pixels).tolist() == [[[0, 128, 255]]]
    assert notes == [DEPTH]

    pixels, notes = read_image(written(tmp_path / "x.ppm", b"P6 1 1 65535\n" + samples))
    assert as_hwc(pixels).tolist() == [[[0, 128, 255]]]
    assert notes == [DEPTH]

    rgba = b"\0" + samples + struct.pack(">H", 65535)
    _, notes = read_image(written(tmp_path / "rgba.png", png_bytes(1, 1, 16, 6, rgba)))
    assert notes == [DEPTH]
    grey = b"\0" + struct.pack(">2H", 32768, 0)
    pixels, notes = read_image(written(tmp_path / "la.png", png_bytes(1, 1, 16, 4, grey)))
    assert as_hwc(pixels).tolist() == [[[255, 255, 255]]]
    assert notes == [DEPTH, GREY, ALPHA]


def test_twelve_bit_greyscale_is_refused_and_not_read_as_nearly_black(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tiff", tiff_bytes(12, b"\xff\xff\xff" * 2, width=2, height=2))
    with Image.open(path) as image:
        assert image.mode == "I;16"
    assert "12-bit" in refusal(path)


# --- right, or refused ---


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib", "packbits"])
@pytest.mark.parametrize("order", "<>")
def test_tiffs_of_every_kind_are_right_or_refused(planes: str, compression: str | None, order: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    kinds = [("minisblack", 1, None), ("miniswhite", 1, None), ("rgb", 3, None), ("separated", 4, None)]
    kinds += [("rgb", 4, "unassalpha"), ("rgb", 4, "unspecified"), ("minisblack", 2, "unassalpha"), ("cielab", 3, None)]
    read = []
    for (photometric, samples, extra), dtype in itertools.product(
        kinds, ["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"]
    ):
        values = (np.arange(12 * 20 * samples) * 7919 % 251).reshape(12, 20, samples)
        array = (values * (257 if dtype == "u2" else 1)).astype(dtype)
        stored = array[..., 0] if samples == 1 else array.transpose(2, 0, 1) if planes == "separate" else array
        file = io.BytesIO()
        try:
            tifffile.imwrite(
                file,
                stored,
                photometric=photometric,
                planarconfig=planes if samples > 1 else None,
                extrasamples=extra and [extra],
                compression=compression,
                byteorder=order,
                metadata=None,
            )
        except (ImportError, KeyError, ValueError):  # a compression that it needs another package for
            continue
        try:
            pixels, _ = read_image_bytes(file.getvalue(), "x")
        except InputError:
            continue
        read.append((photometric, samples, dtype))
        expected = values[..., :3] if samples > 2 else values[..., :1].repeat(3, axis=2)
        if photometric == "miniswhite":
            expected = 255 - expected
        if photometric == "separated":
            expected = (255 - expected) * (255 - values[..., 3:]) / 255
        if extra == "unassalpha":
            expected = 255 + (expected - 255.0) * values[..., -1:] / 255
        if photometric != "cielab":
            assert np.abs(as_hwc(pixels) - expected).max() <= 2.1, read[-1]
    assert {("minisblack", 1, "u1"), ("minisblack", 1, "u2"), ("rgb", 3, "u1"), ("rgb", 4, "u1")} <= set(read) or (
        compression == "packbits"
    )
    assert {dtype for _, _, dtype in read} <= {"u1", "u2"}
    assert planes == "contig" or ("cielab", 3, "u1") not in read


def test_samples_that_pillow_would_misread_are_refused() -> None:
    grey = bytes(range(240))
    odd = {
        "signed": tiff_bytes(8, grey, 20, 12, extra={339: 2}),
        "0 is white": tiff_bytes(16, grey, 10, 12, extra={262: 0}),
        "predicted": tiff_bytes(8, grey, 20, 12, extra={317: 2}),
    }
    inks = io.BytesIO()
    Image.new("CMYK", (8, 8), (200, 50, 120, 30)).save(inks, "JPEG")
    marker = inks.getvalue().index(b"\xff\xee\0\x0eAdobe")
    odd["Adobe"] = inks.getvalue()[:marker] + inks.getvalue()[marker + 16 :]
    grey_jp2 = encoded("JPEG2000", photo_like(channels=1)[..., 0])
    size = grey_jp2.index(b"\xff\x4f\xff\x51") + 42
    odd["4 bits"] = grey_jp2[:size] + b"\3" + grey_jp2[size + 1 :]
    colour_jp2 = encoded("JPEG2000", photo_like())
    odd["16 bits"] = colour_jp2[:size] + b"\x0f\1\1" * 3 + colour_jp2[size + 9 :]
    for word, content in odd.items():
        with pytest.raises(InputError, match=word):
            read_image_bytes(content, "x")


# --- orientation, frames, warnings ---

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("value", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, value: int) -> None:
    lossless = {".webp": {"lossless": True}}.get(suffix, {})
    array = photo_like()
    path = saved(Image.fromarray(array), tmp_path / f"x{suffix}", "RGB", exif=orientation(value), **lossless)
    pixels, notes = read_image(path)
    np.testing.assert_array_equal(as_hwc(pixels), UPRIGHT[value](array))
    assert notes == []


@pytest.mark.parametrize("value", UPRIGHT)
def test_exif_orientation_of_jpeg(tmp_path: Path, value: int) -> None:
    path = saved(Image.fromarray(blocks()), tmp_path / "x.jpg", "RGB", quality=95, exif=orientation(value))
    pixels = as_hwc(read_image(path).pixels).astype(int)
    expected = UPRIGHT[value](blocks()).astype(int)
    assert pixels.shape == expected.shape
    assert np.median(np.abs(pixels - expected)) <= 2


@pytest.mark.parametrize("value", UPRIGHT)
def test_exif_orientation_with_palette_transparency_and_sixteen_bits(tmp_path: Path, value: int) -> None:
    image, indices, colours = palette_image()
    exif = orientation(value)
    path = saved(image, tmp_path / "palette.png", "P", transparency=1, exif=exif)
    colours[1] = 255
    np.testing.assert_array_equal(as_hwc(read_image(path).pixels), UPRIGHT[value](colours[indices]))

    # Uncompressed TIFFs of these modes are those that Pillow maps into memory.
    grey = photo_like(channels=1)[..., 0]
    wide = grey.astype(np.uint16) * 257
    files = [
        (Image.fromarray(grey), "grey.tiff", "L"),
        (Image.fromarray(wide.astype("<u2")), "wide.png", "I;16"),
        (Image.fromarray(wide.astype("<u2")), "wide.tiff", "I;16"),
        (Image.fromarray(wide.astype(">u2")), "wide_big_endian.tiff", "I;16B"),
    ]
    expected = UPRIGHT[value](grey[..., None].repeat(3, axis=2))
    for image, name, mode in files:
        path = saved(image, tmp_path / name, mode, exif=exif)
        np.testing.assert_array_equal(as_hwc(read_image(path).pixels), expected)


def exif_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF of one length with orientation 6 and a tag as given, in the order of tags."""
    entries = sorted([struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI", tag, kind, count) + value])
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4) + b"text that may be meant " * 2


MADE_UP = [
    (tag, kind, count, value)
    for tag in (0x0100, 0x010E, 0x0110, 0x011A, 0x0132, 0x02BC, 0x8769, 0xFFFE)
    for kind in (0, 1, 2, 3, 4, 5, 7, 10, 12, 13, 129)
    for count, value in ((1, b"\x26\0\0\0"), (9, b"\x28\0\0\0"), (2**31, b"\x28\0\0\0"), (4, b"\xff\xfe\xfd\xfc"))
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_tags_cost_neither_the_picture_nor_its_orientation(kind: str) -> None:
    plain = exif_with(*MADE_UP[0])
    content = encoded(kind, blocks(), exif=plain)
    assert plain.removeprefix(b"Exif\0\0") in content
    upright = read_image_bytes(encoded(kind, blocks()), "x").pixels.rot90(-1, (1, 2))
    for odd in MADE_UP:
        changed = content.replace(plain.removeprefix(b"Exif\0\0"), exif_with(*odd).removeprefix(b"Exif\0\0"))
        assert read_image_bytes(changed, "x").pixels.equal(upright), odd


@pytest.mark.parametrize("order", "<>")
def test_odd_tags_of_a_tiff_cost_neither_the_picture_nor_its_orientation(order: str) -> None:
    array = photo_like(4, 6)
    upright = torch.from_numpy(np.rot90(array, -1).copy()).permute(2, 0, 1)
    for tag, kind, count, value in MADE_UP:
        if tag in (0x0100, 0x0110):
            continue
        extra = {274: 6, 296: 3, tag: struct.pack(f"{order}HHI", tag, kind, count) + value}
        content = tiff_bytes(8, array.tobytes(), 6, 4, order, {262: 2, 277: 3, **extra})
        pixels, notes = read_image_bytes(content, "x")
        assert pixels.equal(upright), (tag, kind, count)
        assert notes == []


def test_no_segment_costs_a_jpeg_its_picture() -> None:
    plain = encoded("JPEG", blocks(), exif=orientation(6))
    expected = read_image_bytes(plain, "x").pixels
    for marker, body in itertools.product(
        (b"\xff\xe1", b"\xff\xe2", b"\xff\xed"),
        (b"ICC_PROFILE\0", b"ICC_PROFILE\0\1\2x", b"MPF\0II*\0", b"Photoshop 3.0\x008BIM\4\4", b"Exif\0\0II", b""),
    ):
        segment = marker + struct.pack(">H", len(body) + 2) + body
        at = plain.index(b"\xff\xdb")  # after the intact EXIF
        assert read_image_bytes(plain[:at] + segment + plain[at:], "x").pixels.equal(expected), body


def test_orientation_in_the_texts_of_png(tmp_path: Path) -> None:
    array = photo_like()
    texts = {
        "XML:com.adobe.xmp": '<x tiff:Orientation="6">',
        "Raw profile type exif": f"\nexif\n   99\n{orientation(6).tobytes().hex()}\n",
    }
    for key, text in texts.items():
        for zipped in (False, True) if key.startswith("Raw") else (False,):
            info = PngInfo()
            info.add_text(key, text, zip=zipped) if key.startswith("Raw") else info.add_itxt(key, text)
            path = saved(Image.fromarray(array), tmp_path / "x.png", "RGB", pnginfo=info)
            np.testing.assert_array_equal(as_hwc(read_image(path).pixels), UPRIGHT[6](array))


def test_no_text_or_metadata_costs_a_png_its_picture() -> None:
    plain = encoded("PNG", photo_like())
    expected = read_image_bytes(plain, "x").pixels
    long = zlib.compress(bytes(3 << 20))
    chunks = [
        chunk(b"zTXt", b"prompt\0\0" + long),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + long),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + long),
        chunk(b"iCCP", b"icc\0\0" + long),
        chunk(b"zTXt", b"method\0\7abc"),
        chunk(b"tEXt", b"transparency\0none"),
        chunk(b"tEXt", b"icc_profile\0none"),
        chunk(b"eXIf", b"broken"),
        chunk(b"pHYs", b""),
        chunk(b"tEXt", b"a\0b")[:-1] + b"?",
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 70,
    ]
    for body in chunks:
        for place in (33, len(plain) - 12):  # after the header, before the end
            pixels, notes = read_image_bytes(plain[:place] + body + plain[place:], "x")
            assert pixels.equal(expected), body[:20]
            assert all("colour profile ignored" in note for note in notes)


# --- colour profiles ---

SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
CURVE = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in np.linspace(0, 1, 1024)]


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, PCS XYZ (Lab for inks)."""
    tags = {b"desc": b"desc" + bytes(7) + b"\2x" + bytes(79), b"wtpt": xyz((0.9642, 1, 0.8249)), **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    head = struct.pack(">I4s4s4s4s4s", start + len(body), b"none", b"\2\x10\0\0", b"mntr", space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(values: float | Sequence[float]) -> bytes:
    if isinstance(values, float):
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(values * 256))
    return b"curv" + bytes(4) + struct.pack(f">I{len(values)}H", len(values), *(round(v * 65535) for v in values))


def rgb_profile(primaries: Sequence[Sequence[float]], gamma: float | Sequence[float]) -> bytes:
    tags = {name + b"XYZ": xyz(primary) for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return profile(b"RGB ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))})


def in_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("primaries", "gamma"), [(SRGB, 1.0), (ADOBE, 2.19921875), (DISPLAY_P3, 2.19921875)])
def test_colour_profiles_are_converted_to_srgb(kind: str, primaries: Sequence[Sequence[float]], gamma: float) -> None:
    array = photo_like()
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, notes = read_image_bytes(encoded(kind, array, icc_profile=rgb_profile(primaries, gamma), **options), "x")
    expected = in_srgb((array / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(SRGB))
    assert np.abs(as_hwc(pixels) - expected).max() <= 1.1
    assert notes == ["colour profile converted to sRGB"]


def test_profiles_of_greyscale_with_8_and_16_bits_and_alpha() -> None:
    linear = profile(b"GRAY", {b"kTRC": curve(1.0)})
    values = np.arange(256)
    expected = in_srgb(values / 255)
    for depth, kind in ((1, "PNG"), (257, "PNG"), (257, "TIFF")):
        grey = (values * depth).astype(np.uint8 if depth == 1 else np.uint16)[None]
        pixels, notes = read_image_bytes(encoded(kind, grey, icc_profile=linear), "x")
        assert np.abs(as_hwc(pixels)[0] - expected[:, None]).max() <= 0.51
        assert notes == [*[DEPTH] * (depth == 257), GREY, "colour profile converted to sRGB"]

    with_alpha = np.stack([values, 255 - values], axis=-1).astype(np.uint8)[None]
    pixels, _ = read_image_bytes(encoded("PNG", with_alpha, icc_profile=linear), "x")
    share = (255 - values) / 255
    assert np.abs(as_hwc(pixels)[0, :, 1] - (expected * share + 255 * (1 - share))).max() <= 1.5


def test_profile_of_inks() -> None:
    """A profile by which white is white, all inks together are black, and each is the same grey."""
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += (
        bytes(range(256)) * 4
        + bytes([255, 128, 128])
        + bytes([128, 128, 128]) * 14
        + bytes([0, 128, 128])
        + bytes(range(256)) * 3
    )
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    buffer = io.BytesIO()
    inks.save(buffer, "TIFF", icc_profile=profile(b"CMYK", {b"A2B0": table}))
    pixels, notes = read_image_bytes(buffer.getvalue(), "x")
    assert np.abs(as_hwc(pixels).astype(int) - 119).max() <= 2  # L* = 50.2
    assert notes == ["CMYK converted to RGB", "colour profile converted to sRGB"]


@pytest.mark.parametrize("points", [26, 1024])
def test_srgb_profiles_leave_every_value_as_it_is(points: int) -> None:
    every = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    curve_points = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, 1024), CURVE)
    pixels, notes = read_image_bytes(encoded("PNG", every, icc_profile=rgb_profile(SRGB, curve_points)), "x")
    np.testing.assert_array_equal(as_hwc(pixels), every)
    assert notes == []


def test_a_broken_or_mismatched_profile_is_a_note() -> None:
    good = rgb_profile(ADOBE, 2.2)
    for array, bad in ((photo_like(), b"none"), (photo_like(), good[:200]), (photo_like()[..., 0], good)):
        expected = read_image_bytes(encoded("PNG", array), "x").pixels
        pixels, notes = read_image_bytes(encoded("PNG", array, icc_profile=bad), "x")
        assert pixels.equal(expected)
        assert notes[-1].startswith("colour profile ignored (")


def test_a_profile_of_more_than_a_mebibyte_in_a_png_is_used() -> None:
    large = rgb_profile(SRGB, 1.0) + bytes(2 << 20)
    content = encoded("PNG", photo_like())
    packed = chunk(b"iCCP", b"x\0\0" + zlib.compress(large))
    pixels, _ = read_image_bytes(content[:33] + packed + content[33:], "x")
    assert np.abs(as_hwc(pixels) - in_srgb(photo_like() / 255)).max() <= 1.1


# --- frames, warnings ---


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff"])
def test_first_of_several_frames(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 6), (20 * i, 0, 255)) for i in range(12)]
    path = tmp_path / f"x{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    pixels, notes = read_image(path)
    np.testing.assert_array_equal(as_hwc(pixels), np.array(frames[0]))
    assert notes == ["first of several frames used"]


def test_what_pillow_warns_about_becomes_a_note(tmp_path: Path) -> None:
    exif = orientation(1)
    exif[0x010E] = "a description long enough to lie behind the table of tags"
    path = tmp_path / "x.jpg"
    cut_short = exif.tobytes()[:-20]
    Image.fromarray(blocks()).save(path, exif=cut_short)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, notes = read_image(path)
    assert pixels.shape == (3, 32, 64)
    assert len(notes) == 1
    assert notes[0].startswith("Pillow warned: ")


# --- what is refused ---


def test_missing_directory_empty_and_special_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing.png")
    assert "directory" in refusal(tmp_path)
    assert "empty" in refusal(written(tmp_path / "empty.png", b""))
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refusal(tmp_path / "pipe.png")


@pytest.mark.parametrize("name", ["null\0byte.png", "x" * 300 + ".png", "two\nlines.png"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    refusal(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "content",
    [
        b"just some text\n" * 20,
        bytes(500),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"GIF89a",
        b"II*\0\xff\xff\xff\xff",
        b"P6 3 3 255\n",
        png_bytes(0, 4, 8, 2, b"\0"),
    ],
    ids=["text", "zeros", "png", "jpeg", "webp", "eps", "gif", "tiff", "ppm", "no width"],
)
def test_what_is_no_image(tmp_path: Path, content: bytes) -> None:
    refusal(written(tmp_path / "x.png", content))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp", ".jp2", ".ppm", ".avif"])
def test_files_cut_short(tmp_path: Path, suffix: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x{suffix}"
    Image.fromarray(noise).save(path)
    read_image(path)
    content = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(part * len(content))])
        refusal(path)


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    assert limit is not None
    message = refusal(written(tmp_path / "bomb.png", png_bytes(20_000, 20_000, 8, 2, bytes(1000))))
    assert str(2 * limit) in message
    assert (limit, filters) == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_images_of_which_pillow_only_warns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.fromarray(photo_like()), tmp_path / "x.png", "RGB")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 20 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, notes = read_image(path)
    np.testing.assert_array_equal(as_hwc(pixels), photo_like())
    assert notes == []
    with Image.open(path) as image:
        assert read_pillow_image(image, "x").pixels.equal(pixels)


VALID = [
    encoded("PNG", photo_like(), exif=orientation(6)),
    encoded("PNG", photo_like(channels=4)),
    encoded("PNG", photo_like(channels=1)[..., 0].astype(np.uint16) * 257),
    encoded("JPEG", blocks(), exif=orientation(8)),
    encoded("WEBP", blocks(), exif=orientation(3)),
    encoded("WEBP", photo_like(channels=4), lossless=True),
    encoded("GIF", blocks()),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "x.bin"


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(
    content=st.sampled_from(VALID),
    flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), max_size=8),
    kept=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
)
def test_a_damaged_file_gives_an_image_or_a_refusal(
    scratch: Path, content: bytes, flips: list[tuple[int, int]], kept: float
) -> None:
    mutated = bytearray(content[: max(1, int(kept * len(content)))])
    for place, change in flips:
        mutated[place % len(mutated)] ^= change
    scratch.write_bytes(mutated)
    image, message = None, ""
    try:
        image = read_image(scratch)
    except InputError as error:
        message = str(error)
    if image is None:
        assert len(message.splitlines()) == 1
        assert repr(str(scratch)) in message
    else:
        assert as_hwc(image.pixels).size > 0
        assert all(len(note.splitlines()) == 1 for note in image.notes)


# --- writing ---


def test_written_png_reads_back_exactly(tmp_path: Path) -> None:
    pixels = torch.from_numpy(photo_like()).permute(2, 0, 1)  # not contiguous
    path = tmp_path / "out.png"
    path.write_bytes(b"an older file")
    write_png(pixels, path)
    assert torch.equal(read_image(path).pixels, pixels)
    with Image.open(path) as image:
        assert image.format == "PNG"
    assert os.listdir(tmp_path) == ["out.png"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # the umask's, not a private temporary's


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def save_half(self: Image.Image, path: Path, format: str) -> None:
        Path(path).write_bytes(b"\x89PNG half")
        raise interruption("in the middle")

    path = tmp_path / "out.png"
    path.write_bytes(b"an older file")
    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises((KeyboardInterrupt, InputError), match="in the middle"):
        write_png(torch.zeros(3, 4, 5, dtype=torch.uint8), path)
    assert path.read_bytes() == b"an older file"
    assert os.listdir(tmp_path) == ["out.png"]


def test_where_no_file_can_be_written(tmp_path: Path) -> None:
    pixels = torch.zeros(3, 4, 5, dtype=torch.uint8)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "x.png", tmp_path / "folder", tmp_path / "file" / "x.png"):
        with pytest.raises(InputError, match="cannot write") as caught:
            write_png(pixels, path)
        assert repr(str(path)) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4, 5),
        torch.zeros(1, 3, 4, 5, dtype=torch.uint8),
        torch.zeros(4, 5, 3, dtype=torch.uint8),
    ],
)
def test_only_uint8_images_are_written(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"uint8 pixels of shape \(3, H, W\)"):
        write_png(tensor, tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


# --- ranges ---


@pytest.mark.parametrize("shape", [(256,), (16, 16), (4, 1, 8, 8), (2, 2, 2, 4, 8)])
def test_every_pixel_value_survives_both_ways(shape: tuple[int, ...]) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(shape)
    x = to_model_range(pixels)
    assert x.dtype == torch.float32
    assert x.shape == shape
    torch.testing.assert_close(x.flatten(), torch.linspace(-1, 1, 256))
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_uint8(x.double()), pixels)


def test_to_uint8_clamps_and_rounds_to_nearest() -> None:
    step = 1 / 127.5
    x = torch.tensor([-5.0, -1.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 1 - 0.4 * step, 1.0, 3e38])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(torch.tensor([-2.0, 0.5, 7.0], dtype=torch.bfloat16)).tolist() == [0, 191, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad: float) -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 3] = bad
    with pytest.raises(InputError, match="1 of 96 values"):
        to_uint8(x)


def test_ranges_refuse_the_other_kind_of_tensor() -> None:
    with pytest.raises(InputError, match="float32"):
        to_model_range(torch.zeros(3, 4, 4))
    with pytest.raises(InputError, match="uint8"):
        to_uint8(torch.zeros(3, 4, 4, dtype=torch.uint8))
