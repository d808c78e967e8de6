"""Metrics and the bicubic baseline against independent implementations."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.evaluation.baseline import bicubic_baseline
from dc_ssdae.evaluation.metrics import psnr, ssim


@pytest.fixture(scope="module")
def pair():
    reference = resize_shorter_side(sample_photos("held_out")[0].pixels, 96)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0)) * 12
    return reference, (reference + noise).round().clamp(0, 255).byte()


def test_psnr_equals_scikit_image(pair):
    reference, image = pair
    assert psnr(reference, image) == pytest.approx(
        peak_signal_noise_ratio(reference.numpy(), image.numpy(), data_range=255), abs=1e-6
    )


def test_ssim_equals_scikit_image_but_for_its_border(pair):
    reference, image = pair
    _, theirs = structural_similarity(
        reference.numpy().astype(float),
        image.numpy().astype(float),
        channel_axis=0,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    # scikit-image reflects at the border with the outermost pixel repeated, torchmetrics without.
    assert ssim(reference, image) == pytest.approx(theirs.mean(), abs=2e-3)


def test_equal_images_are_perfect(pair):
    reference, _ = pair
    assert psnr(reference, reference) == float("inf")
    assert ssim(reference, reference) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("height", "width", "values"), [(256, 256, 4096), (256, 384, 6144), (300, 451, 600), (64, 64, 3)]
)
def test_baseline_has_as_many_values_as_the_latent(height, width, values):
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    baseline = bicubic_baseline(pixels, values)
    h, w = baseline.size
    # One row or column more or less is the nearest that whole numbers allow.
    assert abs(3 * h * w - values) <= 3 * max(h, w)
    assert h / w == pytest.approx(height / width, rel=0.1)
    assert baseline.image.shape == pixels.shape


def test_baseline_is_pillows_bicubic():
    pixels = resize_shorter_side(sample_photos("held_out")[1].pixels, 128)
    baseline = bicubic_baseline(pixels, 4 * 16 * 24)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    h, w = baseline.size
    theirs = image.resize((w, h), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(theirs).astype(int) - baseline.image.permute(1, 2, 0).numpy().astype(int))
    # Pillow rounds and clamps the small image too, which matters where bicubic overshoots.
    assert difference.max() <= 8
    assert difference.mean() < 0.5
