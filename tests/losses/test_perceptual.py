"""LPIPS against the package of that name, its gradients, and its weights."""

import warnings
from collections.abc import Callable
from dataclasses import replace
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
from dc_ssdae.dynamics import FlowMatching
from dc_ssdae.losses import LPIPSLoss, StepOutputs

NETS = {
    "vgg": (models.vgg16, "vgg16-397923af.pth"),
    "alex": (models.alexnet, "alexnet-owt-7be5be79.pth"),
    "squeeze": (models.squeezenet1_1, "squeezenet1_1-b8a52dc0.pth"),
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
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a TORCH_HOME has the files of all networks."""
    folder = tmp_path_factory.mktemp("torch_home") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for build, name in NETS.values():
        torch.save(random_state(build), folder / name)
    return folder


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
def test_it_is_the_packages_lpips_with_weights_from_torchs_cache(
    net: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(checkpoints.parents[1]))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=net, verbose=False)
    term = LPIPSLoss(net=net)
    assert term.weights_file == checkpoints / NETS[net][1]
    assert not term.random_weights
    x, estimate = pair(3)
    estimate = torch.cat([estimate[:1], x[1:2] + 0.05, -x[2:]])
    with torch.no_grad():
        value, expected = term(outputs(x, estimate)), reference(estimate, x).flatten()
    assert expected.min() > 1e-4, "a comparison of zeros would say nothing"
    assert (value.shape, value.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


# --- gradients ---


def test_gradients_reach_the_estimate_alone(random_loss: LPIPSLoss) -> None:
    x, estimate = (images.requires_grad_() for images in pair())
    given = outputs(x.detach(), estimate)
    random_loss(replace(given, record=given.record._replace(x=x))).sum().backward()
    assert estimate.grad is not None
    assert (estimate.grad.flatten(1).norm(dim=1) > 0).all()
    assert x.grad is None


def test_value_and_gradients_are_finite_where_the_network_sees_nothing(random_loss: LPIPSLoss) -> None:
    # Convolutions without bias answer with zeros alone to an image that is 0 after scaling.
    x, _ = pair()
    estimate = random_loss.backbone.network.scaling.shift.expand_as(x).clone().requires_grad_()
    assert not any(features.any() for features in random_loss.backbone(estimate))
    loss = random_loss.distance(estimate, x).sum()
    loss.backward()
    assert loss.isfinite()
    assert estimate.grad.isfinite().all()


# --- weights ---


def test_building_is_silent_and_random_weights_are_the_same_at_every_start(
    checkpoints: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    networks = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 2):
            state = torch.manual_seed(seed).get_state()
            term = LPIPSLoss("alex", weights="random")
            assert torch.equal(torch.get_rng_state(), state)
            assert term.random_weights
            assert term.weights_file is None
            networks.append(term.backbone.network.state_dict())
        LPIPSLoss("alex", weights=str(checkpoints))
        assert torch.equal(torch.get_rng_state(), state)
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())
    assert all(tensor.any() for name, tensor in networks[0].items() if name.endswith("weight"))


def test_fetching_finds_what_building_would_or_one_line_names_it(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LPIPSLoss.fetch(weights=str(checkpoints))
    LPIPSLoss.fetch("squeeze", weights="random", precision="bfloat16")

    def unreachable(*_: Any, timeout: float) -> None:
        assert timeout <= 10
        raise URLError("no answer")

    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    for attempt in (LPIPSLoss, LPIPSLoss.fetch):
        message = refusal(attempt)
        parts = (NETS["vgg"][1], models.VGG16_Weights.IMAGENET1K_V1.url, "no answer", "--losses.lpips 0")
        assert all(part in message for part in parts)
        assert "'vgg16' (did you mean 'vgg'?)" in refusal(attempt, net="vgg16")


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for name in ("features.3.weight", "features.99.weight"):
        torch.save({**random_state(models.alexnet), name: torch.zeros(3)}, tmp_path / NETS["alex"][1])
        assert name in refusal(LPIPSLoss, net="alex", weights=str(tmp_path))


# --- settings ---


@pytest.mark.parametrize(("net", "side"), [("vgg", 16), ("alex", 31), ("squeeze", 17)])
def test_images_must_be_large_enough(net: str, side: int) -> None:
    term = LPIPSLoss(net, weights="random")
    assert term(outputs(*pair(1, side, side + 8))).isfinite().all()
    for height, width in ((side - 1, side), (side, side - 1)):
        assert f"{height}×{width}" in refusal(term, outputs(*pair(1, height, width)))
