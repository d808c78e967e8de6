"""Small autoencoders, images for them, and what is refused, that several test modules share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, DiagonalGaussian, InputError

TINY_DECODER = {
    "init_args": {
        "channels": 8,
        "multipliers": [1, 1, 2, 2],
        "norm_groups": 8,
        "middle_layers": 1,
        "blocks_per_level": 1,
        "window_radius": 3,
    }
}

EVALUATION: dict[str, Any] = {
    "protocol": "dcae",
    "data": "photos/validation",
    "images": 5000,
    "image_size": 256,
    "decoding": {"sampler": "nesterov", "num_steps": 4, "step_size": [0.5, 0.25]},
    "metrics": {"psnr": {"value": 25.125, "low": 25.0, "high": 25.25}, "lpips": {"value": 0.5, "note": "random"}},
}
"""As a model's provenance holds it."""


def tiny_encoder(kind: str, factor: int) -> dict[str, Any]:
    if kind == "KLEncoder":
        init_args: dict[str, Any] = {"channels": 8, "norm_groups": 8, "blocks_per_level": 1}
    else:
        halvings = factor.bit_length() - 1
        init_args = {
            "widths": [16] * halvings + [32],
            "depths": [0] + [1] * halvings,
            "block_types": ["ResBlock"] * halvings + ["EfficientViTBlock"],
        }
    return {"class_path": kind, "init_args": init_args}


def tiny(factor: int = 8, encoder: str = "KLEncoder", **given: Any) -> DCSSDAE:
    """A small autoencoder in eval mode with every parameter and running statistic moved off its start."""
    parts = {"encoder": tiny_encoder(encoder, factor), "decoder": TINY_DECODER, **given}
    model = DCSSDAE(latent_channels=4, downsample_factor=factor, **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if hasattr(model.decoder, "latent_norm"):
            model.decoder.latent_norm.running_mean.normal_()
            model.decoder.latent_norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


class PatchEncoder(nn.Module):
    """Looks at each patch of f × f pixels alone, with one convolution."""

    def __init__(self, latent_channels: int, downsample_factor: int, variance: bool = True) -> None:
        super().__init__()
        self.variance = variance
        channels = 2 * latent_channels if variance else latent_channels
        self.conv = nn.Conv2d(3, channels, downsample_factor, downsample_factor)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        moments = self.conv(x)
        return DiagonalGaussian.from_moments(moments) if self.variance else DiagonalGaussian(moments)


class PatchDecoder(nn.Module):
    """Looks at each pixel, and the latent there, alone."""

    def __init__(self, latent_channels: int, downsample_factor: int, time_conditioning: bool) -> None:
        super().__init__()
        self.of_latent = nn.ConvTranspose2d(latent_channels, 3, downsample_factor, stride=downsample_factor)

    def forward(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        return (x - self.of_latent(z)) * (1.0 if time is None else 0.5 + time[:, None, None, None])


def patchwise(dynamics: dict[str, Any] | None = None, variance: bool = True) -> DCSSDAE:
    """A model that works patch by patch: quick to compile, and the same in tiles."""
    encoder = {"class_path": "tiny_models.PatchEncoder", "init_args": {"variance": variance}}
    return DCSSDAE(4, 8, encoder=encoder, decoder={"class_path": "tiny_models.PatchDecoder"}, dynamics=dynamics).eval()


class BareDynamics:
    """A dynamics that shares no class with the package's own; has what building a model asks for."""

    conditions_on_time, noise_level = True, 1.0

    def sample_level(self) -> None: ...

    def corrupt(self) -> None: ...

    def clean_estimate(self) -> None: ...

    def loss(self) -> None: ...


def image(batch: int = 1, height: int = 32, width: int = 48) -> Tensor:
    return 2.0 * torch.rand(batch, 3, height, width) - 1.0


def refusal(call: Callable[..., Any], *arguments: Any, **given: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        call(*arguments, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


def loading_refusal(folder: Path, **given: Any) -> str:
    """The one line with which a model folder is refused."""
    return refusal(DCSSDAE.from_pretrained, folder, **given)


def loads_or_refuses(folder: Path) -> None:
    """Load a model, or be refused in one line; any other exception fails the test."""
    try:
        DCSSDAE.from_pretrained(folder)
        message = ""
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def edit_config(folder: Path, **changes: Any) -> None:
    """Replace settings in a model folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
