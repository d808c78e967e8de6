"""One pass of a candidate over a data set: every metric, image by image, without ever holding all images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain, compress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.data.images import reason
from dc_ssdae.data.loader import BrokenImage, ReadingFailed, ValidationImage, ValidationImages, validation_loader
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, counted, is_out_of_memory
from dc_ssdae.evaluation.candidates import Candidate
from dc_ssdae.evaluation.estimates import METRICS, RESAMPLES, Estimate, bootstrap, pooled_psnr
from dc_ssdae.evaluation.metric_networks import MSE, MetricSuite
from dc_ssdae.evaluation.protocol import Protocol
from dc_ssdae.evaluation.statistics import LatentProfile, LatentProfiler, survey
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.randomness import named_generator

KL, BITS, EVALUATIONS = "kl", "bits_per_pixel", "evaluations"
"""What is noted of every image besides metrics: nats, a codec's bits, and evaluations of a decoder that counts them."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a data set is gone through.

    Args:
        protocol: see there.
        size: side of the images in pixels, at least 1.
        batch_size: images at a time, in each process, at least 1.
        workers: processes that read images, for each process; 0 reads in the process itself.
        seed: of sampled latents and of the bootstrap.
        in_training: an image that is not finite has metrics that are NaN, instead of ending the evaluation, and
            there are no intervals.
    """

    protocol: Protocol
    size: int
    batch_size: int = 16
    workers: int = 0
    seed: int = 0
    in_training: bool = False

    def images(self, source: ImageSource, limit: int | None = None) -> ValidationImages:
        """The images of a data set, prepared as the protocol says; at most `limit`, evenly spread."""
        return ValidationImages(source, self.size, len(source) if limit is None else limit, self.protocol.prepare)


@dataclass
class Evaluation:
    """What a pass found, in all processes.

    Attributes:
        metrics: by name, all of `METRICS`.
        images: how many were measured.
        names: of all images, also of those that cannot be read.
        values: of each image, by metric and by KL, BITS and EVALUATIONS: (N,) float64, NaN where there is none.
        broken: images that cannot be read.
        broken_places: the places of those.
        latent: None where there is no posterior over (B, c, h, w).
        latent_shape: of one image's latent; None for a codec or a function.
        others: mean KL, bits per pixel and evaluations, with their intervals.
        enlarged: how many of the measured images were smaller than the evaluation's size.
    """

    metrics: dict[str, Estimate]
    images: int
    names: list[str]
    values: dict[str, np.ndarray]
    broken: list[BrokenImage]
    broken_places: list[int] = field(default_factory=list)
    latent: LatentProfile | None = None
    latent_shape: tuple[int, ...] | None = None
    others: dict[str, Estimate] = field(default_factory=dict)
    enlarged: int = 0


class Reconstructed(NamedTuple):
    """An image before and after, uint8 (3, S, S), at its place in the data set."""

    place: int
    name: str
    original: Tensor
    output: Tensor


@torch.no_grad()  # not inference mode, whose tensors sharded networks could not train with afterwards
def evaluate(
    candidate: Candidate,
    images: ValidationImages,
    suite: MetricSuite,
    settings: EvaluationSettings,
    device: torch.device,
    processes: Processes | None = None,
    advance: Callable[[int], object] | None = None,
) -> Evaluation:
    """Reconstruct and measure images; of several processes, each does its share.

    Args:
        candidate: on `device`.
        images: as `settings.images` gives them.
        suite: of the settings' protocol. It keeps what it needs of the images for the next candidate: a suite is for
            one data set.
        settings: see there.
        device: of candidate and metrics.
        processes: that share the work, if there are several. All call the candidate equally often.
        advance: called after each batch with the number of its images, in all processes together.

    Returns:
        The result, the same whatever the batch size and the number of processes, but for rounding in networks.

    Raises:
        InputError: the candidate raises it, or its output is not finite or has another shape.
        ReadingFailed: no image can be read, or the data set can no longer be read.
    """
    processes = processes or Processes()
    for distance in suite.distances.values():
        distance.discard()
    share, count = _Share(candidate, images, suite, settings, device), len(images)
    broken, enlarged = survey(images, share.measure, settings.batch_size, settings.workers, processes, advance)
    if len(broken) == count:
        raise ReadingFailed(f"none of {counted(count, 'image')} can be read; the first: {broken[0].reason}")
    parts = processes.gather((share.values, share.profiler))
    # An image's values are NaN in all processes but the one that has found them.
    values = {name: np.fmax.reduce([found[name] for found, _ in parts]) for name in share.values}
    measured = {name: np.delete(column, list(broken)) for name, column in values.items()}
    profilers = [profiler for _, profiler in parts if profiler is not None]

    def estimate(name: str) -> Estimate:
        if name in suite.missing:
            return Estimate(reason=suite.missing[name])
        if name in suite.distances:
            return suite.distances[name].finish(processes)
        pooled = name == "psnr" and settings.protocol.psnr == "pooled"
        column, statistic = (measured[MSE], pooled_psnr) if pooled else (measured[name], np.mean)
        return bootstrap(column, statistic, settings.seed, 0 if settings.in_training else RESAMPLES)

    return Evaluation(
        metrics={name: replace(estimate(name), note=suite.notes.get(name)) for name in METRICS},
        images=count - len(broken),
        names=[images.name(place) for place in range(count)],
        values=values,
        broken=list(broken.values()),
        broken_places=list(broken),
        latent=reduce(LatentProfiler.merge, profilers).profile() if profilers else None,
        latent_shape=share.latent_shape,
        others={name: estimate(name) for name in (KL, BITS, EVALUATIONS) if not np.isnan(measured[name]).all()},
        enlarged=enlarged,
    )


@torch.no_grad()
def reconstruct_places(
    candidate: Candidate,
    images: ValidationImages,
    places: Sequence[int],
    settings: EvaluationSettings,
    device: torch.device,
) -> list[Reconstructed]:
    """Reconstruct some images as `evaluate` does, to be shown; those that cannot be read are left out."""
    share = _Share(candidate, images, MetricSuite(), settings, device)
    batches = validation_loader(images, places, settings.batch_size, 0)
    shown = (share.measure(batch, torch.tensor([image.broken is None for image in batch])) for batch in batches)
    return list(chain.from_iterable(shown))


def describe_failure(error: Exception, batch_size: int) -> str:
    """Say in one line why a candidate has no results."""
    if is_out_of_memory(error):
        return f"out of memory with batches of {batch_size}"
    return " ".join(str(error).split()) if isinstance(error, InputError) else reason(error)


@dataclass
class _Share:
    """What one process finds in its share of the images."""

    candidate: Candidate
    images: ValidationImages
    suite: MetricSuite
    settings: EvaluationSettings
    device: torch.device

    def __post_init__(self) -> None:
        self.values = {name: np.full(len(self.images), np.nan) for name in (*self.suite.images, KL, BITS, EVALUATIONS)}
        self.profiler: LatentProfiler | None = None
        self.latent_shape: tuple[int, ...] | None = None

    def measure(self, batch: Sequence[ValidationImage], counts: Tensor) -> list[Reconstructed]:
        """Reconstruct a batch, measure the images of it that count, (B,) bool, and give them."""
        protocol, names = self.settings.protocol, [self.images.name(image.place) for image in batch]
        prepared = torch.stack([image.pixels for image in batch]).to(self.device)
        x, generators = protocol.model_input(prepared), [named_generator(self.settings.seed, name) for name in names]
        encoded, decoded = self.candidate.reconstruct(x, generators if protocol.latent == "sample" else None)
        if not decoded.images.is_floating_point() or decoded.images.shape != x.shape:
            given = f"images of {decoded.images.dtype} and shape {tuple(decoded.images.shape)}"
            raise InputError(f"gives {given}; floating-point ones of {tuple(x.shape)} are expected")
        places, names = [image.place for image in compress(batch, counts)], list(compress(names, counts))
        images = decoded.images[counts]
        lost = ~images.isfinite().flatten(1).all(dim=1).cpu()
        if lost.any() and not self.settings.in_training:
            raise InputError(f"gives NaN or infinity for {next(compress(names, lost))}")
        images = images.float().nan_to_num()
        reference, output = protocol.reference(prepared[counts]), protocol.to_uint8(images)
        if places:
            for name, metric in self.suite.images.items():
                sides = (x[counts], images) if name in protocol.unrounded else (reference, output)
                self.values[name][places] = torch.where(lost, torch.nan, metric(*sides).cpu())
            for distance in self.suite.distances.values():
                distance.add(reference, output, names)
        if encoded.bits is not None:
            self.values[BITS][places] = np.array(list(compress(encoded.bits, counts))) / x[0, 0].numel()
        if encoded.posterior is not None:
            posterior = DiagonalGaussian(*(side[counts] for side in encoded.posterior.moments))
            self.latent_shape = tuple(posterior.mean.shape[1:])
            if posterior.logvar is not None:
                self.values[KL][places] = posterior.kl().cpu()
            if len(self.latent_shape) == 3:
                profiler = LatentProfiler.of(posterior)
                self.profiler = profiler if self.profiler is None else self.profiler.merge(profiler)
        if decoded.num_evaluations is not None:
            self.values[EVALUATIONS][places] = decoded.num_evaluations[counts].cpu()
        return list(map(Reconstructed, places, names, reference.cpu(), output.cpu()))
