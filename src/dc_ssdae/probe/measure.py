"""What a trained probe is measured by: its loss, its samples compared with images, the latents' spectrum."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.data.encode_latents import LatentEncoder, hash_network
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.loader import ValidationImages, validation_loader
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.candidates import Candidate, CandidateSpec
from dc_ssdae.evaluation.estimates import bootstrap
from dc_ssdae.latent import DiagonalGaussian, LatentMoments
from dc_ssdae.probe.features import FeatureNetwork, copying_ratio, frechet_distances, nearest
from dc_ssdae.probe.latents import LatentSources, LatentSubset
from dc_ssdae.probe.report import MOST_REFERENCES, MOST_SAMPLES, RECONSTRUCTIONS, SAMPLES, Distance, Neighbours
from dc_ssdae.probe.sampling import Sampling, batches, draw_latents, starting_latents
from dc_ssdae.probe.spectrum import Spectrum, luma, radial_spectrum
from dc_ssdae.probe.step import SHARES, FieldStep, field_losses

NEIGHBOURED, NEIGHBOURS = 8, 4
"""How many samples are shown with their nearest training images, and with how many."""

CURVE_POINTS = 500
"""Of the training loss, each the mean of a block of steps."""


def encoder_of(candidate: Candidate, spec: CandidateSpec, size: int, device: torch.device) -> LatentEncoder:
    """Encode with any autoencoder that can be measured.

    Args:
        candidate: on `device`.
        spec: what it was opened from.
        size: side of the images in pixels.
        device: of the candidate.

    Raises:
        InputError: it has no latents (c, h, w) of which a pixel is a square of the image.
    """

    @torch.inference_mode()
    def encode(pixels: Tensor) -> DiagonalGaussian:
        posterior = candidate.encode(to_model_range(pixels).to(device)).posterior
        if posterior is None or posterior.mean.ndim != 4:
            raise InputError(f"{spec.label} has no latent (c, h, w) to train on")
        return posterior

    mean = encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)).mean
    channels, height, width = mean.shape[1:]
    if height != width or size % height:
        raise InputError(f"latents of {spec.label} are {height}×{width} for images of {size} pixels", "size")
    weights = candidate.module.state_dict()
    identity = {"name": None if weights else spec.value, "kind": spec.kind}
    dtype = str(mean.dtype).removeprefix("torch.")
    return LatentEncoder(encode, spec.label, hash_network(identity, weights), size // height, channels, dtype)


@dataclass
class ProbeMeasurement:
    """How a trained probe is measured.

    Args:
        step: in evaluation mode, on `device`, with the averaged weights.
        sources: what it was trained on.
        device: of the network.
        batch_size: samples, images and latents at a time.
        seed: of the samples' noise and of the bootstrap.
    """

    step: FieldStep
    sources: LatentSources
    device: torch.device
    batch_size: int
    seed: int

    def losses(self) -> dict[str, Any]:
        """The loss on all validation latents, by level."""
        found = field_losses(self.step, self.sources.validation, len(self.sources.validation), self.batch_size)
        loss = bootstrap(found.per_latent.numpy(), np.mean, self.seed)
        return {"levels": SHARES, "field_loss": found.field, "clean_error": found.clean, "loss": loss}

    def spectrum(self, limit: int) -> Spectrum:
        """The spectrum of at most `limit` normalised training latents."""
        train = self.sources.train.upright()
        count = min(limit, len(train))
        places = [place * len(train) // count for place in range(count)]
        read = ([train.read(places[place]).latent for place in some] for some in batches(len(places), self.batch_size))
        return radial_spectrum(torch.stack(some) for some in read)

    def pictures(
        self,
        candidate: Candidate,
        images: ValidationImages | None,
        features: Mapping[str, FeatureNetwork],
        samplings: list[Sampling],
        count: int,
    ) -> dict[str, Any]:
        """Decode samples and compare them with images.

        Args:
            candidate: decodes; on `device`.
            images: real ones to compare with; None has no distances.
            features: by name, those to trust first.
            samplings: how samples are drawn; those of the first are shown.
            count: of samples of each, and of training images; at most half as many as there are training latents.

        Returns:
            Fields of a `ProbeReport`.
        """
        train, validation = self.sources.train.upright(), self.sources.validation
        # Of 2 · count training images those at even places are the references, and the others' reconstructions the
        # floor: what a perfect sampler would reach, which draws other images than the references.
        count = min(count, len(train) // 2)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        known = [place * len(train) // (2 * count) for place in range(2 * count)]
        training = self._seen(self._decoded(candidate, train, known), features)
        unseen = self._seen(self._decoded(candidate, validation, range(len(validation))[:count]), features)
        found: dict[str, Any] = {}
        real: _Seen | None = None
        if images is not None:
            places = matching_places(images, train, [known[2 * place] for place in order.tolist()])
            real = self._seen(self._read(images, places), features)
            found |= {"references": real.shown[:MOST_REFERENCES], "image_spectrum": real.spectrum}
        labels = torch.tensor([train.read(known[2 * place + 1]).label for place in order.tolist()])
        drawn = []
        for sampling in samplings:
            moments = LatentMoments(train.dataset.latent_shape[0])
            drawing = _Drawing(sampling, labels, moments, 2 if sampling.guidance != 1.0 else 1)
            drawn.append((drawing, self._seen(self._samples(candidate, drawing), features)))
        samples_by, samples = drawn[0]
        found["seconds_per_sample"] = samples_by.seconds / count
        found |= {
            "samples": samples.shown,
            "samples_by": f"{samples_by.sampling.title}, {samples_by.sampling.num_steps} steps",
            "classes": [train.class_name(label) for label in labels[:MOST_SAMPLES].tolist()],
        }
        if features:
            first = next(iter(features))
            near, new, known_features = (each.features[first] for each in (samples, unseen, training))
            found["searched"] = training.count
            found["copying"] = copying_ratio(near, new, known_features, self.seed)
            distances, found_at = nearest(samples.features[first][:NEIGHBOURED], known_features, NEIGHBOURS)
            neighbours = [known[place] for place in found_at.flatten().tolist()]
            images_of = self._decoded(candidate, train, neighbours, NEIGHBOURS)
            rows = zip(samples.shown, images_of, distances.tolist(), strict=False)
            found["neighbours"] = [Neighbours(*row) for row in rows]
        if real is not None:
            found["distances"] = []
            for name, network in features.items():
                sets = [training.features[name][1::2], *(seen.features[name] for _, seen in drawn)]
                values = frechet_distances(real.features[name], sets, seed=self.seed)
                about: dict[str, Any] = {"features": network.title, "is_stand_in": network.is_stand_in, "count": count}
                found["distances"].append(Distance(**about, images=RECONSTRUCTIONS, value=values[0]))
                for (drawing, _), value in zip(drawn, values[1:], strict=True):
                    found["distances"].append(Distance(**about, images=SAMPLES, value=value, **drawing.about()))
        if real is None:
            found["no_distances"] = "Samples are not compared with images: give --data."
        elif not features:
            names = "Inception, DINOv2 or SqueezeNet"
            found["no_distances"] = f"Samples are not compared with images: no weights of {names} are on this machine."
        return found

    @torch.inference_mode()
    def _decode(self, candidate: Candidate, normalised: Tensor) -> Tensor:
        """Images of normalised latents, uint8 (B, 3, S, S) on the CPU."""
        latents = self.sources.train.dataset.denormalise(normalised.to(self.device))
        images = candidate.decode(latents).images.float()
        return to_uint8(images.nan_to_num().clamp(-1.0, 1.0)).cpu()

    def _decoded(
        self, candidate: Candidate, latents: LatentSubset, places: Sequence[int], size: int | None = None
    ) -> Iterator[Tensor]:
        """Decode the latents at some places, at most `size` at a time."""
        for some in batches(len(places), size or self.batch_size):
            read = [latents.read(places[place]).latent for place in some]
            yield self._decode(candidate, torch.stack(read))

    def _samples(self, candidate: Candidate, drawing: "_Drawing") -> Iterator[Tensor]:
        shape = self.sources.train.dataset.latent_shape
        for places in batches(len(drawing.labels), self.batch_size):
            began = time.monotonic()
            start = starting_latents(shape, places, self.seed).to(self.device)
            labels = drawing.labels[places.start : places.stop].to(self.device)
            result = draw_latents(self.step, start, labels, drawing.sampling)
            pictures = self._decode(candidate, result.sample)
            drawing.seconds += time.monotonic() - began
            drawing.evaluations += drawing.per_step * int(result.num_evaluations.sum())
            drawing.moments.add(DiagonalGaussian(result.sample))
            yield pictures

    def _read(self, images: ValidationImages, places: Sequence[int]) -> Iterator[Tensor]:
        for batch in validation_loader(images, places, self.batch_size, 0):
            whole = [image.pixels for image in batch if image.broken is None]
            if whole:
                yield torch.stack(whole)

    @torch.inference_mode()
    def _seen(self, pictures: Iterator[Tensor], features: Mapping[str, FeatureNetwork]) -> "_Seen":
        """Go through images: keep the first of them, their features and their spectrum."""
        shown: list[Tensor] = []
        found: dict[str, list[Tensor]] = {name: [] for name in features}
        count = 0

        def lumas() -> Iterator[Tensor]:
            nonlocal count
            for batch in pictures:
                if count < MOST_SAMPLES:
                    shown.append(batch)
                count += len(batch)
                for name, network in features.items():
                    found[name].append(network(batch.to(self.device)).cpu())
                yield luma(batch)

        spectrum = radial_spectrum(lumas())
        gathered = {name: torch.cat(parts) for name, parts in found.items()}
        return _Seen(torch.cat(shown)[:MOST_SAMPLES], gathered, spectrum, count)


@dataclass
class _Drawing:
    """A set of samples being drawn: how, the labels, evaluations per step, and what it took."""

    sampling: Sampling
    labels: Tensor
    moments: LatentMoments
    per_step: int
    seconds: float = 0.0
    evaluations: int = 0

    def about(self) -> dict[str, Any]:
        """What a `Distance` tells of it."""
        told = {"sampler": self.sampling.title, "num_steps": self.sampling.num_steps}
        evaluations = self.evaluations / len(self.labels)
        std = torch.tensor(self.moments.mean_and_std()[1])
        own = None if evaluations == self.sampling.num_steps else evaluations
        return {**told, "evaluations": own, "variance": float(std.square().mean())}


@dataclass
class _Seen:
    """Some images: the first of them, features of all by network, their spectrum, how many."""

    shown: Tensor
    features: dict[str, Tensor]
    spectrum: Spectrum
    count: int


def matching_places(images: ValidationImages, latents: LatentSubset, places: Sequence[int]) -> list[int]:
    """The places of the images that latents were encoded from.

    Args:
        images: the data set that was encoded, all of it.
        latents: of that data set.
        places: of latents.

    Raises:
        InputError: these are not the images of the latents.
    """
    known = {images.name(place): place for place in range(len(images))}
    names = [latents.dataset.stored(latents.indices[place]).name for place in places]
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"--data has no image {missing[0]!r}, of which there is a latent; give the images encoded")
    return [known[name] for name in names]


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve of (step, value) pairs as the means of at most `CURVE_POINTS` blocks."""
    size = -(-len(curve) // CURVE_POINTS)
    blocks = [curve[first : first + size] for first in range(0, len(curve), size or 1)]
    return [(block[-1][0], float(np.mean([value for _, value in block]))) for block in blocks]
