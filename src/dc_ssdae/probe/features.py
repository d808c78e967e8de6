"""What samples are compared by: features of networks whose weights are on this machine, and distances of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.estimates import RESAMPLES, Estimate
from dc_ssdae.evaluation.frechet import REPLICATES, FrechetDistance
from dc_ssdae.evaluation.metric_networks import load_metrics
from dc_ssdae.evaluation.protocol import Protocol
from dc_ssdae.losses.backbones import weights_on_this_machine
from dc_ssdae.losses.perceptual import build_trunk, trunk_file

TITLES = {"rfid": "Inception", "rfdd": "DINOv2"}
SQUEEZENET_SIDE, SQUEEZENET_CHANNELS = 224, 512
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, as torchvision trains with
_ROWS = 256  # at a time, so that memory stays small
_SAME = 1e-6  # cosine distance in float32 of what is equal


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that gives features of images.

    Args:
        title: its name on pages.
        is_stand_in: whether its distances are no standard ones, and say nothing outside one table.
        channels: D.
        network: gives the features, (B, D), of images, uint8 (B, 3, H, W) on its device and of any size.
    """

    title: str
    is_stand_in: bool
    channels: int
    network: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features of images, uint8 (B, 3, H, W): (B, D) float32."""
        return self.network(pixels).float()


class SqueezeNet(nn.Module):
    """The last layer of torchvision's SqueezeNet 1.1 before its classifier, averaged over space (Iandola et al. 2016).

    Images are resized to 224 pixels a side, also enlarged: bicubic, antialiased, in floating point.

    Args:
        trunk: as `build_trunk` gives it.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), to (B, 512) float32."""
        x = F.interpolate(pixels / 255.0, (SQUEEZENET_SIDE, SQUEEZENET_SIDE), mode="bicubic", antialias=True)
        return self.trunk(tvf.normalize(x, _MEAN, _DEVIATION))[-1].mean(dim=(2, 3))


def load_features(device: torch.device, download: bool = False, random: bool = False) -> dict[str, FeatureNetwork]:
    """Load the networks whose weights are on this machine: Inception, DINOv2, and SqueezeNet as a stand-in for both.

    Args:
        device: of the networks.
        download: fetch Inception's and DINOv2's weights where they are not on this machine.
        random: take a SqueezeNet with random weights where there are no weights at all.

    Returns:
        By name ("inception", "dinov2", "squeezenet"), those to trust first; empty where there are none.

    Raises:
        InputError: a file of weights is damaged or another network's, or a download failed.
    """
    suite = load_metrics(Protocol("probe", inception="tensorflow"), device, [*TITLES], download=download, replicates=0)
    found = {}
    for name, distance in suite.distances.items():
        title = TITLES[name]
        found[title.lower()] = FeatureNetwork(title, name in suite.notes, distance.channels, distance.features)
    path = weights_on_this_machine(trunk_file("squeeze"))
    if path is not None or (random and not found):
        network = SqueezeNet(build_trunk("squeeze", path)).to(device).eval().requires_grad_(False)
        title = "SqueezeNet" if path else "random SqueezeNet"
        found["squeezenet"] = FeatureNetwork(title, True, SQUEEZENET_CHANNELS, network)
    return found


def frechet_distances(
    references: Tensor, sets: Iterable[Tensor], replicates: int = REPLICATES, seed: int = 0
) -> list[Estimate]:
    """Measure the Fréchet distance of several sets' features from the same references, each resampled on its own.

    Args:
        references: (M, D).
        sets: features (N, D) each; N may differ from M and from set to set.
        replicates: of the bootstrap; 0 gives no intervals.
        seed: of the bootstrap.
    """
    measure = FrechetDistance(nn.Identity(), references.shape[1], replicates, seed, references.device)

    def add(features: Tensor, is_reference: bool) -> None:
        for places in torch.arange(len(features)).split(_ROWS):
            rows, kind = features[places], "reference" if is_reference else "image"
            names = [f"{kind} {place}" for place in places.tolist()]
            measure.add(rows if is_reference else None, None if is_reference else rows, names)

    add(references, True)
    found = []
    for features in sets:
        add(features, False)
        found.append(measure.finish(Processes()))
    return found


def nearest(samples: Tensor, references: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Find the nearest references of samples by the cosine distance of their features, from 0 to 2.

    Args:
        samples: (N, D).
        references: (M, D).
        k: how many, at most M.

    Returns:
        Distances (N, k) float32, the nearest first, and the references' places (N, k).
    """
    known = F.normalize(references.float())
    blocks = [(1.0 - F.normalize(rows.float()) @ known.T).topk(k, largest=False) for rows in samples.split(_ROWS)]
    distances, places = zip(*blocks, strict=True)
    return torch.cat(distances).clamp(min=0.0), torch.cat(places)  # rounding would make some negative


def copying_ratio(samples: Tensor, validation: Tensor, training: Tensor, seed: int = 0) -> Estimate:
    """Compare how near samples are to training images with how near unseen images are: ratio of median distances.

    Well below 1, samples are copies of training images; above 1, they are unlike any image. A decoder leaves its
    mark on samples, which alone would keep them away from photos: give features of reconstructions for all three, where
    there is a decoder.

    Args:
        samples: features of samples, (N, D).
        validation: features of images that were not trained on, (V, D).
        training: features of the training images, (M, D).
        seed: of the bootstrap, which resamples samples and unseen images.

    Returns:
        With a percentile bootstrap interval of 95 %.
    """
    near, unseen = (nearest(rows, training)[0][:, 0].double().cpu().numpy() for rows in (samples, validation))
    generator = np.random.default_rng(seed)
    if np.median(unseen) < _SAME:
        return Estimate(reason="unseen images are copies of training images")
    medians = [np.median(generator.choice(side, (RESAMPLES, len(side))), axis=1) for side in (near, unseen)]
    ratios = medians[0] / medians[1].clip(min=_SAME)
    return Estimate(float(np.median(near) / np.median(unseen)), *np.percentile(ratios, [2.5, 97.5]).tolist())
