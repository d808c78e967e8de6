"""Building blocks shared by the networks: down- and upsampling, and the residual block of the U-ViT decoder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dc_ssdae.errors import InputError


class CheckpointedModule(nn.Module):
    """A module that can drop the activations inside its blocks and compute them again in the backward pass.

    The two attributes are the ones that diffusers' `enable_gradient_checkpointing` looks for and sets. Trades about
    a third more computation for memory; losses and gradients keep their bits. What updates running statistics must
    not be run this way: it would update them twice.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)

    def run_block(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call `block(*inputs)`, of whose activations only the inputs are kept where checkpointing is on."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if not torch.compiler.is_compiling() and _attention_is_plain():
            block = partial(_run_plain, block)
        return self._gradient_checkpointing_func(block, *inputs)


def _attention_is_plain() -> bool:
    """Whether the fused kernels of attention are switched off, as second derivatives need it."""
    cuda = torch.backends.cuda
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def _run_plain(block: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a block without fused attention, also when the backward pass computes it again, outside of `sdpa_kernel`."""
    with sdpa_kernel(SDPBackend.MATH):
        return block(*inputs)


def as_layout(x: Tensor) -> Tensor:
    """Put a map (B, C, H, W) into the memory order in which convolutions are fastest: channels-last.

    Except for training on a CPU, whose gradients of convolutions' weights take up to four times as long in it.
    """
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last)


def as_planes(x: Tensor) -> Tensor:
    """Put what a network gives without gradients into the usual memory order, channel by channel, to be saved say."""
    return x if torch.is_grad_enabled() else x.contiguous()


def silu(x: Tensor) -> Tensor:
    """SiLU of what nobody else holds: in place, so that no memory is asked for, where no gradient will need it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of which nobody else holds y: in its place where no gradient will need it, and it has the sum's dtype."""
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else y.add_(x)


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution: (B, in_channels, H, W) -> (B, out_channels, H, W).

    Without gradients it is a matrix product over channels-last pixels: PyTorch's convolution of one image on one
    thread of a CPU takes three times as long.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class UpsamplingConv(nn.Conv2d):
    """A 3×3 convolution of the doubled (nearest) map: (B, C, H, W) -> (B, C, 2H, 2W).

    In float32 on a CPU, without gradients, it is a 2×2 convolution of the map itself for each of the four places in a
    cell: 4/9 of the work. Half precision would round the sums of weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(F.interpolate(input, scale_factor=2, mode="nearest"))
        batch, channels, height, width = input.shape
        shape = (batch, channels, 2 * height, 2 * width)
        output = torch.empty(shape, dtype=input.dtype, memory_format=torch.channels_last)
        for row in (0, 1):
            rows = _sum_of_two(self.weight, row, dim=2)
            for column in (0, 1):
                part = F.conv2d(input, _sum_of_two(rows, column, dim=3), self.bias, padding=1)
                output[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
        return output


def _sum_of_two(weight: Tensor, place: int, dim: int) -> Tensor:
    """Of three weights in a row those that meet the same value added up: the last two at the first place of a cell."""
    first, second, third = weight.split(1, dim)
    return torch.cat([first + second, third] if place else [first, second + third], dim)


def average_channel_groups(x: Tensor, channels: int) -> Tensor:
    """Mean of each group of consecutive channels: (B, C, H, W) -> (B, channels, H, W), C a multiple of channels."""
    return x.unflatten(1, (channels, x.shape[1] // channels)).mean(dim=2)


class SpaceToChannelDownsample(nn.Module):
    """Halve both sides, with DC-AE's non-parametric shortcut (Chen et al. 2025, section 3).

    Args:
        in_channels: width before.
        out_channels: width after; divides 4·in_channels.
        strided: conv3 with stride 2 (SANA's), in place of conv3 to out_channels/4 and pixel-unshuffle.
        shortcut: add the mean of each group of 4·in_channels/out_channels channels of the pixel-unshuffled input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, strided: bool = False, shortcut: bool = True) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.strided = strided
        self.shortcut = shortcut
        width, stride = (out_channels, 2) if strided else (out_channels // 4, 1)
        self.conv = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) if self.strided else F.pixel_unshuffle(self.conv(x), 2)
        if self.shortcut:
            y = add(average_channel_groups(F.pixel_unshuffle(x, 2), self.out_channels), y)
        return y


def conv3_of_upsampled(conv: nn.Conv2d, x: Tensor, factor: int) -> Tensor:
    """Apply a 3×3 convolution to the `factor`-times nearest-upsampled map without building that map.

    Within a cell of equal pixels only three positions per axis differ: first, inner, last. So the convolution
    runs on the 3-times upsampled map and its inner rows and columns are repeated: 9/factor² of the work.

    Args:
        conv: 3×3, stride 1, padding 1.
        x: (B, C, h, w).
        factor: upsampling factor, at least 1.

    Returns:
        (B, conv.out_channels, h·factor, w·factor), equal to the direct form up to float rounding.
    """
    if factor <= 3:
        return conv(F.interpolate(x, scale_factor=factor, mode="nearest") if factor > 1 else x)
    batch, _, height, width = x.shape
    y = conv(F.interpolate(x, scale_factor=3, mode="nearest"))
    y = y.view(batch, y.shape[1], height, 3, width, 3)
    first, inner, last = y.split(1, dim=3)
    y = torch.cat([first, inner.expand(-1, -1, -1, factor - 2, -1, -1), last], dim=3)
    first, inner, last = y.split(1, dim=5)
    y = torch.cat([first, inner.expand(-1, -1, -1, -1, -1, factor - 2), last], dim=5)
    return y.view(batch, -1, height * factor, width * factor)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm without affine, then × (1 + scale) + shift, both from the context by a 1×1 convolution.

    Shape: x (B, C, H, W), context (B, K, h, w) with H/h = W/w a whole number -> (B, C, H, W).
    """

    def __init__(self, channels: int, context_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5, affine=False)
        self.scale_shift = nn.Conv2d(context_channels, 2 * channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.scale_shift(context).chunk(2, dim=1)
        batch, channels, height, width = x.shape
        rows, columns = context.shape[-2:]
        # Each pixel of the context serves a whole cell of x: broadcasting over the cell upsamples without a copy.
        normed = self.norm(x)
        cells = normed.view(batch, channels, rows, height // rows, columns, width // columns)
        scale, shift = 1.0 + scale[:, :, :, None, :, None], shift[:, :, :, None, :, None]
        if torch.is_grad_enabled():
            return (cells * scale + shift).view(batch, channels, height, width)
        cells.mul_(scale).add_(shift)  # torch.addcmul(out=) would be one pass, and stop torch.compile
        return normed


class ConditionedResidualBlock(nn.Module):
    """The U-ViT's residual block, conditioned on the latent's context and, for flow matching, on time.

    AdaGN(context), SiLU, conv3, GroupNorm, [× (1 + s) + b from time], SiLU, conv3 (zero at start), + input.

    Shape: x (B, in_channels, H, W), context (B, K, h, w), time (B, time_channels) or None
    -> (B, out_channels, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, context_channels: int, time_channels: int | None, groups: int
    ) -> None:
        super().__init__()
        self.norm1 = AdaptiveGroupNorm(in_channels, context_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.time_scale_shift = None if time_channels is None else nn.Linear(time_channels, 2 * out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.shortcut = nn.Identity() if in_channels == out_channels else PointwiseConv(in_channels, out_channels)

    def forward(self, x: Tensor, context: Tensor, time: Tensor | None) -> Tensor:
        y = self.norm2(self.conv1(silu(self.norm1(x, context))))
        if self.time_scale_shift is not None and time is not None:
            scale, shift = self.time_scale_shift(F.silu(time))[:, :, None, None].chunk(2, dim=1)
            y = y * (1.0 + scale) + shift
        return add(self.shortcut(x), self.conv2(silu(y)))


def check_downsample_factor(factor: int) -> int:
    """Return log2 of f.

    Raises:
        InputError: f is no power of two from 8 on.
    """
    if factor < 8 or factor & (factor - 1):
        raise InputError(f"downsample_factor is {factor}; it must be a power of two from 8 on (8, 16, 32, 64, 128, …)")
    return factor.bit_length() - 1


def check_image(x: Tensor, factor: int) -> None:
    """Refuse what is not (B, 3, H, W) with H and W multiples of f.

    Raises:
        InputError: names the shape and the nearest one that would fit.
    """
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise InputError(f"an image batch has shape (B, 3, H, W), without zeros, not {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        fit = f"{height + -height % factor}×{width + -width % factor}"
        raise InputError(f"image of {height}×{width} pixels: pad it to {fit}, multiples of f = {factor}")


def check_latent_shape(z: Tensor, channels: int) -> None:
    """Refuse what is not (B, channels, h, w).

    Raises:
        InputError: names the shape.
    """
    if z.ndim != 4 or z.shape[1] != channels or 0 in z.shape:
        raise InputError(f"a latent batch has shape (B, {channels}, h, w), without zeros, not {tuple(z.shape)}")
