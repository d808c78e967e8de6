"""LPIPS against the package of that name, its gradients, and its weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import lpips
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.functional import pil_to_tensor

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.losses import LPIPSLoss, StepOutputs

VGG_FILE = "vgg16-397923af.pth"
ALEX_FILE = "alexnet-owt-7be5be79.pth"
SQUEEZE_FILE = "squeezenet1_1-b8a52dc0.pth"
NETS = {
    "vgg": (models.vgg16, VGG_FILE),
    "alex": (models.alexnet, ALEX_FILE),
    "squeeze": (models.squeezenet1_1, SQUEEZE_FILE),
}


def random_state(build: Callable[..., nn.Module], seed: int = 0) -> dict[str, Tensor]:
    """What torchvision's file of a network holds, random; the classifier takes the room of one number."""
    generator = torch.Generator().manual_seed(seed)
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


def test_on_photos_it_is_the_packages_lpips(data_dir: Path, random_loss: LPIPSLoss) -> None:
    files = sorted(path for path in data_dir.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:3]
    photos = [pil_to_tensor(Image.open(file).convert("RGB").resize((64, 48))) for file in files]
    x = torch.stack(photos) / 127.5 - 1.0
    estimate = (x + 0.2 * torch.randn_like(x)).roll(1, dims=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    reference.net.load_state_dict(random_loss.backbone.network.trunk.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            random_loss(outputs(x, estimate)), reference(estimate, x).flatten(), atol=1e-6, rtol=1e-4
        )


def test_equal_images_are_at_distance_zero(random_loss: LPIPSLoss) -> None:
    x, _ = pair()
    value = random_loss(outputs(x, x))
    torch.testing.assert_close(value, torch.zeros(2), atol=1e-7, rtol=0)


def test_what_differs_more_is_farther(random_loss: LPIPSLoss) -> None:
    x, _ = pair()
    noise = torch.randn_like(x)
    near, far = (random_loss(outputs(x, x + scale * noise)) for scale in (0.05, 0.5))
    assert (near > 0).all()
    assert (far > 2 * near).all()


def test_it_compares_the_clean_estimate(random_loss: LPIPSLoss) -> None:
    x, _ = pair()
    dynamics = EquilibriumMatching()
    record = dynamics.corrupt(x, torch.randn_like(x), torch.tensor([0.1, 0.7]))
    given = StepOutputs(dynamics, record, record.target, DiagonalGaussian(torch.zeros(2, 1, 1, 1)))
    assert random_loss(given).max() < 1e-6


def test_bfloat16_changes_little(random_loss: LPIPSLoss) -> None:
    x, estimate = pair()
    half = LPIPSLoss(weights="random", precision="bfloat16")
    value, expected = half(outputs(x, estimate)), random_loss(outputs(x, estimate))
    assert value.dtype == torch.float32
    assert not torch.equal(value, expected)
    torch.testing.assert_close(value, expected, rtol=0.1, atol=0)


# --- gradients ---


def test_gradients_reach_the_estimate_alone(random_loss: LPIPSLoss) -> None:
    x, estimate = pair()
    x.requires_grad_()
    estimate.requires_grad_()
    given = outputs(x.detach(), estimate)
    given = StepOutputs(given.dynamics, given.record._replace(x=x), given.prediction, given.posterior)
    random_loss(given).sum().backward()
    assert estimate.grad is not None
    assert estimate.grad.isfinite().all()
    assert (estimate.grad.flatten(1).norm(dim=1) > 0).all()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in random_loss.backbone.network.parameters())


def test_the_gradient_is_the_slope(random_loss: LPIPSLoss) -> None:
    x, estimate = pair(1)
    given = outputs(x, estimate.requires_grad_())
    (gradient,) = torch.autograd.grad(random_loss(given).sum(), estimate)
    step = 1e-2 * gradient / gradient.abs().max()
    with torch.no_grad():
        ahead, behind = (random_loss(outputs(x, estimate + sign * step)).sum() for sign in (1.0, -1.0))
    torch.testing.assert_close((gradient * step).sum(), 0.5 * (ahead - behind), rtol=0.03, atol=0)


def test_gradients_are_finite_where_the_network_sees_nothing(random_loss: LPIPSLoss) -> None:
    # Convolutions without bias answer with zeros alone to an image that is 0 after scaling.
    x, _ = pair()
    estimate = random_loss.backbone.network.scaling.shift.expand_as(x).clone().requires_grad_()
    assert not any(features.any() for features in random_loss.backbone(estimate))
    random_loss(outputs(x, estimate)).sum().backward()
    assert estimate.grad is not None
    assert estimate.grad.isfinite().all()


# --- as a module ---


def test_nothing_of_it_is_saved_or_trained(random_loss: LPIPSLoss) -> None:
    assert not random_loss.state_dict()
    assert not list(random_loss.parameters())


def test_it_moves_as_a_whole() -> None:
    term = LPIPSLoss("alex", weights="random").to(torch.bfloat16).to(memory_format=torch.channels_last)
    network = term.backbone.network
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.bfloat16}
    assert term(outputs(*pair())).dtype == torch.float32


def test_it_is_silent(home: Path, folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LPIPSLoss("alex", weights=folder)
    assert not caught
    assert capfd.readouterr() == ("", "")


# --- weights ---


@pytest.mark.parametrize("weights", ["random", "file"])
def test_building_disturbs_no_random_numbers(weights: str, folder: str) -> None:
    state = torch.get_rng_state()
    LPIPSLoss("alex", weights=weights if weights == "random" else folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_are_the_same_at_every_start() -> None:
    terms = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        terms.append(LPIPSLoss("alex", weights="random"))
    first, second = (term.backbone.network.state_dict() for term in terms)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert terms[0].random_weights
    assert terms[0].weights_file is None
    assert all(tensor.any() for name, tensor in first.items() if name.endswith("weight"))


def test_the_variable_and_torchs_cache_are_searched(
    home: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", folder)
    assert LPIPSLoss("alex").weights_file == Path(folder) / ALEX_FILE
    monkeypatch.delenv("DC_SSDAE_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(home))
    assert LPIPSLoss("alex").weights_file == home / "hub" / "checkpoints" / ALEX_FILE


def test_without_weights_one_line_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no answer")

    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    for attempt in (LPIPSLoss, LPIPSLoss.fetch):
        message = error_of(attempt)
        for part in (VGG_FILE, models.VGG16_Weights.IMAGENET1K_V1.url, "DC_SSDAE_WEIGHTS", "--losses.lpips 0"):
            assert part in message


def test_fetching_finds_what_building_would(folder: str, tmp_path: Path) -> None:
    LPIPSLoss.fetch(weights=folder)
    LPIPSLoss.fetch("squeeze", weights="random", precision="bfloat16")
    assert VGG_FILE in error_of(LPIPSLoss.fetch, weights=str(tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(folder: str, tmp_path: Path, share: float) -> None:
    content = (Path(folder) / ALEX_FILE).read_bytes()
    (tmp_path / ALEX_FILE).write_bytes(content[: int(share * len(content))])
    assert ALEX_FILE in error_of(LPIPSLoss, net="alex", weights=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.3.weight": None}, "features.3.weight"),
        ({"features.3.bias": torch.zeros(3)}, "features.3.bias"),
        ({"features.99.weight": torch.zeros(3)}, "features.99.weight"),
        ({"fc.weight": torch.zeros(3)}, "fc.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {**random_state(models.alexnet), **change}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / ALEX_FILE)
    error = error_of(LPIPSLoss, net="alex", weights=str(tmp_path))
    assert ALEX_FILE in error
    assert message in error


def test_another_networks_file_is_named(folder: str, tmp_path: Path) -> None:
    (tmp_path / ALEX_FILE).symlink_to(Path(folder) / SQUEEZE_FILE)
    assert ALEX_FILE in error_of(LPIPSLoss, net="alex", weights=str(tmp_path))


# --- settings ---


def test_unknown_settings_are_refused() -> None:
    for attempt in (LPIPSLoss, LPIPSLoss.fetch):
        assert "unknown net of LPIPS 'vgg16' (did you mean 'vgg'?)" in error_of(attempt, net="vgg16")
    assert "bf16" in error_of(LPIPSLoss, weights="random", precision="bf16")


@pytest.mark.parametrize(("net", "side"), [("vgg", 16), ("alex", 31), ("squeeze", 17)])
def test_images_must_be_large_enough(net: str, side: int) -> None:
    term = LPIPSLoss(net, weights="random")
    x, estimate = pair(1, side, side + 8)
    assert term(outputs(x, estimate)).isfinite().all()
    for height, width in ((side - 1, side), (side, side - 1)):
        given = outputs(*pair(1, height, width))
        assert f"{height}×{width}; {net} needs sides of at least {side} pixels" in error_of(term, given)


def error_of(attempt: Callable[..., Any], *args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        attempt(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
