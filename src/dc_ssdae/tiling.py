"""Overlapping tiles: what an image is gone through in when all of it at once would not fit into memory."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dc_ssdae.errors import InputError
from dc_ssdae.settings import check_value

DEFAULT_OVERLAP = 0.25


def check_tiling(tile_size: int | None, overlap: float, downsample_factor: int) -> tuple[int, int]:
    """Turn a tile's size and overlap into numbers of latents.

    Args:
        tile_size: side in pixels, a multiple of f; None is 512, or 4 f where that is more.
        overlap: share of a tile's side that it has in common with its neighbour, from 0 to 0.75.
        downsample_factor: f.

    Returns:
        The tile's side and its overlap, in latents; at least one latent overlaps unless `overlap` is 0.

    Raises:
        InputError: one of them is out of range.
    """
    tile_size = max(512, 4 * downsample_factor) if tile_size is None else tile_size
    check_value("tile_size", tile_size, int, {"at_least": 2 * downsample_factor})
    check_value("overlap", overlap, float, {"at_least": 0.0, "at_most": 0.75})
    size, rest = divmod(tile_size, downsample_factor)
    if rest:
        raise InputError(f"tile_size is {tile_size}; it must be a multiple of f = {downsample_factor}")
    return size, min(max(round(overlap * size), 1), size - 1) if overlap else 0


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Spread as few tiles as possible evenly over a side, each whole and overlapping the next by `overlap` or more.

    Args:
        length: of the side.
        size: of a tile; a longer one than the side is cut to it.
        overlap: of neighbours, less than `size`.
    """
    last = length - min(size, length)
    gaps = -(-last // (size - overlap))
    return [index * last // gaps for index in range(gaps + 1)] if gaps else [0]


def tile_weights(starts: Sequence[int], size: int, length: int, scale: int = 1) -> Tensor:
    """The weight of each tile along a side: linear ramps where tiles overlap, adding up to one at every place.

    Args:
        starts: of the tiles, as `tile_starts` gives them.
        size: of a tile.
        length: of the side.
        scale: places of the result for each unit of the side.

    Returns:
        float32 (tiles, length · scale), 0 outside the tile.
    """
    place = torch.arange(length * scale, dtype=torch.float64) + 0.5
    weights = torch.stack([((place > start * scale) & (place < (start + size) * scale)).double() for start in starts])
    for index, (before, start) in enumerate(itertools.pairwise(starts)):
        if ramp := scale * (before + size - start):
            weights[index + 1] *= ((place - start * scale) / ramp).clamp(0.0, 1.0)
            weights[index] *= (((before + size) * scale - place) / ramp).clamp(0.0, 1.0)
    return (weights / weights.sum(dim=0)).float()


def blend_tiles(
    compute: Callable[..., Tensor], inputs: Sequence[tuple[Tensor, int]], size: int, overlap: int, scale: int = 1
) -> Tensor:
    """Compute a map tile by tile and blend the tiles; one tile is held at a time, beside the map.

    Args:
        compute: of the same tile of every input, gives (B, C, rows · scale, columns · scale).
        inputs: each (B, C, H, W), with its places for each unit of the grid that the tiles are cut from.
        size: side of a tile in units of the grid.
        overlap: of neighbouring tiles in units of the grid.
        scale: places of the map for each unit of the grid.

    Returns:
        (B, C, height · scale, width · scale), float32.
    """
    height, width = (side // inputs[0][1] for side in inputs[0][0].shape[2:])
    tops, lefts = tile_starts(height, size, overlap), tile_starts(width, size, overlap)
    blended = torch.empty(0)
    for top, down in zip(tops, tile_weights(tops, size, height, scale), strict=True):
        rows = slice(top, min(top + size, height))
        for left, across in zip(lefts, tile_weights(lefts, size, width, scale), strict=True):
            columns = slice(left, min(left + size, width))
            tiles = [whole[:, :, scaled(rows, places), scaled(columns, places)] for whole, places in inputs]
            tile = compute(*tiles).float()
            if not blended.numel():
                blended = tile.new_zeros(*tile.shape[:2], height * scale, width * scale)
            y, x = scaled(rows, scale), scaled(columns, scale)
            blended[:, :, y, x] += tile * down[y].to(tile.device)[:, None] * across[x].to(tile.device)
    return blended


def scaled(span: slice, scale: int) -> slice:
    """A span of a side that is `scale` times as long."""
    return slice(span.start * scale, span.stop * scale)
