"""The Fréchet distance between images and their reconstructions, accumulated batch by batch, with its bootstrap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.estimates import Estimate, around
from dc_ssdae.randomness import resampling_counts

REPLICATES = 20
"""Of the bootstrap; each keeps two matrices of features by features in float64, 67 MB for Inception's 2048 features."""


@dataclass
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

    features: Callable[[Tensor], Tensor]
    channels: int
    replicates: int = REPLICATES
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if torch.device(self.device).type == "mps" else self.device)
        self._reference: list[_Gaussian] = []
        self.discard()

    def discard(self) -> None:
        """Begin with other reconstructions after a pass that was given up; a half-gathered reference goes too."""
        # With 1 among the features, so that a product's first row has the number of images and the sums. On the CPU
        # the system gives memory for zeros only as they are written to.
        shape = (1 if self._reference else 2, 1 + self.replicates, 1 + self.channels, 1 + self.channels)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, reference: Tensor | None, images: Tensor | None, names: Sequence[str]) -> None:
        """Take in a batch of pairs, or of one set alone, so that sets may differ in number.

        Args:
            reference: uint8 (B, 3, H, W), on the networks' device; not looked at after the first `finish`. None adds
                nothing to the reference.
            images: uint8 (B, 3, H, W), the reconstructions of the reference. None adds nothing to them.
            names: of the B images, by which they are resampled: the same name in both sets as often in both.
        """
        counts = torch.from_numpy(resampling_counts(self.seed, names, self.replicates))
        weights = F.pad(counts, (1, 0), value=1).T[:, None].to(self.device, torch.float64)  # (1 + R, 1, B)
        for pixels, sums in zip((images, reference), self._sums, strict=False):
            if pixels is None:
                continue
            rows = F.pad(self.features(pixels).to(self.device).double(), (1, 0), value=1.0)
            sums.baddbmm_(weights * rows.T, rows.expand(len(sums), -1, -1))

    def finish(self, processes: Processes) -> Estimate:
        """Give the distance of all processes' images, in each of them; then begin with other reconstructions.

        The reference is kept, and its images need not be given again.
        """
        images, *reference = self._sums
        self._reference += [self._gaussian(sums, processes).factored() for side in reference for sums in side]
        pairs = zip(self._reference, images, strict=True)
        value, *replicates = [_distance(known, self._gaussian(sums, processes)) for known, sums in pairs]
        self.discard()
        if not np.isfinite(value):
            return Estimate(reason="a distance between sets needs at least two images")
        return around(max(value, 0.0), np.asarray(replicates))

    def _gaussian(self, sums: Tensor, processes: Processes) -> "_Gaussian":
        """Put together one set's features in all processes; it can be asked for once."""
        sums = processes.sum(sums).to(self.device)
        count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0].clamp(min=1)
        covariance = (sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1).clamp(min=1)
        return _Gaussian(float(count), mean, covariance)


class _Gaussian(NamedTuple):
    """How many images a set has, the features' mean (D,), and their covariance (D, D)."""

    images: float
    mean: Tensor
    covariance: Tensor

    def factored(self) -> "_Gaussian":
        """The same with F of F Fᵀ = covariance in its place, (D, rank)."""
        factor, failed = torch.linalg.cholesky_ex(self.covariance)  # faster, where no feature follows from others
        if self.images > len(factor) and not failed:
            return self._replace(covariance=factor)
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1:].clamp(min=0.0) * len(values) * torch.finfo(values.dtype).eps
        return self._replace(covariance=vectors[:, kept] * values[kept].sqrt())


def _distance(reference: _Gaussian, images: _Gaussian) -> float:
    """In float64, of a factored reference; NaN where a set has fewer than two images."""
    if min(reference.images, images.images) < 2:
        return float("nan")
    # The eigenvalues of C₁ C₂ with C₁ = F Fᵀ are those of the symmetric Fᵀ C₂ F.
    factor = reference.covariance
    roots = torch.linalg.eigvalsh(factor.T @ images.covariance @ factor).clamp(min=0.0).sqrt()
    means = (reference.mean - images.mean).square().sum()
    return float(means + factor.square().sum() + images.covariance.trace() - 2.0 * roots.sum())
