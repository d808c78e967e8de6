"""Image quality, by torchmetrics and scikit-image: an image (3, H, W) against another one, and image by image.

Images are uint8; those that SSIM compares may be unrounded. The libraries are imported where they are used: they take
seconds, and a run that does not evaluate needs none of them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

ImageMetric = Callable[[Tensor, Tensor], Tensor]
"""From reference and images, (B, 3, H, W) uint8, or float32 where the protocol has them unrounded, to (B,)."""


def each(metric: Callable[[Tensor, Tensor], float]) -> ImageMetric:
    """Take a metric of two images pair by pair, so that no value depends on the batch: (B,) float64."""

    def measure(reference: Tensor, images: Tensor) -> Tensor:
        return torch.tensor([metric(*pair) for pair in zip(reference, images, strict=True)], dtype=torch.float64)

    return measure


def psnr(reference: Tensor, image: Tensor, highest: float = math.inf) -> float:
    """Peak signal-to-noise ratio in dB, at most `highest`, which equal images have."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return min(float(peak_signal_noise_ratio(_float64(image), _float64(reference), data_range=255.0)), highest)


def ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, the border reflected.

    Images of a floating-point dtype are clamped to [-1, 1] and measured there, around 0, as LightningDiT does it: the
    means that SSIM compares are other ones than those of pixels from 0 to 255.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    data_range = (-1.0, 1.0) if image.is_floating_point() else (0.0, 255.0)
    sides = image.float()[None], reference.float()[None]
    return float(structural_similarity_index_measure(*sides, data_range=data_range))


def scikit_ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity with scikit-image's defaults: uniform window of 7 pixels, unbiased, no border."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(reference.cpu().numpy(), image.cpu().numpy(), channel_axis=0, data_range=255))


def mse(reference: Tensor, image: Tensor) -> float:
    """Mean squared error in units of the full range, squared."""
    return float((_float64(reference) - _float64(image)).div(255.0).square().mean())


def _float64(image: Tensor) -> Tensor:
    """In float64; on the CPU where the device, Apple's GPU, has none."""
    return (image.cpu() if image.device.type == "mps" else image).double()
