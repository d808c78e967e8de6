"""One pass of a candidate over a data set: every metric, image by image, without ever holding all images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.data.loader import BrokenImage, ReadingFailed, ValidationImages, validation_loader
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, counted, is_out_of_memory
from dc_ssdae.evaluation.candidates import Candidate, Encoded
from dc_ssdae.evaluation.estimates import METRICS, Estimate, bootstrap, pooled_psnr
from dc_ssdae.evaluation.latent_statistics import LatentProfile, LatentProfiler
from dc_ssdae.evaluation.metric_networks import MSE, MetricSuite
from dc_ssdae.evaluation.protocol import Protocol
from dc_ssdae.randomness import named_generator

KL, BITS, EVALUATIONS = "kl", "bits_per_pixel", "evaluations"
"""What is noted of every image besides metrics: nats, a codec's bits, and evaluations of a decoder that counts them."""


class CandidateFailed(InputError):
    """A candidate gives what cannot be measured."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a data set is gone through.

    Args:
        protocol: see there.
        size: side of the images in pixels.
        batch_size: images at a time, in each process.
        workers: processes that read images, for each process; 0 reads in the process itself.
        seed: of sampled latents and of the bootstrap.
    """

    protocol: Protocol
    size: int
    batch_size: int = 16
    workers: int = 0
    seed: int = 0

    def images(self, source: ImageSource, limit: int | None = None) -> ValidationImages:
        """The images of a data set, prepared as the protocol says; at most `limit`, evenly spread."""
        return ValidationImages(source, self.size, len(source) if limit is None else limit, self.protocol.prepare)


@dataclass
class Evaluation:
    """What a pass found; in the main process.

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


@torch.inference_mode()
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
        processes: that share the work, if there are several.
        advance: called after each batch with the number of its images.

    Returns:
        The result, the same whatever the batch size and the number of processes, but for rounding. Only the main
        process has distances between sets.

    Raises:
        CandidateFailed: its output is not finite or has another shape, or it raises an InputError.
        ReadingFailed: no image can be read, or the data set can no longer be read.
    """
    processes = processes or Processes()
    for distance in suite.distances.values():
        distance.discard()
    gathered = _Gathered(images, suite, settings, processes)
    problem: Exception | None = None
    try:
        gathered.go_through(candidate, device, advance)
    except Exception as error:  # a user's code may raise anything
        if processes.count == 1:
            raise
        problem = error
    # Where one process has failed all do, so that none waits for it; in the words of the first.
    reason = None if problem is None else describe_failure(problem, settings.batch_size)
    failures = [text for text in processes.gather(reason) if text is not None]
    if problem is not None:
        raise problem
    if failures:
        raise CandidateFailed(failures[0])
    return gathered.result()


@torch.inference_mode()
def reconstruct_places(
    candidate: Candidate,
    images: ValidationImages,
    places: Sequence[int],
    settings: EvaluationSettings,
    device: torch.device,
) -> list[Reconstructed]:
    """Reconstruct some images as `evaluate` does, to be shown; those that cannot be read are left out."""
    shown: list[Reconstructed] = []
    for batch in validation_loader(images, places, settings.batch_size, 0):
        usable = [image for image in batch if image.broken is None]
        if not usable:
            continue
        names = [images.name(image.place) for image in usable]
        prepared = torch.stack([image.pixels for image in usable]).to(device)
        output = settings.protocol.to_uint8(_reconstruct(candidate, prepared, names, settings)[1])
        sides = zip(usable, names, settings.protocol.reference(prepared).cpu(), output.cpu(), strict=True)
        shown += [Reconstructed(image.place, name, original, after) for image, name, original, after in sides]
    return shown


def describe_failure(error: Exception, batch_size: int) -> str:
    """Say in one line why a candidate has no results."""
    if is_out_of_memory(error):
        return f"out of memory with batches of {batch_size}"
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Gathered:
    """What a process has found so far."""

    def __init__(
        self, images: ValidationImages, suite: MetricSuite, settings: EvaluationSettings, processes: Processes
    ) -> None:
        self.images, self.suite, self.settings, self.processes = images, suite, settings, processes
        count, names = len(images), [*suite.images, KL, BITS, EVALUATIONS]
        # Each value at its image's place: the sum over processes then adds zeros, and rounds nothing.
        self.values = {name: torch.zeros(count, dtype=torch.float64) for name in names}
        self.known = {name: torch.zeros(count, dtype=torch.float64) for name in names}
        self.broken: list[tuple[int, BrokenImage]] = []
        self.enlarged = 0
        self.profiler: LatentProfiler | None = None
        self.has_profile = True
        self.latent_shape: tuple[int, ...] | None = None

    def go_through(self, candidate: Candidate, device: torch.device, advance: Callable[[int], object] | None) -> None:
        """Reconstruct and measure this process's share."""
        settings, protocol = self.settings, self.settings.protocol
        places = self.processes.share(len(self.images))
        for batch in validation_loader(self.images, places, settings.batch_size, settings.workers):
            self.broken += [(image.place, image.broken) for image in batch if image.broken is not None]
            usable = [image for image in batch if image.broken is None]
            self.enlarged += sum(image.enlarged for image in usable)
            if usable:
                names = [self.images.name(image.place) for image in usable]
                here = [image.place for image in usable]
                prepared = torch.stack([image.pixels for image in usable]).to(device)
                reference = protocol.reference(prepared)
                x, unrounded = _reconstruct(candidate, prepared, names, settings, self, here)
                output = protocol.to_uint8(unrounded)
                for name, metric in self.suite.images.items():
                    sides = (x, unrounded) if name in protocol.unrounded else (reference, output)
                    self.note(name, here, metric(*sides))
                for distance in self.suite.distances.values():
                    distance.add(reference, output, names)
            if advance is not None:
                advance(len(batch))

    def note(self, name: str, places: Sequence[int], values: Tensor) -> None:
        """Keep a value of each of some images."""
        where = torch.tensor(places)
        self.values[name][where] = values.detach().cpu().double()
        self.known[name][where] = 1.0

    def add_latent(self, encoded: Encoded, places: Sequence[int], pixels: int) -> None:
        """Keep what there is to know of a batch's latents."""
        if encoded.bits is not None:
            self.note(BITS, places, torch.tensor(encoded.bits, dtype=torch.float64) / pixels)
        if encoded.posterior is None:
            return
        mean = encoded.posterior.mean
        self.latent_shape = tuple(mean.shape[1:])
        if encoded.posterior.logvar is not None:
            self.note(KL, places, encoded.posterior.kl())
        if mean.ndim != 4:
            self.has_profile = False
            return
        self.profiler = self.profiler or LatentProfiler(mean.shape[1])
        self.profiler.add(encoded.posterior)

    def result(self) -> Evaluation:
        """Put together what all processes have found."""
        images, processes = self.images, self.processes
        broken = sorted(image for part in processes.gather(self.broken) for image in part)
        values: dict[str, np.ndarray] = {}
        for name, found in self.values.items():
            known = processes.sum(self.known[name]) > 0
            total = processes.sum(found)
            values[name] = torch.where(known, total, torch.nan).numpy()
        measured = len(images) - len(broken)
        if measured == 0:
            raise ReadingFailed(
                f"none of {counted(len(images), 'image')} can be read; the first: {broken[0][1].reason}"
            )
        shape = next((shape for shape in processes.gather(self.latent_shape) if shape is not None), None)
        return Evaluation(
            metrics={name: self._estimate(name, values) for name in METRICS},
            images=measured,
            names=[images.name(place) for place in range(len(images))],
            values=values,
            broken=[image for _, image in broken],
            broken_places=[place for place, _ in broken],
            latent=self._profile(),
            latent_shape=shape,
            others={
                name: bootstrap(_known(values[name]), seed=self.settings.seed)
                for name in (KL, BITS, EVALUATIONS)
                if len(_known(values[name]))
            },
            enlarged=sum(processes.gather(self.enlarged)),
        )

    def _estimate(self, name: str, values: dict[str, np.ndarray]) -> Estimate:
        suite, settings = self.suite, self.settings
        if name in suite.missing:
            return Estimate(reason=suite.missing[name])
        note = suite.notes.get(name)
        if name in suite.distances:
            return suite.distances[name].finish(self.processes).noted(note)
        if name == "psnr" and settings.protocol.psnr == "pooled":
            return bootstrap(_known(values[MSE]), pooled_psnr, settings.seed)
        readable = ~np.isnan(values[MSE])
        lost = int(np.isnan(values[name][readable]).sum())
        if lost:
            return Estimate(reason=f"it is NaN for {lost:,} of {readable.sum():,} images")
        return bootstrap(_known(values[name]), seed=settings.seed).noted(note)

    def _profile(self) -> LatentProfile | None:
        parts = [part for part in self.processes.gather(self.profiler) if part is not None]
        if not parts or not all(self.processes.gather(self.has_profile)):
            return None
        first, *others = parts
        for part in others:
            first.merge(part)
        return first.profile()


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _reconstruct(
    candidate: Candidate,
    prepared: Tensor,
    names: Sequence[str],
    settings: EvaluationSettings,
    gathered: _Gathered | None = None,
    places: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Reconstruct prepared images and check what came out; gives the model's input and its output in float32."""
    x = settings.protocol.model_input(prepared)
    sampled = settings.protocol.latent == "sample"
    generators = [named_generator(settings.seed, name) for name in names] if sampled else None
    try:
        encoded, decoded = candidate.reconstruct(x, generators)
    except InputError as error:
        raise CandidateFailed(str(error)) from error
    images = decoded.images
    if not images.is_floating_point():
        raise CandidateFailed(f"gives images of {images.dtype}, not floating-point numbers in [-1, 1]")
    if images.shape != x.shape:
        given, wanted = ("×".join(map(str, shape)) for shape in (images.shape, x.shape))
        raise CandidateFailed(f"gives images of shape {given} for {wanted}")
    lost = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if lost:
        raise CandidateFailed(
            f"gives NaN or infinity in {len(lost)} of a batch's {len(images)} images, {names[lost[0]]} first"
        )
    if gathered is not None:
        gathered.add_latent(encoded, places, x.shape[-1] * x.shape[-2])
        if decoded.num_evaluations is not None:
            gathered.note(EVALUATIONS, places, decoded.num_evaluations)
    return x, images.float()
