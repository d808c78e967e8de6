"""Half precision: float16 and bfloat16 decode photos as well as float32 does, and nothing overflows in float16."""

import copy
import math
from pathlib import Path

import pytest
import torch
from half_convolutions import ConvolutionsOfAGPU
from tiny_models import TINY_DECODER, tiny
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.presets import list_presets

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Three photos in [-1, 1], (3, 3, 128, 128)."""
    crops = [photo.pixels[:, 40:168, 60:188] for photo in sample_photos("held_out")]
    return torch.stack(crops).float() / 127.5 - 1.0


TRAINED_MODEL = Path(__file__).parent / "assets" / "photos_f8c4"


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Of images in [-1, 1], in dB."""
    return [10.0 * math.log10(4.0 / error) for error in (a - b).double().square().flatten(1).mean(dim=1).tolist()]


@pytest.mark.parametrize("num_steps", [1, 4])
@torch.no_grad()
def test_photos_are_decoded_alike_in_every_type(num_steps: int, photos: Tensor) -> None:
    """Within 0.15 dB of each other, photo by photo: from one latent, and each through its own encoder."""
    quality: dict[str, list[float]] = {}
    same = torch.empty(0)
    for dtype in (torch.float32, *HALVES):
        model = DCSSDAE.from_pretrained(TRAINED_MODEL, torch_dtype=dtype)
        assert model.dtype == dtype
        with ConvolutionsOfAGPU():
            z = model.encode(photos).latent_dist.mode()
            same = z if dtype == torch.float32 else same
            own, shared = (model.decode(latents, num_steps=num_steps).sample for latents in (z, same))
        for name, y in (("own latents", own), ("same latents", shared)):
            assert y.dtype == dtype
            quality[f"{dtype}, {name}"] = psnr(y.float().clamp(-1.0, 1.0), photos)
    assert min(quality["torch.float32, own latents"]) > 18.0, "a model that has not learned shows nothing"
    for values in zip(*quality.values(), strict=True):
        assert max(values) - min(values) < 0.15, quality


@pytest.mark.parametrize("name", [name for name in list_presets() if not name.endswith("_eqm_image")])
@torch.no_grad()
def test_random_weights_of_a_preset_stay_finite_in_float16(name: str, photos: Tensor) -> None:
    """Encoding a photo, and decoding a sample of its latent and latents twenty standard deviations away."""
    model = DCSSDAE.from_preset(name).half()
    small = name in ("demo", "fast_f8c4", "vq_f8c4_fm")
    side = max(64 if small else 0, model.config.downsample_factor)
    with ConvolutionsOfAGPU():
        posterior = model.encode(photos[:1, :, :side, :side]).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(0))
        # Two images: the photo's latent, and what a generative model would give at its very worst.
        far = 20.0 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).half()
        y = model.decode(torch.cat([z, far])).sample
    for values in (posterior.mean, posterior.logvar, posterior.std, posterior.kl(), z, y):
        if values is not None:
            assert values.isfinite().all()
    assert y.dtype == torch.float16


@pytest.mark.parametrize(("encoder", "dynamics"), [("KLEncoder", "EquilibriumMatching"), ("DCEncoder", "FlowMatching")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_moved_weights_and_outliers(encoder: str, dtype: torch.dtype, dynamics: str) -> None:
    """Every parameter moved off its start; images and latents far out; large grids, whose attention goes by tiles."""
    whole = tiny(8, encoder, dynamics={"class_path": dynamics})
    model = copy.deepcopy(whole).to(dtype)
    x = 2.0 * torch.rand(2, 3, 192, 200) - 1.0
    with ConvolutionsOfAGPU():
        for scale in (1.0, 20.0, 500.0):
            posterior = model.encode(scale * x).latent_dist
            expected = whole.encode(scale * x).latent_dist.mean
            # A sum of squares that overflows leaves zeros, which are finite.
            assert (posterior.mean.float() - expected).norm() < 0.1 * expected.norm(), scale
            assert posterior.std.isfinite().all()
            z = posterior.mean.clone()
            z[0] *= min(scale, 20.0)
            z[1, :, 3, 4] = min(20.0 * scale, 1000.0)  # one latent far off among usual ones
            y = model.decode(z).sample
            assert y.isfinite().all(), scale


@torch.no_grad()
def test_an_encoder_without_norms_overflows_late() -> None:
    """Nothing holds its residual stream together; images in range are far from float16's limit all the same."""
    settings = {"norm": "none", "widths": [16, 16, 16, 32], "depths": [0, 2, 2, 2]}
    model = DCSSDAE(4, 8, encoder={"class_path": "DCEncoder", "init_args": settings}, decoder=TINY_DECODER).half()
    with ConvolutionsOfAGPU():
        assert model.encode(2.0 * torch.rand(1, 3, 64, 64) - 1.0).latent_dist.mean.abs().max() < 100.0
