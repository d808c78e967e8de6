"""Image files to uint8 RGB tensors and back, and the two pixel ranges (uint8, and the model's [-1, 1])."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from dc_ssdae.errors import InputError
from dc_ssdae.files import GIT_LFS, GIT_LFS_ADVICE, written_beside

# A closed list: among Pillow's other readers are one that runs an external program (EPS) and some that take
# almost any bytes for an image (TGA), so that a text file would come out as noise instead of an error.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_OPTIONAL_EXTENSIONS = {"avif": ("avif",), "jpg_2000": ("j2k", "jp2"), "webp": ("webp",)}  # by Pillow's features
IMAGE_EXTENSIONS = (
    *("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff"),
    *(name for kind, names in _OPTIONAL_EXTENSIONS.items() if kind in features.get_supported() for name in names),
)
"""Extensions of the image files that this Pillow reads, in lower case and without the dot; data sets have no others."""

LARGEST_FILE = 2**31
"""Bytes; more than the largest image that is read has without compression."""

_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa")
_OTHER_COLOUR_SPACES = ("CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# Pillow opens every integer deeper than 16 bits as mode I, and in these formats 16-bit greyscale too; they
# hold nothing deeper, so that there mode I does mean 16 bits.
_SIXTEEN_BITS_AT_MOST = ("PNG", "PPM")

_ALPHA_NOTE = "alpha composited over white"
_GREY_NOTE = "greyscale repeated to three channels"
_DEPTH_NOTE = "16-bit reduced to 8 bits"


class ImageFile(NamedTuple):
    """An image as read from a file: uint8 `pixels` (3, H, W), and `notes` in words on what was converted."""

    pixels: Tensor
    notes: list[str]


def read_image(path: str | Path) -> ImageFile:
    """Read an image file upright, as 8-bit RGB.

    EXIF orientation is applied. Alpha is composited over white, greyscale repeated, 16-bit greyscale rounded
    to 8 bits (16-bit colour is cut to its high byte, by Pillow), CMYK, YCbCr, LAB and HSV converted to RGB,
    the first frame of several taken: each with a note. Embedded colour profiles are ignored, the values taken
    as sRGB.

    Args:
        path: an AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or WebP file of at most
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.

    Returns:
        The pixels, uint8 (3, H, W) in RGB order, and the notes. What Pillow warns about becomes a note too.

    Raises:
        InputError: there is no such file, or it is not an image, damaged, cut short, too large, or of a pixel
            type that has no one meaning in 8 bits (32-bit integer or floating point).
    """
    check_image_file(path)
    # Not opened by its path: Pillow then maps uncompressed TIFFs into memory, and those that their
    # orientation turns by 90 degrees come out scrambled.
    return _read(f"cannot read image {str(path)!r}", lambda: _opened(open(path, "rb")))


def check_image_file(path: str | Path) -> None:
    """Refuse what no image can be read from, before it is opened.

    Raises:
        InputError: there is no such file, or it is not a regular one, empty, or larger than `LARGEST_FILE`.
    """
    subject = f"cannot read image {str(path)!r}"
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{subject}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{subject}: it is {'a directory' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    if status.st_size == 0:
        raise InputError(f"{subject}: the file is empty")
    if status.st_size > LARGEST_FILE:
        raise InputError(f"{subject}: it has {status.st_size} bytes, more than any image that can be read")


def read_image_bytes(data: bytes, name: str) -> ImageFile:
    """Read an image file's content, as `read_image` does the file.

    Args:
        data: the whole content.
        name: what to call the image in messages.

    Returns:
        As `read_image`.

    Raises:
        InputError: the content is empty, or for what `read_image` refuses a file.
    """
    subject = f"cannot read image {name!r}"
    if not data:
        raise InputError(f"{subject}: the file is empty")
    return _read(subject, lambda: _opened(io.BytesIO(data)))


def read_pillow_image(image: Image.Image, name: str) -> ImageFile:
    """Turn a Pillow image, loaded or only opened, into pixels, as `read_image` does a file.

    Args:
        image: one that is opened but not yet loaded gets loaded and turned upright; a loaded one is left as it is.
        name: what to call the image in messages.

    Returns:
        As `read_image`.

    Raises:
        InputError: for what `read_image` refuses a file.
    """
    return _read(f"cannot read image {name!r}", lambda: contextlib.nullcontext(_own_copy(image)))


def _read(subject: str, opened: Callable[[], AbstractContextManager[Image.Image]]) -> ImageFile:
    """Decode what `opened` gives, with every failure an InputError that begins with `subject`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with opened() as image:
                pixels, notes = _decode(image)
        except InputError as error:
            raise InputError(f"{subject}: {error}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            reason = f"it has more pixels than the limit of {Image.MAX_IMAGE_PIXELS}; make it smaller first"
            raise InputError(f"{subject}: {reason}") from error
        except UnidentifiedImageError as error:
            reason = f"it is damaged, or not an image of these kinds: {', '.join(_FORMATS)}"
            raise InputError(f"{subject}: {reason}") from error
        except Exception as error:
            # Pillow's decoders answer damaged files with whatever their parsing trips over: OSError,
            # SyntaxError, struct.error, zlib.error, IndexError, OverflowError, MemoryError …
            detail = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{subject}: it is damaged, cut short or not readable ({detail})") from error
    remarks = {" ".join(str(w.message).split()): None for w in caught if issubclass(w.category, UserWarning)}
    return ImageFile(pixels, notes + [f"Pillow warned: {remark}" for remark in remarks])


def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # a Pillow may be built without some


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    with file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise InputError(GIT_LFS_ADVICE)
        file.seek(0)
        with Image.open(file, formats=_readable_formats()) as image:
            yield image


def _own_copy(image: Image.Image) -> Image.Image:
    """A copy to turn upright. Of an image not yet loaded none is made: loading loses how its samples are stored."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError
    if getattr(image, "tile", None):
        return image
    copy = image.copy()
    copy.format = image.format  # which Pillow's copy leaves out
    return copy


def _decode(image: Image.Image) -> ImageFile:
    """Turn an opened file into upright RGB pixels and notes; its InputErrors do not name the file."""
    notes = []
    raw_mode = _raw_mode(image)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"first of {frames} frames used")
    # In place, so that the format and the transparent colour stay with the image.
    ImageOps.exif_transpose(image, in_place=True)

    if "transparency" in image.info and raw_mode in ("L;2", "L;4", "RGB;16B"):
        # Pillow compares the colour, at its own depth, with pixels already brought to 8 bits.
        raise InputError(
            "a transparent colour of 2, 4 or 16 bits, which Pillow misreads; save it with an alpha channel"
        )
    sixteen_bit = image.mode in _SIXTEEN_BIT_MODES or (image.mode == "I" and image.format in _SIXTEEN_BITS_AT_MOST)
    if sixteen_bit and raw_mode != "I;12":
        pixels, more = _from_sixteen_bit_grey(image)
        return ImageFile(pixels, notes + more)
    if image.mode not in _GREY_MODES + _COLOUR_MODES + _OTHER_COLOUR_SPACES:
        known = {"F": "32-bit floating-point", "I": "32-bit or signed integer", "I;16": "12-bit"}
        raise InputError(f"{known.get(image.mode, image.mode)} pixels; save it with 8 or 16 bits per channel")

    if ";16" in raw_mode:
        notes.append(_DEPTH_NOTE)
    if image.mode in _OTHER_COLOUR_SPACES:
        notes.append(f"{image.mode} converted to RGB")
    if image.mode in _GREY_MODES or raw_mode == "LA;16B":  # opened as RGBA
        notes.append(_GREY_NOTE)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest_alpha, _ = image.getchannel("A").getextrema()
        if lowest_alpha != 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            notes.append(_ALPHA_NOTE)
    array = np.array(image.convert("RGB"))
    return ImageFile(torch.from_numpy(array).permute(2, 0, 1).contiguous(), notes)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for how the file stores its samples ("RGB;16B"); known only before loading."""
    tile = getattr(image, "tile", None)
    if not tile:
        return image.mode
    codec, _, _, arguments = tile[0]
    if isinstance(arguments, str):
        return arguments
    if codec in ("ppm", "ppm_plain") and arguments[1] > 255:  # (mode, largest value)
        return f"{arguments[0]};16"
    return str(arguments[0]) if arguments else image.mode


def _from_sixteen_bit_grey(image: Image.Image) -> ImageFile:
    # Not by Pillow, which clips at 255. 257 is odd, so v / 257 is never half-way between two integers.
    wide = np.array(image).astype(np.int64)
    grey = ((wide + 128) // 257).astype(np.uint8)
    notes = [_DEPTH_NOTE, _GREY_NOTE]
    transparent = wide == image.info.get("transparency", -1)
    if transparent.any():
        grey[transparent] = 255
        notes.append(_ALPHA_NOTE)
    return ImageFile(torch.from_numpy(grey).repeat(3, 1, 1), notes)


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
