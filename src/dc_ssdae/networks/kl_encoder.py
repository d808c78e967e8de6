"""The KL encoder: the encoder of Stable Diffusion's VAE, for any f = 2^k from 8 on."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError, check_at_least
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.networks.attention import SpatialSelfAttention
from dc_ssdae.networks.blocks import (
    CheckpointedModule,
    PointwiseConv,
    add,
    as_layout,
    as_planes,
    check_downsample_factor,
    check_image,
    silu,
)


class KLEncoder(CheckpointedModule):
    """Convolutional encoder to a diagonal Gaussian (Rombach et al. 2022, "High-resolution image synthesis with
    latent diffusion models", appendix).

    Args:
        latent_channels: c.
        downsample_factor: f, a power of two from 8 on.
        channels: width of the first level; a multiple of `norm_groups`.
        multipliers: width of each level in units of `channels`, log2(f) + 1 of them; None stands for
            [1, 2, 4, 4] and one more 4 for each halving beyond f8.
        blocks_per_level: residual blocks a level.
        norm_groups: groups of every group norm.

    Shape: x (B, 3, H, W) in [-1, 1], H and W multiples of f -> DiagonalGaussian of (B, c, H/f, W/f).

    Raises:
        InputError: f is no power of two from 8 on, or `multipliers` has another length than f asks for.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        downsample_factor: int = 8,
        channels: int = 128,
        multipliers: Sequence[int] | None = None,
        blocks_per_level: int = 2,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        halvings = check_downsample_factor(downsample_factor)
        check_at_least(1, latent_channels=latent_channels, channels=channels, norm_groups=norm_groups)
        check_at_least(1, blocks_per_level=blocks_per_level)
        multipliers = [1, 2] + [4] * (halvings - 1) if multipliers is None else multipliers
        if len(multipliers) != halvings + 1:
            raise InputError(f"multipliers has {len(multipliers)} levels; f = {downsample_factor} needs {halvings + 1}")
        widths = [channels * multiplier for multiplier in multipliers]
        if any(width < 1 or width % norm_groups for width in widths):
            raise InputError(f"level widths {widths} must be positive multiples of norm_groups = {norm_groups}")
        self.downsample_factor = downsample_factor
        self.widths = widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(level - 1, 0)]] + [width] * (blocks_per_level - 1)
            blocks: list[nn.Module] = [KLResidualBlock(before, width, norm_groups) for before in inputs]
            if level < halvings:
                blocks.append(AsymmetricDownsample(width))
            self.down.append(nn.Sequential(*blocks))
        width = widths[-1]
        self.middle = nn.Sequential(
            KLResidualBlock(width, width, norm_groups),
            SpatialSelfAttention(width, norm_groups),
            KLResidualBlock(width, width, norm_groups),
        )
        self.latent_head = nn.Sequential(
            nn.GroupNorm(norm_groups, width, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(width, 2 * latent_channels, 3, padding=1),
            nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1),
        )

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Encode (B, 3, H, W) in [-1, 1] to the Gaussian over (B, c, H/f, W/f)."""
        check_image(x, self.downsample_factor)
        y = self.conv_in(as_layout(x))
        for level in (*self.down, self.middle):
            for block in level.children():
                y = self.run_block(block, y)
        return DiagonalGaussian.from_moments(as_planes(self.latent_head(y)))

    def parameter_groups(self) -> dict[str, list[str]]:
        """Name what a phase of training can choose, as `dc_ssdae.parameter_groups` reads it; from input to latent.

        The middle works at the latent's resolution, as the last stage does, and belongs to it.
        """
        stages = {f"stages.{level}": [f"down.{level}"] for level in range(len(self.down))}
        stages[f"stages.{len(self.down) - 1}"].append("middle")
        return {"input": ["conv_in"], **stages, "latent_head": ["latent_head"]}


class KLResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv3, GroupNorm, SiLU, conv3, with a 1×1 shortcut where the widths differ."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else PointwiseConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(silu(self.norm1(x)))
        y = self.conv2(silu(self.norm2(y)))
        return add(self.shortcut(x), y)


class AsymmetricDownsample(nn.Module):
    """conv3 with stride 2 after one row and column of zeros at the bottom and the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))
