"""Encode and decode one photo of any size, and measure it against the bicubic baseline."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.transforms import crop_to, pad_to_multiple
from dc_ssdae.evaluation.baseline import bicubic_baseline
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
    device = next(model.parameters()).device
    x, size = pad_to_multiple(to_model_range(pixels)[None], model.config.downsample_factor)
    x = x.to(device)
    z, encode_seconds = timed(lambda: model.encode(x).latent_dist.mode(), device, repeats)
    y, decode_seconds = timed(lambda: model.decode(z).sample, device, repeats)
    reconstruction = to_uint8(crop_to(y[0], size).cpu())
    baseline = bicubic_baseline(pixels, z[0].numel()).image
    figures = {
        "psnr": psnr(pixels, reconstruction),
        "psnr_bicubic": psnr(pixels, baseline),
        "ssim": ssim(pixels, reconstruction),
        "ssim_bicubic": ssim(pixels, baseline),
        "encode_ms": 1000 * encode_seconds,
        "decode_ms": 1000 * decode_seconds,
    }
    return PhotoResult(name, pixels, reconstruction, baseline, figures)
