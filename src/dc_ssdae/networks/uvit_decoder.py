"""The U-ViT decoder: a U-Net with windowed transformer blocks, conditioned on the latent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError, check_at_least, check_names
from dc_ssdae.networks.attention import WindowedSelfAttention
from dc_ssdae.networks.block_transform import BlockSynthesis
from dc_ssdae.networks.blocks import (
    CheckpointedModule,
    ConditionedResidualBlock,
    UpsamplingConv,
    add,
    as_layout,
    as_planes,
    check_downsample_factor,
    check_latent_shape,
    conv3_of_upsampled,
    silu,
)
from dc_ssdae.networks.norms import GlobalBatchNorm2d

TIME_SCALE = 1000.0

OUTPUT_INIT_GAIN = 0.1
"""Of the output's weights at initialisation, against PyTorch's default, where a shortcut gives the answer already."""


@dataclass(frozen=True)
class Size:
    """A named size of the decoder: XS to H as in the DC-SSDAE report, or `fast`, which is for speed."""

    channels: int
    multipliers: tuple[int, int, int, int]
    middle_layers: int
    heads: int | None
    blocks_per_level: int = 2
    norm_groups: int = 32
    patch: int = 1


SIZES: dict[str, Size] = {
    "XS": Size(32, (1, 2, 3, 3), 8, 4),
    "S": Size(48, (1, 2, 3, 3), 8, 4),
    "B": Size(64, (1, 2, 3, 3), 10, None),
    "M": Size(96, (1, 2, 3, 3), 12, None),
    "L": Size(96, (1, 2, 4, 4), 16, None),
    "XL": Size(128, (1, 2, 4, 4), 16, None),
    "H": Size(192, (1, 2, 4, 4), 16, None),
    "fast": Size(64, (1, 1, 1, 2), 2, 4, blocks_per_level=1, norm_groups=16, patch=4),
}


class DecoderFeatures(NamedTuple):
    """What `UViTDecoder.forward_with_features` gives: the output (B, 3, H, W) and features (B, D, H/8, W/8)."""

    output: Tensor
    features: Tensor


class UViTDecoder(CheckpointedModule):
    """Answer of the dynamics' network to an image, given a latent (the DC-SSDAE report; its sizes are about SSDD's).

    Args:
        latent_channels: c.
        downsample_factor: f of the latent, a power of two from 8 on.
        size: "XS", "S", "B", "M", "L", "XL" or "H", or "fast" (docs/performance.md); it gives those of the next
            settings that are None.
        channels: base width.
        multipliers: width of each of the 4 - log2(patch) levels in units of `channels`, rounded up to a multiple of
            `norm_groups`; a size keeps its last ones.
        middle_layers: transformer blocks.
        heads: attention heads; None in a size stands for clamp(⌊last width / 64⌋, 4, 16).
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        norm_groups: groups of every group norm, and the unit of the widths.
        patch: side p of the squares of pixels that the first level sees as one: the image goes in through
            pixel-unshuffle, the answer comes out through pixel-shuffle, and the log2(p) finest levels fall away. 1, 2,
            4 or 8. Above 1 it is for an image as the answer: the noise of p² pixels is too much for narrow layers.
        window_radius: reach of the attention in tokens of 8×8 pixels: 8 is the paper's 17×17 window, 7 the
            original code's.
        block_shortcut: add a learned linear map of each latent pixel to its f×f block of the answer, for an image as
            the answer: "cosines" starts as the inverse of a `DCEncoder`'s block shortcut, "zero" as nothing, for the
            latent of another encoder; "none" leaves it out. (Ours.)
        time_conditioning: take a time, as flow matching needs; equilibrium matching knows none.

    Shape: x (B, 3, H, W), z (B, c, H/f, W/f), time (B,) in [0, 1] or None -> (B, 3, H, W).

    Raises:
        InputError: a setting is unknown or does not fit the others.
    """

    def __init__(
        self,
        latent_channels: int = 32,
        downsample_factor: int = 32,
        size: str = "S",
        channels: int | None = None,
        multipliers: Sequence[int] | None = None,
        middle_layers: int | None = None,
        heads: int | None = None,
        blocks_per_level: int | None = None,
        window_radius: int = 8,
        norm_groups: int | None = None,
        patch: int | None = None,
        block_shortcut: Literal["none", "zero", "cosines"] = "none",
        time_conditioning: bool = False,
    ) -> None:
        super().__init__()
        check_names("size of UViTDecoder", [size], SIZES)
        check_names("block_shortcut of UViTDecoder", [block_shortcut], ("none", "zero", "cosines"))
        check_downsample_factor(downsample_factor)
        preset = SIZES[size]
        patch = preset.patch if patch is None else patch
        if patch not in (1, 2, 4, 8):
            raise InputError(f"patch is {patch}; it must be 1, 2, 4 or 8")
        levels = 5 - patch.bit_length()
        blocks_per_level = preset.blocks_per_level if blocks_per_level is None else blocks_per_level
        norm_groups = preset.norm_groups if norm_groups is None else norm_groups
        channels = preset.channels if channels is None else channels
        multipliers = preset.multipliers[-levels:] if multipliers is None else multipliers
        middle_layers = preset.middle_layers if middle_layers is None else middle_layers
        check_at_least(1, latent_channels=latent_channels, channels=channels, norm_groups=norm_groups)
        check_at_least(1, middle_layers=middle_layers, blocks_per_level=blocks_per_level)
        check_at_least(0, window_radius=window_radius)
        if len(multipliers) != levels or min(multipliers) < 1:
            raise InputError(f"multipliers {list(multipliers)}: patch {patch} needs {levels} of them, each at least 1")
        widths = [norm_groups * math.ceil(channels * multiplier / norm_groups) for multiplier in multipliers]
        heads = heads or preset.heads or min(max(widths[-1] // 64, 4), 16)
        check_at_least(1, heads=heads)
        if widths[0] % 2 or widths[-1] % heads:
            raise InputError(f"level widths {widths}: the first must be even, the last a multiple of heads = {heads}")

        context, width = widths[0], widths[-1]
        time_channels = 4 * widths[0] if time_conditioning else None
        self.latent_channels = latent_channels
        self.downsample_factor = downsample_factor
        self.patch = patch
        self.time_conditioning = time_conditioning
        self.feature_channels = width  # D of `forward_with_features`
        self.latent_norm = GlobalBatchNorm2d(latent_channels, eps=1e-5)
        self.image_in = nn.Conv2d(3 * patch**2, context // 2, 3, padding=1)
        self.latent_in = nn.Conv2d(latent_channels, context // 2, 3, padding=1)
        self.join_in = nn.Conv2d(context, context, 3, padding=1)
        self.context = nn.Sequential(
            nn.Conv2d(latent_channels, context, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(context, context, 3, padding=1),
        )
        self.time_embedding = None if time_channels is None else TimeEmbedding(widths[0])
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [widths[0]]
        for level, level_width in enumerate(widths):
            inputs = [widths[max(level - 1, 0)]] + [level_width] * (blocks_per_level - 1)
            resample: type[nn.Module] | None = StridedConv if level < levels - 1 else None
            self.down.append(DownLevel(inputs, level_width, context, time_channels, norm_groups, resample))
            skips += [level_width] * (blocks_per_level + (level < levels - 1))
        self.middle = TransformerMiddle(width, context, middle_layers, heads, window_radius, norm_groups)
        hidden = width
        for level in reversed(range(levels)):
            inputs = []
            for _ in range(blocks_per_level + 1):
                inputs.append(hidden + skips.pop())
                hidden = widths[level]
            resample = UpsamplingConv if level > 0 else None
            self.up.append(UpLevel(inputs, hidden, context, time_channels, norm_groups, resample))
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], 3 * patch**2, 3, padding=1)
        self.block_shortcut: BlockSynthesis | None = None
        if block_shortcut != "none":
            self.block_shortcut = BlockSynthesis(latent_channels, downsample_factor, block_shortcut)
            with torch.no_grad():
                self.conv_out.weight *= OUTPUT_INIT_GAIN

    def forward(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        """Answer (B, 3, H, W) to x (B, 3, H, W) given z (B, c, H/f, W/f) and, with time conditioning, time (B,)."""
        return self._run(x, z, time, None)[0]

    def forward_with_features(
        self, x: Tensor, z: Tensor, time: Tensor | None = None, layer: int | None = None
    ) -> DecoderFeatures:
        """Answer as `forward` does, and also give the output of one middle transformer block.

        Args:
            x: (B, 3, H, W).
            z: (B, c, H/f, W/f).
            time: (B,) in [0, 1] with time conditioning, else None.
            layer: index of the block from 0; None is REPA's, min(4, ⌊n/2⌋) of n.

        Raises:
            InputError: there is no such block, or the inputs do not fit together.
        """
        count = len(self.middle.blocks)
        layer = min(4, count // 2) if layer is None else layer
        if not 0 <= layer < count:
            raise InputError(f"layer is {layer}; the decoder has middle blocks 0 to {count - 1}")
        output, features = self._run(x, z, time, layer)
        assert features is not None
        return DecoderFeatures(output, features)

    def _run(self, x: Tensor, z: Tensor, time: Tensor | None, layer: int | None) -> tuple[Tensor, Tensor | None]:
        self._check(x, z, time)
        direct = None if self.block_shortcut is None else self.block_shortcut(z)
        z = as_layout(self.latent_norm(z))
        latent_map = as_layout(conv3_of_upsampled(self.latent_in, z, self.downsample_factor // self.patch))
        image_map = self.image_in(as_layout(F.pixel_unshuffle(x, self.patch)))
        y = self.join_in(torch.cat([image_map, latent_map], dim=1))
        context = self.context(z)
        embedded_time = None
        if self.time_embedding is not None and time is not None:
            embedded_time = self.time_embedding(time, y.dtype)
        # Not one list that all levels change: hooks that move a module's inputs, as offloading has, copy lists.
        skips = [y]
        for down in self.down:
            y, outputs = down(y, context, embedded_time)
            skips += outputs
        y, features = self.middle(y, context, layer)
        # A list, which the level empties: as an argument of its own, the hidden map would live until the level ends.
        maps = [y]
        del y
        for up in self.up:
            assert isinstance(up, UpLevel)
            maps += [skips.pop() for _ in up.blocks]
            maps = [up(maps, context, embedded_time)]
        answer = F.pixel_shuffle(self.run_block(self._output, maps.pop()), self.patch)
        return as_planes(answer if direct is None else add(direct, answer)), features

    def parameter_groups(self) -> dict[str, list[str]]:
        """Name what a phase of training can choose, as `dc_ssdae.parameter_groups` reads it; from inputs to output.

        Levels are counted from 0, the finest, on the way up too. A resampling belongs to the level it leaves.
        """
        last = len(self.up) - 1
        return {
            "latent_inputs": ["latent_norm", "latent_in", "context", "block_shortcut"],
            "image_inputs": ["image_in", "join_in"],
            **({} if self.time_embedding is None else {"time": ["time_embedding"]}),
            **{f"down.{level}": [f"down.{level}"] for level in range(len(self.down))},
            "middle": ["middle"],
            # `up` holds the deepest level first.
            **{f"up.{last - index}": [f"up.{index}"] for index in range(last)},
            "head": [f"up.{last}", "norm_out", "conv_out"],
        }

    def _output(self, y: Tensor) -> Tensor:
        return self.conv_out(silu(self.norm_out(y)))

    def _check(self, x: Tensor, z: Tensor, time: Tensor | None) -> None:
        factor = self.downsample_factor
        check_latent_shape(z, self.latent_channels)
        expected = (z.shape[0], 3, z.shape[2] * factor, z.shape[3] * factor)
        if tuple(x.shape) != expected:
            raise InputError(f"x has shape {tuple(x.shape)}; a latent of {tuple(z.shape)} needs {expected}")
        given, wanted = None if time is None else time.shape, z.shape[:1] if self.time_conditioning else None
        if given != wanted:
            shapes = [shape and tuple(shape) for shape in (wanted, given)]
            raise InputError("this decoder takes a time of shape {}, not {}".format(*shapes))


class TimeEmbedding(nn.Module):
    """Sinusoidal features of 1000·t, then Linear, SiLU, Linear: (B,) in [0, 1] -> (B, 4·channels).

    Frequencies 10000^(-i / (channels/2)), features [cos, sin] (Ho et al. 2020).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.linear1.in_features // 2
        # The angles reach 1000 radians: half precision would lose them.
        exponent = torch.arange(half, device=time.device, dtype=torch.float32) / half
        angles = TIME_SCALE * time.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
        features = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
        return self.linear2(F.silu(self.linear1(features)))


class Level(CheckpointedModule):
    """One level of the U-Net: a residual block for each of `in_channels`, and the conv3 to the next level, if any."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        context_channels: int,
        time_channels: int | None,
        norm_groups: int,
        resample: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ConditionedResidualBlock(width, channels, context_channels, time_channels, norm_groups)
            for width in in_channels
        )
        self.resample = None if resample is None else resample(channels)


class StridedConv(nn.Conv2d):
    """A 3×3 convolution with stride 2: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class DownLevel(Level):
    """Residual blocks, then conv3 with stride 2 on all levels but the last; gives the last output, and all of them."""

    def forward(self, y: Tensor, context: Tensor, time: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for block in self.blocks:
            y = self.run_block(block, y, context, time)
            outputs.append(y)
        if self.resample is not None:
            y = self.resample(y)
            outputs.append(y)
        return y, outputs


class UpLevel(Level):
    """Residual blocks, each on (hidden, its skip), then nearest ×2 and conv3 on all levels but the first.

    The list of maps, the hidden one and then the skips, is used up, so that each is freed as soon as it is joined.
    """

    def forward(self, maps: list[Tensor], context: Tensor, time: Tensor | None) -> Tensor:
        y = maps.pop(0)
        for block in self.blocks:
            if self.gradient_checkpointing:
                y = self.run_block(_run_joined, block, y, maps.pop(0), context, time)
            else:
                y = torch.cat([y, maps.pop(0)], dim=1)
                y = block(y, context, time)
        if self.resample is not None:
            y = self.run_block(self.resample, y)
        return y


# A function of its own, so that checkpointing does not keep the joined map.
def _run_joined(block: nn.Module, y: Tensor, skip: Tensor, context: Tensor, time: Tensor | None) -> Tensor:
    return block(torch.cat([y, skip], dim=1), context, time)


class TransformerMiddle(CheckpointedModule):
    """GroupNorm, Linear, transformer blocks, Linear, + input, on tokens of 8×8 pixels: (B, D, h, w) -> same."""

    def __init__(
        self, channels: int, context_channels: int, layers: int, heads: int, radius: int, norm_groups: int
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.project_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_channels, heads, radius) for _ in range(layers))
        self.project_out = nn.Linear(channels, channels)

    def forward(self, y: Tensor, context: Tensor, layer: int | None) -> tuple[Tensor, Tensor | None]:
        batch, channels, height, width = y.shape
        tokens = self.project_in(self.norm(y).flatten(2).transpose(1, 2))
        features = None
        for index, block in enumerate(self.blocks):
            tokens = self.run_block(block, tokens, context, height, width)
            if index == layer:
                features = tokens.transpose(1, 2).reshape(batch, channels, height, width)
        tokens = self.project_out(tokens)
        return y + tokens.transpose(1, 2).reshape(batch, channels, height, width), features


class TransformerBlock(nn.Module):
    """AdaLN(context), windowed attention, +; LayerNorm, GEGLU feed-forward, +: (B, h·w, D) -> same."""

    def __init__(self, channels: int, context_channels: int, heads: int, radius: int) -> None:
        super().__init__()
        self.shift_scale = nn.Linear(context_channels, 2 * channels)
        self.norm1 = nn.LayerNorm(channels, eps=1e-5, elementwise_affine=False)
        self.attention = WindowedSelfAttention(channels, heads, radius)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.feed_forward_in = nn.Linear(channels, 8 * channels)
        self.feed_forward_out = nn.Linear(4 * channels, channels)
        nn.init.zeros_(self.feed_forward_out.weight)
        nn.init.zeros_(self.feed_forward_out.bias)

    def forward(self, tokens: Tensor, context: Tensor, height: int, width: int) -> Tensor:
        rows, columns = context.shape[-2:]
        modulation = self.shift_scale(F.silu(context).permute(0, 2, 3, 1))
        modulation = modulation.repeat_interleave(height // rows, dim=1).repeat_interleave(width // columns, dim=2)
        shift, scale = modulation.flatten(1, 2).chunk(2, dim=-1)
        normed = self.norm1(tokens) * (1.0 + scale) + shift
        tokens = tokens + self.attention(normed, height, width)
        value, gate = self.feed_forward_in(self.norm2(tokens)).chunk(2, dim=-1)
        return tokens + self.feed_forward_out(value * F.gelu(gate))
