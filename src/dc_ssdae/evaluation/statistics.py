"""One pass over images, shared by processes, and the statistics of latents that such a pass gathers."""

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dc_ssdae.data.loader import BrokenImage, ValidationImage, ValidationImages, validation_loader
from dc_ssdae.distributed import Processes
from dc_ssdae.files import finite
from dc_ssdae.latent import DiagonalGaussian, LatentMoments

ACTIVE_VARIANCE = 0.01
"""Variance of a channel's mean above which it counts as active (Burda et al. 2016)."""


def survey(
    images: ValidationImages,
    work: Callable[[Sequence[ValidationImage], Tensor], object],
    batch_size: int,
    workers: int,
    processes: Processes,
    advance: Callable[[int], object] | None = None,
) -> tuple[dict[int, BrokenImage], int]:
    """Go through images; of several processes, each works on its share, and all learn what could not be read.

    Sharded networks need every process to call them equally often: so the last image fills up each share.

    Args:
        images: to read.
        work: called with each batch, and whether each of its images counts, (B,) bool: not one that cannot be read,
            which is black, or that fills up the share. An `InputError` in one process is raised in all.
        batch_size: images at a time, in each process.
        workers: processes that read images; 0 reads in this one.
        processes: that share the images.
        advance: called after each batch with the number of its images, in all processes together.

    Returns:
        The images that cannot be read, by their places; and how many were enlarged.

    Raises:
        InputError: `work` raised it, or the data set can no longer be read.
    """
    count = len(images)
    places = range(processes.index, processes.count * -(-count // processes.count), processes.count)
    batches = validation_loader(images, [min(place, count - 1) for place in places], batch_size, workers)
    broken: dict[int, BrokenImage] = {}
    enlarged: set[int] = set()
    for start in range(0, len(places), batch_size):
        batch = processes.together(partial(next, batches))
        counts = [place < count and image.broken is None for place, image in zip(places[start:], batch, strict=False)]
        broken |= {image.place: image.broken for image in batch if image.broken is not None}
        enlarged |= {image.place for image in batch if image.enlarged}
        processes.together(partial(work, batch, torch.tensor(counts)))
        if advance is not None:
            advance(len(batch))
    return dict(sorted(ChainMap(*processes.gather(broken)).items())), len(set().union(*processes.gather(enlarged)))


def latent_statistics(
    encode: Callable[[Tensor], DiagonalGaussian],
    images: ValidationImages,
    channels: int,
    batch_size: int,
    workers: int,
    processes: Processes | None = None,
    advance: Callable[[int], object] | None = None,
) -> tuple[LatentMoments, dict[int, BrokenImage], int]:
    """Encode images and gather the moments of their latents, of all processes; and give what `survey` does.

    Args:
        encode: uint8 (B, 3, S, S) on the CPU to the Gaussian over (B, c, h, w), on any device.
        images: to encode.
        channels: c.
        batch_size: see `survey`, as for what else is not said here and what it raises.
        workers: likewise.
        processes: likewise; this one alone by default.
        advance: likewise.
    """
    processes, moments = processes or Processes(), LatentMoments(channels)

    def work(batch: Sequence[ValidationImage], counts: Tensor) -> None:
        moments.add(encode(torch.stack([image.pixels for image in batch])), counts)

    found = survey(images, work, batch_size, workers, processes, advance)
    return LatentMoments.from_states(torch.stack(processes.gather(moments.state()))), *found


@dataclass(frozen=True)
class LatentProfile:
    """What the latents of a data set are like.

    Args:
        mean: of each of the c channels, over images and places.
        std: of each channel, of samples: Var z = Var μ + E σ².
        kl: of each channel from N(0, 1), in nats per image (summed over places, averaged over images); None for an
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


@dataclass
class LatentProfiler:
    """What a `LatentProfile` is made of, in float64, of some latents.

    Args:
        moments: of the c channels.
        products: Σ (μ - mean)(μ - mean)ᵀ over images and places, (c, c).
        kl: sum over images, of each channel, (c,); NaN without a variance.
    """

    moments: LatentMoments
    products: Tensor
    kl: Tensor

    @classmethod
    def of(cls, posterior: DiagonalGaussian) -> "LatentProfiler":
        """Gather it of a batch over (B, c, h, w)."""
        mean, *logvars = (side.detach().cpu().double().transpose(0, 1).flatten(1) for side in posterior.moments)
        logvar = logvars[0] if logvars else torch.tensor(torch.nan)
        moments = LatentMoments(len(mean))
        moments.add(posterior)
        away = mean - moments.mean[:, None]
        return cls(moments, away @ away.T, 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=1))

    def merge(self, other: "LatentProfiler") -> "LatentProfiler":
        """Take in what another one has gathered; gives itself."""
        apart, values = other.moments.mean - self.moments.mean, (self.moments.values, other.moments.values)
        between = torch.outer(apart, apart) * (math.prod(values) / max(1, sum(values)))
        self.moments.merge(other.moments)
        self.products = self.products + other.products + between
        self.kl = self.kl + other.kl
        return self

    def profile(self) -> LatentProfile:
        """The profile of all latents so far, at least one."""
        covariance = self.products / self.moments.values
        squared = covariance.square().sum()
        dimensions = float(covariance.trace().square() / squared) if squared > 0 else 0.0
        active = int((covariance.diagonal() > ACTIVE_VARIANCE).sum())
        kl = None if self.kl.isnan().all() else (self.kl / self.moments.images).tolist()
        return LatentProfile(*self.moments.mean_and_std(), kl, dimensions, active, self.moments.images)
