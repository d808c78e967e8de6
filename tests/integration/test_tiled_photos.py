"""Large photos through a trained model in tiles: no seam to be seen, and memory that follows the tile."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from torch import Tensor
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
SIDE, TILE = 2048, 512
PHOTOS = {photo.name: photo.pixels for photo in sample_photos("held_out")}


def enlarged(name: str, side: int = SIDE) -> Tensor:
    """The photo's central square as (1, 3, side, side) in [-1, 1]."""
    pixels = PHOTOS[name]
    square = center_crop(pixels, min(pixels.shape[1:]))
    return to_model_range(tvf.resize(square, [side, side], InterpolationMode.BICUBIC, antialias=True))[None]


@torch.inference_mode()
def tiled_reconstruction(x: Tensor, overlap: float) -> Tensor:
    model = DCSSDAE.from_pretrained(TRAINED)
    model.enable_tiling(TILE, overlap)
    return model(x).sample[0].clamp(-1, 1)


def seams(side: int, overlap: float) -> list[int]:
    """The pixels before which a tile begins or ends, but for the image's border."""
    starts = [8 * start for start in tile_starts(side // 8, TILE // 8, round(overlap * TILE / 8))]
    return sorted({*starts[1:], *(start + TILE for start in starts[:-1])})


def differences(image: Tensor, overlap: float) -> list[tuple[Tensor, Tensor]]:
    """Of neighbouring columns, and of rows: the mean differences of the lines at a seam, and of all others."""
    found = []
    for axis in (2, 1):
        lines = image.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
        at_seam = torch.zeros(len(lines), dtype=torch.bool)
        at_seam[torch.tensor(seams(image.shape[-1], overlap)) - 1] = True
        found.append((lines[at_seam], lines[~at_seam]))
    return found


def share_above(image: Tensor, overlap: float) -> float:
    """Of the pairs of pixels across a seam, the share that differ more than 99 % of the pairs elsewhere."""
    above = []
    for axis in (2, 1):
        pairs = image.diff(dim=axis).abs().mean(dim=0).movedim(axis - 1, 0)
        at_seam = torch.zeros(len(pairs), dtype=torch.bool)
        at_seam[torch.tensor(seams(image.shape[-1], overlap)) - 1] = True
        # Every hundredth pair: quantile takes no more than 16 million.
        limit = pairs[~at_seam].flatten()[::100].quantile(0.99)
        above.append((pairs[at_seam] > limit).float().mean())
    return float(max(above))


@pytest.mark.parametrize(
    "name", ["coffee", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chelsea", "rocket"))]
)
def test_no_seam_is_to_be_seen(name: str) -> None:
    image = tiled_reconstruction(enlarged(name), 0.25)
    for at_seam, elsewhere in differences(image, 0.25):
        assert at_seam.max() <= elsewhere.quantile(0.99)
    assert share_above(image, 0.25) < 0.015


def test_tiles_without_overlap_have_seams() -> None:
    """What the test above measures is there to be measured."""
    image = tiled_reconstruction(enlarged("coffee", 1024), 0.0)
    for at_seam, elsewhere in differences(image, 0.0):
        assert at_seam.min() > 1.5 * elsewhere.quantile(0.99)
    assert share_above(image, 0.0) > 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_follows_the_tile() -> None:
    candidate = OurCandidate(tiny())
    x = torch.zeros(1, 3, 512, 512)
    whole = peak_memory(candidate, partial(candidate.reconstruct, x), torch.device("cpu"))
    candidate.model.enable_tiling(64)
    tiled = peak_memory(candidate, partial(candidate.reconstruct, x), torch.device("cpu"))
    if whole is None or tiled is None:
        pytest.skip("this system does not reset the high-water mark of a process")
    assert tiled < 0.4 * whole  # what is left are the noise, the field and the image, each as large as the image
