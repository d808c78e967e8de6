"""Image files to uint8 RGB tensors and back, and the two pixel ranges (uint8, and the model's [-1, 1])."""

import contextlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError, features
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
# Pillow opens every integer deeper than 16 bits as mode I, and in these formats 16-bit greyscale too; they
# hold nothing deeper, so that there mode I does mean 16 bits.
_SIXTEEN_BITS_AT_MOST = ("PNG", "PPM")

# What pixels need, with the orientation and the colour profile: tags of TIFF, chunks of PNG.
_TIFF_TAGS = {*range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326)}
_TIFF_TAGS |= {332, 338, 339, 347, *range(512, 522), *range(529, 533), 34675}
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT")
_PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # of which Pillow reads the orientation
_JPEG_SEGMENTS = (b"JFIF", b"Adobe", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0")
_LARGEST_CHUNK = 2**25  # bytes, decompressed
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from EXIF's orientations to Image.Transpose

_ALPHA_NOTE = "alpha composited over white"
_GREY_NOTE = "greyscale repeated to three channels"
_DEPTH_NOTE = "16-bit reduced to 8 bits"


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
    check_image_file(path)
    return _read(f"cannot read image {str(path)!r}", lambda: _opened(Path(path).read_bytes()), interleaved)


def check_image_file(path: str | Path) -> None:
    """Refuse what no image can be read from, before it is opened.

    Raises:
        InputError: there is no such file, or it is not a regular one, or larger than `LARGEST_FILE`.
    """
    subject = f"cannot read image {str(path)!r}"
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{subject}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{subject}: it is {'a directory' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    if status.st_size > LARGEST_FILE:
        raise InputError(f"{subject}: it has {status.st_size} bytes, more than any image that can be read")


def read_image_bytes(data: bytes, name: str, interleaved: bool = False) -> ImageFile:
    """Read an image file's content, as `read_image` does the file.

    Args:
        data: the whole content.
        name: what to call the image in messages.
        interleaved: as `read_image`'s.

    Returns:
        As `read_image`.

    Raises:
        InputError: the content is empty, or for what `read_image` refuses a file.
    """
    return _read(f"cannot read image {name!r}", lambda: _opened(data), interleaved)


def read_pillow_image(image: Image.Image, name: str) -> ImageFile:
    """Turn a Pillow image, loaded or only opened, into pixels, as `read_image` does a file.

    Args:
        image: one that is opened but not yet loaded gets loaded; otherwise it is left as it is.
        name: what to call the image in messages.

    Returns:
        As `read_image`.

    Raises:
        InputError: for what `read_image` refuses a file.
    """
    return _read(f"cannot read image {name!r}", lambda: contextlib.nullcontext(image))


def _read(
    subject: str, opened: Callable[[], AbstractContextManager[Image.Image]], interleaved: bool = False
) -> ImageFile:
    """Decode what `opened` gives, with every failure an InputError that begins with `subject`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with opened() as image:
                pixels, notes = _decode(image)
        except InputError as error:
            raise InputError(f"{subject}: {error}") from error
        except Image.DecompressionBombError as error:
            reason = f"it has more pixels than the limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)}; make it smaller first"
            raise InputError(f"{subject}: {reason}") from error
        except UnidentifiedImageError as error:
            kinds = f"{', '.join(_FORMATS)}, with 8 or 16 bits per channel"
            reason = f"it is damaged, or not an image of these kinds: {kinds}"
            raise InputError(f"{subject}: {reason}") from error
        except Exception as error:
            # Pillow's decoders answer damaged files with whatever their parsing trips over: OSError,
            # SyntaxError, struct.error, zlib.error, IndexError, OverflowError, MemoryError …
            detail = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{subject}: it is damaged, cut short or not readable ({detail})") from error
    remarks = {" ".join(str(w.message).split()): None for w in caught if issubclass(w.category, UserWarning)}
    pixels = pixels if interleaved else pixels.contiguous()
    return ImageFile(pixels, notes + [f"Pillow warned: {remark}" for remark in remarks])


def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # a Pillow may be built without some


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    if not data:
        raise InputError("the file is empty")
    if data.startswith(GIT_LFS):
        raise InputError(GIT_LFS_ADVICE)
    metadata: Mapping[str, Any] = {}
    with contextlib.suppress(struct.error, IndexError):  # what is damaged here is refused by Pillow
        if data.startswith(b"\x89PNG"):
            data, metadata = _without_png_metadata(data)
        elif data.startswith(b"\xff\xd8"):
            data = _without_jpeg_metadata(data)
        elif data.startswith((b"II*\0", b"MM\0*")):
            data = _without_tiff_metadata(data)
        elif data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
            _check_jpeg_2000(data)
    with Image.open(io.BytesIO(data), formats=_readable_formats()) as image:
        image.info.update(metadata)
        yield image


def _without_png_metadata(data: bytes) -> tuple[bytes, Mapping[str, Any]]:
    """A PNG without the chunks that Pillow may refuse it for, and what is of use of them, as in Pillow's `info`."""
    kept, place = [data[:8]], 8
    info: dict[str, str | bytes] = {}
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place = place, place + length + 12
        if kind in _PNG_CHUNKS:
            kept.append(data[start:place])
            continue
        body = data[start + 8 : place - 4]
        key, _, text = body.partition(b"\0")
        with contextlib.suppress(zlib.error):
            if kind == b"iCCP" or (kind == b"zTXt" and key in _PNG_TEXTS):
                text = zlib.decompressobj().decompress(text[1:], _LARGEST_CHUNK)
        if kind in (b"eXIf", b"iCCP"):
            info["exif" if kind == b"eXIf" else "icc_profile"] = body if kind == b"eXIf" else text
        elif key in _PNG_TEXTS:
            info[key.decode()] = text.decode("latin-1")
    return b"".join(kept), info


def _without_jpeg_metadata(data: bytes) -> bytes:
    """A JPEG with those of its application segments that pixels, orientation and colours need."""
    kept, start = [data[:2]], 2
    while data[start : start + 1] == b"\xff" and data[start + 1] not in (0xDA, 0xFF):  # the scan; padding
        end = start + 2 + int(struct.unpack_from(">H", data, start + 2)[0])
        empty_profile = data.startswith(b"ICC_PROFILE", start + 4) and end - start < 18
        if data[start + 1] & 0xF0 != 0xE0 or (data.startswith(_JPEG_SEGMENTS, start + 4) and not empty_profile):
            kept.append(data[start:end])
        start = max(end, start + 4)
    return b"".join(kept) + data[start:]


def _without_tiff_metadata(data: bytes) -> bytes:
    """A TIFF that has of its first page's tags only those that the pixels need."""
    order, start, tags = _tiff_tags(data)
    kept = [entry for tag, entry in tags if tag in _TIFF_TAGS]
    end = start + 2 + 12 * len(tags)
    page = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + data[end : end + 4]
    return data[:start] + page + data[start + len(page) :]


def _tiff_tags(data: bytes) -> tuple[str, int, list[tuple[int, bytes]]]:
    """The byte order of a TIFF, or of EXIF, the place of its first directory, and its entries with their tags."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    return order, start, [(struct.unpack_from(f"{order}H10x", data, at)[0], data[at : at + 12]) for at in places]


def _decode(image: Image.Image) -> ImageFile:
    """Turn an opened file into upright RGB pixels and notes; its InputErrors do not name the file."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > 2 * limit:  # as Pillow, of images that were made without it
        raise Image.DecompressionBombError
    notes = []
    raw_mode, kind, profile = _raw_mode(image), image.format, image.info.get("icc_profile")
    if getattr(image, "is_animated", False):  # how many there are takes reading them all, of which one may be broken
        notes.append("first of several frames used")
    _check_samples(image)
    image.load()
    turn = None if kind == "TIFF" else _TURNS.get(_orientation(image))  # a TIFF was turned when it was loaded
    if turn is not None:
        image = image.transpose(Image.Transpose(turn))

    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BITS_AT_MOST)
    if sixteen_bit and raw_mode != "I;12":
        pixels, more = _from_sixteen_bit_grey(image, profile)
        return ImageFile(pixels, notes + more)
    if image.mode not in _GREY_MODES + _COLOUR_MODES + _OTHER_COLOUR_SPACES:
        known = {"F": "32-bit float", "I": "32-bit or signed", "I;16": "12-bit", "La": "premultiplied greyscale"}
        raise InputError(f"{known.get(image.mode, image.mode)} pixels; save it with 8 or 16 bits per channel")

    if ";16" in raw_mode:
        notes.append(_DEPTH_NOTE)
    if image.mode in _OTHER_COLOUR_SPACES:
        notes.append(f"{image.mode} converted to RGB")
    grey = image.mode in _GREY_MODES or raw_mode == "LA;16B"  # opened as RGBA
    if grey:
        notes.append(_GREY_NOTE)
    alpha, mode = None, image.mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    array, more = _as_srgb(image, image.mode, None if mode == "LAB" else profile)  # LAB names its colours itself
    notes += more
    if array is None:
        array = np.array(image.convert("RGB"))
    if alpha is not None and alpha.getextrema()[0] != 255:
        image = Image.fromarray(array)
        image.putalpha(alpha)
        array = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
        notes.append(_ALPHA_NOTE)
    return ImageFile(torch.from_numpy(array).permute(2, 0, 1), notes)


def _check_samples(image: Image.Image) -> None:
    """Refuse what Pillow opens and gets wrong."""
    tags = getattr(image, "tag_v2", {})
    bits, photometric, compression = tags.get(258, (1,))[0], tags.get(262, 0), tags.get(259, 1)
    separate = tags.get(284, 1) == 2 and tags.get(277, 1) > 1
    uncompressed = compression == 1 and (bits > 8 or tags.get(266, 1) == 2)
    grey_alpha = photometric in (0, 1, 3) and any(tags.get(338, ()))
    unnamed_alpha = photometric == 2 and tags.get(277, 1) == 4 and 338 not in tags
    wrong = {
        "signed samples": bits == 8 and 2 in tags.get(339, ()),
        "16-bit samples of which 0 is white": bool(tags) and photometric == 0 and bits == 16,
        "samples predicted without LZW or deflate": tags.get(317, 1) != 1 and compression in (1, 32773),
        "planes that Pillow mixes up": separate and (photometric == 8 or grey_alpha or uncompressed or unnamed_alpha),
        "inks without Adobe's marker that tells how they are stored": (image.format, image.mode) == ("JPEG", "CMYK")
        and "adobe" not in image.info,
        "a transparent colour of 2, 4 or 16 bits, which Pillow misreads": "transparency" in image.info
        and _raw_mode(image) in ("L;2", "L;4", "RGB;16B"),
    }
    for kind, found in wrong.items():
        if found:
            raise InputError(f"{kind}; save it as 8-bit RGB or greyscale, with an alpha channel if need be")


def _check_jpeg_2000(data: bytes) -> None:
    """Refuse depths that Pillow does not scale to 8 or 16 bits, or that make its white overflow to black."""
    start = data.find(b"\xff\x4f\xff\x51")  # the codestream's size
    (count,) = struct.unpack_from(">H", data, start + 40)
    bits = {depth % 128 + 1 for depth in data[start + 42 : start + 42 + 3 * count : 3]}
    if start >= 0 and bits != {8} and (count > 1 or min(bits) < 8):
        raise InputError(f"JPEG 2000 of {max(bits)} bits per channel; save it with 8, or as PNG")


def _orientation(image: Image.Image) -> int:
    """The orientation of EXIF, whatever else is in there; where it has none, what Pillow finds in other metadata."""
    with contextlib.suppress(KeyError, struct.error):
        order, _, tags = _tiff_tags(re.sub(b"^(Exif\0\0){1,2}", b"", image.info["exif"]))
        return int(struct.unpack_from(f"{order}H", dict(tags)[0x0112], 8)[0])
    with contextlib.suppress(Exception):  # broken EXIF
        return int(image.getexif().get(0x0112, 1))
    return 1


def _as_srgb(image: Image.Image, mode: str, profile: bytes | None) -> tuple[np.ndarray | None, list[str]]:
    """The image's values (H, W, 3) in sRGB, or None if they stay as they are, and notes."""
    try:
        convert = None if profile is None else _profile_converter(profile, mode)
    except Exception as error:  # broken, of another kind of pixels, or this Pillow has no colour management
        return None, [f"colour profile ignored ({' '.join(str(error).split()) or type(error).__name__})"]
    return (None, []) if convert is None else (convert(image), ["colour profile converted to sRGB"])


@lru_cache(maxsize=16)
def _profile_converter(profile: bytes, mode: str) -> Callable[[Image.Image], np.ndarray] | None:
    """What converts images of `mode` from a profile to sRGB; None if that would change no value by more than 1."""
    ramps: Mapping[str, np.ndarray] = {"L": np.arange(256, dtype=np.uint8), "I;16": np.arange(65536, dtype=np.uint16)}
    grey = ramps.get(mode)
    # Optimised, dark levels of linear greyscale would be off by up to 10 of 255.
    flags = ImageCms.Flags.NONE if grey is None else ImageCms.Flags.NOOPTIMIZE
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB", flags=flags)

    def convert(image: Image.Image) -> np.ndarray:
        return np.array(ImageCms.applyTransform(image, transform))

    if grey is not None:
        table = convert(Image.fromarray(grey[None]))[0]
        unchanged = np.abs(table - 255 * (grey / grey[-1])[:, None]).max() <= 1
        return None if unchanged else lambda image: table[np.array(image)]
    samples = 15 * np.indices((18, 18, 18), dtype=np.uint8).reshape(3, 18, -1).transpose(1, 2, 0)
    unchanged = mode == "RGB" and np.abs(convert(Image.fromarray(samples)) - samples.astype(int)).max() <= 1
    return None if unchanged else convert


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


def _from_sixteen_bit_grey(image: Image.Image, profile: bytes | None) -> ImageFile:
    # Not by Pillow, which clips at 255. 257 is odd, so v / 257 is never half-way between two integers.
    wide = np.array(image).astype(np.int32)
    array, more = _as_srgb(image, "I;16", profile)
    if array is None:
        array = ((wide + 128) // 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    notes = [_DEPTH_NOTE, _GREY_NOTE, *more]
    transparent = wide == image.info.get("transparency", -1)
    if transparent.any():
        array[transparent] = 255
        notes.append(_ALPHA_NOTE)
    return ImageFile(torch.from_numpy(array).permute(2, 0, 1), notes)


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
