"""The latent: a diagonal Gaussian per image, and what may be asked of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dc_ssdae.errors import InputError

LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """A Gaussian with a diagonal covariance over each image's latent (SPEC section 2, "Total loss").

    Args:
        mean: (B, c, h, w), any floating dtype.
        logvar: (B, c, h, w) natural logarithm of the variance, clamped to [-30, 20]; None for an encoder that
            gives a point and no variance, whose samples are its mean and whose KL is zero.

    Raises:
        InputError: mean and logvar differ in shape.
    """

    def __init__(self, mean: Tensor, logvar: Tensor | None = None) -> None:
        if logvar is not None and logvar.shape != mean.shape:
            raise InputError(f"mean and logvar differ in shape: {tuple(mean.shape)} and {tuple(logvar.shape)}")
        self.mean = mean
        self.logvar = None if logvar is None else logvar.clamp(*LOGVAR_RANGE)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Split (B, 2c, h, w) into mean (first c channels) and log-variance (last c channels)."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean: (B, c, h, w)."""
        return self.mean

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Draw one latent per image by the reparameterisation trick, so that gradients reach mean and logvar.

        Args:
            generator: one generator for the whole batch, or one per image; None uses PyTorch's default one.
            noise: (B, c, h, w) standard normal, cast to float32, in place of a generator.

        Returns:
            (B, c, h, w) in the mean's dtype.

        Raises:
            InputError: the list of generators is not as long as the batch; the noise is not of the mean's shape;
                generator and noise are both given.
        """
        if noise is not None:
            if generator is not None:
                raise InputError("give noise or generator, not both")
            if noise.shape != self.mean.shape:
                raise InputError(f"noise has shape {tuple(noise.shape)}; this latent needs {tuple(self.mean.shape)}")
        if self.logvar is None:
            return self.mean
        if noise is None:
            noise = draw_noise(self.mean.shape, generator, device=self.mean.device)
        noise = noise.to(device=self.mean.device, dtype=torch.float32)
        std = torch.exp(0.5 * self.logvar.float())
        return (self.mean.float() + std * noise).to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL divergence from N(0, I): (B,) float32, summed over c, h and w; in float32 under autocast too."""
        if self.logvar is None:
            return torch.zeros(self.mean.shape[0], device=self.mean.device)
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normal noise image by image, so that an image's noise does not depend on the batch's size.

    Args:
        shape: (B, …) of the result.
        generator: one generator, from which the images are drawn one after the other; or a list with one per
            image; or None for PyTorch's default generator. A CPU generator draws on the CPU whatever the device,
            so that a seed means the same noise everywhere.
        device: where the noise is wanted.

    Returns:
        float32 tensor of that shape.

    Raises:
        InputError: the list of generators is not as long as the batch.
    """
    batch, *rest = shape
    generators: Sequence[torch.Generator | None]
    if generator is None or isinstance(generator, torch.Generator):
        generators = [generator] * batch
    else:
        generators = list(generator)
        if len(generators) != batch:
            raise InputError(f"{len(generators)} generators for a batch of {batch} images; give one, or one per image")
    noise = [
        torch.randn(rest, generator=g, device=g.device if g is not None else device, dtype=torch.float32).to(device)
        for g in generators
    ]
    return torch.stack(noise) if noise else torch.empty(tuple(shape), device=device)
