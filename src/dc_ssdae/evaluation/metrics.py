"""Image quality, from torchmetrics and scikit-image, on images rounded to uint8 but for one kind of SSIM.

The libraries are imported where they are used: they take seconds, and a run that does not evaluate needs none of them.
"""

import math

import torch
from torch import Tensor


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of one uint8 image (3, H, W) against another."""
    return float(psnr_each(reference[None], image[None]))


def psnr_each(reference: Tensor, images: Tensor, highest: float = math.inf) -> Tensor:
    """As `psnr`, of each of uint8 images (B, 3, H, W): (B,) float64; where they are equal, `highest` in dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = peak_signal_noise_ratio(
        images.double(), reference.double(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=highest)


def ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity of one uint8 image (3, H, W) against another (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5; the mean is over all pixels, the image reflected at its border.
    """
    return float(ssim_each(reference[None], image[None]))


def ssim_each(reference: Tensor, images: Tensor) -> Tensor:
    """As `ssim`, of each of images (B, 3, H, W): (B,) float32.

    Those of a floating-point dtype are clamped to [-1, 1] and measured there, around 0, as LightningDiT does it: the
    means that SSIM compares are other ones than those of pixels from 0 to 255.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    data_range = (-1.0, 1.0) if images.is_floating_point() else (0.0, 255.0)
    value = structural_similarity_index_measure(
        images.float(), reference.float(), data_range=data_range, reduction="none"
    )
    return value.reshape(len(images))


def scikit_ssim_each(reference: Tensor, images: Tensor) -> Tensor:
    """Structural similarity as scikit-image takes it by default, of uint8 images (B, 3, H, W): (B,) float64.

    Uniform window of 7 pixels, unbiased covariances, no border.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(reference.cpu().numpy(), images.cpu().numpy(), strict=True)
    values = [structural_similarity(ours, theirs, channel_axis=0, data_range=255) for ours, theirs in pairs]
    return torch.tensor(values, dtype=torch.float64)


def mse(reference: Tensor, image: Tensor) -> float:
    """Mean squared error of one uint8 image (3, H, W) against another, in units of the full range, squared."""
    return float(mse_each(reference[None], image[None]))


def mse_each(reference: Tensor, images: Tensor) -> Tensor:
    """As `mse`, of each of uint8 images (B, 3, H, W): (B,) float64."""
    return (reference.double() - images.double()).div(255.0).square().mean(dim=(1, 2, 3))
