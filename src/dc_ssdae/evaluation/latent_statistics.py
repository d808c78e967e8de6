"""Statistics of the latents of a data set, which training a latent diffusion model needs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dc_ssdae.data.loader import (
    BrokenImage,
    ValidationImage,
    ValidationImages,
    in_one_line,
    leave_signals_to_the_parent,
)
from dc_ssdae.latent import DiagonalGaussian, LatentMoments


class LatentSurvey(NamedTuple):
    """What one process has gathered of its share of the images, and which of them cannot be read."""

    moments: LatentMoments
    broken: list[BrokenImage]


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

    The sum over processes of `moments.state(process, processes)` is what `LatentMoments.from_state` makes the
    moments of all images from.

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
    loader: DataLoader[list[ValidationImage]] = DataLoader(
        images,  # type: ignore[arg-type]
        sampler=[min(place, count - 1) for place in places],
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_parent(),
        generator=torch.Generator(),
    )
    moments = LatentMoments(channels)
    broken: list[BrokenImage] = []
    done = 0
    for batch in in_one_line(loader):
        own = [place < count for place in places[done : done + len(batch)]]
        done += len(batch)
        counts = [mine and image.broken is None for mine, image in zip(own, batch, strict=True)]
        posterior = encode(torch.stack([image.pixels for image in batch]))
        moments.add(posterior, torch.tensor(counts))
        broken += [image.broken for mine, image in zip(own, batch, strict=True) if mine and image.broken is not None]
        if advance is not None:
            advance(len(batch))
    return LatentSurvey(moments, broken)
