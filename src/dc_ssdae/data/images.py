"""Image files to uint8 RGB tensors and back, and the two pixel ranges (uint8, and the model's [-1, 1])."""

import io
import os
import struct
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from dc_ssdae.errors import InputError
from dc_ssdae.files import check_file, written_beside

# A closed list: among Pillow's other readers are one that runs an external program (EPS) and some that take
# almost any bytes for an image (TGA), so that a text file would come out as noise instead of an error.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

IMAGE_EXTENSIONS = (
    *("avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
    *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
)
"""Extensions of image files, in lower case and without the dot; data sets have no others."""

LARGEST_FILE = 2**31
"""Bytes; more than the largest image that is read has without compression."""

_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa")
_OTHER_COLOUR_SPACES = ("CMYK", "YCbCr", "LAB", "HSV")
# Pillow opens every integer deeper than 16 bits as mode I, and in these formats 16-bit greyscale too; they
# hold nothing deeper, so that there mode I does mean 16 bits.
_SIXTEEN_BITS_AT_MOST = ("PNG", "PPM")

_PNG_ORIENTATIONS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts in which Pillow finds the orientation
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from EXIF's orientations to Image.Transpose


class ImageFile(NamedTuple):
    """An image as read from a file: uint8 `pixels` (3, H, W), and `notes` in words on what was converted."""

    pixels: Tensor
    notes: list[str]


def read_image(path: str | Path, interleaved: bool = False) -> ImageFile:
    """Read an image file upright, as 8-bit RGB.

    EXIF orientation is applied. Embedded colour profiles are converted to sRGB; without one, values are taken as
    sRGB. Alpha is composited over white, greyscale repeated, 16-bit greyscale rounded to 8 bits (16-bit colour is cut
    to its high byte, by Pillow), CMYK, YCbCr, LAB and HSV converted to RGB, the first frame of several taken: each
    with a note, as is a profile that cannot be used.

    Args:
        path: an AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or WebP file of at most
            twice `PIL.Image.MAX_IMAGE_PIXELS` pixels, where Pillow itself refuses.
        interleaved: leave the three values of a pixel side by side in memory, as in the file, and save a copy.

    Returns:
        The pixels, uint8 (3, H, W) in RGB order, and the notes. What Pillow warns about becomes a note too.

    Raises:
        InputError: there is no such file, or it is not an image, damaged, cut short, too large, or of a pixel
            type that has no one meaning in 8 bits (32-bit integer or floating point).
    """
    return read_image_bytes(read_bytes(path), str(path), interleaved)


def read_bytes(path: str | Path) -> bytes:
    """Read the content of an image file.

    Raises:
        InputError: there is no such file, it is not a regular one, or it is larger than `LARGEST_FILE`.
    """
    try:
        check_file(path)
        if os.path.getsize(path) > LARGEST_FILE:
            raise InputError("it is larger than any image that can be read")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # an InputError, or a null byte in the name
        raise InputError(f"cannot read image {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def read_image_bytes(data: bytes | Image.Image, name: str, interleaved: bool = False) -> ImageFile:
    """Decode an image, as `read_image` does a file.

    Args:
        data: the whole content of an image file, or a Pillow image, loaded or only opened.
        name: what to call the image in messages.
        interleaved: as for `read_image`.

    Returns:
        As `read_image`.

    Raises:
        InputError: for the same reasons as `read_image`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            pixels, notes = _decode(data if isinstance(data, Image.Image) else _open(data))
        except Exception as error:
            # Pillow's decoders answer damaged files with whatever their parsing trips over: OSError,
            # SyntaxError, struct.error, zlib.error, IndexError, OverflowError, MemoryError …
            damaged = f"it is damaged, cut short or not readable ({reason(error)})"
            text = str(error) if isinstance(error, InputError) else damaged
            raise InputError(f"cannot read image {name!r}: {text}") from error
    remarks = {" ".join(str(w.message).split()): None for w in caught if issubclass(w.category, UserWarning)}
    pixels = pixels if interleaved else pixels.contiguous()
    return ImageFile(pixels, notes + [f"Pillow warned: {remark}" for remark in remarks])


def reason(error: BaseException) -> str:
    """Say in one line what an exception is about: its type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _open(data: bytes) -> Image.Image:
    with suppress(struct.error, IndexError):  # what is damaged here is refused by Pillow
        if data.startswith(b"\x89PNG"):
            data = _without_texts(data)
        elif data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
            _check_jpeg_2000(data)
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except OSError as error:
        kinds = f"{', '.join(_FORMATS)}, with 8 or 16 bits per channel"
        raise InputError(f"it is damaged, or not an image of these kinds: {kinds}") from error


def _without_texts(data: bytes) -> bytes:
    """A PNG without the texts that Pillow refuses it for where they are long, such as the settings of generators."""
    kept, place = [data[:8]], 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place = place, place + length + 12
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or data.startswith(_PNG_ORIENTATIONS, start + 8):
            kept.append(data[start:place])
    return b"".join(kept)


def _check_jpeg_2000(data: bytes) -> None:
    """Refuse depths that Pillow does not scale to 8 or 16 bits, or that make its white overflow to black."""
    start = data.find(b"\xff\x4f\xff\x51")  # the codestream's size
    (count,) = struct.unpack_from(">H", data, start + 40)
    bits = {depth % 128 + 1 for depth in data[start + 42 : start + 42 + 3 * count : 3]}
    if start >= 0 and bits != {8} and (count > 1 or min(bits) < 8):
        raise InputError(f"JPEG 2000 of {max(bits)} bits per channel; save it with 8, or as PNG")


def _decode(image: Image.Image) -> ImageFile:
    """Turn an opened file into upright RGB pixels and notes; its InputErrors do not name the file."""
    notes = []
    raw_mode, kind, profile = _raw_mode(image), image.format, image.info.get("icc_profile")
    if getattr(image, "is_animated", False):  # how many there are takes reading them all, of which one may be broken
        notes.append("first of several frames used")
    _check_samples(image, raw_mode)
    image.load()
    turn = None
    with suppress(Exception):  # broken EXIF
        turn = None if kind == "TIFF" else _TURNS.get(image.getexif().get(0x0112, 1))  # a loaded TIFF is upright
    if turn is not None:
        image = image.transpose(Image.Transpose(turn))

    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BITS_AT_MOST)
    if ";16" in raw_mode or sixteen_bit:
        notes.append("16-bit reduced to 8 bits")
    if sixteen_bit and raw_mode != "I;12":
        # Not by Pillow, which clips at 255. 257 is odd, so v / 257 is never half-way between two integers.
        image = Image.fromarray(((np.array(image).astype(np.int32) + 128) // 257).astype(np.uint8))
    if image.mode not in _GREY_MODES + _COLOUR_MODES + _OTHER_COLOUR_SPACES:
        raise InputError(f"its pixels are of Pillow's mode {image.mode}; save it with 8 or 16 bits per channel")
    if image.mode in _OTHER_COLOUR_SPACES:
        notes.append(f"{image.mode} converted to RGB")
    grey = image.mode in _GREY_MODES or raw_mode == "LA;16B"  # opened as RGBA
    if grey:
        notes.append("greyscale repeated to three channels")
    alpha, mode = None, image.mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    try:
        to_srgb = _srgb_transform(profile, image.mode) if profile and mode != "LAB" else None  # LAB needs no profile
        if to_srgb is not None:
            image = ImageCms.applyTransform(image, to_srgb) or image
            notes.append("colour profile converted to sRGB")
    except Exception as error:  # broken, of another kind of pixels, or this Pillow has no colour management
        notes.append(f"colour profile ignored ({reason(error)})")
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] != 255:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        notes.append("alpha composited over white")
    return ImageFile(torch.from_numpy(np.array(image)).permute(2, 0, 1), notes)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for how the file stores its samples ("RGB;16B"); known only before loading."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else None
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else image.mode


def _check_samples(image: Image.Image, raw_mode: str) -> None:
    """Refuse what Pillow opens and gets wrong."""
    tags = getattr(image, "tag_v2", {})
    bits, photometric, samples = tags.get(258, (1,))[0], tags.get(262, 0), tags.get(277, 1)
    separate = samples > 1 and tags.get(284, 1) == 2
    wrong = {
        "signed samples": bits == 8 and 2 in tags.get(339, ()),
        "16-bit samples of which 0 is white": bool(tags) and photometric == 0 and bits == 16,
        "a predictor without LZW or deflate": tags.get(317, 1) != 1 and tags.get(259, 1) not in (5, 8, 32946),
        "planes that Pillow mixes up": separate and (photometric, bits, samples) != (2, 8, 3),
        "inks without Adobe's marker that tells how they are stored": image.format == "JPEG"
        and image.mode == "CMYK"
        and "adobe" not in image.info,
        "a transparent colour of 2, 4 or 16 bits, which Pillow misreads": "transparency" in image.info
        and raw_mode in ("L;2", "L;4", "I;16B", "RGB;16B"),
    }
    for kind, found in wrong.items():
        if found:
            raise InputError(f"{kind}; save it as 8-bit RGB or greyscale, with an alpha channel if need be")


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts images of `mode` from a profile to sRGB; None if that would change no value by more than 1."""
    # Optimised, dark levels of linear greyscale would be off by up to 10 of 255.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB", flags=flags)
    colours = 15 * np.indices((18, 18, 18), dtype=np.uint8).reshape(3, 18, -1).transpose(1, 2, 0)
    samples = Image.fromarray(colours).convert(mode)
    converted = ImageCms.applyTransform(samples, transform)
    change = np.array(converted).astype(int) - np.array(samples.convert("RGB"))
    return transform if np.abs(change).max() > 1 else None


def write_png(pixels: Tensor, path: str | Path) -> None:
    """Write an image as PNG, whole or not at all: beside its place first, then renamed.

    Args:
        pixels: uint8 (3, H, W), RGB, on any device.
        path: where to; an existing file is replaced. The folder must exist.

    Raises:
        InputError: the tensor is not such an image, or the file cannot be written.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.numel() == 0:
        raise InputError(f"PNG is written from uint8 pixels of shape (3, H, W), not from {_describe(pixels)}")
    try:
        with written_beside(Path(path)) as beside:
            to_pillow(pixels).save(beside, format="PNG")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write image {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def to_pillow(pixels: Tensor) -> Image.Image:
    """Make a Pillow image of uint8 pixels (3, H, W) in RGB order, on any device."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def to_model_range(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to the model's range: 0 to -1, 255 to 1.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 in [-1, 1], same shape: pixels / 127.5 - 1.

    Raises:
        InputError: the tensor is not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise InputError(f"the model's range is made from uint8 pixels, not from {_describe(pixels)}")
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Map images in the model's range to uint8 pixels: clamped to [-1, 1], then rounded to nearest.

    Args:
        x: any floating-point dtype, any shape, nominally in [-1, 1].

    Returns:
        uint8, same shape; the inverse of `to_model_range`.

    Raises:
        InputError: the tensor is not floating-point, or holds infinities or NaN.
    """
    if not x.is_floating_point():
        raise InputError(f"uint8 pixels are made from a floating-point image, not from {_describe(x)}")
    non_finite = int((~x.isfinite()).sum())
    if non_finite:
        raise InputError(f"{non_finite} of {x.numel()} values of the image are infinite or NaN")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
