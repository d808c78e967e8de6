"""Image quality, from torchmetrics, on images rounded to uint8.

torchmetrics is imported where it is used: it takes seconds, and a run that does not evaluate needs none of it.
"""

from torch import Tensor


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of one uint8 image (3, H, W) against another."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(image.double(), reference.double(), data_range=255.0))


def ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity of one uint8 image (3, H, W) against another (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5; the mean is over all pixels, the image reflected at its border.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(image[None].double(), reference[None].double(), data_range=255.0))


def mse(reference: Tensor, image: Tensor) -> float:
    """Mean squared error of one uint8 image (3, H, W) against another, in units of the full range, squared."""
    return float((reference.double() - image.double()).div(255.0).square().mean())
