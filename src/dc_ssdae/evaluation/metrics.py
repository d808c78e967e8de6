"""Image quality, from torchmetrics and scikit-image, on images rounded to uint8.

The libraries are imported where they are used: they take seconds, and a run that does not evaluate needs none of them.
"""

import torch
from torch import Tensor


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of one uint8 image (3, H, W) against another."""
    return float(psnr_each(reference[None], image[None]))


def psnr_each(reference: Tensor, images: Tensor) -> Tensor:
    """As `psnr`, of each of uint8 images (B, 3, H, W): (B,) float64; infinite where they are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        images.double(), reference.double(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity of one uint8 image (3, H, W) against another (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5; the mean is over all pixels, the image reflected at its border.
    """
    return float(ssim_each(reference[None], image[None]))


def ssim_each(reference: Tensor, images: Tensor) -> Tensor:
    """As `ssim`, of each of uint8 images (B, 3, H, W): (B,) float64."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(images.double(), reference.double(), data_range=255.0, reduction="none")
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
