"""The deep-compression encoder: DC-AE's stages with space-to-channel shortcuts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError, check_names
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.networks.attention import LinearAttention
from dc_ssdae.networks.block_transform import BlockAnalysis
from dc_ssdae.networks.blocks import (
    CheckpointedModule,
    SpaceToChannelDownsample,
    add,
    as_layout,
    as_planes,
    average_channel_groups,
    check_downsample_factor,
    check_image,
    silu,
)
from dc_ssdae.networks.norms import ChannelRMSNorm

BlockType = Literal["ResBlock", "EfficientViTBlock"]

LATENT_INIT_GAIN = 0.1
"""Of the latent's output weights at initialisation, against PyTorch's default, where they are to start small."""

LOGVAR_START = -4.0
"""Log-variance that an encoder with a block shortcut starts at: the latent carries the image from the first step on."""


@dataclass(frozen=True)
class Architecture:
    """A family of stages; an encoder of factor f = 2^k takes the first k + 1 of each sequence."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    block_types: tuple[BlockType, ...]
    attention_scales: tuple[int, ...] = ()
    strided_downsample: bool = False


RES: tuple[BlockType, ...] = ("ResBlock",)
VIT: tuple[BlockType, ...] = ("EfficientViTBlock",)
ARCHITECTURES: dict[str, Architecture] = {
    "dc_ssdae": Architecture((128, 256, 512, 512, 1024, 1024, 1024, 1024), (0, 5, 10, 4, 4, 4, 4, 4), 8 * RES),
    "dc_ae": Architecture((128, 256, 512, 512, 1024, 1024, 2048, 2048), (0, 4, 8, 2, 2, 2, 2, 2), 3 * RES + 5 * VIT),
    "dc_ae_sana": Architecture((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), 3 * RES + 3 * VIT, (5,), True),
    "fast": Architecture((16, 32, 64, 128, 256, 256), (0, 1, 1, 2, 2, 2), 6 * RES),
}


class DCEncoder(CheckpointedModule):
    """Deep-compression encoder (Chen et al. 2025, "Deep compression autoencoder", section 3).

    Args:
        latent_channels: c.
        downsample_factor: f, a power of two from 8 on.
        architecture: "dc_ssdae" (the report's f8 to f128), "dc_ae" (DC-AE's), "dc_ae_sana" (SANA's f32), or "fast"
            (ours, f8 to f32, which costs about what the decoder of that name does); it gives the defaults of the
            settings below that are None.
        widths: width of each of the log2(f) + 1 stages.
        depths: blocks of each stage; only the first may be 0, which makes the input layer downsample.
        block_types: "ResBlock" or "EfficientViTBlock" for each stage.
        attention_scales: odd kernel sizes of the extra scales of EfficientViT's attention.
        strided_downsample: conv3 with stride 2 in place of conv3 and pixel-unshuffle.
        norm: "rms_norm", or "none" for the original code's checkpoints, which were trained without any.
        variational: give mean and log-variance (2c channels); False gives c channels and no variance, as
            DC-AE's published encoders do.
        out_shortcut: add the mean of groups of consecutive channels to the latent's mean, as DC-AE does.
        block_shortcut: add a learned linear map of each f×f block of pixels to the latent's mean. It starts as the
            block's c strongest cosines, as JPEG keeps them, so that the first step already has a latent of use. (Ours.)

    Shape: x (B, 3, H, W) in [-1, 1], H and W multiples of f -> DiagonalGaussian of (B, c, H/f, W/f).

    Raises:
        InputError: a setting is unknown or does not fit the others.
    """

    def __init__(
        self,
        latent_channels: int = 32,
        downsample_factor: int = 32,
        architecture: str = "dc_ssdae",
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        block_types: Sequence[BlockType] | None = None,
        attention_scales: Sequence[int] | None = None,
        strided_downsample: bool | None = None,
        norm: Literal["rms_norm", "none"] = "rms_norm",
        variational: bool = True,
        out_shortcut: bool = False,
        block_shortcut: bool = False,
    ) -> None:
        super().__init__()
        check_names("architecture of DCEncoder", [architecture], ARCHITECTURES)
        check_names("norm of DCEncoder", [norm], ("rms_norm", "none"))
        family, stages = ARCHITECTURES[architecture], check_downsample_factor(downsample_factor) + 1
        widths = list(family.widths[:stages] if widths is None else widths)
        depths = list(family.depths[:stages] if depths is None else depths)
        block_types = list(family.block_types[:stages] if block_types is None else block_types)
        scales = tuple(family.attention_scales if attention_scales is None else attention_scales)
        strided = family.strided_downsample if strided_downsample is None else strided_downsample
        out_channels = 2 * latent_channels if variational else latent_channels
        counts = {"widths": len(widths), "depths": len(depths), "block_types": len(block_types)}
        for name, count in counts.items():
            if count != stages:
                raise InputError(f"{name} has {count} stages in {architecture}; f = {downsample_factor} needs {stages}")
        _check_stages(widths, depths, block_types, scales)
        if out_shortcut and widths[-1] % latent_channels:
            raise InputError(f"out_shortcut needs a last width that latent_channels divides, not {widths[-1]}")

        self.downsample_factor = downsample_factor
        self.widths = widths
        self.variational = variational
        self.out_shortcut = out_shortcut
        if depths[0]:
            self.project_in: nn.Module = nn.Conv2d(3, widths[0], 3, padding=1)
        else:
            self.project_in = SpaceToChannelDownsample(3, widths[1], strided=strided, shortcut=False)
        self.stages = nn.ModuleList()
        for index, (width, depth, block_type) in enumerate(zip(widths, depths, block_types, strict=True)):
            has_attention = block_type == "EfficientViTBlock"
            blocks: list[nn.Module] = [
                EfficientViTBlock(width, norm, scales) if has_attention else ResBlock(width, norm) for _ in range(depth)
            ]
            if depth and index + 1 < stages:
                blocks.append(SpaceToChannelDownsample(width, widths[index + 1], strided=strided))
            self.stages.append(nn.Sequential(*blocks))
        self.latent_head = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.block_shortcut = BlockAnalysis(latent_channels, downsample_factor) if block_shortcut else None
        if variational or block_shortcut:
            # The residual stream grows with depth. A log-variance of its size would start the KL at e^(its square);
            # and where a shortcut gives the mean already, the convolution adds little to it at first.
            first = 0 if out_shortcut or block_shortcut else latent_channels
            with torch.no_grad():
                self.latent_head.weight[first:] *= LATENT_INIT_GAIN
                if block_shortcut and variational:
                    self.latent_head.bias[latent_channels:] = LOGVAR_START  # type: ignore[index]

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Encode (B, 3, H, W) in [-1, 1] to the Gaussian over (B, c, H/f, W/f)."""
        check_image(x, self.downsample_factor)
        y = self.project_in(as_layout(x))
        for stage in self.stages:
            for block in stage.children():
                y = self.run_block(block, y)
        moments = as_planes(self.latent_head(y))
        mean, logvar = moments.chunk(2, dim=1) if self.variational else (moments, None)
        if self.out_shortcut:
            mean = mean + average_channel_groups(y, mean.shape[1])
        if self.block_shortcut is not None:
            mean = mean + as_planes(self.block_shortcut(x))
        return DiagonalGaussian(mean, logvar)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Name what a phase of training can choose, as `dc_ssdae.parameter_groups` reads it; from input to latent.

        Stages are counted from 0; one without blocks is no group. A downsample belongs to the stage that it leaves.
        """
        filled = [f"stages.{index}" for index, stage in enumerate(self.stages) if [*stage.children()]]
        return {
            "input": ["project_in"],
            **{name: [name] for name in filled},
            "latent_head": ["latent_head", "block_shortcut"],
        }


class ResBlock(nn.Module):
    """x + norm(conv3(SiLU(conv3(x)))), the second convolution without bias: (B, C, H, W) -> same."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = _make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return add(x, self.norm(self.conv2(silu(self.conv1(x)))))


class EfficientViTBlock(nn.Module):
    """Linear attention, then the GLU inverted bottleneck, each with its residual: (B, C, H, W) -> same."""

    def __init__(self, channels: int, norm: str, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = LinearAttention(channels, scales, _make_norm(norm, channels))
        self.bottleneck = GLUInvertedBottleneck(channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.attention(x))


class GLUInvertedBottleneck(nn.Module):
    """1×1 to 8C, SiLU, depth-wise 3×3, value · SiLU(gate), 1×1 to C, norm, + input: (B, C, H, W) -> same."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        wide = 8 * channels
        self.expand = nn.Conv2d(channels, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.project = nn.Conv2d(wide // 2, channels, 1, bias=False)
        self.norm = _make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depthwise(silu(self.expand(x))).chunk(2, dim=1)
        return add(x, self.norm(self.project(value * F.silu(gate))))


def _make_norm(norm: str, channels: int) -> nn.Module:
    return ChannelRMSNorm(channels) if norm == "rms_norm" else nn.Identity()


def _check_stages(
    widths: Sequence[int], depths: Sequence[int], block_types: Sequence[str], scales: Sequence[int]
) -> None:
    check_names("block type of DCEncoder", block_types, ("ResBlock", "EfficientViTBlock"))
    if any(depth < (0 if index == 0 else 1) for index, depth in enumerate(depths)):
        raise InputError(f"depths {list(depths)}: only the first may be 0, none may be negative")
    for index, (width, block_type) in enumerate(zip(widths, block_types, strict=True)):
        unit = LinearAttention.HEAD_WIDTH if block_type == "EfficientViTBlock" else 4
        if width <= 0 or width % unit:
            raise InputError(f"widths[{index}] is {width}; {block_type} needs a positive multiple of {unit}")
        if index and depths[index - 1] and (4 * widths[index - 1]) % width:
            raise InputError(f"widths[{index}] = {width} must divide 4·widths[{index - 1}] = {4 * widths[index - 1]}")
    if any(scale < 1 or scale % 2 == 0 for scale in scales):
        raise InputError(f"attention_scales {list(scales)}: kernel sizes must be odd and positive")
