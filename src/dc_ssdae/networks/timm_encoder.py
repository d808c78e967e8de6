"""A frozen vision transformer of timm as the encoder: the latent is a map of its patch tokens."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError, did_you_mean, wrong_value
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.networks.blocks import check_image

DINOV2_B_WITH_REGISTERS = "vit_base_patch14_reg4_dinov2.lvd142m"

NORM_EPS = 1e-6
"""Of the last norm of DINOv2 and SigLIP."""


class TimmEncoder(nn.Module):
    """A frozen vision transformer of timm, whose normalised patch tokens are the latent (Zheng et al. 2025,
    "Diffusion transformers with representation autoencoders").

    The image is resized so that the transformer's patches are the places of the latent; class and register tokens
    are dropped, and the others pass a layer norm without scale and shift. Nothing is fetched here: the weights are
    random until a model is loaded or a training run starts.

    Args:
        latent_channels: c; below the width of the transformer, a trainable 1×1 convolution projects the tokens.
        downsample_factor: f.
        name: timm's name of a vision transformer that takes images of any size; DINOv2-B/14 with registers by default.
        layer: the block whose tokens are taken, from 0, or from the end with -1 for the last; later ones are not built.
        weights: what a training run starts from: the published weights, or random ones.

    Shape: x (B, 3, H, W) in [-1, 1], H and W multiples of f -> DiagonalGaussian of (B, c, H/f, W/f), without variance.

    Raises:
        InputError: timm has no such network, the network is no such transformer or has no such layer, or c is above its
            width.
    """

    def __init__(
        self,
        latent_channels: int = 768,
        downsample_factor: int = 16,
        name: str = DINOV2_B_WITH_REGISTERS,
        layer: int = -1,
        weights: Literal["pretrained", "random"] = "pretrained",
    ) -> None:
        super().__init__()
        transformer = create_transformer(name)
        depth, width = len(transformer.blocks), transformer.embed_dim
        if not -depth <= layer < depth:
            raise wrong_value("layer", layer, f"from {-depth} to {depth - 1} for {name}")
        if latent_channels > width:
            raise wrong_value("latent_channels", latent_channels, f"at most {width}, the width of {name}")
        transformer.prune_intermediate_layers([layer], prune_norm=True)
        self.downsample_factor = downsample_factor
        self.tokens = PatchTokens(transformer.requires_grad_(False), antialias=False)
        self.projection = nn.Identity() if latent_channels == width else nn.Conv2d(width, latent_channels, 1)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Encode (B, 3, H, W) in [-1, 1] to a point (B, c, H/f, W/f)."""
        check_image(x, self.downsample_factor)
        rows, columns = (side // self.downsample_factor for side in x.shape[2:])
        tokens = self.tokens(x, rows, columns)
        tokens = F.layer_norm(tokens, tokens.shape[2:], eps=NORM_EPS)
        return DiagonalGaussian(self.projection(tokens.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()))

    def parameter_groups(self) -> dict[str, list[str]]:
        """Name what a phase of training can choose, as `dc_ssdae.parameter_groups` reads it."""
        return {"transformer": ["tokens"], "projection": ["projection"]}


class PatchTokens(nn.Module):
    """Patch tokens (B, rows · columns, channels) of images in [-1, 1], resized so that each token is one patch.

    Args:
        transformer: a vision transformer of timm.
        antialias: smooth an image before it is made smaller.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, transformer: Any, antialias: bool = True) -> None:
        super().__init__()
        self.transformer = transformer
        self.antialias = antialias
        self.channels: int = transformer.embed_dim
        self.register_buffer("mean", torch.tensor(transformer.pretrained_cfg["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(transformer.pretrained_cfg["std"]).view(3, 1, 1))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        height, width = self.transformer.patch_embed.patch_size
        x = F.interpolate(x, (rows * height, columns * width), mode="bicubic", antialias=self.antialias)
        x = (0.5 * x + 0.5 - self.mean) / self.std
        return self.transformer.forward_features(x)[:, self.transformer.num_prefix_tokens :]


def create_transformer(name: str) -> Any:
    """Build a vision transformer of timm that takes images of any size, with random weights.

    Args:
        name: timm's; nothing is looked up outside of timm.

    Raises:
        InputError: timm has no such network, or it is not such a transformer.
    """
    import timm

    if not (timm.is_model_pretrained(name) if "." in name else timm.is_model(name)):
        raise InputError(f"timm has no {name!r}{did_you_mean(name, [*timm.list_models(), *timm.list_pretrained()])}")
    try:
        transformer: Any = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
        _ = transformer.num_prefix_tokens, transformer.patch_embed.patch_size, transformer.embed_dim, transformer.blocks
    except (TypeError, AttributeError):
        wanted = f"a vision transformer that takes images of any size; {DINOV2_B_WITH_REGISTERS} is one"
        raise InputError(f"{name} of timm is not {wanted}") from None
    return transformer
