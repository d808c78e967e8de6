"""Distances and neighbours against closed forms and brute force; the networks that are loaded."""

import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.losses.perceptual import TRUNKS
from dc_ssdae.probe.features import copying_ratio, frechet_distances, load_features, nearest

CPU = torch.device("cpu")


def whitened(count: int, channels: int = 3) -> Tensor:
    """Rows of mean 0 whose sample covariance is the identity."""
    rows = torch.randn(count, channels, dtype=torch.float64)
    return math.sqrt(count - 1) * torch.linalg.qr(rows - rows.mean(dim=0)).Q


def test_sets_of_different_sizes_have_the_closed_form() -> None:
    """Of Gaussians with diagonal covariances: |μ₁ - μ₂|² + Σ (σ₁ - σ₂)²; more than a block of rows."""
    deviations = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    references = whitened(300) * deviations
    shifted, wider, same = frechet_distances(references, [whitened(50) * deviations + 2.0, 3 * references, references])
    assert shifted.value == pytest.approx(12.0)
    assert wider.value == pytest.approx(4 * (1 + 4 + 0.25))
    assert same.value == pytest.approx(0.0, abs=1e-6)
    for found in (shifted, wider):
        assert 0.0 < found.low < found.value < found.high  # type: ignore[operator]
    (alone,) = frechet_distances(references, [references[:1]])
    assert alone.value is None
    assert alone.reason


def test_it_is_the_same_as_of_pairs() -> None:
    measure, (reference, images) = FrechetDistance(lambda rows: rows, 3, 0), torch.randn(2, 40, 3)
    measure.add(reference, images, [str(place) for place in range(40)])
    (found,) = frechet_distances(reference, [images], replicates=0)
    assert found.value == pytest.approx(measure.finish(Processes()).value)


def test_nearest_is_brute_force() -> None:
    samples, references = torch.randn(300, 5), torch.randn(40, 5)
    distances, places = nearest(samples, references, 3)
    for row, found, where in zip(samples, distances, places, strict=True):
        every = 1.0 - torch.nn.functional.cosine_similarity(row[None], references)
        expected = sorted(every.tolist())[:3]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)
        assert every[where].tolist() == pytest.approx(expected, abs=1e-6)
    distances, places = nearest(3.0 * references[[7, 0]], references)  # copies, but brighter
    assert places.flatten().tolist() == [7, 0]
    assert distances.abs().max() < 1e-6


def test_copies_have_a_small_ratio() -> None:
    training, unseen, others = torch.randn(3, 200, 8)
    copies = training[:100] + 0.05 * torch.randn(100, 8)
    fresh, copied = copying_ratio(others, unseen, training), copying_ratio(copies, unseen, training)
    assert fresh.low < 1.0 < fresh.high  # type: ignore[operator]
    assert copied.low < copied.value < copied.high < 0.2  # type: ignore[operator]
    medians = [nearest(side, training)[0].median() for side in (others, unseen)]
    assert fresh.value == pytest.approx(float(medians[0] / medians[1]), rel=0.02)  # medians of even numbers differ
    assert copying_ratio(copies, training, training).value is None


# --- the networks ---


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)


@pytest.mark.usefixtures("nothing_here")
def test_without_weights_there_is_nothing_but_random_ones_when_asked() -> None:
    assert load_features(CPU) == {}
    (found,) = load_features(CPU, random=True).values()
    assert (found.is_stand_in, found.title) == (True, "random SqueezeNet")
    pixels = torch.randint(0, 256, (2, 3, TRUNKS["squeeze"][1] - 1, 40), dtype=torch.uint8)  # smaller than it takes
    features = found(pixels)
    assert (features.shape, features.dtype) == ((2, found.channels), torch.float32)
    torch.testing.assert_close(features, load_features(CPU, random=True)["squeezenet"](pixels))


@pytest.mark.usefixtures("nothing_here")
def test_squeezenet_is_torchvisions(squeezenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features, through torchvision's own classifier and pooling, are torchvision's answer."""
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(squeezenet))
    (found,) = load_features(CPU).values()
    assert (found.is_stand_in, found.title) == (True, "SqueezeNet")
    theirs = squeezenet1_1().eval()
    theirs.load_state_dict(torch.load(squeezenet / "squeezenet1_1-b8a52dc0.pth", weights_only=True))
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    prepare = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    torch.testing.assert_close(found(pixels), theirs.features(prepare(pixels)).mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
