"""LPIPS against the package of that name, its gradients, and its weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import lpips
import pytest
import torch
from tiny_models import refusal
from torch import Tensor, nn
from torchvision import models

from dc_ssdae import DiagonalGaussian
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.losses import LPIPSLoss, StepOutputs
from dc_ssdae.losses.backbones import weights_on_this_machine
from dc_ssdae.losses.perceptual import trunk_file

VGG_FILE = "vgg16-397923af.pth"
ALEX_FILE = "alexnet-owt-7be5be79.pth"
SQUEEZE_FILE = "squeezenet1_1-b8a52dc0.pth"
NETS = {
    "vgg": (models.vgg16, VGG_FILE),
    "alex": (models.alexnet, ALEX_FILE),
    "squeeze": (models.squeezenet1_1, SQUEEZE_FILE),
}


def random_state(build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """What torchvision's file of a network holds, random; the classifier takes the room of one number."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.startswith("classifier."):
            state[name] = torch.zeros(()).expand(shape)
        elif name.endswith(".weight"):
            state[name] = torch.randn(shape, generator=generator) * (2.0 / shape[1:].numel()) ** 0.5
        else:
            state[name] = 0.1 * torch.randn(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME with the files of all networks."""
    folder = tmp_path_factory.mktemp("torch_home")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    for build, name in NETS.values():
        torch.save(random_state(build), folder / "hub" / "checkpoints" / name)
    return folder


@pytest.fixture
def folder(home: Path) -> str:
    return str(home / "hub" / "checkpoints")


@pytest.fixture(scope="module")
def random_loss() -> LPIPSLoss:
    return LPIPSLoss(weights="random")


def outputs(x: Tensor, estimate: Tensor) -> StepOutputs:
    """A step of which `estimate` is the clean estimate: of flow matching from pure noise, x̂ = ε + v."""
    dynamics = FlowMatching()
    record = dynamics.corrupt(x, torch.randn_like(x), torch.ones(len(x)))
    posterior = DiagonalGaussian(torch.zeros(len(x), 1, 1, 1))
    return StepOutputs(dynamics, record, estimate - record.x_level, posterior)


def pair(batch: int = 2, height: int = 32, width: int = 48) -> tuple[Tensor, Tensor]:
    """Smooth images and others that resemble them."""
    x = nn.functional.interpolate(2.0 * torch.rand(batch, 3, 5, 5) - 1.0, (height, width), mode="bicubic")
    return x, x + 0.1 * torch.randn_like(x)


# --- the value ---


@pytest.mark.parametrize("net", NETS)
def test_it_is_the_packages_lpips(net: str, home: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(home))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=net, verbose=False)
    term = LPIPSLoss(net=net, weights=folder)
    assert term.weights_file == Path(folder) / NETS[net][1]
    assert not term.random_weights
    x, estimate = pair(3)
    estimate = torch.cat([estimate[:1], x[1:2] + 0.05, -x[2:]])
    with torch.no_grad():
        value, expected = term(outputs(x, estimate)), reference(estimate, x).flatten()
    assert expected.min() > 1e-4, "a comparison of zeros would say nothing"
    assert (value.shape, value.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


def test_it_compares_the_clean_estimate(random_loss: LPIPSLoss) -> None:
    x, _ = pair()
    dynamics = EquilibriumMatching()
    record = dynamics.corrupt(x, torch.randn_like(x), torch.tensor([0.1, 0.7]))
    given = StepOutputs(dynamics, record, record.target, DiagonalGaussian(torch.zeros(2, 1, 1, 1)))
    assert random_loss(given).max() < 1e-6


# --- gradients ---


def test_gradients_reach_the_estimate_alone(random_loss: LPIPSLoss) -> None:
    x, estimate = (images.requires_grad_() for images in pair())
    given = outputs(x.detach(), estimate)
    given = StepOutputs(given.dynamics, given.record._replace(x=x), given.prediction, given.posterior)
    random_loss(given).sum().backward()
    assert estimate.grad is not None
    assert (estimate.grad.flatten(1).norm(dim=1) > 0).all()
    assert x.grad is None


def test_gradients_are_finite_where_the_network_sees_nothing(random_loss: LPIPSLoss) -> None:
    # Convolutions without bias answer with zeros alone to an image that is 0 after scaling.
    x, _ = pair()
    estimate = random_loss.backbone.network.scaling.shift.expand_as(x).clone().requires_grad_()
    assert not any(features.any() for features in random_loss.backbone(estimate))
    random_loss(outputs(x, estimate)).sum().backward()
    assert estimate.grad is not None
    assert estimate.grad.isfinite().all()


# --- weights ---


def test_building_is_silent_and_draws_no_random_numbers(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weights in ("random", folder):
            LPIPSLoss("alex", weights=weights)
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)


def test_torchs_cache_is_searched(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    for folder, found in ((tmp_path, False), (home, True)):
        monkeypatch.setenv("TORCH_HOME", str(folder))
        assert (weights_on_this_machine(trunk_file("alex")) is not None) == found
    assert LPIPSLoss("alex").weights_file == home / "hub" / "checkpoints" / ALEX_FILE


def test_random_weights_are_the_same_at_every_start() -> None:
    first, second = (LPIPSLoss("alex", weights="random") for _ in range(2))
    state = second.backbone.network.state_dict()
    for name, tensor in first.backbone.network.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.any() or not name.endswith("weight")
    assert first.random_weights
    assert first.weights_file is None


def test_fetching_finds_what_building_would_or_one_line_names_it(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LPIPSLoss.fetch(weights=folder)
    LPIPSLoss.fetch("squeeze", weights="random", precision="bfloat16")

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no answer")

    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    for attempt in (LPIPSLoss, LPIPSLoss.fetch):
        message = refusal(attempt)
        for part in (VGG_FILE, models.VGG16_Weights.IMAGENET1K_V1.url, "DC_SSDAE_WEIGHTS", "--losses.lpips 0"):
            assert part in message


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for name in ("features.3.weight", "features.99.weight"):
        torch.save({**random_state(models.alexnet), name: torch.zeros(3)}, tmp_path / ALEX_FILE)
        assert name in refusal(LPIPSLoss, net="alex", weights=str(tmp_path))


# --- settings ---


@pytest.mark.parametrize(("net", "side"), [("vgg", 16), ("alex", 31), ("squeeze", 17)])
def test_images_must_be_large_enough(net: str, side: int) -> None:
    term = LPIPSLoss(net, weights="random")
    assert term(outputs(*pair(1, side, side + 8))).isfinite().all()
    for height, width in ((side - 1, side), (side, side - 1)):
        assert f"{height}×{width}" in refusal(term, outputs(*pair(1, height, width)))


def test_unknown_settings_are_refused() -> None:
    for attempt in (LPIPSLoss, LPIPSLoss.fetch):
        assert "'vgg16' (did you mean 'vgg'?)" in refusal(attempt, net="vgg16")
