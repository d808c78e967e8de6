"""Evaluation within a run: reconstruct validation images in one step and measure them; measure the latents."""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from dc_ssdae.data.images import to_uint8
from dc_ssdae.data.loader import BrokenImage, ValidationImages, validation_loader
from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.latent_statistics import LatentSurvey, latent_statistics
from dc_ssdae.evaluation.metrics import mse, psnr, ssim
from dc_ssdae.latent import DiagonalGaussian, LatentMoments
from dc_ssdae.training.config import METRICS

MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {"psnr": psnr, "ssim": ssim, "mse": mse}
assert MEASURES.keys() == METRICS.keys()


class Evaluation(NamedTuple):
    """Means over the images, how many there were, what could not be read, and how many were enlarged."""

    values: dict[str, float]
    images: int
    broken: list[BrokenImage]
    enlarged: int = 0


def evaluate(
    reconstruct: Callable[[Tensor], Tensor],
    images: ValidationImages,
    processes: Processes,
    batch_size: int,
    workers: int,
) -> Evaluation:
    """Measure reconstructions; every process does its share, and all get the same result.

    Args:
        reconstruct: uint8 (B, 3, S, S) to (B, 3, S, S) in [-1, 1].
        images: what to measure.
        processes: of the run.
        batch_size: images at a time in each process.
        workers: that read images.
    """
    count = len(images)
    # Sharded networks need every process to call them equally often: the last image fills up, and does not count.
    places = range(processes.index, processes.count * -(-count // processes.count), processes.count)
    # Each value at its image's place: the sum over processes then adds zeros, and rounds nothing.
    results = torch.zeros(count, len(MEASURES) + 2, dtype=torch.float64)
    broken: list[BrokenImage] = []
    unread = iter(places)
    for batch in validation_loader(images, [min(place, count - 1) for place in places], batch_size, workers):
        pixels = torch.stack([image.pixels for image in batch])
        reconstructed = reconstruct(pixels.to(processes.device)).cpu()
        for place, image, output in zip(islice(unread, len(batch)), batch, reconstructed, strict=True):
            if place < count and image.broken is not None:
                broken.append(image.broken)
            elif place < count:
                results[place] = results.new_tensor([*measure(image.pixels, output), image.enlarged, 1.0])
    total = processes.sum(results)
    broken = [image for part in processes.gather(broken) for image in part]
    measured = int(total[:, -1].sum())
    means = total[:, :-2].sum(dim=0) / measured
    return Evaluation(dict(zip(MEASURES, means.tolist(), strict=True)), measured, broken, int(total[:, -2].sum()))


def measure_latent(
    encode: Callable[[Tensor], DiagonalGaussian],
    images: ValidationImages,
    channels: int,
    processes: Processes,
    batch_size: int,
    workers: int,
) -> LatentSurvey:
    """Gather the moments of images' latents; every process does its share, and all get the same result.

    Args:
        encode: uint8 (B, 3, S, S) to the Gaussian over (B, c, h, w).
        images: what to encode.
        channels: c.
        processes: of the run.
        batch_size: images at a time in each process.
        workers: that read images.
    """
    share = processes.index, processes.count
    survey = latent_statistics(
        lambda pixels: encode(pixels.to(processes.device)), images, channels, batch_size, workers, *share
    )
    moments = LatentMoments.from_states(torch.stack(processes.gather(survey.moments.state())))
    return LatentSurvey(moments, [image for part in processes.gather(survey.broken) for image in part])


def measure(pixels: Tensor, output: Tensor) -> list[float]:
    """Compute `MEASURES` of an image.

    Args:
        pixels: the original, uint8 (3, S, S).
        output: its reconstruction (3, S, S), about [-1, 1]; one that is not finite has no values but NaN.
    """
    if not output.isfinite().all():
        return [float("nan")] * len(MEASURES)
    image = to_uint8(output)
    return [metric(pixels, image) for metric in MEASURES.values()]
