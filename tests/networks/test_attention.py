"""Windowed attention against a plain loop, its memory, its gradients; linear attention and spatial self-attention."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dc_ssdae.networks.attention import (
    DENSE_TOKENS,
    LinearAttention,
    SpatialSelfAttention,
    WindowedSelfAttention,
)


def windowed_attention(channels: int, heads: int, radius: int) -> WindowedSelfAttention:
    """A module whose table and weights are all random and of a size that matters."""
    module = WindowedSelfAttention(channels, heads, radius)
    with torch.no_grad():
        module.relative_position_table.normal_()
        for layer in (module.query, module.key):
            layer.weight.mul_(2.0)
    return module


def by_a_mask(module: WindowedSelfAttention, tokens: Tensor, height: int, width: int) -> Tensor:
    """All pairs with an explicit mask, in the dtype of `tokens`, differentiable."""
    dtype, radius = tokens.dtype, module.radius
    query, key, value = (
        (tokens @ layer.weight.to(dtype).T).unflatten(-1, (module.heads, -1))
        for layer in (module.query, module.key, module.value)
    )
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dy = y.flatten()[:, None] - y.flatten()
    dx = x.flatten()[:, None] - x.flatten()
    inside = (dy.abs() <= radius) & (dx.abs() <= radius)
    bias = module.relative_position_table.to(dtype)[
        (dy + radius).clamp(0, 2 * radius), (dx + radius).clamp(0, 2 * radius)
    ]
    logits = torch.einsum("bqhd,bkhd->bqkh", query, key) / math.sqrt(query.shape[-1]) + bias
    weights = logits.masked_fill(~inside[..., None], -math.inf).softmax(dim=2)
    attended = torch.einsum("bqkh,bkhd->bqhd", weights, value).flatten(2)
    return attended @ module.out.weight.to(dtype).T + module.out.bias.to(dtype)


def in_tiles(module: WindowedSelfAttention, tokens: Tensor, height: int, width: int) -> Tensor:
    return as_form(module, module._attend_in_tiles, tokens, height, width)


def over_all_pairs(module: WindowedSelfAttention, tokens: Tensor, height: int, width: int) -> Tensor:
    return as_form(module, module._attend_all_pairs, tokens, height, width)


def as_form(
    module: WindowedSelfAttention, attend: Callable[..., Tensor], tokens: Tensor, height: int, width: int
) -> Tensor:
    """The module with one of its two forms chosen by hand."""
    batch, count, channels = tokens.shape
    grid = (batch, height, width, module.heads, channels // module.heads)
    query, key, value = (layer(tokens).view(grid) for layer in (module.query, module.key, module.value))
    return module.out(attend(query, key, value).reshape(batch, count, channels))


FORMS = {"tiles": in_tiles, "all pairs": over_all_pairs}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("radius", [0, 3, 8])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11), (1, 20), (17, 3)])
def test_both_forms_equal_the_reference(form: str, radius: int, height: int, width: int) -> None:
    module = windowed_attention(12, 2, radius)
    tokens = torch.randn(2, height * width, 12)
    expected = by_a_mask(module, tokens.double(), height, width)
    actual = FORMS[form](module, tokens, height, width)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("radius", [7, 8])
@pytest.mark.parametrize(("height", "width"), [(16, 32), (33, 16), (24, 24), (23, 37)])
def test_module_equals_a_masked_reference_around_the_threshold(radius: int, height: int, width: int) -> None:
    """Through `forward`, which chooses the form: 512 tokens are the last of all pairs, 528 the first of tiles."""
    assert (height * width > DENSE_TOKENS) == ((height, width) != (16, 32))
    module = windowed_attention(32, 4, radius)
    tokens = torch.randn(1, height * width, 32)
    expected = by_a_mask(module, tokens.double(), height, width)
    torch.testing.assert_close(module(tokens, height, width).double(), expected, atol=1e-5, rtol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tiles_leave_the_border_out(dtype: torch.dtype) -> None:
    module = windowed_attention(32, 4, 8)
    tokens = torch.randn(1, 23 * 25, 32)
    expected = by_a_mask(module, tokens.double(), 23, 25)
    actual = module.to(dtype)(tokens.to(dtype), 23, 25)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=0.05, rtol=0.0)


def gradients(
    function: Callable[..., Tensor], module: WindowedSelfAttention, tokens: Tensor, height: int, width: int
) -> dict[str, Tensor]:
    module.zero_grad()
    tokens = tokens.clone().requires_grad_()
    output = function(module, tokens, height, width)
    # A weighting that differs everywhere, so that no gradient cancels out.
    weighting = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view_as(output)
    (output * weighting).sum().backward()
    result = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    assert tokens.grad is not None
    return {"tokens": tokens.grad.clone(), **result}


@pytest.mark.parametrize("radius", [3, 8])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 22)])
def test_gradients_of_both_forms_equal_the_reference(radius: int, height: int, width: int) -> None:
    module = windowed_attention(16, 2, radius)
    tokens = torch.randn(2, height * width, 16)
    expected = gradients(by_a_mask, module.double(), tokens.double(), height, width)
    module.float()
    for function in FORMS.values():
        actual = gradients(function, module, tokens, height, width)
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            largest = expected[name].abs().max()
            assert largest > 0.0
            difference = (value.double() - expected[name]).abs().max()
            assert difference <= 1e-5 * max(1.0, largest.item()), name


@pytest.mark.parametrize(("height", "width"), [(6, 9), (24, 24)], ids=["all pairs", "tiles"])
def test_the_table_learns_in_every_step(height: int, width: int) -> None:
    """A bias cached at the first call would neither get a second gradient nor change the output."""
    module = windowed_attention(16, 2, 3)
    module.requires_grad_(False)
    module.relative_position_table.requires_grad_()
    tokens = torch.randn(1, height * width, 16)
    goal = torch.randn_like(tokens)
    optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
    outputs = []
    for _ in range(3):
        output = module(tokens, height, width)
        outputs.append(output.detach())
        optimizer.zero_grad()
        (output - goal).square().mean().backward()
        gradient = module.relative_position_table.grad
        assert gradient is not None
        assert (gradient != 0.0).all()
        optimizer.step()
    for before, after in itertools.pairwise(outputs):
        assert (before - after).abs().max() > 1e-4


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements among all outputs, forward and backward, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, Tensor):
                # What an expanded view repeats costs no memory.
                sides = [side for side, step in zip(output.shape, output.stride(), strict=True) if step]
                self.numel = max(self.numel, math.prod(sides))
        return result


def largest_tensor(attend: Callable[[Tensor], Tensor], side: int) -> int:
    x = torch.randn(1, 64, side, side, requires_grad=True)
    with LargestTensor() as largest:
        attend(x).square().sum().backward()
    return largest.numel


def test_memory_grows_linearly() -> None:
    """Of the window's attention and of the KL encoder's; a tensor over all pairs would grow sixteenfold."""
    spatial = SpatialSelfAttention(64)

    def windowed(x: Tensor) -> Tensor:
        return WindowedSelfAttention(32, 4, 8)(x[:, :32].flatten(2).mT, *x.shape[2:])

    for attend in (windowed, spatial):
        small, large = (largest_tensor(attend, side) for side in (48, 96))
        assert large / small <= 4.5


def test_the_recorder_sees_a_tensor_over_all_pairs() -> None:
    module = windowed_attention(8, 2, 3)
    with LargestTensor() as largest, torch.no_grad():
        by_a_mask(module, torch.randn(1, 400, 8), 20, 20)
    assert largest.numel >= 2 * 400 * 400


def linear_attention_by_loops(module: LinearAttention, x: Tensor) -> Tensor:
    """The specification's text, head by head and token by token, in float64; the norm is left out."""
    x = x.double()
    base = module.query_key_value.double()(x)
    wide = torch.cat([base, *(scale.double()(base) for scale in module.scales)], dim=1)
    heads = wide.shape[1] // 96
    parts = []
    for head in range(heads):
        group = wide[:, 96 * head : 96 * (head + 1)].flatten(2)
        query, key, value = group[:, :32].relu(), group[:, 32:64].relu(), group[:, 64:]
        columns = []
        for token in range(group.shape[-1]):
            weights = (key * query[:, :, token, None]).sum(dim=1)
            summed = (value * weights[:, None]).sum(dim=-1)
            columns.append(summed / (weights.sum(dim=-1, keepdim=True) + 1e-15))
        parts.append(torch.stack(columns, dim=-1))
    attended = torch.cat(parts, dim=1).unflatten(-1, x.shape[-2:])
    return x + module.out.double()(attended)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(), (5,), (3, 5)])
@pytest.mark.parametrize(("height", "width"), [(4, 8), (3, 11), (7, 5), (9, 8)], ids=str)
def test_linear_attention(scales: tuple[int, ...], height: int, width: int) -> None:
    """32 tokens are the last of the quadratic form, 33 the first of the linear one."""
    module = LinearAttention(64, scales, nn.Identity())
    x = torch.randn(2, 64, height, width)
    actual = module(x)
    expected = linear_attention_by_loops(module, x)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_linear_attention_norms_before_the_residual() -> None:
    module = LinearAttention(32, (), nn.BatchNorm2d(32).eval())
    nn.init.constant_(module.norm.weight, 0.0)
    nn.init.constant_(module.norm.bias, 3.0)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(module(x), x + 3.0)


@torch.no_grad()
@pytest.mark.parametrize("side", [4, 12])
def test_linear_attention_accumulates_in_float32_under_autocast(side: int) -> None:
    """Sums over many tokens in bfloat16 would be off by more than the rounding of inputs and outputs."""
    module = LinearAttention(32, (), nn.Identity())
    x = torch.randn(1, 32, side, side)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x)
    expected = linear_attention_by_loops(module, x)
    torch.testing.assert_close(actual.double(), expected, atol=0.03, rtol=0.0)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 7)])
def test_spatial_self_attention(height: int, width: int) -> None:
    module = SpatialSelfAttention(16, groups=4).double()
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    x = torch.randn(2, 16, height, width, dtype=torch.float64)
    grouped = x.view(2, 4, -1)
    normed = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = normed.view_as(x) * module.norm.weight[:, None, None] + module.norm.bias[:, None, None]
    query, key, value = (layer(normed).flatten(2) for layer in (module.query, module.key, module.value))
    weights = (torch.einsum("bcq,bck->bqk", query, key) * 16**-0.5).softmax(dim=-1)
    attended = torch.einsum("bqk,bck->bcq", weights, value).view_as(x)
    torch.testing.assert_close(module(x), x + module.out(attended))
