"""The networks that metrics look through, from weights that are on this machine; nothing is downloaded unasked."""

import contextlib
import importlib.util
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.data.images import to_model_range, to_pillow
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.evaluation.frechet import REPLICATES, FrechetDistance
from dc_ssdae.evaluation.metrics import mse_each, psnr_each, scikit_ssim_each, ssim_each
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

ImageMetric = Callable[[Tensor, Tensor], Tensor]
"""From reference and images, (B, 3, H, W) uint8, or float32 where the protocol has them unrounded, to (B,)."""

DINOV2_L = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIDE = 224
INCEPTION_CHANNELS, INCEPTION_SIDE = 2048, 299
SSIM_SMALLEST = {"torchmetrics": 6, "scikit-image": 7}
"""Side in pixels that the windows need, by library."""
NOT_ASKED = "not asked for"
MSE = "mse"
"""Measured of every image too, for PSNRs that are pooled."""

DREAMSIM_FILES = (
    "dino_vitb16_pretrain.pth",
    "open_clip_vitb16_pretrain.pth.tar",
    "clip_vitb16_pretrain.pth.tar",
    "ensemble_lora",
    "facebookresearch_dino_main",
    "checkpoints/dino_vitbase16_pretrain.pth",
)
"""What the package dreamsim keeps of its ensemble in its folder; the last two by way of PyTorch Hub."""


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
        InputError: a name is unknown, images are too small for a metric that was asked for, a file is damaged or
            another network's, or a download failed.
    """
    for name in wanted or ():
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    names = [name for name in METRICS if wanted is None or name in wanted]
    suite = MetricSuite(images={MSE: _in_float64(mse_each, device)})
    suite.missing = {name: NOT_ASKED for name in METRICS if name not in names}
    smallest = {
        "ssim": ("SSIM", SSIM_SMALLEST[protocol.ssim]),
        "lpips": (f"LPIPS of {protocol.lpips}", TRUNKS[protocol.lpips][1]),
    }
    loader = _Loader(suite, device, random_backbones, download)
    for name in names:
        if name == "psnr":
            suite.images[name] = _in_float64(partial(psnr_each, highest=protocol.highest_psnr or math.inf), device)
        elif name in smallest and size is not None and size < smallest[name][1]:
            suite.missing[name] = "{} needs images of at least {} pixels; give a larger --size".format(*smallest[name])
            if wanted is not None:
                raise InputError(suite.missing[name])
        elif name == "ssim":
            suite.images[name] = ssim_each if protocol.ssim == "torchmetrics" else scikit_ssim_each
        elif name == "dreamsim":
            loader.dreamsim()
        elif name == "lpips":
            loader.network(name, trunk_file(protocol.lpips), lambda path: _LPIPS(protocol.lpips, path))
        else:
            if name == "rfid" and importlib.util.find_spec("torch_fidelity") is None:
                suite.missing[name] = "the package torch-fidelity is not installed: pip install 'dc-ssdae[eval]'"
                continue
            if name == "rfid":
                network = loader.network(name, inception_file(), lambda path: Inception(path, protocol.inception))
            else:
                network = loader.network(name, transformer_file(dinov2), lambda path: DINOv2(dinov2, path))
            if network is not None:
                suite.distances[name] = FrechetDistance(network, network.channels, replicates, seed, device)
    return suite


class _Loader:
    """Finds the weights of networks and says which they are."""

    def __init__(self, suite: MetricSuite, device: torch.device, random_backbones: bool, download: bool) -> None:
        self.suite = suite
        self.device = device
        self.random_backbones = random_backbones
        self.download = download

    def network(self, name: str, file: WeightsFile, build: Callable[[Path | None], nn.Module]) -> Any:
        """Build a metric's network; None where its weights are not available, and the suite says why."""
        path = weights_on_this_machine(file)
        if path is None and self.download:
            path = download_weights(file, METRICS[name].title, "leave --download out")
        if path is None and not self.random_backbones:
            self.suite.missing[name] = (
                f"weights {file.names[0]} are not on this machine; put them into the folder that {FOLDER_VARIABLE} "
                "names, or give --download"
            )
            return None
        if path is None:
            self.suite.notes[name] = "its network has random weights: comparable only within this report"
            self.suite.files[name] = "random weights"
        else:
            checksum = sha256(path)
            self.suite.files[name] = f"{path.name}, SHA-256 {checksum}"
            published = published_prefix(file)
            if published is not None and not checksum.startswith(published):
                self.suite.notes[name] = (
                    f"its weights are not the published ones (SHA-256 {checksum[:8]}…, not {published}…): comparable "
                    "only within this report"
                )
        network = build(path).to(self.device).eval().requires_grad_(False)
        if name == "lpips":
            self.suite.images[name] = lambda reference, images: network(images, reference).cpu().double()
        return network

    def dreamsim(self) -> None:
        """Load DreamSim's ensemble with its package, from a folder that has all of its files."""
        if importlib.util.find_spec("dreamsim") is None:
            self.suite.missing["dreamsim"] = "the package dreamsim is not installed: pip install dreamsim"
            return
        weights = os.environ.get(FOLDER_VARIABLE)
        folders = [*([Path(weights).expanduser() / "dreamsim"] if weights else []), Path("models")]
        folder = next((f for f in folders if all((f / name).exists() for name in DREAMSIM_FILES)), None)
        if folder is None:
            self.suite.missing["dreamsim"] = (
                f"its weights are not on this machine; let the package download them into "
                f"{' or '.join(map(str, folders))}: dreamsim(pretrained=True, cache_dir=…)"
            )
            return
        from dreamsim import dreamsim

        hub = torch.hub.get_dir()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                network, preprocess = dreamsim(pretrained=True, device=str(self.device), cache_dir=str(folder))
        finally:
            torch.hub.set_dir(hub)  # the package moves it
        self.suite.files["dreamsim"] = f"ensemble of {folder}"

        def measure(reference: Tensor, images: Tensor) -> Tensor:
            sides = [
                torch.cat([preprocess(to_pillow(image)) for image in side]).to(self.device)
                for side in (reference, images)
            ]
            return network(*sides).cpu().double().reshape(len(images))

        self.suite.images["dreamsim"] = measure


class _LPIPS(nn.Module):
    """lpips' own metric, with torchvision's weights read strictly."""

    def __init__(self, net: str, path: Path | None) -> None:
        import lpips

        super().__init__()
        with fixed_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package speaks torchvision's former language
            self.metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self.metric.net = build_trunk(net, path)
        self.net = net

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        smallest = TRUNKS[self.net][1]
        if min(images.shape[-2:]) < smallest:
            raise InputError(_too_small(self.net))
        if not images.is_floating_point():
            images, reference = to_model_range(images), to_model_range(reference)
        return self.metric(images, reference).reshape(len(images))


class Inception(nn.Module):
    """torch-fidelity's port of the Inception of FID: uint8 (B, 3, H, W) to (B, 2048) float32.

    Args:
        path: of its weights; None draws random ones, the same at every start.
        prepare: pixels to its input, as `Protocol.inception` says.
    """

    channels = INCEPTION_CHANNELS

    def __init__(self, path: Path | None, prepare: str = "tensorflow") -> None:
        from torch_fidelity import feature_extractor_inceptionv3 as library

        super().__init__()
        # The constructor reads weights, by running what a pickle tells it to; here they are read strictly instead.
        with fixed_random_state():
            extractor = _without_weights(library.FeatureExtractorInceptionV3)
        if path is not None:
            # The published file comes from TensorFlow, where nobody counts batches, and nothing reads their number.
            counts = {name: n for name, n in extractor.state_dict().items() if name.endswith(".num_batches_tracked")}
            load_exactly(extractor, counts | read_weights(path), path)
        *layers, _ = extractor.children()  # in the order of its forward; the last is the classifier
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.prepare = prepare

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(self.input(pixels))

    def input(self, pixels: Tensor) -> Tensor:
        """What the first layer sees of uint8 pixels (B, 3, H, W): (B, 3, 299, 299) float32."""
        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        if self.prepare == "pytorch-fid":
            return F.interpolate(to_model_range(pixels), size, mode="bilinear", align_corners=False)
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return (interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size, align_corners=False) - 128) / 128


class DINOv2(nn.Module):
    """The class token of a DINOv2 of timm: uint8 (B, 3, H, W) to (B, D) float32 (Stein et al. 2023).

    Images are resized to 224 pixels a side: bicubic, antialiased, in floating point. Positions are resampled as the
    authors' code does it, bicubic without antialiasing and with its offset, where timm would use antialiasing.

    Args:
        name: timm's.
        path: of its weights; None draws random ones, the same at every start.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, path: Path | None) -> None:
        super().__init__()
        self.transformer: Any = build_transformer(name, path)
        positions = _resized_positions(self.transformer)
        self.transformer.set_input_size(img_size=(DINOV2_SIDE, DINOV2_SIDE))
        self.transformer.pos_embed = nn.Parameter(positions)
        self.channels: int = self.transformer.embed_dim
        if path is None:
            for name_, scale in self.transformer.named_parameters():
                if name_.endswith(".gamma"):  # timm starts its layer scales at 1e-5, which hides the image
                    nn.init.ones_(scale)
        config = self.transformer.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels / 255.0, (DINOV2_SIDE, DINOV2_SIDE), mode="bicubic", antialias=True)
        return self.transformer.forward_features((x - self.mean) / self.std)[:, 0]


def _resized_positions(transformer: Any) -> Tensor:
    """The position embeddings for images of DINOV2_SIDE pixels, (1, prefix + tokens, D)."""
    prefix = transformer.num_prefix_tokens
    embeddings = transformer.pos_embed.detach()
    side = DINOV2_SIDE // transformer.patch_embed.patch_size[0]
    rows, columns = transformer.patch_embed.grid_size
    grid = embeddings[:, prefix:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    scale = ((side + 0.1) / rows, (side + 0.1) / columns)  # 0.1 as in the authors' code, which passes the scale on
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([embeddings[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


def _too_small(net: str) -> str:
    return f"LPIPS of {net} needs images of at least {TRUNKS[net][1]} pixels; give a larger --size"


def _in_float64(metric: ImageMetric, device: torch.device) -> ImageMetric:
    """Take a metric on the CPU where the device, Apple's GPU, has no float64."""
    return metric if device.type != "mps" else lambda reference, images: metric(reference.cpu(), images.cpu())


def inception_file() -> WeightsFile:
    """Describe torch-fidelity's file of the Inception of FID."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return hub_file(URL_INCEPTION_V3)


def published_prefix(file: WeightsFile) -> str | None:
    """The first eight digits of the SHA-256 that PyTorch Hub's files have in their names."""
    match = re.search(r"-([0-9a-f]{8})\.pth$", file.names[0])
    return match.group(1) if match else None


def _without_weights(extractor: Any) -> Any:
    """Build torch-fidelity's Inception with random weights: its constructor insists on a file."""
    import tempfile

    class Blank(extractor):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({}, file)
        file.flush()
        blank = Blank("inception-v3-compat", [str(INCEPTION_CHANNELS)], feature_extractor_weights_path=file.name)
    blank.__class__ = extractor
    for module in blank.modules():
        if isinstance(module, nn.Conv2d):  # PyTorch's own start shrinks what it sees from layer to layer
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return blank
