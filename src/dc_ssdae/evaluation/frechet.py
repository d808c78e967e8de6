"""The Fréchet distance between images and their reconstructions, accumulated batch by batch, with its bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.estimates import Estimate, around
from dc_ssdae.randomness import resampling_counts

REPLICATES = 20
"""Of the bootstrap; each keeps two matrices of features by features in float64, 67 MB for Inception's 2048 features."""
BUFFERED_ROWS = 512
"""Images whose features are multiplied at once: one product of large matrices is faster than many of small ones."""


class FrechetDistance:
    """The Fréchet distance between two sets of images, of features that a network gives (Heusel et al. 2017).

    Sums and products of features are all that is kept, in float64, so that memory does not grow with the images. For
    the interval the same is kept of replicates of a Poisson bootstrap, which draws an image and its reconstruction
    together.

    Args:
        features: of uint8 images (B, 3, H, W): (B, D).
        channels: D.
        replicates: of the bootstrap; 0 gives no interval.
        seed: of its drawing.
        device: where the sums are kept; one with float64, else the CPU.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        channels: int,
        replicates: int = REPLICATES,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.features = features
        self.seed = seed
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.sets, self.channels = 1 + replicates, channels
        self.has_reference = False
        self._reference: list[_Gaussian] = []
        self.discard()

    def discard(self) -> None:
        """Begin with other reconstructions after a pass that was given up; a half-gathered reference goes too."""
        self._sums = [_Sums(self.sets, self.channels, self.device) for _ in range(1 if self.has_reference else 2)]

    def add(self, reference: Tensor, images: Tensor, names: Sequence[str]) -> None:
        """Take in a batch.

        Args:
            reference: uint8 (B, 3, H, W), on the networks' device; not looked at once `has_reference` is set.
            images: uint8 (B, 3, H, W), their reconstructions.
            names: of the B images, by which they are resampled.
        """
        counts = torch.from_numpy(resampling_counts(self.seed, names, self.sets - 1))
        weights = torch.cat([torch.ones(len(names), 1), counts], dim=1).to(self.device, torch.float64)
        for pixels, sums in zip((images, reference), self._sums, strict=False):
            sums.add(self.features(pixels).to(self.device).double(), weights)

    def finish(self, processes: Processes) -> Estimate:
        """Give the distance of all processes' images, in the main process; then begin with other reconstructions.

        The reference is kept, and its images need not be given again.
        """
        if not self.has_reference:
            gaussians = (self._sums[1].gaussian(place, processes) for place in range(self.sets))
            self._reference = [gaussian.factored() for gaussian in gaussians if processes.is_main]
            self.has_reference = True
        values: list[float] = []
        for place in range(self.sets):
            gaussian = self._sums[0].gaussian(place, processes)
            if processes.is_main:
                values.append(_distance(self._reference[place], gaussian))
        self.discard()
        if not values:
            return Estimate(reason="told by the main process")
        if not np.isfinite(values[0]):
            return Estimate(reason="a distance between sets needs at least two images")
        return around(max(values[0], 0.0), np.asarray(values[1:]))


class _Gaussian(NamedTuple):
    """How many images a set has, the features' mean (D,), and their covariance (D, D)."""

    images: float
    mean: Tensor
    covariance: Tensor

    def factored(self) -> "_Gaussian":
        """The same with F of F Fᵀ = covariance in its place, (D, rank)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1:].clamp(min=0.0) * len(values) * torch.finfo(values.dtype).eps
        return self._replace(covariance=vectors[:, kept] * values[kept].sqrt())


class _Sums:
    """Weighted sums over images, for each of S sets, of products of two among 1 and the D features."""

    def __init__(self, sets: int, channels: int, device: torch.device) -> None:
        # On the CPU the system gives memory for zeros only as they are written to.
        self._sums = torch.zeros(sets, 1 + channels, 1 + channels, dtype=torch.float64, device=device)
        self._buffer: list[tuple[Tensor, Tensor]] = []

    def add(self, features: Tensor, weights: Tensor) -> None:
        """Take in features (B, D) with their weights (B, S) in each set."""
        self._buffer.append((torch.cat([torch.ones_like(weights[:, :1]), features], dim=1), weights))
        if sum(len(rows) for rows, _ in self._buffer) >= BUFFERED_ROWS:
            self._empty_buffer()

    def gaussian(self, place: int, processes: Processes) -> _Gaussian:
        """One set's features in all processes. It can be asked for once."""
        self._empty_buffer()
        sums = processes.sum(self._sums[place]).to(self._sums.device)
        count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0].clamp(min=1)
        covariance = (sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1).clamp(min=1)
        return _Gaussian(float(count), mean, covariance)

    def _empty_buffer(self) -> None:
        if self._buffer:
            rows, weights = (torch.cat(parts) for parts in zip(*self._buffer, strict=True))
            self._buffer = []
            for sums, weight in zip(self._sums, weights.T, strict=True):
                drawn = rows[weight > 0]
                sums.addmm_(drawn.T, drawn * weight[weight > 0, None])


def _distance(reference: _Gaussian, images: _Gaussian) -> float:
    """In float64, of a factored reference; NaN where a set has fewer than two images."""
    if min(reference.images, images.images) < 2:
        return float("nan")
    # The eigenvalues of C₁ C₂ with C₁ = F Fᵀ are those of the symmetric Fᵀ C₂ F.
    factor = reference.covariance
    roots = torch.linalg.eigvalsh(factor.T @ images.covariance @ factor).clamp(min=0.0).sqrt()
    means = (reference.mean - images.mean).square().sum()
    return float(means + factor.square().sum() + images.covariance.trace() - 2.0 * roots.sum())
