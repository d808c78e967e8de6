"""Attention: exact windowed attention with relative positions, ReLU linear attention, and plain self-attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.networks.norms import full_precision

TILE = 8
"""Side, in tokens, of the square of queries that share one neighbourhood of keys."""

DENSE_TOKENS = 512
"""Up to this many tokens one masked attention over all pairs is faster than tiles (measured on two cores)."""


MISSING_KEY = -30000.0
"""A logit, before the scale, whose exponential is exactly zero in float32 and which float16 can hold."""


class WindowedSelfAttention(nn.Module):
    """Multi-head self-attention in a square window with learned relative positions.

    A query at (y, x) sees the keys within `radius` tokens on each axis. Its logits get `table[dy + r, dx + r, head]`
    with (dy, dx) = query - key. The table is read anew in every call: its gradient flows in every step.

    Two exact forms of the same function: up to `DENSE_TOKENS` tokens all pairs with a mask; above, tiles of 8×8
    queries against their (8 + 2 radius)² surroundings, whose memory grows linearly with the number of tokens.

    Args:
        channels: width of the tokens, a multiple of `heads`.
        heads: number of heads.
        radius: reach of the window in tokens; 8 is the paper's 17×17, 7 the original code's 15×15.
    """

    def __init__(self, channels: int, heads: int, radius: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.radius = radius
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.relative_position_table = nn.Parameter(torch.zeros(2 * radius + 1, 2 * radius + 1, heads))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Attend within the window: (B, height·width, C) in row-major order -> the same shape."""
        batch, count, channels = tokens.shape
        grid = (batch, height, width, self.heads, channels // self.heads)
        query, key, value = (layer(tokens).view(grid) for layer in (self.query, self.key, self.value))
        attend = self._attend_all_pairs if count <= DENSE_TOKENS else self._attend_in_tiles
        return self.out(attend(query, key, value).reshape(batch, count, channels))

    def _bias(self, query_side: tuple[int, int], key_side: tuple[int, int], shift: int, dtype: torch.dtype) -> Tensor:
        """Bias (heads, queries, keys) of two grids whose origins lie `shift` tokens apart; -inf outside the window."""
        table, radius, device = self.relative_position_table, self.radius, self.relative_position_table.device
        rows, columns = (
            torch.arange(q, device=device)[:, None] - torch.arange(k, device=device)[None, :] + shift
            for q, k in zip(query_side, key_side, strict=True)
        )
        row, column = ((offset + radius).clamp(0, 2 * radius) for offset in (rows, columns))
        index = row[:, None, :, None] * (2 * radius + 1) + column[None, :, None, :]
        inside = (rows.abs() <= radius)[:, None, :, None] & (columns.abs() <= radius)[None, :, None, :]
        pairs = query_side[0] * query_side[1], key_side[0] * key_side[1]
        bias = F.embedding(index.reshape(pairs), table.to(dtype).flatten(0, 1)).permute(2, 0, 1)
        return bias.masked_fill(~inside.reshape(pairs), float("-inf"))

    def _attend_all_pairs(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, height, width, _, _ = query.shape
        bias = self._bias((height, width), (height, width), 0, query.dtype)
        query, key, value = (part.flatten(1, 2).transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None]).transpose(1, 2)

    def _attend_in_tiles(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, height, width, heads, dim = query.shape
        radius, reach = self.radius, TILE + 2 * self.radius
        rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
        down, right = rows * TILE - height, columns * TILE - width
        # A tile's surroundings reach past the border, to keys that do not exist. One more channel, 1 in every query
        # and very negative in those keys, masks them, so that one bias without a border serves all tiles. The
        # channels are filled up to a multiple of 8, which fused kernels ask for.
        padded_dim = dim + 8 - dim % 8
        border = torch.zeros(height, width, device=query.device, dtype=query.dtype)
        border = F.pad(border, (radius, radius + right, radius, radius + down), value=MISSING_KEY)
        border = F.pad(border[:, :, None, None], (dim, padded_dim - dim - 1))

        def surroundings(x: Tensor, mark: Tensor | None) -> Tensor:
            x = F.pad(x, (0, padded_dim - dim, 0, 0, radius, radius + right, radius, radius + down))
            x = (x if mark is None else x + mark).unfold(1, reach, TILE).unfold(2, reach, TILE)
            return x.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, heads, reach * reach, padded_dim)

        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, padded_dim - dim - 1, 0, 0, 0, right, 0, down))
        query = query.view(batch, rows, TILE, columns, TILE, heads, padded_dim).permute(0, 1, 3, 5, 2, 4, 6)
        attended = F.scaled_dot_product_attention(
            query.reshape(-1, heads, TILE * TILE, padded_dim),
            surroundings(key, border),
            surroundings(value, None),
            attn_mask=self._bias((TILE, TILE), (reach, reach), radius, query.dtype)[None],
            scale=dim**-0.5,
        )
        attended = attended[..., :dim].reshape(batch, rows, columns, heads, TILE, TILE, dim)
        attended = attended.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * TILE, columns * TILE, heads, dim)
        return attended.narrow(1, 0, height).narrow(2, 0, width)


class LinearAttention(nn.Module):
    """EfficientViT's multi-scale ReLU linear attention with its residual (Cai et al. 2023).

    Args:
        channels: C, a multiple of 32 (the width of a head).
        scales: odd kernel sizes of the extra scales; SANA's encoder has (5,), DC-AE's none.
        norm: applied to the output before the residual is added.

    Shape: (B, C, H, W) -> (B, C, H, W). Accumulates in float32, also under autocast.
    """

    HEAD_WIDTH = 32

    def __init__(self, channels: int, scales: tuple[int, ...], norm: nn.Module) -> None:
        super().__init__()
        wide = 3 * channels
        self.query_key_value = nn.Conv2d(channels, wide, 1, bias=False)
        self.scales = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, wide, size, padding=size // 2, groups=wide, bias=False),
                nn.Conv2d(wide, wide, 1, groups=wide // self.HEAD_WIDTH, bias=False),
            )
            for size in scales
        )
        self.out = nn.Conv2d((1 + len(scales)) * channels, channels, 1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        base = self.query_key_value(x)
        scaled = torch.cat([base, *(scale(base) for scale in self.scales)], dim=1)
        # Each run of 96 consecutive channels is one head's query, key and value.
        per_head = scaled.reshape(batch, -1, 3 * self.HEAD_WIDTH, height * width)
        with full_precision(x.device.type):
            query, key, value = per_head.float().chunk(3, dim=2)
            attended = _relu_attention(query.relu(), key.relu(), value).to(scaled.dtype)
        attended = attended.reshape(batch, -1, height, width)
        return x + self.norm(self.out(attended))


def _relu_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """v (kᵀ q) / (Σ kᵀ q + eps) for (B, heads, width, tokens), by whichever product is the smaller one."""
    width, tokens = query.shape[-2:]
    if tokens <= width:
        weights = key.transpose(-1, -2) @ query
        return value @ (weights / (weights.sum(dim=-2, keepdim=True) + eps))
    summary = value @ key.transpose(-1, -2)
    normaliser = key.sum(dim=-1, keepdim=True).transpose(-1, -2) @ query
    return (summary @ query) / (normaliser + eps)


class SpatialSelfAttention(nn.Module):
    """Residual single-head self-attention over all pixels: (B, C, H, W) -> same."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # Contiguous, because PyTorch's fused kernels, which never hold all pairs at once, take nothing else.
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2)[:, None].contiguous()
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended[:, 0].transpose(1, 2).reshape(x.shape))
