"""The radial spectrum against closed forms: a wave, white noise, Parseval's theorem; the figure at its edges."""

import math

import pytest
import torch
from torch import Tensor

from dc_ssdae.evaluation.curves import save_picture
from dc_ssdae.probe.spectrum import Spectrum, luma, radial_spectrum, spectrum_figure


def wave(rows: int, columns: int, down: int, across: int, amplitude: float = 1.0) -> Tensor:
    """A sine with so many cycles along each side, (h, w)."""
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    return amplitude * torch.sin(2 * math.pi * (down * y + across * x) + 0.3)


@pytest.mark.parametrize(
    ("size", "cycles", "ring"), [((16, 16), (3, 0), 3), ((16, 16), (3, 4), 5), ((8, 24), (0, 6), 2)]
)
def test_a_wave_is_in_the_ring_of_its_frequency_alone(
    size: tuple[int, int], cycles: tuple[int, int], ring: int
) -> None:
    """Its power a²/2 is in two coefficients; of a map that is not square, cycles count along the shorter side."""
    found = radial_spectrum(torch.stack([wave(*size, *cycles, amplitude=3.0), 7 * torch.ones(size)])[None])
    assert found.frequencies.tolist() == list(range(1, min(size) // 2 + 1))
    power = found.power * found.coefficients
    expected = torch.zeros_like(power)
    expected[0, ring - 1] = 4.5
    torch.testing.assert_close(power, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.variance, torch.tensor([4.5, 0.0], dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_powers_add_up_to_the_variance_over_batches_too() -> None:
    """Of waves within the rings; white noise has the same power everywhere, and its corners are beyond the rings."""
    inside = torch.stack([wave(12, 12, n, n % 3, 0.5 + n) + 5.0 for n in range(1, 5)])[:, None]
    found = radial_spectrum(batch for batch in inside.split(3))
    variance = inside.var(dim=(-2, -1), unbiased=False).mean(dim=0).double()
    torch.testing.assert_close(found.variance, variance, rtol=1e-5, atol=0.0)
    torch.testing.assert_close((found.power * found.coefficients).sum(dim=1), variance, rtol=1e-5, atol=0.0)
    noise = 2.0 * torch.randn(400, 2, 16, 16)
    white = radial_spectrum(noise)
    torch.testing.assert_close(white.variance, noise.var(dim=(-2, -1), unbiased=False).mean(dim=0).double())
    assert (white.power * 16**2 / 4.0 - 1.0).abs().max() < 0.1
    assert 0.7 < float((white.power * white.coefficients).sum() / white.variance.sum()) < 0.85  # a circle in a square


def test_luma_is_of_rec_601() -> None:
    red_and_white = torch.tensor([[255, 0, 0], [255, 255, 255]], dtype=torch.uint8)[:, :, None, None]
    torch.testing.assert_close(luma(red_and_white).flatten(), torch.tensor([0.299, 1.0]), atol=1e-3, rtol=0.0)


def test_the_images_have_the_latents_power_over_the_shared_frequencies() -> None:
    latent = radial_spectrum(torch.randn(4, 200, 8, 8))
    images = radial_spectrum(100.0 * torch.randn(4, 1, 32, 32))
    figure = spectrum_figure(latent, images)
    *channels, mean, whole, shared = figure.axes[0].lines
    assert len(channels) == 50
    torch.testing.assert_close(torch.tensor(mean.get_ydata()), latent.power.mean(dim=0))
    assert [list(line.get_xdata()) for line in (shared, whole)] == [[1, 2, 3, 4], list(range(1, 17))]
    totals = [(latent.coefficients * torch.as_tensor(line.get_ydata())).sum() for line in (mean, shared)]
    torch.testing.assert_close(*totals)
    smallest = radial_spectrum(torch.randn(4, 3, 2, 2))
    assert isinstance(smallest, Spectrum)
    assert save_picture(lambda: spectrum_figure(smallest, images)).startswith(b"\x89PNG")
