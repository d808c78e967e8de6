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
        self._shape = (1 + replicates, channels)
        self._images = _Sums(self._shape, self.device)
        self._reference = _Sums(self._shape, self.device)
        self._reference_gaussians: list[_Gaussian] = []
        self.has_reference = False

    def add(self, reference: Tensor, images: Tensor, names: Sequence[str]) -> None:
        """Take in a batch.

        Args:
            reference: uint8 (B, 3, H, W), on the networks' device; not looked at once `has_reference` is set.
            images: uint8 (B, 3, H, W), their reconstructions.
            names: of the B images, by which they are resampled.
        """
        counts = torch.from_numpy(resampling_counts(self.seed, names, self._shape[0] - 1))
        weights = torch.cat([torch.ones(len(names), 1), counts], dim=1).to(self.device, torch.float64)
        sides = (
            [(images, self._images)] if self.has_reference else [(images, self._images), (reference, self._reference)]
        )
        for pixels, sums in sides:
            sums.add(self.features(pixels).to(self.device).double(), weights)

    def finish(self, processes: Processes) -> Estimate:
        """Give the distance of all processes' images, in the main process; then begin with other reconstructions.

        The reference is kept, and its images need not be given again.
        """
        if not self.has_reference:
            gaussians = (self._reference.gaussian(place, processes) for place in range(self._shape[0]))
            self._reference_gaussians = [gaussian.factored() for gaussian in gaussians if processes.is_main]
            self._reference, self.has_reference = _Sums(self._shape, self.device), True
        values: list[float] = []
        for place in range(self._shape[0]):
            gaussian = self._images.gaussian(place, processes)
            if processes.is_main:
                values.append(_distance(self._reference_gaussians[place], gaussian))
        self.discard()
        if not values:
            return Estimate(reason="told by the main process")
        if not np.isfinite(values[0]):
            return Estimate(reason="a distance between sets needs at least two images")
        return around(max(values[0], 0.0), np.asarray(values[1:]))

    def discard(self) -> None:
        """Begin with other reconstructions after a pass that was given up; a half-gathered reference goes too."""
        self._images = _Sums(self._shape, self.device)
        if not self.has_reference:
            self._reference = _Sums(self._shape, self.device)


class _Gaussian(NamedTuple):
    """How many images a set has, the features' mean (D,), their total variance, and their covariance (D, D)."""

    images: float
    mean: Tensor
    variance: float
    covariance: Tensor

    def factored(self) -> "_Gaussian":
        """The same with F of F Fᵀ = covariance in its place, (D, rank)."""
        if self.images < 2:
            return self
        factor, failed = torch.linalg.cholesky_ex(self.covariance)  # faster, where no feature follows from others
        if self.images > len(factor) and not failed:
            return self._replace(covariance=factor)
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1:].clamp(min=0.0) * len(values) * torch.finfo(values.dtype).eps
        return self._replace(covariance=vectors[:, kept] * values[kept].sqrt())


class _Sums:
    """Weighted sums over images' features, for each of S sets: of 1, of a feature, and of products of two."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        sets, channels = shape
        self._counts = torch.zeros(sets, dtype=torch.float64, device=device)
        self._totals = torch.zeros(sets, channels, dtype=torch.float64, device=device)
        # On the CPU the system gives memory for zeros only as they are written to.
        self._products = torch.zeros(sets, channels, channels, dtype=torch.float64, device=device)
        self._buffer: list[tuple[Tensor, Tensor]] = []

    def add(self, features: Tensor, weights: Tensor) -> None:
        """Take in features (B, D) with their weights (B, S) in each set."""
        self._buffer.append((features, weights))
        if sum(len(rows) for rows, _ in self._buffer) >= BUFFERED_ROWS:
            self._empty_buffer()

    def gaussian(self, place: int, processes: Processes) -> _Gaussian:
        """One set's features in all processes. It can be asked for once."""
        self._empty_buffer()
        count, total, products = (
            processes.sum(sums[place]).to(self._counts.device) for sums in (self._counts, self._totals, self._products)
        )
        mean = total / count.clamp(min=1)
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1).clamp(min=1)
        return _Gaussian(float(count), mean, float(covariance.trace()), covariance)

    def _empty_buffer(self) -> None:
        if not self._buffer:
            return
        rows, weights = (torch.cat(parts) for parts in zip(*self._buffer, strict=True))
        self._buffer = []
        self._counts += weights.sum(dim=0)
        self._totals += weights.T @ rows
        for products, weight in zip(self._products, weights.T, strict=True):
            drawn = rows[weight > 0]
            products.addmm_(drawn.T, drawn * weight[weight > 0, None])


def _distance(reference: _Gaussian, images: _Gaussian) -> float:
    """In float64; NaN where a set has fewer than two images.

    Args:
        reference: factored.
        images: not factored.
    """
    if min(reference.images, images.images) < 2:
        return float("nan")
    # The eigenvalues of C₁ C₂ with C₁ = F Fᵀ are those of the symmetric Fᵀ C₂ F.
    factor = reference.covariance
    values = torch.linalg.eigvalsh(factor.T @ images.covariance @ factor)
    means = float((reference.mean - images.mean).square().sum())
    return means + reference.variance + images.variance - 2.0 * float(values.clamp(min=0.0).sqrt().sum())
