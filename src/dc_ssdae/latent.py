"""The latent: a diagonal Gaussian per image, what may be asked of it, and statistics over many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dc_ssdae.errors import InputError, counted

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for a whole batch, or one per image; None is PyTorch's default one."""

LOGVAR_RANGE = (-30.0, 20.0)

LOGVAR_IN_TRAINING = 2.0
"""The largest log-variance that a training step computes with.

A variance above the prior's, 1, helps neither the image nor the KL, and trained encoders give none. But one step of
Adam can move a log-variance by tens, because all weights behind it may move the same way, each by about the learning
rate: at 20 a single value then costs a KL of 2·10⁸, at 2 one of 2.2.
"""


class DiagonalGaussian:
    """A Gaussian with a diagonal covariance over each image's latent.

    Args:
        mean: (B, c, h, w), any floating dtype.
        logvar: (B, c, h, w) natural logarithm of the variance, clamped to [-30, 20], through which gradients pass;
            None for an encoder that gives a point and no variance, whose samples are its mean and whose KL is zero.

    Raises:
        InputError: mean and logvar differ in shape.
    """

    def __init__(self, mean: Tensor, logvar: Tensor | None = None) -> None:
        if logvar is not None and logvar.shape != mean.shape:
            raise InputError(f"mean and logvar differ in shape: {tuple(mean.shape)} and {tuple(logvar.shape)}")
        self.mean = mean
        self.logvar = None if logvar is None else _clamped(logvar, *LOGVAR_RANGE)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Split (B, 2c, h, w) into mean (first c channels) and log-variance (last c channels)."""
        return cls(*moments.chunk(2, dim=1))

    @property
    def std(self) -> Tensor:
        """Standard deviation (B, c, h, w); zeros where the encoder gives a point."""
        return torch.zeros_like(self.mean) if self.logvar is None else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance (B, c, h, w); zeros where the encoder gives a point."""
        return torch.zeros_like(self.mean) if self.logvar is None else torch.exp(self.logvar)

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """The mean and, where the encoder gives one, the log-variance: (B, c, h, w) each."""
        return (self.mean,) if self.logvar is None else (self.mean, self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean: (B, c, h, w)."""
        return self.mean

    def sample(self, generator: Generators = None, noise: Tensor | None = None) -> Tensor:
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
        if noise is not None and (generator is not None or noise.shape != self.mean.shape):
            raise InputError(f"give a generator, or noise of shape {tuple(self.mean.shape)}, not both")
        if self.logvar is None:
            return self.mean
        if noise is None:
            noise = draw_noise(self.mean.shape, generator, self.mean.device)
        noise = noise.to(device=self.mean.device, dtype=torch.float32)
        std = torch.exp(0.5 * self.logvar.float())
        return (self.mean.float() + std * noise).to(self.mean.dtype)

    def bounded(self, logvar: float = LOGVAR_IN_TRAINING) -> "DiagonalGaussian":
        """With no log-variance above `logvar`; gradients pass through the bound, so that what is above comes back."""
        return self if self.logvar is None else DiagonalGaussian(self.mean, _clamped(self.logvar, -math.inf, logvar))

    def kl(self) -> Tensor:
        """KL divergence from N(0, I): (B,) float32, summed over c, h and w; in float32 under autocast too."""
        if self.logvar is None:
            return torch.zeros(self.mean.shape[0], device=self.mean.device)
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def _clamped(values: Tensor, lowest: float, highest: float) -> Tensor:
    """Clamp values, and pass gradients through as if not: the difference from itself is 0 and carries them."""
    clamped = values.clamp(lowest, highest)
    return clamped.detach() + (values - values.detach()) if values.requires_grad else clamped


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Draw standard normal noise image by image, so that an image's noise does not depend on the batch's size.

    Args:
        shape: (B, …) of the result.
        generator: one generator, from which the images are drawn one after the other; or a list with one per
            image; or None for PyTorch's default generator, from which all are drawn at once. A CPU generator draws on
            the CPU whatever the device, so that a seed means the same noise everywhere.
        device: where the noise is wanted.

    Returns:
        float32 tensor of that shape.

    Raises:
        InputError: the list of generators is not as long as the batch.
    """
    if generator is None:
        return torch.randn(tuple(shape), device=device, dtype=torch.float32)
    batch, *rest = shape
    generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != batch:
        raise InputError(f"{counted(len(generators), 'generator')} for {counted(batch, 'image')}; give one, or as many")
    noise = [torch.randn(rest, generator=g, device=g.device, dtype=torch.float32).to(device) for g in generators]
    return torch.stack(noise) if noise else torch.empty(tuple(shape), device=device)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of the latents of a data set, which latent diffusion is trained with.

    Either a latent z is normalised channel by channel, (z - mean) / std, or as a whole by two numbers,
    (z - shift_factor) · scaling_factor, with which all values of all channels together have mean 0 and standard
    deviation 1. A channel that never changes has the standard deviation 0.0: divide that one by 1.

    Args:
        mean: of each of the c channels.
        std: of each channel, over images and places, not negative.
        count: of images.

    Raises:
        InputError: there is no number, or one is not finite; or every value of every latent is the same, so that no
            scaling gives a standard deviation of 1.
    """

    mean: list[float]
    std: list[float]
    count: int

    def __post_init__(self) -> None:
        differ = any(self.std) or len(set(self.mean)) > 1
        if not differ or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise InputError("no image was encoded, or the encoder has collapsed: latents are alike, or not finite")

    def settings(self) -> dict[str, Any]:
        """The settings of `DCSSDAE` that hold the statistics, under the names that diffusers gives them.

        shift_factor is the mean of all values of all channels, scaling_factor one over their standard deviation.
        """
        shift = math.fsum(self.mean) / len(self.mean)
        # The mean of the channels' variances, and the variance of their means.
        std = math.hypot(*self.std, *(mean - shift for mean in self.mean)) / math.sqrt(len(self.mean))
        as_a_whole = {"scaling_factor": 1.0 / std, "shift_factor": shift}
        return {**as_a_whole, "latents_mean": list(self.mean), "latents_std": list(self.std)}


class LatentMoments:
    """Gathers the statistics of latents, batch by batch, in float64.

    They are those of samples, without drawing any: by the law of total variance Var z = Var μ + E σ². The sums are
    of differences from the mean (Chan, Golub and LeVeque 1983), so that a large mean costs no digits, and a channel
    that never changes has the standard deviation 0 exactly.

    Args:
        channels: c.
        images: that were gathered.
        values: of each channel that were gathered.
        gathered: (c,) float64 each: their mean, and Σ (μ - mean)² + Σ σ²; 0 where nothing was gathered.
    """

    def __init__(self, channels: int, images: float = 0, values: float = 0, *gathered: Tensor) -> None:
        self.images, self.values = int(images), int(values)
        self.mean, self.spread = gathered or 2 * (torch.zeros(channels, dtype=torch.float64),)

    def add(self, posterior: DiagonalGaussian, weights: Tensor | None = None) -> None:
        """Take in a batch.

        What is not finite is taken in too, and refused by `statistics`, by all processes alike.

        Args:
            posterior: over (B, c, h, w), on any device; h and w may differ from batch to batch.
            weights: (B,), 1 for images that count and 0 for those that fill the batch up; all count by default.

        Raises:
            InputError: the number of channels is another.
        """
        # Chosen, not multiplied by 0, which would keep a NaN; and on the CPU, because not every device has float64.
        chosen = torch.ones(len(posterior.mean)).bool() if weights is None else weights.detach().cpu() != 0
        mu = _by_channel(posterior.mean, chosen)
        if mu.numel() == 0:
            return
        variance, mean = torch.var_mean(mu - mu[:, :1], dim=1, correction=0)
        spread = variance * mu.shape[1]
        if posterior.logvar is not None:
            spread += _by_channel(posterior.logvar, chosen).exp().sum(dim=1)
        self.merge(LatentMoments(mu.shape[0], int(chosen.sum()), mu.shape[1], mu[:, 0] + mean, spread))

    def merge(self, other: "LatentMoments") -> None:
        """Take in what another one has gathered.

        Raises:
            InputError: the numbers of channels differ.
        """
        if other.mean.shape != self.mean.shape:
            raise InputError(f"the statistics are of {len(self.mean)} channels; these latents have {len(other.mean)}")
        if other.values == 0:
            return
        total = self.values + other.values
        apart = other.mean - self.mean
        self.spread = self.spread + other.spread + apart.square() * (self.values * other.values / total)
        self.mean = self.mean + apart * (other.values / total)
        self.images, self.values = self.images + other.images, total

    def state(self) -> Tensor:
        """All that was gathered, as (2 + 2c,) float64 on the CPU, of which `from_states` makes the whole again."""
        return torch.cat([torch.tensor([self.images, self.values], dtype=torch.float64), self.mean, self.spread])

    @classmethod
    def from_states(cls, states: Tensor) -> "LatentMoments":
        """Put together what `state` gave in several places, such as the processes of a run: (places, 2 + 2c)."""
        moments = cls(states.shape[1] // 2 - 1)
        for state in states:
            moments.merge(cls(len(moments.mean), *state[:2].tolist(), *state[2:].chunk(2)))
        return moments

    def statistics(self) -> LatentStatistics:
        """The statistics of all latents so far.

        Raises:
            InputError: there are none, or some are not finite, or all their values are the same.
        """
        return LatentStatistics(*self.mean_and_std(), self.images)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, whatever they are."""
        return self.mean.tolist(), (self.spread / self.values).sqrt().tolist()


def _by_channel(values: Tensor, chosen: Tensor) -> Tensor:
    """Values (B, c, h, w) of the chosen images as (c, n) float64 on the CPU."""
    return values.detach().cpu()[chosen].double().transpose(0, 1).flatten(1)
