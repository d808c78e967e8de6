"""Encode and decode one photo of any size, and measure it against the bicubic baseline."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.transforms import crop_to, pad_to_multiple
from dc_ssdae.evaluation.metrics import psnr, ssim
from dc_ssdae.evaluation.profile import timed


class PhotoResult(NamedTuple):
    """A held-out photo: pictures uint8 (3, H, W), and by name the quality of model and baseline, and times in ms."""

    name: str
    original: Tensor
    reconstruction: Tensor
    baseline: Tensor
    figures: Mapping[str, float]


@torch.inference_mode()
def measure_photo(model: DCSSDAE, name: str, pixels: Tensor, repeats: int = 3) -> PhotoResult:
    """Reconstruct a photo in one step and compare it, and the baseline of as many values, with the original.

    Args:
        model: in eval mode.
        name: of the photo.
        pixels: uint8 (3, H, W), any size; padded by reflection and cropped back.
        repeats: timed runs of encode and of decode, after one that is not timed; the median counts.
    """
    x, size = pad_to_multiple(to_model_range(pixels)[None].to(model.device), model.config.downsample_factor)
    z, encode_seconds = timed(lambda: model.encode(x).latent_dist.mode(), model.device, repeats)
    y, decode_seconds = timed(lambda: model.decode(z).sample, model.device, repeats)
    reconstruction = to_uint8(crop_to(y[0], size).cpu())
    baseline, _ = bicubic_baseline(pixels, z[0].numel())
    figures = {
        "psnr": psnr(pixels, reconstruction),
        "psnr_bicubic": psnr(pixels, baseline),
        "ssim": ssim(pixels, reconstruction),
        "ssim_bicubic": ssim(pixels, baseline),
        "encode_ms": 1000 * encode_seconds,
        "decode_ms": 1000 * decode_seconds,
    }
    return PhotoResult(name, pixels, reconstruction, baseline, figures)


def bicubic_baseline(pixels: Tensor, latent_values: int) -> tuple[Tensor, tuple[int, int]]:
    """Shrink an image to about `latent_values` numbers and enlarge it again, bicubic with antialiasing.

    Args:
        pixels: uint8 (3, H, W).
        latent_values: c·(H/f)·(W/f) of the model to compare with; h×w has the image's proportions, and 3·h·w is
            about as many, as nearly as rounding both sides allows.

    Returns:
        The image (3, H, W) uint8, and the size (h, w) in between.
    """
    height, width = pixels.shape[-2:]
    scale = math.sqrt(latent_values / (3 * height * width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    # In floating point, because a latent's numbers are not rounded to 8 bits either.
    small = tvf.resize(pixels.float(), list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    back = tvf.resize(small, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return back.round().clamp(0, 255).byte(), size
