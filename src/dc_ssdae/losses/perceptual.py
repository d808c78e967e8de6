"""Perceptual distance of the clean estimate from the image."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.losses.backbones import (
    FrozenBackbone,
    WeightsFile,
    check_precision,
    find_weights,
    fixed_random_state,
    hub_file,
    load_exactly,
    read_weights,
    weights_on_this_machine,
)
from dc_ssdae.losses.term import StepOutputs

TRUNKS: Mapping[str, tuple[str, int]] = {
    "vgg": ("vgg16", 16),
    "alex": ("alexnet", 31),
    "squeeze": ("squeezenet1_1", 17),
}
"""By the name that LPIPS gives a network: torchvision's name, and the smallest side of an image that it takes."""

EPSILON = 1e-10


class LPIPSLoss(nn.Module):
    """LPIPS v0.1 of x̂ against the image: (B,) float32 (SPEC section 2; Zhang et al. 2018).

    "auto" is float32, because bfloat16 is too coarse for x̂ near x. Measured with random weights on 64 and 128 pixel
    crops of photos, features compared in float32: for noise of standard deviation 0.02 VGG's loss changes by up to 5 %
    an image and 1 to 1.6 % over a batch, from 0.05 on by up to 1.2 % and 0.4 %; for blur by up to 5 % and 0.3 %. The
    gradient's direction has a cosine of 0.97 to 0.98 with float32's.

    Args:
        net: "vgg" (VGG-16), "alex" or "squeeze".
        weights: folder with torchvision's file of that network, or "random"; None looks for it (`find_weights`).
        precision: "float32", "bfloat16", or "auto", which is float32.

    Raises:
        InputError: a setting is unknown, or the weights are not to be had.
    """

    def __init__(self, net: str = "vgg", weights: str | None = None, precision: str = "auto") -> None:
        super().__init__()
        file = _file(net, precision)
        self.weights_file = find_weights("lpips", file, weights)
        self.random_weights = self.weights_file is None
        self.net = net
        self.backbone = FrozenBackbone(_build(net, self.weights_file), precision)

    @classmethod
    def fetch(cls, net: str = "vgg", weights: str | None = None, precision: str = "auto") -> None:
        """Find or download the weights that the same settings need, without building anything.

        Raises:
            InputError: a setting is unknown, or the weights are not to be had.
        """
        find_weights("lpips", _file(net, precision), weights)

    @classmethod
    def is_on_this_machine(cls, net: str = "vgg") -> bool:
        """Whether the network's weights are here, so that nothing is downloaded for them.

        Raises:
            InputError: there is no such network, or DC_SSDAE_WEIGHTS names no folder.
        """
        return weights_on_this_machine(_file(net, "auto")) is not None

    def forward(self, outputs: StepOutputs) -> Tensor:
        return self.distance(outputs.clean_estimate, outputs.record.x)

    def distance(self, estimate: Tensor, x: Tensor) -> Tensor:
        """LPIPS of images (B, 3, H, W) in [-1, 1] against others: (B,) float32; gradients flow to `estimate`.

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
    """Features of an image in [-1, 1] at several depths, and LPIPS' weights of their channels.

    Args:
        scaling: of the image.
        trunk: gives a tuple of (B, C, h, w).
        heads: a (C,) for each.
    """

    def __init__(self, scaling: nn.Module, trunk: nn.Module, heads: list[Tensor]) -> None:
        super().__init__()
        self.scaling = scaling
        self.trunk = trunk
        self.heads = nn.ParameterList(heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.trunk(self.scaling(x))


def _unit_length(features: Tensor) -> Tensor:
    """Scale the channels to length 1, in float32; where all are 0, the gradient of the length is 0 too."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def _file(net: str, precision: str) -> WeightsFile:
    check_precision(precision)
    return trunk_file(net)


def trunk_file(net: str) -> WeightsFile:
    """Describe torchvision's file of LPIPS' network `net`.

    Raises:
        InputError: there is no such network.
    """
    if net not in TRUNKS:
        raise unknown_name("net of losses.lpips", net, TRUNKS)
    from torchvision.models import get_model_weights

    return hub_file(get_model_weights(TRUNKS[net][0])["IMAGENET1K_V1"].url)


def build_trunk(net: str, path: Path | None) -> nn.Module:
    """Build LPIPS' network `net`, which gives features at several depths, as its package slices it.

    Args:
        net: one of `TRUNKS`.
        path: of torchvision's file; None draws random weights, the same at every start.

    Raises:
        InputError: the file is damaged, or another network's.
    """
    from lpips import pretrained_networks

    classes = {
        "vgg": pretrained_networks.vgg16,
        "alex": pretrained_networks.alexnet,
        "squeeze": pretrained_networks.squeezenet,
    }
    # On the meta device: torchvision would first draw random weights, of the classifier too, which takes seconds.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", UserWarning)  # the package speaks torchvision's former language
        trunk: nn.Module = classes[net](pretrained=False)
    trunk.to_empty(device="cpu")
    if path is None:
        with fixed_random_state():
            for module in trunk.modules():
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)
    else:
        # The classifier is of no use here. LPIPS cuts the features into slices and keeps their numbers.
        tensors = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith("classifier.")}
        renamed = {name: f"features.{name.partition('.')[2]}" for name in trunk.state_dict()}
        load_exactly(trunk, tensors, path, renamed)
    return trunk


def _build(net: str, path: Path | None) -> PerceptualFeatures:
    import lpips

    trunk = build_trunk(net, path)
    heads_path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = [head.flatten() for _, head in sorted(read_weights(heads_path).items())]
    return PerceptualFeatures(lpips.ScalingLayer(), trunk, heads)
