"""The bicubic baseline: what plain resizing does with as many numbers as the latent has."""

import math
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf


class BicubicBaseline(NamedTuple):
    """The resized-and-back image (3, H, W) uint8, and the size (h, w) in between, which has 3·h·w values."""

    image: Tensor
    size: tuple[int, int]


def bicubic_baseline(pixels: Tensor, latent_values: int) -> BicubicBaseline:
    """Shrink an image to about `latent_values` numbers and enlarge it again, bicubic with antialiasing.

    Args:
        pixels: uint8 (3, H, W).
        latent_values: c·(H/f)·(W/f) of the model to compare with; h×w keeps the image's proportions as nearly
            as whole numbers allow and comes as close to 3·h·w = latent_values as it can.
    """
    height, width = pixels.shape[-2:]
    ideal = height * math.sqrt(latent_values / (3 * height * width))
    size = min(
        ((h, max(round(latent_values / (3 * h)), 1)) for h in {max(math.floor(ideal), 1), math.ceil(ideal)}),
        key=lambda side: abs(3 * side[0] * side[1] - latent_values),
    )
    # In floating point, because a latent's numbers are not rounded to 8 bits either.
    small = tvf.resize(pixels.float(), list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    back = tvf.resize(small, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return BicubicBaseline(back.round().clamp(0, 255).byte(), size)
