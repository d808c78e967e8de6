"""Down- and upsampling and the conditioned residual block against direct forms."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.networks.blocks import (
    AdaptiveGroupNorm,
    ConditionedResidualBlock,
    SpaceToChannelDownsample,
    average_channel_groups,
    conv3_of_upsampled,
)


def upsampled(x: Tensor, rows: int, columns: int) -> Tensor:
    """Nearest upsampling by repetition."""
    return x.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 3, 4, 32])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (2, 5)])
def test_conv3_of_upsampled(factor: int, height: int, width: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, height, width)
    expected = conv(upsampled(x, factor, factor))
    torch.testing.assert_close(conv3_of_upsampled(conv, x, factor), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("factor", [2, 8])
def test_conv3_of_upsampled_has_the_direct_forms_gradients(factor: int) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(1, 5, 3 * factor, 4 * factor, dtype=torch.float64)
    inputs = [x, conv.weight, conv.bias]
    expected = torch.autograd.grad((conv(upsampled(x, factor, factor)) * weighting).sum(), inputs)
    actual = torch.autograd.grad((conv3_of_upsampled(conv, x, factor) * weighting).sum(), inputs)
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns", "cell"), [(4, 4, 1), (2, 3, 4), (1, 2, 8)])
def test_adaptive_group_norm(rows: int, columns: int, cell: int) -> None:
    module = AdaptiveGroupNorm(8, 5, groups=4).double()
    x = torch.randn(2, 8, rows * cell, columns * cell, dtype=torch.float64)
    context = torch.randn(2, 5, rows, columns, dtype=torch.float64)
    grouped = x.view(2, 4, -1)
    normed = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    scale, shift = upsampled(module.scale_shift(context), cell, cell).chunk(2, dim=1)
    torch.testing.assert_close(module(x, context), normed.view_as(x) * (1.0 + scale) + shift)


@torch.no_grad()
def test_average_channel_groups() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert average_channel_groups(x, 3).flatten().tolist() == [0.5, 2.5, 4.5]


@torch.no_grad()
@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 4), (4, 8), (4, 16), (8, 4)])
@pytest.mark.parametrize("strided", [False, True])
def test_downsample_shortcut(in_channels: int, out_channels: int, strided: bool) -> None:
    """Without the convolution, output channel j is the mean of a run of the pixel-unshuffled channels."""
    module = SpaceToChannelDownsample(in_channels, out_channels, strided=strided)
    nn.init.zeros_(module.conv.weight)
    nn.init.zeros_(module.conv.bias)
    x = torch.randn(2, in_channels, 4, 6)
    unshuffled = [x[:, c, dy::2, dx::2] for c in range(in_channels) for dy in (0, 1) for dx in (0, 1)]
    run = 4 * in_channels // out_channels
    expected = torch.stack(
        [torch.stack(unshuffled[run * j : run * (j + 1)]).mean(dim=0) for j in range(out_channels)], dim=1
    )
    torch.testing.assert_close(module(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("strided", [False, True])
def test_downsample_without_shortcut(strided: bool) -> None:
    module = SpaceToChannelDownsample(3, 8, strided=strided, shortcut=False)
    x = torch.randn(1, 3, 6, 4)
    y = module(x)
    assert y.shape == (1, 8, 3, 2)
    if strided:
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), module.conv.weight, module.conv.bias, stride=2)
    else:
        full = F.conv2d(F.pad(x, (1, 1, 1, 1)), module.conv.weight, module.conv.bias)
        expected = torch.stack([full[:, c, dy::2, dx::2] for c in (0, 1) for dy in (0, 1) for dx in (0, 1)], dim=1)
    torch.testing.assert_close(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (8, 16)])
def test_residual_block(in_channels: int, out_channels: int, timed: bool) -> None:
    block = ConditionedResidualBlock(in_channels, out_channels, 5, 12 if timed else None, groups=4).double()
    x = torch.randn(2, in_channels, 4, 8, dtype=torch.float64)
    context = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    time = torch.randn(2, 12, dtype=torch.float64) if timed else None
    shortcut = block.shortcut(x)
    torch.testing.assert_close(block(x, context, time), shortcut, msg="conv2 starts at zero")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    y = block.norm1(x, context)
    y = block.norm2(block.conv1(y * y.sigmoid()))
    if time is not None:
        scale, shift = block.time_scale_shift(time * time.sigmoid()).chunk(2, dim=1)
        y = y * (1.0 + scale[:, :, None, None]) + shift[:, :, None, None]
    expected = block.shortcut(x) + block.conv2(y * y.sigmoid())
    torch.testing.assert_close(block(x, context, time), expected)
