"""A pass over images that processes share, statistics of latents, and profiles, against closed forms and NumPy."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.data.loader import ValidationImage, ValidationImages
from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.statistics import LatentProfile, LatentProfiler, latent_statistics, survey
from dc_ssdae.latent import LatentMoments


class Source:
    """Eleven images of one value each; some are broken."""

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 11

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise InputError(f"cannot read {self.name(index)}")
        return torch.full((3, 8, 8), 10 * index, dtype=torch.uint8), -1


class Alone(Processes):
    """One of several processes, of which the others say nothing."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Encoder:
    """Gives each image's value, and a variance of 1; remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> DiagonalGaussian:
        assert pixels.dtype == torch.uint8
        self.batches.append(len(pixels))
        mean = pixels[:, :2, ::8, ::8].float()
        return DiagonalGaussian(mean, torch.zeros_like(mean))


BROKEN = [(), (0, 10), (10,), tuple(range(1, 11))]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 2), (15, 2)])
def test_every_image_that_can_be_read_counts_once(processes: int, batch_size: int, broken: Sequence[int]) -> None:
    """Each process encodes equally many batches; what fills up does not count."""
    images, encoders = ValidationImages(Source(broken), 8, 100), [Encoder() for _ in range(processes)]
    parts, unread = [], {}
    for index, encode in enumerate(encoders):
        moments, mine, enlarged = latent_statistics(encode, images, 2, batch_size, 0, Alone(index, processes))
        assert enlarged == 0
        parts.append(moments.state())
        unread |= mine
    assert {sum(encode.batches) for encode in encoders} == {-(-11 // processes)}
    found = LatentMoments.from_states(torch.stack(parts)).statistics()
    values = torch.tensor([10.0 * index for index in range(11) if index not in broken], dtype=torch.float64)
    assert found.count == len(values)
    assert found.mean == pytest.approx([values.mean().item()] * 2, rel=1e-12)
    assert found.std == pytest.approx([(values.var(correction=0).item() + 1.0) ** 0.5] * 2, rel=1e-12)
    assert {place: image.name for place, image in unread.items()} == {index: f"image {index}" for index in broken}


def test_a_pass_counts_what_was_enlarged_and_tells_its_progress() -> None:
    seen: list[int] = []
    done: list[int] = []

    def work(batch: Sequence[ValidationImage], counts: Tensor) -> None:
        assert counts.tolist() == [True] * len(batch)
        seen.extend(image.place for image in batch)

    images = ValidationImages(Source((2,)), 9, 7)  # the images 0, 1, 3, 4, 6, 7 and 9
    assert survey(images, work, 3, 0, Processes(), done.append) == ({}, 7)
    assert (seen, done) == (list(range(7)), [3, 3, 1])


# --- profiles ---

PATTERNS = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])
"""Orthogonal, of mean 0 and variance 1."""


def profile_of(*posteriors: DiagonalGaussian) -> LatentProfile:
    return reduce(LatentProfiler.merge, map(LatentProfiler.of, posteriors)).profile()


def channels(*rows: Tensor) -> DiagonalGaussian:
    """Two images of two places each."""
    return DiagonalGaussian(torch.stack(rows).reshape(len(rows), 2, 1, 2).transpose(0, 1))


def random_posterior(shift: float = 0.0) -> DiagonalGaussian:
    """Of 9 images over 4 channels that hang together; the last varies little."""
    mixing = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0, 0.3, 2.0, 0], [0, 0, 0, 0.05]])
    mean = torch.einsum("ck,bkhw->bchw", mixing, torch.randn(9, 4, 3, 5)) + shift
    return DiagonalGaussian(mean.double(), torch.randn(9, 4, 3, 5).double())


@pytest.mark.parametrize(
    ("scales", "expected"), [((1, 1), 2.0), ((2, 1), 25 / 17), ((1, 0), 1.0), ((0, 0), 0.0), ((0.0, 0.2), 1.0)]
)
def test_effective_dimensions_of_independent_channels(scales: Sequence[float], expected: float) -> None:
    """Of channels that never change exactly none, whatever they are."""
    found = profile_of(channels(*(scale * pattern + 3.1 for scale, pattern in zip(scales, PATTERNS, strict=True))))
    assert found.effective_dimensions == pytest.approx(expected)
    assert found.active_channels == sum(scale > 0.1 for scale in scales)
    same = channels(*(scale * PATTERNS[0] + 1 for scale in (1.0, -2.0, 0.5)))
    assert profile_of(same).effective_dimensions == pytest.approx(1.0)


def test_kl_in_closed_form() -> None:
    """Of N(m, s²): ½ (m² + s² - 1 - ln s²), here at 6 places; of a point, none."""
    mean = torch.tensor([0.0, 1.0, -2.0]).reshape(1, 3, 1, 1).expand(4, 3, 2, 3)
    logvar = torch.tensor([0.0, 0.0, math.log(4)]).reshape(1, 3, 1, 1).expand(4, 3, 2, 3)
    found, point = profile_of(DiagonalGaussian(mean, logvar)), DiagonalGaussian(mean)
    assert found.kl == pytest.approx([0.0, 3.0, 3 * (4 + 4 - 1 - math.log(4))])
    assert (found.mean, found.std, found.images) == ([0.0, 1.0, -2.0], pytest.approx([1.0, 1.0, 2.0]), 4)
    assert profile_of(point).kl is None
    assert profile_of(DiagonalGaussian(mean, logvar), point).kl is None


@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [2, 3, 4]])
def test_it_is_numpys_however_it_is_split_and_merged(sizes: list[int], shift: float) -> None:
    posterior = random_posterior(shift)
    assert posterior.logvar is not None
    mean, logvar = posterior.mean.numpy(), posterior.logvar.numpy()
    by_channel = np.moveaxis(mean, 1, 0).reshape(4, -1)
    eigenvalues = np.linalg.eigvalsh(np.cov(by_channel, bias=True))
    expected = {
        "mean": by_channel.mean(axis=1),
        "std": np.sqrt(by_channel.var(axis=1) + np.exp(logvar).mean(axis=(0, 2, 3))),
        "kl": 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(2, 3)).mean(axis=0),
        "effective_dimensions": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "active_channels": 3,
        "images": 9,
    }
    pairs = zip(posterior.mean.split(sizes), posterior.logvar.split(sizes), strict=True)
    parts = [DiagonalGaussian(*pair) for pair in pairs]
    nothing = DiagonalGaussian(posterior.mean[:0], posterior.logvar[:0])
    found = profile_of(nothing, *parts, nothing)
    assert found.as_json().keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_what_is_not_finite_is_none_in_a_file() -> None:
    profile = LatentProfile([0.0, math.nan], [1.0, math.inf], None, math.nan, 1, 3)
    assert profile.as_json() == asdict(profile) | {
        "mean": [0.0, None],
        "std": [1.0, None],
        "effective_dimensions": None,
    }
