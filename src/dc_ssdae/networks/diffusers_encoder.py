"""The encoder of an autoencoder of diffusers, run by diffusers' own code."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.networks.blocks import CheckpointedModule, check_image

WRAPPED = ("AutoencoderTiny",)
"""The classes of diffusers whose encoders are run as they are; those of AutoencoderKL and AutoencoderDC are ours."""

SAVED_BESIDE = ("block_out_channels",)
"""What these classes write into config.json and their constructors do not take."""


class DiffusersEncoder(CheckpointedModule):
    """An encoder of diffusers, without its autoencoder's decoder.

    Args:
        latent_channels: c.
        downsample_factor: f.
        autoencoder: the class of diffusers, "AutoencoderTiny" (TAESD and its kin; Bohan 2023, "Tiny AutoEncoder for
            Stable Diffusion").
        settings: of that class, as its config.json has them.

    Shape: x (B, 3, H, W) in [-1, 1], H and W multiples of f -> DiagonalGaussian of (B, c, H/f, W/f).

    Raises:
        InputError: the class or a setting is unknown, or c does not fit the settings.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        downsample_factor: int = 8,
        autoencoder: str = "AutoencoderTiny",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        import diffusers

        super().__init__()
        if autoencoder not in WRAPPED:
            raise unknown_name("autoencoder of DiffusersEncoder", autoencoder, WRAPPED)
        settings = constructor_settings(autoencoder, settings or {})
        if settings.setdefault("latent_channels", latent_channels) != latent_channels:
            raise InputError(
                f"latent_channels is {latent_channels}; {autoencoder} has {settings['latent_channels']} in its settings"
            )
        self.downsample_factor = downsample_factor
        self.autoencoder = getattr(diffusers, autoencoder)(**settings)
        del self.autoencoder.decoder

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Encode (B, 3, H, W) in [-1, 1] to a point of (B, c, H/f, W/f), as a Gaussian without a variance."""
        check_image(x, self.downsample_factor)
        return DiagonalGaussian(self.run_block(self._latents, x))

    def _latents(self, x: Tensor) -> Tensor:
        if self.autoencoder.encoder.gradient_checkpointing:
            # Its own leaves out that it takes images in [0, 1] (diffusers 0.42).
            self.autoencoder.encoder.gradient_checkpointing = False
        return self.autoencoder.encode(x).latents


def constructor_settings(autoencoder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a class of diffusers that a config.json holds.

    Raises:
        InputError: one is unknown to the installed diffusers: it may stand for a layer.
    """
    import diffusers

    accepted = [*inspect.signature(getattr(diffusers, autoencoder).__init__).parameters][1:]
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in SAVED_BESIDE}
    for key in given:
        if key not in accepted:
            raise unknown_name(f"setting of {autoencoder}", key, accepted)
    return given
