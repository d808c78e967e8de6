"""Metrics and the bicubic baseline against independent implementations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.evaluation.baseline import bicubic_baseline
from dc_ssdae.evaluation.metrics import mse, mse_each, psnr, psnr_each, scikit_ssim_each, ssim, ssim_each


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


# --- images of a batch, each on its own ---

EACH = {"psnr": psnr_each, "ssim": ssim_each, "scikit ssim": scikit_ssim_each, "mse": mse_each}
GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Photos (7, 3, 48, 61) and others between hardly and entirely different, none of them equal."""
    photos = [resize_shorter_side(photo.pixels, 64)[:, :48, :61] for photo in sample_photos("held_out")]
    reference = torch.stack([photos[i % len(photos)].roll(i, dims=2) for i in range(7)])
    generator = torch.Generator().manual_seed(1)
    strength = torch.tensor([0.6, 2.0, 6.0, 12.0, 25.0, 60.0, 400.0]).view(7, 1, 1, 1)
    noise = torch.randn(reference.shape, generator=generator) * strength
    images = (reference + noise).round().clamp(0, 255).to(torch.uint8)
    images[1] = images[1] // 2 + 60  # another brightness and contrast
    return reference, images


def one_by_one(metric: Callable[[Tensor, Tensor], object], pair: tuple[Tensor, Tensor]) -> Tensor:
    """A library's metric called for one image at a time, (1, 3, H, W) both."""
    calls = [metric(reference[None], image[None]) for reference, image in zip(*pair, strict=True)]
    return torch.tensor([float(value) for value in calls], dtype=torch.float64)  # type: ignore[arg-type]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_psnr_of_each_is_torchmetrics(batch: tuple[Tensor, Tensor]) -> None:
    function = one_by_one(lambda a, b: torchmetrics_psnr(b.double(), a.double(), data_range=255.0), batch)
    module = one_by_one(lambda a, b: PeakSignalNoiseRatio(data_range=255.0)(b.double(), a.double()), batch)
    assert_equal(psnr_each(*batch), function)
    # The module sums up in float32.
    torch.testing.assert_close(psnr_each(*batch), module, rtol=1e-6, atol=0)


def test_psnr_of_each_is_scikit_images(batch: tuple[Tensor, Tensor]) -> None:
    expected = one_by_one(lambda a, b: peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255), batch)
    # torchmetrics keeps the logarithm of 255 in float32.
    torch.testing.assert_close(psnr_each(*batch), expected, rtol=0, atol=1e-5)
    assert expected.min() < 10.0
    assert expected.max() > 45.0


def test_ssim_of_each_is_torchmetrics(batch: tuple[Tensor, Tensor]) -> None:
    function = one_by_one(lambda a, b: torchmetrics_ssim(b.double(), a.double(), data_range=255.0), batch)
    module = one_by_one(lambda a, b: StructuralSimilarityIndexMeasure(data_range=(0.0, 255.0))(b, a), batch)
    assert torch.equal(ssim_each(*batch).double(), module), "DC-AE hands uint8 to the module, which makes them float32"
    torch.testing.assert_close(ssim_each(*batch).double(), function, rtol=0, atol=5e-6)
    assert 0.0 < function.min() < 0.1 < 0.98 < function.max() < 1.0


def test_ssim_of_unrounded_images_is_lightningdits(batch: tuple[Tensor, Tensor]) -> None:
    """Its definition: the module of torchmetrics with the range (-1, 1), on images that nobody clamped."""
    sides = tuple(1.1 * (side.float() / 127.5 - 1.0) + 0.003 for side in batch)
    definition = one_by_one(lambda a, b: StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))(b, a), sides)
    found = ssim_each(*sides)
    torch.testing.assert_close(found.double(), definition, rtol=0, atol=1e-6)
    assert (found - ssim_each(*batch)).abs().max() > 0.02, "0 in the middle makes no difference here"


def test_psnr_may_have_an_upper_limit(batch: tuple[Tensor, Tensor]) -> None:
    """RAE takes no squared error, of images in [0, 1], for less than 1e-10."""
    reference, images = batch[0], batch[1].clone()
    images[2] = reference[2]
    definition = -10.0 * mse_each(reference, images).clamp(min=1e-10).log10()
    torch.testing.assert_close(psnr_each(reference, images, highest=100.0), definition, rtol=0, atol=1e-5)
    assert psnr_each(reference, images, highest=100.0)[2] == 100.0


def test_ssim_of_each_is_scikit_images_where_the_border_is_mirrored(batch: tuple[Tensor, Tensor]) -> None:
    """scikit-image leaves out what its window of 11 pixels does not cover: a border of 5.

    torchmetrics mirrors the image there, without the outermost pixel twice; mirrored beforehand, both average over the
    same windows.
    """
    expected = []
    for reference, image in zip(*batch, strict=True):
        pair = [np.pad(x.numpy().astype(float), ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (reference, image)]
        expected.append(structural_similarity(*pair, channel_axis=0, data_range=255, **GAUSSIAN))
    torch.testing.assert_close(ssim_each(*batch).tolist(), expected, rtol=1e-6, atol=1e-6)
    inside = one_by_one(
        lambda a, b: structural_similarity(
            a[0].double().numpy(), b[0].double().numpy(), channel_axis=0, data_range=255, **GAUSSIAN
        ),
        batch,
    )
    assert (ssim_each(*batch) - inside).abs().max() > 1e-4, "the border makes no difference here"


def test_scikit_ssim_of_each_is_scikit_images(batch: tuple[Tensor, Tensor]) -> None:
    def by_default(reference: Tensor, image: Tensor) -> float:
        sides = [np.ascontiguousarray(x[0].numpy().transpose(1, 2, 0)) for x in (reference, image)]
        return float(structural_similarity(*sides, channel_axis=-1, win_size=7))  # its range of uint8 is 255

    assert_equal(scikit_ssim_each(*batch), one_by_one(by_default, batch))
    assert (scikit_ssim_each(*batch) - ssim_each(*batch)).abs().max() > 1e-3, "the two windows make no difference here"


def test_mse_of_each_is_scikit_images_and_goes_with_psnr(batch: tuple[Tensor, Tensor]) -> None:
    values = mse_each(*batch)
    assert_equal(values, one_by_one(lambda a, b: mean_squared_error(a.numpy() / 255.0, b.numpy() / 255.0), batch))
    torch.testing.assert_close(-10.0 * values.log10(), psnr_each(*batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("metric", EACH.values(), ids=EACH)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_batch_size_changes_nothing(
    metric: Callable[[Tensor, Tensor], Tensor], size: int, batch: tuple[Tensor, Tensor]
) -> None:
    parts = [metric(*(side[start : start + size] for side in batch)) for start in range(0, 7, size)]
    torch.testing.assert_close(torch.cat(parts), metric(*batch), rtol=0, atol=1e-6)
    assert [len(part) for part in parts] == [size] * (7 // size) + ([7 % size] if 7 % size else [])


@pytest.mark.parametrize(("single", "each"), [(psnr, psnr_each), (ssim, ssim_each), (mse, mse_each)])
def test_one_image_is_a_batch_of_one(
    single: Callable[[Tensor, Tensor], float], each: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> None:
    values = [single(reference, image) for reference, image in zip(*batch, strict=True)]
    assert all(isinstance(value, float) for value in values)
    torch.testing.assert_close(values, each(*batch).tolist(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", EACH.values(), ids=EACH)
def test_the_images_are_left_as_they_are(
    metric: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> None:
    before = [side.clone() for side in batch]
    metric(*batch)
    assert all(torch.equal(side, kept) for side, kept in zip(batch, before, strict=True))


def test_an_equal_image_among_others_is_perfect(batch: tuple[Tensor, Tensor]) -> None:
    reference, images = batch[0], batch[1].clone()
    images[2] = reference[2]
    assert psnr_each(reference, images).isinf().tolist() == [place == 2 for place in range(7)]
    assert mse_each(reference, images)[2] == 0.0
    for metric in (ssim_each, scikit_ssim_each):
        values = metric(reference, images)
        assert values[2] == pytest.approx(1.0, abs=1e-6)
        assert (values[[0, 1, 3, 4, 5, 6]] < 0.9999).all()


def test_black_against_white_is_the_worst() -> None:
    black, white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert psnr_each(black, white).tolist() == pytest.approx([0.0], abs=1e-5)
    assert mse_each(black, white).tolist() == [1.0]
    # Equal but for the luminance: c₁ / (μ² + c₁), with c₁ = (0.01 · 255)².
    for metric in (ssim_each, scikit_ssim_each):
        assert float(metric(black, white)) == pytest.approx(1e-4 / (1.0 + 1e-4), rel=1e-5)
