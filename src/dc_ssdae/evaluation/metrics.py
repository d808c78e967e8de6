"""Image quality, from torchmetrics, on images rounded to uint8."""

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of one uint8 image (3, H, W) against another."""
    return float(peak_signal_noise_ratio(image.double(), reference.double(), data_range=255.0))


def ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity of one uint8 image (3, H, W) against another (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5; the mean is over all pixels, the image reflected at its border.
    """
    return float(structural_similarity_index_measure(image[None].double(), reference[None].double(), data_range=255.0))
