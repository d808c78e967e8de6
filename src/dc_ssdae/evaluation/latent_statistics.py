"""Statistics of the latents of a data set: for training a latent diffusion model, and for judging an encoder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dc_ssdae.data.loader import BrokenImage, ValidationImages, validation_loader
from dc_ssdae.files import finite
from dc_ssdae.latent import DiagonalGaussian, LatentMoments


class LatentSurvey(NamedTuple):
    """What one process has gathered of its share of the images, which cannot be read, and how many were enlarged."""

    moments: LatentMoments
    broken: list[BrokenImage]
    enlarged: int = 0


def latent_statistics(
    encode: Callable[[Tensor], DiagonalGaussian],
    images: ValidationImages,
    channels: int,
    batch_size: int,
    workers: int,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[int], object] | None = None,
) -> LatentSurvey:
    """Encode images and gather the moments of their latents; of several processes, each does its share.

    `LatentMoments.from_states` makes the moments of all images from the processes' `moments.state()`.

    Args:
        encode: uint8 (B, 3, S, S) on the CPU to the Gaussian over (B, c, h, w), on any device.
        images: what to encode.
        channels: c.
        batch_size: images at a time in each process.
        workers: processes that read images; 0 reads in this one.
        process: index of this process.
        processes: how many there are; all of them call `encode` equally often.
        advance: called after each batch with the number of its images.

    Raises:
        InputError: the data set can no longer be read. (What is not finite is refused by `moments.statistics()`.)
    """
    count = len(images)
    # Sharded networks need every process to call them equally often: the last image fills up, and does not count.
    places = range(process, processes * -(-count // processes), processes)
    moments = LatentMoments(channels)
    broken: list[BrokenImage] = []
    done = enlarged = 0
    for batch in validation_loader(images, [min(place, count - 1) for place in places], batch_size, workers):
        own = [place < count for place in places[done : done + len(batch)]]
        done += len(batch)
        counts = [mine and image.broken is None for mine, image in zip(own, batch, strict=True)]
        posterior = encode(torch.stack([image.pixels for image in batch]))
        moments.add(posterior, torch.tensor(counts))
        enlarged += sum(mine and image.enlarged for mine, image in zip(own, batch, strict=True))
        broken += [image.broken for mine, image in zip(own, batch, strict=True) if mine and image.broken is not None]
        if advance is not None:
            advance(len(batch))
    return LatentSurvey(moments, broken, enlarged)


ACTIVE_VARIANCE = 0.01
"""Variance of a channel's mean above which it counts as active (Burda et al. 2016)."""


@dataclass(frozen=True)
class LatentProfile:
    """What the latents of a data set are like.

    Args:
        mean: of each of the c channels, over images and places.
        std: of each channel, of samples: Var z = Var μ + E σ².
        kl: of each channel from N(0, 1), in nats an image (summed over places, averaged over images); None for an
            encoder without a variance.
        effective_dimensions: of the c channels, tr(C)² / tr(C²) of the covariance C of μ over images and places (the
            participation ratio): c where all channels vary equally and independently, 1 where all are one.
        active_channels: whose μ has a variance above 0.01.
        images: how many.
    """

    mean: list[float]
    std: list[float]
    kl: list[float] | None
    effective_dimensions: float
    active_channels: int
    images: int

    def as_json(self) -> dict[str, Any]:
        """All fields; what is not finite is None."""
        return {key: finite(value) for key, value in asdict(self).items()}


class LatentProfiler:
    """Gathers a `LatentProfile` batch by batch, in float64.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        self.moments = LatentMoments(channels)
        self._values = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)  # Σ (μ - mean)(μ - mean)ᵀ
        self._kl: Tensor | None = torch.zeros(channels, dtype=torch.float64)

    def add(self, posterior: DiagonalGaussian) -> None:
        """Take in a batch over (B, c, h, w).

        Raises:
            InputError: the number of channels is another.
        """
        self.moments.add(posterior)
        mu = posterior.mean.detach().cpu().double().transpose(0, 1).flatten(1)
        mean = mu.mean(dim=1)
        away = mu - mean[:, None]
        self._join(mu.shape[1], mean, away @ away.T)
        if posterior.logvar is None:
            self._kl = None
        elif self._kl is not None:
            logvar = posterior.logvar.detach().cpu().double().transpose(0, 1).flatten(1)
            self._kl += 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).sum(dim=1)

    def merge(self, other: "LatentProfiler") -> None:
        """Take in what another one has gathered.

        Raises:
            InputError: the numbers of channels differ.
        """
        self.moments.merge(other.moments)
        self._join(other._values, other._mean, other._products)
        self._kl = None if self._kl is None or other._kl is None else self._kl + other._kl

    def profile(self) -> LatentProfile:
        """The profile of all latents so far, at least one."""
        mean, std = self.moments.mean_and_std()
        covariance = self._products / self._values
        trace = covariance.trace()
        squared = covariance.square().sum()
        images = self.moments.images
        return LatentProfile(
            mean=mean,
            std=std,
            kl=None if self._kl is None else (self._kl / images).tolist(),
            effective_dimensions=float(trace.square() / squared) if squared > 0 else 0.0,
            active_channels=int((covariance.diagonal() > ACTIVE_VARIANCE).sum()),
            images=images,
        )

    def _join(self, values: int, mean: Tensor, products: Tensor) -> None:
        if values == 0:
            return
        total = self._values + values
        apart = mean - self._mean
        self._products = self._products + products + torch.outer(apart, apart) * (self._values * values / total)
        self._mean = self._mean + apart * (values / total)
        self._values = total
