"""Reading every kind of file people have, refusing the rest in one line, writing, the two pixel ranges."""

import io
import itertools
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from broken_samples import chunk, encoded, png_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from tiny_models import refusal

from dc_ssdae.data.images import read_image, read_image_bytes, to_model_range, to_uint8, write_png
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


def tiff_bytes(bits: int, samples: bytes, width: int, height: int) -> bytes:
    """A greyscale TIFF made by hand."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 122, 277: 1, 278: height, 279: len(samples)}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + samples


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image: bytes | Image.Image) -> tuple[np.ndarray, list[str]]:
    """The pixels (H, W, 3) and notes."""
    pixels, notes = read_image_bytes(image, "x")
    assert (pixels.dtype, pixels.ndim, pixels.shape[0], pixels.is_contiguous()) == (torch.uint8, 3, 3, True)
    return pixels.permute(1, 2, 0).numpy(), notes


# --- pixel modes ---


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_rgb_is_read_unchanged(tmp_path: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "x"
    path.write_bytes(encoded(photo_like(), kind, **options))
    pixels, notes = read_image(path)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), photo_like())
    assert notes == []
    interleaved = read_image(str(path), interleaved=True).pixels
    assert (pixels.is_contiguous(), interleaved.stride(0), pixels.equal(interleaved)) == (True, 1, True)


def test_greyscale_and_black_and_white() -> None:
    grey = photo_like(channels=1)[..., 0]
    for array, expected in ((grey, grey), (grey > 100, np.where(grey > 100, 255, 0))):
        pixels, notes = decoded(encoded(array, "PNG"))
        np.testing.assert_array_equal(pixels, expected[..., None].repeat(3, axis=2))
        assert notes == [GREY]


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 4), ("LA", 2)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_composited_over_white(kind: str, mode: str, channels: int) -> None:
    array = photo_like(channels=channels)
    pixels, notes = decoded(stored(Image.fromarray(array, mode), kind))
    alpha = array[..., -1:] / 255
    assert np.abs(pixels - (array[..., :-1] * alpha + 255 * (1 - alpha))).max() <= 1
    assert notes == ([ALPHA] if mode == "RGBA" else [GREY, ALPHA])
    array[..., -1] = 255
    assert ALPHA not in decoded(stored(Image.fromarray(array, mode), kind))[1]


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    indices = (np.arange(12 * 20) % 4).astype(np.uint8).reshape(12, 20)
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 128], [255, 255, 255]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())  # turns the mode into P
    return image, indices, colours


@pytest.mark.parametrize(
    ("kind", "transparency"), [("PNG", None), ("PNG", 1), ("PNG", bytes([255, 0, 255, 255])), ("GIF", 1)]
)
def test_palette(kind: str, transparency: int | bytes | None) -> None:
    image, indices, colours = palette_image()
    pixels, notes = decoded(stored(image, kind, **({} if transparency is None else {"transparency": transparency})))
    if transparency is not None:
        colours[1] = 255
    np.testing.assert_array_equal(pixels, colours[indices])
    assert notes == [ALPHA] * (transparency is not None)


def test_transparent_colour_without_a_palette() -> None:
    pixels, notes = decoded(png_bytes(2, 1, 8, 2, bytes([0, 7, 8, 9, 7, 8, 10]), b"\0\7\0\10\0\11"))
    assert (pixels.tolist(), notes) == ([[[255, 255, 255], [7, 8, 10]]], [ALPHA])
    pixels, notes = decoded(png_bytes(2, 1, 8, 0, bytes([0, 7, 9]), b"\0\7"))
    assert (pixels.tolist(), notes) == ([[[255] * 3, [9] * 3]], [GREY, ALPHA])


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key"),
    [(2, 0, b"\0\x60", b"\0\1"), (4, 0, b"\0\x12", b"\0\1"), (16, 0, bytes(5), bytes(2)), (16, 2, bytes(13), bytes(6))],
)
def test_transparent_colour_that_pillow_would_miss_is_refused(bits: int, colour: int, row: bytes, key: bytes) -> None:
    assert "transparent colour" in refusal(decoded, png_bytes(2, 1, bits, colour, row, key))
    assert decoded(png_bytes(2, 1, bits, colour, row))[0].shape == (1, 2, 3)


@pytest.mark.parametrize(("mode", "kind"), [("YCbCr", "TIFF"), ("LAB", "TIFF"), ("CMYK", "TIFF"), ("CMYK", "JPEG")])
def test_other_colour_spaces_come_back_as_the_colours_they_were(mode: str, kind: str) -> None:
    if mode == "LAB" and not features.check("littlecms2"):
        pytest.skip("this Pillow has no colour management")
    if (mode, kind) == ("YCbCr", "TIFF") and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("before Pillow 13, Pillow cannot read such a file of its own")
    muted = blocks() // 2 + 60  # saturated colours lose more in 8-bit LAB
    content = stored(Image.fromarray(muted).convert(mode), kind, quality=100)
    assert kind == "TIFF" or b"Adobe" in content  # the marker that says the inks are stored inverted
    pixels, notes = decoded(content)
    assert np.median(np.abs(pixels.astype(int) - muted)) <= 3
    assert notes == [f"{mode} converted to RGB"]


@pytest.mark.parametrize("mode", ["F", "I", "RGBX"])
def test_other_modes_are_refused(mode: str) -> None:
    assert f"mode {mode}; save it with 8 or 16 bits" in refusal(decoded, Image.new(mode, (4, 3)))


# --- sixteen bits ---


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2"), ("JPEG2000", "<u2")]
)
def test_sixteen_bit_greyscale_is_scaled_and_rounded(kind: str, dtype: str) -> None:
    values = np.arange(65536).reshape(256, 256)
    pixels, notes = decoded(encoded(values.astype(dtype), kind))
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels, expected[..., None].repeat(3, axis=2))
    assert notes == [DEPTH, GREY]


def test_sixteen_bit_colour_is_remarked() -> None:
    samples = b"\0" + struct.pack(">4H", 0, 32768, 65535, 65535)
    pixels, notes = decoded(png_bytes(1, 1, 16, 6, samples))
    assert (pixels.tolist(), notes) == ([[[0, 128, 255]]], [DEPTH])
    pixels, notes = decoded(png_bytes(1, 1, 16, 4, b"\0" + struct.pack(">2H", 32768, 0)))
    assert (pixels.tolist(), notes) == ([[[255, 255, 255]]], [DEPTH, GREY, ALPHA])


# --- right, or refused ---


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_of_every_kind_are_right_or_refused(planes: str, compression: str | None) -> None:
    tifffile = pytest.importorskip("tifffile")
    kinds = [("minisblack", 1, None), ("miniswhite", 1, None), ("rgb", 3, None), ("separated", 4, None)]
    kinds += [("rgb", 4, "unassalpha"), ("rgb", 4, "unspecified"), ("minisblack", 2, "unassalpha"), ("cielab", 3, None)]
    read = set()
    for (photometric, samples, extra), dtype in itertools.product(kinds, ["u1", "u2", "u4", "i1", "i2", "f4"]):
        values = (np.arange(12 * 20 * samples) * 7919 % 251).reshape(12, 20, samples)
        array = (values * (257 if dtype == "u2" else 1)).astype(dtype)
        array = array[..., 0] if samples == 1 else array.transpose(2, 0, 1) if planes == "separate" else array
        file = io.BytesIO()
        options = {"planarconfig": planes if samples > 1 else None, "extrasamples": extra and [extra]}
        tifffile.imwrite(file, array, photometric=photometric, compression=compression, metadata=None, **options)
        try:
            pixels, _ = decoded(file.getvalue())
        except InputError:
            continue
        read.add((photometric, samples, dtype))
        expected = values[..., :3] if samples > 2 else values[..., :1].repeat(3, axis=2)
        if photometric == "miniswhite":
            expected = 255 - expected
        if photometric == "separated":
            expected = (255 - expected) * (255 - values[..., 3:]) / 255
        if extra == "unassalpha":
            expected = 255 + (expected - 255.0) * values[..., -1:] / 255
        assert photometric == "cielab" or np.abs(pixels - expected).max() <= 2.1, (photometric, samples, dtype)
    assert {("minisblack", 1, "u1"), ("minisblack", 1, "u2"), ("rgb", 3, "u1")} <= read
    assert {dtype for _, _, dtype in read} <= {"u1", "u2"}
    assert (planes == "contig") == (("rgb", 4, "u1") in read)


def test_samples_that_pillow_would_misread_are_refused() -> None:
    inks = stored(Image.new("CMYK", (8, 8)), "JPEG")
    marker = inks.index(b"\xff\xee\0\x0eAdobe")
    grey_jp2, colour_jp2 = encoded(photo_like(channels=1)[..., 0], "JPEG2000"), encoded(photo_like(), "JPEG2000")
    size = grey_jp2.index(b"\xff\x4f\xff\x51") + 42
    odd = {
        "mode I;16": tiff_bytes(12, b"\xff\xff\xff" * 2, 2, 2),
        "Adobe": inks[:marker] + inks[marker + 16 :],
        "4 bits": grey_jp2[:size] + b"\3" + grey_jp2[size + 1 :],
        "16 bits": colour_jp2[:size] + b"\x0f\1\1" * 3 + colour_jp2[size + 9 :],
    }
    for word, content in odd.items():
        assert word in refusal(decoded, content)


# --- orientation and other metadata ---


def upright(array: np.ndarray, value: int) -> np.ndarray:
    """As Pillow turns an array."""
    image = Image.fromarray(array)
    image.getexif()[0x0112] = value
    return np.array(ImageOps.exif_transpose(image))


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(value: int) -> None:
    array, exif = photo_like(), orientation(value)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        pixels, notes = decoded(encoded(array, kind, exif=exif, **options))
        np.testing.assert_array_equal(pixels, upright(array, value))
        assert notes == []
    pixels, _ = decoded(encoded(blocks(), "JPEG", quality=95, exif=exif))
    assert np.median(np.abs(pixels.astype(int) - upright(blocks(), value).astype(int))) <= 2
    # Uncompressed TIFFs of these modes are those that Pillow maps into memory.
    grey = array[..., 0]
    for dtype, scale in (("u1", 1), ("<u2", 257), (">u2", 257)):
        pixels, _ = decoded(encoded((grey.astype(int) * scale).astype(dtype), "TIFF", exif=exif))
        np.testing.assert_array_equal(pixels[..., 1], upright(grey, value))


def test_pillow_images_are_turned_upright_and_left_as_they_were() -> None:
    content = encoded(photo_like(), "PNG", exif=orientation(6))
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        for _ in range(2):
            np.testing.assert_array_equal(decoded(image)[0], decoded(content)[0])
        assert image.size == (20, 12)


def test_orientation_in_the_texts_of_png() -> None:
    array, exif = photo_like(), f"\nexif\n   99\n{orientation(6).tobytes().hex()}\n"
    for zipped in (False, True, None):
        info = PngInfo()
        if zipped is None:
            info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6">')
        else:
            info.add_text("Raw profile type exif", exif, zip=zipped)
        np.testing.assert_array_equal(decoded(encoded(array, "PNG", pnginfo=info))[0], upright(array, 6))


def test_no_text_or_broken_metadata_costs_an_image() -> None:
    png, jpeg = encoded(photo_like(), "PNG"), encoded(blocks(), "JPEG", exif=orientation(6))
    long = zlib.compress(bytes(3 << 20))
    texts = [chunk(b"zTXt", b"prompt\0\0" + long), chunk(b"iTXt", b"workflow\0\1\0\0\0" + long)]
    texts += [chunk(b"tEXt", b"transparency\0none"), chunk(b"tEXt", b"a\0b")[:-1] + b"?", chunk(b"eXIf", b"broken")]
    texts += [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 70]
    for body, place in itertools.product(texts, (33, len(png) - 12)):  # after the header, before the end
        np.testing.assert_array_equal(decoded(png[:place] + body + png[place:])[0], photo_like())
    for body in (b"ICC_PROFILE\0\1\2x", b"MPF\0II*\0", b"Exif\0\0II", b""):
        segment = b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body
        at = jpeg.index(b"\xff\xdb")  # after the intact EXIF
        np.testing.assert_array_equal(decoded(jpeg[:at] + segment + jpeg[at:])[0], decoded(jpeg)[0])


# --- colour profiles ---

SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
CURVE = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in np.linspace(0, 1, 1024)]


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, PCS XYZ."""
    tags = {b"desc": b"desc" + bytes(7) + b"\2x" + bytes(79), b"wtpt": xyz((0.9642, 1, 0.8249)), **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4s4s4s4s4s", start + len(body), b"none", b"\2\x10\0\0", b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(values: Sequence[float]) -> bytes:
    return b"curv" + bytes(4) + struct.pack(f">I{len(values)}H", len(values), *(round(v * 65535) for v in values))


def rgb_profile(primaries: Sequence[Sequence[float]], points: Sequence[float]) -> bytes:
    tags = {name + b"XYZ": xyz(primary) for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return profile(b"RGB ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(points))})


def in_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("primaries", "gamma"), [(SRGB, 1.0), (ADOBE, 2.19921875)])
def test_colour_profiles_are_converted_to_srgb(primaries: Sequence[Sequence[float]], gamma: float) -> None:
    array, points = photo_like(), np.linspace(0, 1, 1024) ** gamma
    expected = in_srgb((array / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(SRGB))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        pixels, notes = decoded(encoded(array, kind, icc_profile=rgb_profile(primaries, points), **options))
        assert np.abs(pixels - expected).max() <= 1.1
        assert notes == ["colour profile converted to sRGB"]


def test_profiles_of_greyscale_with_8_and_16_bits_and_alpha() -> None:
    linear = profile(b"GRAY", {b"kTRC": curve([0.0, 1.0])})
    values = np.arange(256)
    expected = in_srgb(values / 255)
    for depth, kind in ((1, "PNG"), (257, "PNG"), (257, "TIFF")):
        grey = (values * depth).astype(np.uint8 if depth == 1 else np.uint16)[None]
        pixels, notes = decoded(encoded(grey, kind, icc_profile=linear))
        assert np.abs(pixels[0] - expected[:, None]).max() <= 0.51
        assert notes == [*[DEPTH] * (depth == 257), GREY, "colour profile converted to sRGB"]
    with_alpha = np.stack([values, 255 - values], axis=-1).astype(np.uint8)[None]
    share = (255 - values) / 255
    pixels, _ = decoded(encoded(with_alpha, "PNG", icc_profile=linear))
    assert np.abs(pixels[0, :, 1] - (expected * share + 255 * (1 - share))).max() <= 1.5


def test_srgb_profiles_leave_every_value_as_it_is() -> None:
    every = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for points in (26, 1024):
        curve_points = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, 1024), CURVE)
        pixels, notes = decoded(encoded(every, "PNG", icc_profile=rgb_profile(SRGB, curve_points)))
        np.testing.assert_array_equal(pixels, every)
        assert notes == []


def test_a_broken_or_mismatched_profile_is_a_note() -> None:
    good = rgb_profile(ADOBE, CURVE)
    for array, bad in ((photo_like(), b"none"), (photo_like(), good[:200]), (photo_like()[..., 0], good)):
        pixels, notes = decoded(encoded(array, "PNG", icc_profile=bad))
        np.testing.assert_array_equal(pixels, decoded(encoded(array, "PNG"))[0])
        assert notes[-1].startswith("colour profile ignored (")


# --- frames, warnings ---


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_first_of_several_frames(kind: str, options: dict[str, bool]) -> None:
    frames = [Image.new("RGB", (8, 6), (20 * i, 0, 255)) for i in range(12)]
    pixels, notes = decoded(stored(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    np.testing.assert_array_equal(pixels, np.array(frames[0]))
    assert notes == ["first of several frames used"]


def test_what_pillow_warns_about_becomes_a_note_unless_it_is_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 64 - 1)  # from twice as many on, Pillow refuses
    exif = orientation(1)
    exif[0x010E] = "a description long enough to lie behind the table of tags"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        pixels, notes = decoded(encoded(blocks(), "JPEG", exif=exif.tobytes()[:-20]))
        assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (32 * 64 - 1, filters)
    assert pixels.shape == (32, 64, 3)
    assert [note.startswith("Pillow warned: ") for note in notes] == [True]


# --- what is refused ---


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 30 * 2**30)
    told = {"missing.png": "No such file", "": "directory", "pipe.png": "not a regular file", "huge.png": "larger"}
    for name in (*told, "null\0byte.png", "x" * 300 + ".png", "two\nlines.png"):
        message = refusal(read_image, f"{tmp_path}/{name}")
        assert told.get(name, "") in message
        assert repr(f"{tmp_path}/{name}") in message


VALID = [
    encoded(photo_like(), "PNG", exif=orientation(6)),
    encoded(photo_like(channels=1)[..., 0].astype(np.uint16) * 257, "PNG"),
    encoded(blocks(), "JPEG", exif=orientation(8)),
    encoded(photo_like(channels=4), "WEBP", lossless=True),
    encoded(blocks(), "GIF"),
    *(encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), kind) for kind in ("TIFF", "JPEG2000")),
]


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(
    content=st.sampled_from(VALID),
    flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), max_size=8),
    kept=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
)
def test_a_damaged_file_gives_an_image_or_a_refusal(content: bytes, flips: list[tuple[int, int]], kept: float) -> None:
    mutated = bytearray(content[: max(1, int(kept * len(content)))])
    for place, change in flips:
        mutated[place % len(mutated)] ^= change
    try:
        pixels, notes = decoded(bytes(mutated))
        lines = notes
        assert pixels.size > 0
    except InputError as error:
        assert str(error).startswith("cannot read image 'x': ")  # noqa: PT017
        lines = [str(error)]
    assert all(len(line.splitlines()) == 1 for line in lines)


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
    missing = tmp_path / "missing" / "x.png"
    assert f"cannot write image {str(missing)!r}" in refusal(write_png, pixels, missing)
    for tensor in (pixels.float(), pixels[None], pixels.permute(1, 2, 0)):
        assert "uint8 pixels of shape (3, H, W)" in refusal(write_png, tensor, path)


# --- ranges ---


def test_every_pixel_value_survives_both_ways() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    x = to_model_range(pixels)
    assert (x.dtype, x.shape) == (torch.float32, pixels.shape)
    torch.testing.assert_close(x.flatten(), torch.linspace(-1, 1, 256))
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_uint8(x.double()), pixels)


def test_to_uint8_clamps_and_rounds_to_nearest() -> None:
    step = 1 / 127.5
    x = torch.tensor([-5.0, -1.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 1 - 0.4 * step, 1.0, 3e38])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(torch.tensor([-2.0, 0.5, 7.0], dtype=torch.bfloat16)).tolist() == [0, 191, 255]


def test_ranges_refuse_the_other_kind_of_tensor() -> None:
    assert "1 of 2 values" in refusal(to_uint8, torch.tensor([0.0, float("nan")]))
    assert "not from float32" in refusal(to_model_range, torch.zeros(3, 4, 4))
    assert "not from uint8" in refusal(to_uint8, torch.zeros(3, 4, 4, dtype=torch.uint8))
