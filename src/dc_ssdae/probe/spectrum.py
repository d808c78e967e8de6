"""The radial power spectrum of latents and of images: how their variance spreads over spatial frequencies."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.evaluation.curves import COLOURS, add_legend, number_logarithmic_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CHANNELS = 64
"""How many channels are drawn at most."""


class Spectrum(NamedTuple):
    """Power by spatial frequency, channel by channel; K is half of the shorter side of the maps.

    Args:
        frequencies: (K,) float64, from 1 to K cycles per image (along its shorter side, where it is not square).
        coefficients: (K,) int64, Fourier coefficients in each ring.
        power: (c, K) float64, mean power per coefficient of each ring.
        variance: (c,) float64, the power of all coefficients, also of those beyond the last ring: a map's variance
            over its positions, averaged over the maps.
    """

    frequencies: Tensor
    coefficients: Tensor
    power: Tensor
    variance: Tensor


def luma(pixels: Tensor) -> Tensor:
    """Weigh the colours of images, uint8 (B, 3, H, W), to their luma of Rec. 601: (B, 1, H, W) float32 in [0, 1]."""
    return tvf.rgb_to_grayscale(pixels / 255.0)


def radial_spectrum(maps: Tensor | Iterable[Tensor]) -> Spectrum:
    """Average the power spectrum of maps over rings of the 2-D Fourier transform.

    The mean of each map is subtracted, and the transform is scaled so that the powers of all coefficients add up to
    the variance (Parseval's theorem). A ring has the coefficients whose distance from 0 rounds to its frequency.

    Args:
        maps: (N, c, h, w) of a floating-point dtype, or batches of such; at least one.
    """
    total: Any = 0
    count = 0
    for batch in [maps] if isinstance(maps, Tensor) else maps:
        batch = batch.float()
        coefficients = torch.fft.fft2(batch - batch.mean(dim=(-2, -1), keepdim=True), norm="forward")
        total = total + coefficients.abs().square().sum(dim=0).cpu().double()
        count += len(batch)
    power, (height, width) = total / count, total.shape[-2:]
    side = min(height, width)
    rows, columns = (side * torch.fft.fftfreq(length, dtype=torch.float64) for length in (height, width))
    rings = torch.hypot(rows[:, None], columns).round().long().flatten()
    inside, counts = slice(1, side // 2 + 1), torch.bincount(rings)
    sums = torch.zeros(len(power), len(counts), dtype=torch.float64).index_add_(1, rings, power.flatten(1))
    frequencies = torch.arange(len(counts), dtype=torch.float64)
    return Spectrum(frequencies[inside], counts[inside], (sums / counts)[:, inside], power.sum(dim=(-2, -1)))


def spectrum_figure(latent: Spectrum, images: Spectrum | None = None) -> "Figure":
    """Draw the spectrum of latents: thin lines for channels, a thick one for their mean, and the images' beside it.

    Args:
        latent: of at least one ring.
        images: of one channel, scaled to the latent's power over the frequencies that both have; faint beyond them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), dpi=110, layout="constrained")
    axes, mean = figure.subplots(), latent.power.mean(dim=0)
    channels: dict[str, Any] = {"color": COLOURS[0], "linewidth": 0.6, "alpha": 0.35}
    thick: dict[str, Any] = {"color": COLOURS[0], "linewidth": 2.4, "marker": "o", "markersize": 3}
    axes.plot(latent.frequencies, latent.power[:: -(-len(latent.power) // MOST_CHANNELS)].T, **channels)
    axes.plot(latent.frequencies, mean, **thick)
    styles = {"channels of the latent": channels, "their mean": thick}
    if images is not None:
        shared = min(len(latent.frequencies), len(images.frequencies))
        powers = [(power * latent.coefficients[:shared]).sum() for power in (mean[:shared], images.power[0, :shared])]
        scaled = images.power[0] * powers[0] / powers[1]
        line: dict[str, Any] = {"color": COLOURS[1], "linewidth": 1.6}
        axes.plot(images.frequencies, scaled, **line, alpha=0.3)
        axes.plot(images.frequencies[:shared], scaled[:shared], **line)
        styles["luma of the images, scaled"] = line
    axes.set(xscale="log", yscale="log", xlabel="frequency (cycles per image)", ylabel="power per coefficient")
    axes.grid(alpha=0.25)
    number_logarithmic_ticks(axes.xaxis, form=",.10g")
    number_logarithmic_ticks(axes.yaxis)
    add_legend(figure, [*styles], [*styles.values()])
    return figure
