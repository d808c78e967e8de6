"""The networks that metrics look through, from weights that are on this machine; nothing is downloaded unasked."""

import contextlib
import importlib.util
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.data.images import to_model_range, to_pillow
from dc_ssdae.errors import check_names
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.evaluation.frechet import REPLICATES, FrechetDistance
from dc_ssdae.evaluation.metrics import ImageMetric, each, mse, psnr, scikit_ssim, ssim
from dc_ssdae.evaluation.protocol import Protocol
from dc_ssdae.files import sha256
from dc_ssdae.losses.backbones import (
    FOLDER_VARIABLE,
    WeightsFile,
    download_weights,
    fixed_random_state,
    hub_file,
    load_exactly,
    read_weights,
    weights_on_this_machine,
)
from dc_ssdae.losses.perceptual import TRUNKS, build_trunk, trunk_file
from dc_ssdae.losses.repa import build_transformer, transformer_file

DINOV2_L = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIDE = 224
INCEPTION_CHANNELS, INCEPTION_SIZE = 2048, (299, 299)
PACKAGES = {"rfid": ("torch-fidelity", "'dc-ssdae[eval]'"), "dreamsim": ("dreamsim", "dreamsim")}
"""By metric, the package that it needs and may lack, and what pip installs it by."""
NOT_ASKED = "not asked for"
MSE = "mse"
"""Measured of every image too, for PSNRs that are pooled."""

DREAMSIM_FILES = ("ensemble_lora", "facebookresearch_dino_main", "checkpoints/dino_vitbase16_pretrain.pth")
"""What the package dreamsim keeps in its folder: of its own archive, and by way of PyTorch Hub."""


@dataclass
class MetricSuite:
    """The metrics of a protocol that this machine can take.

    Args:
        images: those of single images, by name; MSE among them.
        distances: those between sets, by name.
        missing: why a metric of `METRICS` is not taken, by name.
        notes: what to know of a metric before it is compared, by name.
        files: name and SHA-256 of the weights that a metric looks through, by the metric's name.
    """

    images: dict[str, ImageMetric] = field(default_factory=dict)
    distances: dict[str, FrechetDistance] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def load_metrics(
    protocol: Protocol,
    device: torch.device,
    wanted: Sequence[str] | None = None,
    random_backbones: bool = False,
    download: bool = False,
    replicates: int = REPLICATES,
    seed: int = 0,
    dinov2: str = DINOV2_L,
    size: int | None = None,
) -> MetricSuite:
    """Load the metrics of a protocol.

    Args:
        protocol: says which networks and formulas.
        device: of the networks.
        wanted: names among `METRICS`; None is all.
        random_backbones: take a network with random weights where its own are not on this machine.
        download: fetch what is not on this machine, of LPIPS, Inception and DINOv2.
        replicates: of the bootstrap of distances between sets.
        seed: of the bootstrap.
        dinov2: timm's name of the network of rFDD.
        size: smallest side of the images in pixels, where it is known.

    Raises:
        InputError: a name is unknown, a file is damaged or another network's, or a download failed.
    """
    check_names("metric", wanted or (), METRICS)
    suite = MetricSuite({MSE: each(mse)})
    smallest = TRUNKS[protocol.lpips][1]
    for name in METRICS:
        package, by_pip = PACKAGES.get(name, ("torch", ""))
        if wanted is not None and name not in wanted:
            suite.missing[name] = NOT_ASKED
        elif name == "lpips" and size is not None and size < smallest:
            suite.missing[name] = f"it needs images of at least {smallest} pixels; give a larger --size"
        elif importlib.util.find_spec(package.replace("-", "_")) is None:
            suite.missing[name] = f"the package {package} is not installed: pip install {by_pip}"
        elif name == "psnr":
            suite.images[name] = each(partial(psnr, highest=protocol.highest_psnr or math.inf))
        elif name == "ssim":
            suite.images[name] = each(ssim if protocol.ssim == "torchmetrics" else scikit_ssim)
        elif name == "dreamsim":
            _load_dreamsim(suite, device)
        else:
            file, build = NETWORKS[name](protocol, dinov2)
            path = weights_on_this_machine(file)
            if path is None and download:
                path = download_weights(file, METRICS[name].title, "leave --download out")
            if path is None and not random_backbones:
                suite.missing[name] = f"{file.names[0]} is not on this machine or in {FOLDER_VARIABLE}; see --download"
                continue
            checksum = "" if path is None else sha256(path)
            suite.files[name] = "random weights" if path is None else f"{path.name}, SHA-256 {checksum}"
            published = re.search(r"-([0-9a-f]{8})\.pth$", file.names[0])  # as PyTorch Hub names its files
            if path is None or (published is not None and not checksum.startswith(published[1])):
                what = "network has random weights" if path is None else "weights are not the published ones"
                suite.notes[name] = f"its {what}: comparable only within this report"
            network = build(path).to(device).eval().requires_grad_(False)
            if name == "lpips":
                suite.images[name] = network
            else:
                suite.distances[name] = FrechetDistance(network, network.channels, replicates, seed, device)
    return suite


def _load_dreamsim(suite: MetricSuite, device: torch.device) -> None:
    """Load DreamSim's ensemble with its package, from a folder that has all of its files."""
    folders = [Path(os.environ.get(FOLDER_VARIABLE, "")).expanduser() / "dreamsim", Path("models")]
    folder = next((f for f in folders if all((f / name).exists() for name in DREAMSIM_FILES)), None)
    if folder is None:
        suite.missing["dreamsim"] = f"not on this machine; dreamsim(pretrained=True, cache_dir='{folders[0]}') gets it"
        return
    from dreamsim import dreamsim

    hub = torch.hub.get_dir()
    with contextlib.redirect_stdout(sys.stderr):
        network, preprocess = dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    torch.hub.set_dir(hub)  # the package moves it
    suite.files["dreamsim"] = f"ensemble of {folder}"

    def measure(*sides: Tensor) -> Tensor:
        inputs = [torch.cat([preprocess(to_pillow(image)) for image in side]).to(device) for side in sides]
        return network(*inputs).reshape(len(inputs[0]))

    suite.images["dreamsim"] = measure


class LPIPS(nn.Module):
    """The package lpips' own metric, with torchvision's weights read strictly.

    Args:
        net: one of `TRUNKS`.
        path: of the weights of its trunk; None draws random ones, the same at every start.
    """

    def __init__(self, net: str, path: Path | None) -> None:
        import lpips

        super().__init__()
        with fixed_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package speaks torchvision's former language
            self.metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self.metric.net = build_trunk(net, path)

    def forward(self, reference: Tensor, images: Tensor) -> Tensor:
        sides = (side if side.is_floating_point() else to_model_range(side) for side in (images, reference))
        return self.metric(*sides).reshape(len(images))


class Inception(nn.Module):
    """torch-fidelity's port of the Inception of FID: uint8 (B, 3, H, W) to (B, 2048) float32.

    Args:
        path: of its weights; None draws random ones, the same at every start.
        prepare: pixels to its input, as `Protocol.inception` says.
    """

    channels = INCEPTION_CHANNELS

    def __init__(self, path: Path | None, prepare: str = "tensorflow") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        extractor = object.__new__(FeatureExtractorInceptionV3)
        with fixed_random_state():
            # It would run what a pickle tells it to. Without a file it ends there, when all layers are made.
            with contextlib.suppress(FileNotFoundError):
                extractor.__init__("inception-v3-compat", [str(INCEPTION_CHANNELS)], feature_extractor_weights_path="")
            for module in extractor.modules():
                if isinstance(module, nn.Conv2d):  # PyTorch's own start shrinks what it sees from layer to layer
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if path is not None:
            # The published file comes from TensorFlow, where nobody counts batches, and nothing reads their number.
            counts = {name: n for name, n in extractor.state_dict().items() if name.endswith(".num_batches_tracked")}
            load_exactly(extractor, counts | read_weights(path), path)
        *layers, _ = extractor.children()  # in the order of its forward; the last is the classifier
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.prepare = prepare

    def forward(self, pixels: Tensor) -> Tensor:
        if self.prepare == "pytorch-fid":
            return self.layers(F.interpolate(to_model_range(pixels), INCEPTION_SIZE, mode="bilinear"))
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), INCEPTION_SIZE, align_corners=False)
        return self.layers((resized - 128) / 128)


class DINOv2(nn.Module):
    """The class token of a DINOv2 of timm: uint8 (B, 3, H, W) to (B, D) float32 (Stein et al. 2023).

    Images are resized to 224 pixels a side: bicubic, antialiased, in floating point. Positions are resampled as the
    authors' code does it: bicubic without antialiasing and with its offset; those of networks with registers as timm
    does it, with antialiasing.

    Args:
        name: timm's.
        path: of its weights; None draws random ones, the same at every start.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        super().__init__()
        self.transformer: Any = build_transformer(name, path)
        self.channels: int = self.transformer.embed_dim
        embeddings, (rows, columns) = self.transformer.pos_embed.detach(), self.transformer.patch_embed.grid_size
        self.transformer.set_input_size(img_size=(DINOV2_SIDE, DINOV2_SIDE))
        if self.transformer.reg_token is None:
            prefix, grid = embeddings.split([embeddings.shape[1] - rows * columns, rows * columns], dim=1)
            grid = grid.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
            side = self.transformer.patch_embed.grid_size[0] + 0.1  # as in the authors' code, which passes the scale on
            grid = F.interpolate(grid, scale_factor=(side / rows, side / columns), mode="bicubic")
            self.transformer.pos_embed = nn.Parameter(torch.cat([prefix, grid.flatten(2).mT], dim=1))
        if path is None:
            for name_, scale in self.transformer.named_parameters():
                if name_.endswith(".gamma"):  # timm starts its layer scales at 1e-5, which hides the image
                    nn.init.ones_(scale)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels / 255.0, (DINOV2_SIDE, DINOV2_SIDE), mode="bicubic", antialias=True)
        config = self.transformer.pretrained_cfg
        return self.transformer.forward_features(tvf.normalize(x, config["mean"], config["std"]))[:, 0]


def inception_file() -> WeightsFile:
    """Describe torch-fidelity's file of the Inception of FID."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return hub_file(URL_INCEPTION_V3)


NETWORKS: Mapping[str, Callable[[Protocol, str], tuple[WeightsFile, Callable[[Path | None], Any]]]] = {
    "lpips": lambda protocol, _: (trunk_file(protocol.lpips), partial(LPIPS, protocol.lpips)),
    "rfid": lambda protocol, _: (inception_file(), partial(Inception, prepare=protocol.inception)),
    "rfdd": lambda _, dinov2: (transformer_file(dinov2), partial(DINOv2, dinov2)),
}
"""By metric, the weights of its network under a protocol, and how it is built of them."""
