"""Large photos through a trained model in tiles: no seam to be seen, and memory that follows the tile."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.data.transforms import center_crop
from dc_ssdae.evaluation.arena import peak_memory
from dc_ssdae.evaluation.candidates import OurCandidate
from dc_ssdae.tiling import tile_starts

TRAINED = Path(__file__).parents[1] / "assets" / "photos_f8c4"
TILE = 512
PHOTOS = {photo.name: photo.pixels for photo in sample_photos("held_out")}


@torch.inference_mode()
def share_above(name: str, side: int, overlap: float) -> float:
    """Of the pairs of pixels across a seam of tiles, the share that differ more than 99 % of the pairs elsewhere.

    Of the photo's central square, enlarged to `side` and reconstructed in tiles.
    """
    pixels = PHOTOS[name]
    square = center_crop(pixels, min(pixels.shape[1:]))
    x = to_model_range(tvf.resize(square, [side, side], InterpolationMode.BICUBIC, antialias=True))
    model = DCSSDAE.from_pretrained(TRAINED)
    model.enable_tiling(TILE, overlap)
    y = model(x[None]).sample[0].clamp(-1, 1)

    starts = [8 * start for start in tile_starts(side // 8, TILE // 8, round(overlap * TILE / 8))]
    seams = torch.tensor([*starts[1:], *(start + TILE for start in starts[:-1])]) - 1
    above = []
    for axis in (2, 1):
        pairs = y.diff(dim=axis).abs().mean(dim=0).movedim(axis - 1, 0)
        elsewhere = torch.ones(len(pairs), dtype=torch.bool).index_fill(0, seams, False)
        # Every hundredth pair: quantile takes no more than 16 million.
        limit = pairs[elsewhere].flatten()[::100].quantile(0.99)
        above.append((pairs[~elsewhere] > limit).float().mean())
    return float(max(above))


@pytest.mark.parametrize(
    "name", ["coffee", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chelsea", "rocket"))]
)
def test_no_seam_is_to_be_seen(name: str) -> None:
    assert share_above(name, 2048, 0.25) < 0.015


def test_tiles_without_overlap_have_seams() -> None:
    """What the test above measures is there to be measured."""
    assert share_above("coffee", 1024, 0.0) > 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_follows_the_tile() -> None:
    candidate = OurCandidate(tiny())
    x = torch.zeros(1, 3, 512, 512)
    whole = peak_memory(candidate, partial(candidate.reconstruct, x), torch.device("cpu"))
    candidate.value.enable_tiling(64)
    tiled = peak_memory(candidate, partial(candidate.reconstruct, x), torch.device("cpu"))
    if whole is None or tiled is None:
        pytest.skip("this system does not reset the high-water mark of a process")
    assert tiled < 0.4 * whole  # what is left are the noise, the field and the image, each as large as the image
