"""The encoder of any image autoencoder of diffusers, run by diffusers' own code."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError, check_names, shown
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.networks.blocks import CheckpointedModule, check_image

DERIVED = ("block_out_channels", "force_upcast")
"""What some of these classes write into config.json although their constructors do not take it."""


class DiffusersEncoder(CheckpointedModule):
    """The encoder of an image autoencoder of diffusers, without its decoder.

    Autoencoders of video encode an image as one frame.

    Args:
        latent_channels: c.
        downsample_factor: f.
        autoencoder: name of the class of diffusers, such as "AutoencoderTiny" (TAESD and its kin; Bohan 2023, "Tiny
            AutoEncoder for Stable Diffusion"), "AutoencoderKLFlux2" or "AutoencoderRAE".
        settings: of that class, as its config.json has them.

    Shape: x (B, 3, H, W) in [-1, 1], H and W multiples of f -> DiagonalGaussian of (B, c, H/f, W/f).

    Raises:
        InputError: diffusers has no such autoencoder, or a setting is unknown; or, when an image is encoded, c or the
            size of the image does not fit.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        downsample_factor: int = 8,
        autoencoder: str = "AutoencoderTiny",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        kind = find_autoencoder(autoencoder)
        settings = constructor_settings(kind, settings or {})
        if "latent_channels" in inspect.signature(kind).parameters:
            settings.setdefault("latent_channels", latent_channels)
        self.latent_channels = latent_channels
        self.downsample_factor = downsample_factor
        self.autoencoder = kind(**settings)
        self.has_frames = has_frames(self.autoencoder)
        for name, _ in [*self.autoencoder.named_children()]:
            if name.startswith(("decoder", "post_quant")):
                setattr(self.autoencoder, name, nn.Identity())  # not deleted: some count its layers when they encode

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Encode (B, 3, H, W) in [-1, 1] to a Gaussian over (B, c, H/f, W/f), where need be without a variance."""
        check_image(x, self.downsample_factor)
        name, only_side = type(self.autoencoder).__name__, fixed_side(self.autoencoder)
        if only_side is not None and x.shape[2:] != (only_side, only_side):
            raise InputError(f"{name} takes images of {only_side}×{only_side} pixels, not {x.shape[2]}×{x.shape[3]}")
        moments = self.run_block(self._moments, x)
        if moments.shape[1] not in (self.latent_channels, 2 * self.latent_channels):
            raise InputError(f"latent_channels is {self.latent_channels}, which {name} does not have with its settings")
        return DiagonalGaussian(*moments.split(self.latent_channels, dim=1))

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and, where there is one, log-variance."""
        if self.gradient_checkpointing:
            for part in self.autoencoder.modules():
                part.gradient_checkpointing = False  # once is enough; and AutoencoderTiny's own changes the image
        return torch.cat(encode_images(self.autoencoder, x, self.has_frames).moments, dim=1)


def find_autoencoder(name: object) -> Any:
    """Find a class of diffusers that encodes and decodes; nothing outside of diffusers is looked at.

    Raises:
        InputError: there is none of that name.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not (is_model and hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise InputError(f"{shown(name)} is no autoencoder of diffusers")
    return kind


def constructor_settings(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a class of diffusers that a config.json holds.

    Raises:
        InputError: one is unknown to the installed diffusers: it may stand for a layer.
    """
    accepted = inspect.signature(kind).parameters
    names = [name for name in config if not name.startswith("_") and (name in accepted or name not in DERIVED)]
    check_names(f"setting of {kind.__name__}", names, accepted)
    return {name: config[name] for name in names}


def has_frames(autoencoder: nn.Module) -> bool:
    """Whether an autoencoder of diffusers is one of video, whose images (B, 3, T, H, W) have a frame axis."""
    kinds = {type(part) for part in getattr(autoencoder, "encoder", autoencoder).modules()}
    # By name, because some are two-dimensional convolutions of one frame after the other.
    return any("Conv3d" in base.__name__ for kind in kinds for base in kind.__mro__)


def takes_zero_to_one(autoencoder: nn.Module) -> bool:
    """Whether an autoencoder of diffusers takes images in [0, 1]: those do that normalise them as their ViT wants."""
    return hasattr(autoencoder, "encoder_mean")


def fixed_side(autoencoder: nn.Module) -> int | None:
    """Height and width in pixels of the images of an autoencoder of diffusers that resizes all others."""
    return getattr(autoencoder, "decoder_image_size", None)


def encode_images(autoencoder: Any, x: Tensor, with_frames: bool) -> DiagonalGaussian:
    """Encode images by an autoencoder of diffusers; one that takes a channel more gets opaque images.

    Args:
        autoencoder: the model, in the dtype of x.
        x: (B, 3, H, W) in [-1, 1].
        with_frames: as `has_frames` says.

    Returns:
        The Gaussian over (B, c, h, w), of the latent as `encode` gives it.
    """
    x = 0.5 * x + 0.5 if takes_zero_to_one(autoencoder) else x
    config = getattr(autoencoder, "config", {})
    if 4 in (config.get("in_channels"), config.get("input_channels")):
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # alpha, as Qwen-Image 2.1 has it: all is opaque
    posterior = as_posterior(autoencoder.encode(x.unsqueeze(2) if with_frames else x), type(autoencoder).__name__)
    return DiagonalGaussian(*(part.squeeze(2) for part in posterior.moments)) if with_frames else posterior


def as_posterior(output: Any, name: str) -> DiagonalGaussian:
    """Find the latent in what the `encode` of an autoencoder, ours, diffusers' or a user's, gives.

    Args:
        output: a Gaussian, a tensor, or an output with `latent_dist`, `latents` or `latent`.
        name: of the autoencoder, for the message.

    Raises:
        InputError: there is no latent.
    """
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    distribution = getattr(output, "latent_dist", output)
    logvar = getattr(distribution, "logvar", None)
    given = [getattr(distribution, "mean", None), *(getattr(output, field, None) for field in ("latents", "latent"))]
    if output is not distribution and not isinstance(given[0], Tensor):
        given.append(distribution.mode())  # of AutoencoderKLCosmos, which has no mean
    mean = next((value for value in (*given, output) if isinstance(value, Tensor)), None)
    if mean is None:
        kind = type(output).__name__
        raise InputError(f"encode of {name} gives {kind}, not a latent: a tensor, latent_dist or latents")
    return DiagonalGaussian(mean, logvar if isinstance(logvar, Tensor) else None)
