"""Metrics and the bicubic baseline against independent implementations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.evaluation.metrics import each, mse, psnr, scikit_ssim, ssim
from dc_ssdae.evaluation.reconstruction import bicubic_baseline

Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def batch() -> Pair:
    """Photos (7, 3, 48, 61) and others between hardly and entirely different, none of them equal."""
    photos = [resize_shorter_side(photo.pixels, 64)[:, :48, :61] for photo in sample_photos("held_out")]
    reference = torch.stack([photos[i % len(photos)].roll(i, dims=2) for i in range(7)])
    generator = torch.Generator().manual_seed(1)
    strength = torch.tensor([0.6, 2.0, 6.0, 12.0, 25.0, 60.0, 400.0]).view(7, 1, 1, 1)
    noise = torch.randn(reference.shape, generator=generator) * strength
    images = (reference + noise).round().clamp(0, 255).to(torch.uint8)
    images[1] = images[1] // 2 + 60  # another brightness and contrast
    return reference, images


def one_by_one(metric: Callable[[Tensor, Tensor], object], pair: Pair) -> Tensor:
    values = [float(metric(*sides)) for sides in zip(*pair, strict=True)]  # type: ignore[arg-type]
    return torch.tensor(values, dtype=torch.float64)


def test_psnr_and_mse_are_scikit_images(batch: Pair) -> None:
    theirs = one_by_one(lambda a, b: peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255), batch)
    # torchmetrics keeps the logarithm of 255 in float32.
    torch.testing.assert_close(each(psnr)(*batch), theirs, rtol=0, atol=1e-5)
    errors = one_by_one(lambda a, b: mean_squared_error(a.numpy() / 255.0, b.numpy() / 255.0), batch)
    torch.testing.assert_close(each(mse)(*batch), errors, rtol=1e-12, atol=1e-12)
    assert theirs.min() < 10.0 < 45.0 < theirs.max()


def test_ssim_is_torchmetrics_of_pixels_and_of_unrounded_images(batch: Pair) -> None:
    """The definitions of DC-AE, and of LightningDiT: around 0, of images that nobody clamped."""
    unrounded = tuple(1.1 * (side.float() / 127.5 - 1.0) + 0.003 for side in batch)
    for sides, data_range in ((batch, (0.0, 255.0)), (unrounded, (-1.0, 1.0))):
        module = StructuralSimilarityIndexMeasure(data_range=data_range)
        definition = one_by_one(lambda a, b, module=module: module(b[None], a[None]), sides)
        assert torch.equal(each(ssim)(*sides), definition)
    assert 0.0 < each(ssim)(*batch).min() < 0.1 < 0.98 < each(ssim)(*batch).max() < 1.0
    assert (each(ssim)(*unrounded) - each(ssim)(*batch)).abs().max() > 0.02, "0 in the middle makes no difference here"


def test_scikit_ssim_is_scikit_images(batch: Pair) -> None:
    def by_default(reference: Tensor, image: Tensor) -> float:
        sides = [np.ascontiguousarray(x.numpy().transpose(1, 2, 0)) for x in (reference, image)]
        return float(structural_similarity(*sides, channel_axis=-1, win_size=7))  # its range of uint8 is 255

    torch.testing.assert_close(each(scikit_ssim)(*batch), one_by_one(by_default, batch), rtol=1e-12, atol=1e-12)
    assert (each(scikit_ssim)(*batch) - each(ssim)(*batch)).abs().max() > 1e-3, "the windows make no difference here"


@pytest.mark.parametrize("metric", [psnr, ssim, scikit_ssim, mse])
def test_no_bit_depends_on_the_batch(metric: Callable[[Tensor, Tensor], float], batch: Pair) -> None:
    before = [side.clone() for side in batch]
    values = torch.cat([each(metric)(*(side[start : start + 3] for side in batch)) for start in (0, 3, 6)])
    assert torch.equal(values, each(metric)(*batch))
    assert torch.equal(values, one_by_one(metric, batch))
    assert all(map(torch.equal, batch, before))


def test_baseline_is_pillows_bicubic_of_as_many_values_as_the_latent_within_a_row_or_column() -> None:
    pixels = resize_shorter_side(sample_photos("held_out")[1].pixels, 128)
    found, (h, w) = bicubic_baseline(pixels, 4 * 16 * 24)
    assert abs(3 * h * w - 4 * 16 * 24) <= 3 * max(h, w)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    theirs = image.resize((w, h), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(theirs).astype(int) - found.permute(1, 2, 0).numpy().astype(int))
    # Pillow rounds and clamps the small image too, which matters where bicubic overshoots.
    assert difference.max() <= 8
    assert difference.mean() < 0.5
