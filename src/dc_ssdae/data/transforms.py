"""Padding to the encoder's multiple, resizing and cropping; randomness comes from an explicit generator.

torchvision is imported where its transforms are called, because that takes longer than most commands that pad or crop.
"""

import torch
from torch import Tensor

from dc_ssdae.errors import InputError


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad images at the right and bottom until both sides are multiples of `multiple`.

    Each side on its own is padded by reflection (the border pixel itself is not doubled), or, where the pad
    is not smaller than the side, so that one reflection cannot fill it, by repeating the border pixel.

    Args:
        x: (..., C, H, W), any dtype.
        multiple: in pixels, at least 1; the encoder's factor f.

    Returns:
        The padded images, and the original (H, W) in pixels for `crop_to`.

    Raises:
        InputError: `multiple` is not positive, or the images have no pixels.
    """
    height, width = _sides(x, multiple)
    bottom, right = -height % multiple, -width % multiple
    if bottom:
        x = x[..., _with_pad(height, bottom), :]
    if right:
        x = x[..., _with_pad(width, right)]
    return x, (height, width)


def crop_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Keep the top left `size` of images: undoes `pad_to_multiple`.

    Args:
        x: (..., H', W').
        size: (H, W) in pixels, at least 1 and at most (H', W').

    Returns:
        (..., H, W), a view.

    Raises:
        InputError: the images are smaller than `size`.
    """
    height, width = size
    _check_larger(x, height, width)
    return x[..., :height, :width]


def resize_shorter_side(x: Tensor, size: int) -> Tensor:
    """Resize images so that the shorter side is `size`, keeping the aspect ratio: bicubic, antialiased.

    The filter is torchvision's bicubic with `antialias=True`: a = -0.5, widened when shrinking, as Pillow's
    BICUBIC.

    Args:
        x: (..., C, H, W), uint8 (rounded and clamped) or floating point (may overshoot its input's range).
        size: in pixels, at least 1. The longer side is rounded down.

    Returns:
        Same dtype, shorter side `size`.

    Raises:
        InputError: `size` is not positive, or the images have no pixels.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    if min(_sides(x, size)) == size:
        return x
    return tvf.resize(x, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)


def central_part(x: Tensor) -> Tensor:
    """Cut the ends off thin images, longer than 8 times their width, before the centre of them is enlarged.

    The middle stays the middle, and what is left is more than a square crop of the centre and its filter can reach.

    Args:
        x: (..., C, H, W).

    Returns:
        A view; of other images, `x` itself.
    """
    height, width = _sides(x)
    rows, columns = (max(0, (side - 8 * min(height, width)) // 2) for side in (height, width))
    return x[..., rows : height - rows, columns : width - columns]


def center_crop(x: Tensor, size: int) -> Tensor:
    """Cut the central square out of images.

    Args:
        x: (..., C, H, W), both sides at least `size`.
        size: the square's side in pixels, at least 1.

    Returns:
        (..., C, size, size).

    Raises:
        InputError: `size` is not positive, or larger than the images (they are never padded).
    """
    from torchvision.transforms.v2 import functional as tvf

    _check_larger(x, size, size)
    return tvf.center_crop(x, [size, size])


def random_scaled_crop(
    pixels: Tensor, size: int, aug_scale: float, generator: torch.Generator, flip: bool = True
) -> Tensor:
    """Resize an image at random, cut a random square from it, and mirror it or not.

    The shorter side becomes s · `size`, s uniform in [1, aug_scale] (bicubic, antialiased); the square's place is
    uniform; it is mirrored left to right with probability one half. The square is cut before it is resized, which
    comes to the same but for the border pixels and resizes only what is kept. The filter is that of
    `resize_shorter_side`; images smaller than the result are enlarged.

    Args:
        pixels: (3, H, W), uint8 or floating point.
        size: the result's side in pixels, at least 1.
        aug_scale: at least 1; 1 cuts a square of the whole shorter side.
        generator: the only source of randomness; every call draws four numbers from it.
        flip: False never mirrors.

    Returns:
        (3, size, size), same dtype.

    Raises:
        InputError: `pixels` is not one image, or `size` or `aug_scale` is out of range.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    height, width = _sides(pixels, size)
    if not 1.0 <= aug_scale < float("inf") or pixels.shape[:-2] != (3,):
        shape = tuple(pixels.shape)
        raise InputError(f"crops are drawn from an image (3, H, W), not {shape}; aug_scale {aug_scale} is at least 1")
    shorter = min(height, width)

    draws = torch.rand(4, generator=generator, device=generator.device, dtype=torch.float64).tolist()
    side = min(max(round(shorter / (1.0 + (aug_scale - 1.0) * draws[0])), 1), shorter)
    top = int(draws[1] * (height - side + 1))
    left = int(draws[2] * (width - side + 1))
    crop = tvf.resized_crop(
        pixels, top, left, side, side, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return tvf.horizontal_flip(crop) if flip and draws[3] < 0.5 else crop


def _with_pad(side: int, added: int) -> list[int]:
    """The pixels along a side, by their places, with those of the pad behind them."""
    reflected = range(side - 2, side - 2 - added, -1)
    return [*range(side), *(reflected if added < side else [side - 1] * added)]


def _sides(x: Tensor, size: int = 1) -> tuple[int, int]:
    if x.ndim < 3 or 0 in x.shape[-3:] or size < 1:
        wanted = "images have the shape (..., C, H, W) and at least one pixel, before and after"
        raise InputError(f"{wanted}; these have {tuple(x.shape)}, and the new size is {size}")
    return x.shape[-2], x.shape[-1]


def _check_larger(x: Tensor, height: int, width: int) -> None:
    if not (1 <= height <= x.shape[-2] and 1 <= width <= x.shape[-1]):
        raise InputError(f"cannot crop {x.shape[-2]}x{x.shape[-1]} pixels to {height}x{width}")
