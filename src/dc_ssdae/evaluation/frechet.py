"""The Fréchet distance between images and their reconstructions, accumulated batch by batch, with its bootstrap."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dc_ssdae.evaluation.estimates import Estimate, around
from dc_ssdae.processes import Processes
from dc_ssdae.randomness import resampling_counts

REPLICATES = 20
"""Of the bootstrap; each keeps two matrices of features by features in float64, 67 MB for Inception's 2048."""


class FrechetDistance:
    """torchmetrics' distance between two sets of images, of features that a network gives (Heusel et al. 2017).

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
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.features = features
        self.seed = seed
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        given = _Given(channels)
        self._metrics = [
            FrechetInceptionDistance(feature=given, reset_real_features=False, sync_on_compute=False).to(self.device)
            for _ in range(1 + replicates)
        ]
        self.has_reference = False

    def add(self, reference: Tensor, images: Tensor, names: Sequence[str]) -> None:
        """Take in a batch.

        Args:
            reference: uint8 (B, 3, H, W), on the networks' device; not looked at once `has_reference` is set.
            images: uint8 (B, 3, H, W), their reconstructions.
            names: of the B images, by which they are resampled.
        """
        counts = torch.from_numpy(resampling_counts(self.seed, names, len(self._metrics) - 1)).to(self.device)
        sides = [(images, False)] if self.has_reference else [(images, False), (reference, True)]
        for pixels, real in sides:
            features = self.features(pixels).to(self.device).double()
            self._metrics[0].update(features, real=real)
            for place, metric in enumerate(self._metrics[1:]):
                metric.update(features.repeat_interleave(counts[:, place], dim=0), real=real)

    def finish(self, processes: Processes) -> Estimate:
        """Give the distance of all processes' images, in the main process; then begin with other reconstructions.

        The reference is kept, and its images need not be given again.
        """
        values: list[float] = []
        for metric in self._metrics:
            if processes.count > 1:
                metric.sync()
            if processes.is_main:
                values.append(_distance(metric))
            if metric._is_synced:  # `compute` has undone it already
                metric.unsync()
            metric.reset()
        self.has_reference = True
        if not values:
            return Estimate(reason="told by the main process")
        if not np.isfinite(values[0]):
            return Estimate(reason="a distance between sets needs at least two images")
        return around(max(values[0], 0.0), np.asarray(values[1:]))

    def discard(self) -> None:
        """Begin with other reconstructions after a pass that was given up; a half-gathered reference goes too."""
        for metric in self._metrics:
            metric.reset_real_features = not self.has_reference
            metric.reset()
            metric.reset_real_features = False


class _Given(nn.Module):
    """Stands for a network whose features torchmetrics is given instead of images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features = channels

    def forward(self, features: Tensor) -> Tensor:
        return features


def _distance(metric: Any) -> float:
    """In float64, on the CPU; NaN where a set has fewer than two images."""
    counts = (metric.real_features_num_samples, metric.fake_features_num_samples)
    if min(int(count) for count in counts) < 2:
        return float("nan")
    metric.orig_dtype = torch.float64
    return float(metric.compute())
