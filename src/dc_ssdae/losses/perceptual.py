"""Perceptual distance of the clean estimate from the image."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.losses.backbones import (
    FrozenBackbone,
    WeightsFile,
    find_weights,
    fixed_random_state,
    hub_file,
    load_exactly,
    read_weights,
)
from dc_ssdae.losses.term import StepOutputs

TRUNKS: Mapping[str, tuple[str, int]] = {
    "vgg": ("vgg16", 16),
    "alex": ("alexnet", 31),
    "squeeze": ("squeezenet1_1", 17),
}
"""For each network's name in LPIPS: torchvision's name, and the smallest side in pixels of an image that it takes."""


class LPIPSLoss(nn.Module):
    """LPIPS v0.1 of the clean estimate against the image: (B,) float32 (Zhang et al. 2018).

    "auto" is float32, because bfloat16 is too coarse when the estimate is close to the image. Measured for VGG with
    random weights on 64 and 128 pixel crops of photos, features compared in float32: for noise of standard deviation
    0.02, bfloat16 changes the loss by up to 5 % per image and 1 to 1.6 % per batch; from 0.05 on, by up to 1.2 % and
    0.4 %; for blur, by up to 5 % and 0.3 %. The gradient has a cosine of 0.97 to 0.98 with float32's.

    Args:
        net: "vgg" (VGG-16), "alex" or "squeeze".
        weights: folder with torchvision's file of that network, or "random"; None searches for it (`find_weights`).
        precision: "float32", "bfloat16", or "auto", which is float32.

    Raises:
        InputError: a setting is unknown, or the weights are not found.
    """

    def __init__(self, net: str = "vgg", weights: str | None = None, precision: str = "auto") -> None:
        super().__init__()
        self.weights_file = find_weights("lpips", trunk_file(net), weights)
        self.random_weights = self.weights_file is None
        self.net = net
        network = PerceptualFeatures(build_trunk(net, self.weights_file), net)
        self.backbone = FrozenBackbone(network, precision)

    @classmethod
    def fetch(cls, net: str = "vgg", weights: str | None = None, **_: Any) -> None:
        """Find or download the weights for the constructor's settings, without building anything.

        Raises:
            InputError: the network is unknown, or the weights are not found.
        """
        find_weights("lpips", trunk_file(net), weights)

    def forward(self, outputs: StepOutputs) -> Tensor:
        return self.distance(outputs.clean_estimate, outputs.record.x)

    def distance(self, estimate: Tensor, x: Tensor) -> Tensor:
        """Compare images (B, 3, H, W) in [-1, 1] with others: (B,) float32; gradients flow to `estimate`.

        Raises:
            InputError: the images are too small for the network.
        """
        smallest = TRUNKS[self.net][1]
        if min(x.shape[-2:]) < smallest:
            size = f"{x.shape[-2]}×{x.shape[-1]}"
            raise InputError(f"losses.lpips: images are {size}; {self.net} needs sides of at least {smallest} pixels")
        with torch.no_grad():
            real = [_unit_length(features) for features in self.backbone(x)]
        estimated = self.backbone(estimate)
        total = x.new_zeros(x.shape[0], dtype=torch.float32)
        for head, ours, theirs in zip(self.backbone.network.heads, estimated, real, strict=True):
            difference = (_unit_length(ours) - theirs).square().mean(dim=(2, 3))
            total = total + (difference * head.float()).sum(dim=1)
        return total


class PerceptualFeatures(nn.Module):
    """Features of images in [-1, 1] at several depths, with LPIPS's weights of their channels in `heads`.

    Args:
        trunk: gives a tuple of features (B, C, h, w).
        net: one of `TRUNKS`, for which the package lpips has the heads, (C,) each.
    """

    def __init__(self, trunk: nn.Module, net: str) -> None:
        import lpips

        super().__init__()
        heads = read_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
        self.scaling = lpips.ScalingLayer()
        self.trunk = trunk
        self.heads = nn.ParameterList(heads[name].flatten() for name in sorted(heads))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.trunk(self.scaling(x))


def _unit_length(features: Tensor) -> Tensor:
    """Scale the channels to length 1, in float32; where all are 0, the gradient of the length is 0 too."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def trunk_file(net: str) -> WeightsFile:
    """Describe torchvision's weights file of LPIPS's network `net`.

    Raises:
        InputError: the network is unknown.
    """
    if net not in TRUNKS:
        raise unknown_name("net of LPIPS", net, TRUNKS)
    from torchvision.models import get_model_weights

    return hub_file(get_model_weights(TRUNKS[net][0])["IMAGENET1K_V1"].url)


def build_trunk(net: str, path: Path | None) -> nn.Module:
    """Build LPIPS's network `net`, which gives features at several depths.

    Args:
        net: one of `TRUNKS`.
        path: torchvision's file; None draws random weights, the same at every start.

    Raises:
        InputError: the file is damaged, or another network's.
    """
    import lpips

    # On the meta device: torchvision would first draw random weights, of the classifier too, which takes seconds.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", UserWarning)  # the package calls torchvision by a deprecated argument
        trunk: nn.Module = lpips.LPIPS(net=net, lpips=False, pnet_rand=True, verbose=False).net
    trunk.to_empty(device="cpu")
    if path is None:
        with fixed_random_state():
            for module in trunk.modules():
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)
        return trunk
    # LPIPS cuts torchvision's `features` into slices, keeps the layers' numbers, and has no use for the classifier.
    layers = {number: layer for part in trunk.children() for number, layer in part.named_children()}
    tensors = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith("classifier.")}
    load_exactly(nn.ModuleDict({"features": nn.ModuleDict(layers)}), tensors, path)
    return trunk
