"""KL of the latent's posterior."""

from torch import Tensor

from dc_ssdae.latent import DiagonalGaussian


def kl_loss(posterior: DiagonalGaussian) -> Tensor:
    """KL from N(0, I), summed over c·h·w and averaged over the batch: scalar float32 (SPEC section 2)."""
    return posterior.kl().mean()
