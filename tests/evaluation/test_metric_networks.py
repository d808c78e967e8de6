"""Metrics that look through networks, against their packages on the same files; weights that are not to be had."""

import contextlib
import hashlib
import importlib.machinery
import os
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import lpips
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from tiny_models import refusal
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision import models, transforms
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.evaluation import metric_networks
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.evaluation.metric_networks import DREAMSIM_FILES, MSE, DINOv2, Inception, MetricSuite, load_metrics
from dc_ssdae.evaluation.protocol import PROTOCOLS

ALEX_FILE = "alexnet-owt-7be5be79.pth"
VGG_FILE = "vgg16-397923af.pth"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
DINOV2_FILE = f"{DINOV2_S}.safetensors"
FILES = {"lpips": ALEX_FILE, "rfid": INCEPTION_FILE, "rfdd": DINOV2_FILE}
"""Of the metrics whose weights can be downloaded, by the default protocol."""

# --- files as their libraries keep them, with random numbers ---


def random_alexnet() -> dict[str, Tensor]:
    """torchvision's file, without the classifier."""
    torch.manual_seed(0)
    features = models.alexnet().features
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return features.state_dict(prefix="features.")


def random_inception() -> dict[str, Tensor]:
    """torch-fidelity's file: a plain dict that comes from TensorFlow, so that batch norms have no count of batches."""
    torch.manual_seed(0)
    extractor = object.__new__(FeatureExtractorInceptionV3)
    with contextlib.suppress(FileNotFoundError):  # its constructor insists on weights
        extractor.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="/nowhere")  # type: ignore[misc]
    state = {
        name: tensor for name, tensor in extractor.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    for tensor in state.values():
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor)
        else:
            tensor.add_(0.4 * torch.rand_like(tensor))
    return state


def random_dinov2() -> dict[str, Tensor]:
    """timm's file, with layer scales large enough for every layer to matter."""
    torch.manual_seed(3)
    state = timm.create_model(DINOV2_S, pretrained=False, num_classes=0).state_dict()
    for name, tensor in state.items():
        if name.endswith(".gamma"):
            tensor.copy_(0.1 + 0.1 * torch.rand_like(tensor))
        elif tensor.ndim == 1 or name == "pos_embed":
            tensor.add_(0.2 * torch.randn_like(tensor))
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the networks."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_alexnet(), folder / ALEX_FILE)
    torch.save(random_inception(), folder / INCEPTION_FILE)
    save_file(random_dinov2(), folder / DINOV2_FILE)
    return folder


def take_offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Leave no weights on this machine, and no network; gives what is asked of it from now on."""
    asked: list[str] = []

    def unreachable(*args: Any, **_: Any) -> None:
        asked.append(str(args))
        raise URLError("no answer")

    def unresolved(host: Any, *_: Any, **__: Any) -> None:
        asked.append(str(host))
        raise socket.gaierror("no answer")

    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", unreachable)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hugging_face"))
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch_home"))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    monkeypatch.chdir(folder)  # where the folder models/ of DreamSim is looked for
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    return asked


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What a test asks of the network, which does not answer; one that means to ask clears the list."""
    asked = take_offline(monkeypatch, tmp_path)
    yield asked
    assert not asked, "the network was asked"


@pytest.fixture(scope="module")
def full(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MetricSuite:
    """All metrics, with random weights and downloads allowed, where everything but DreamSim is on this machine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = take_offline(monkeypatch, tmp_path_factory.mktemp("full"))
        monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(folder))
        suite = load(random_backbones=True, download=True)
        assert not asked, "the network was asked"
        return suite


@pytest.fixture
def weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that DC_SSDAE_WEIGHTS names."""
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(folder))
    return folder


def load(*wanted: str, protocol: str = "dcae", **settings: Any) -> MetricSuite:
    given = {"dinov2": DINOV2_S, "replicates": 0, **settings}
    return load_metrics(PROTOCOLS[protocol], torch.device("cpu"), wanted or None, **given)


def pair(count: int = 3, height: int = 64, width: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images and others between resembling and unlike them, uint8 (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 300.0 * torch.rand(count, 3, 6, 6, generator=generator) - 20.0
    reference = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    strength = torch.linspace(5.0, 60.0, count).view(-1, 1, 1, 1)
    images = 0.9 * reference + strength * torch.randn(reference.shape, generator=generator)
    return tuple(x.round().clamp(0, 255).to(torch.uint8) for x in (reference, images))  # type: ignore[return-value]


# --- LPIPS ---


def test_lpips_is_the_packages(weights: Path) -> None:
    ours, theirs = load("lpips").images["lpips"], lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = {name: layer for part in theirs.net.children() for name, layer in part.named_children()}
    nn.ModuleDict({"features": nn.ModuleDict(layers)}).load_state_dict(torch.load(weights / ALEX_FILE))
    reference, images = pair(4, 48, 72)
    beyond = [1.3 * (side / 127.5 - 1.0) for side in (reference, images)]  # unrounded, and nobody clamps them
    with torch.no_grad():
        expected = theirs(images / 127.5 - 1.0, reference / 127.5 - 1.0).flatten()
        torch.testing.assert_close(ours(reference, images), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours(*beyond), theirs(*beyond[::-1]).flatten(), rtol=1e-5, atol=1e-7)
    assert expected.min() > 1e-3, "a comparison of zeros would say nothing"


# --- Inception ---


def first_input(network: nn.Module, layer: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the first layer sees, and the features."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    with torch.no_grad():
        found = network(pixels)
    handle.remove()
    return seen[0], found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("side", [40, 310])
def test_inception_is_torch_fidelitys_and_sees_what_the_protocol_gives_it(side: int, weights: Path) -> None:
    """pytorch-fid's definition: images in [0, 1], PyTorch's bilinear interpolation, then to [-1, 1]."""
    path, pixels = str(weights / INCEPTION_FILE), torch.cat(pair(1, side, 56))
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    expected_input, expected = first_input(theirs, theirs.Conv2d_1a_3x3, pixels)
    assert (expected[0] - expected[1]).abs().mean() > 0.01 * expected.std()
    network: Any = load("rfid", protocol="rae").distances["rfid"].features
    seen, found = first_input(network, network.layers[0], pixels)
    assert torch.equal(seen, expected_input)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    definition = 2.0 * nn.functional.interpolate(pixels / 255.0, (299, 299), mode="bilinear", align_corners=False) - 1.0
    network = load("rfid", protocol="lightningdit").distances["rfid"].features
    seen, found = first_input(network, network.layers[0], pixels)
    torch.testing.assert_close(seen, definition, rtol=0, atol=1e-6)
    assert (found - expected).abs().mean() > 1e-3 * expected.std(), "the inputs make no difference here"


def test_inceptions_file_is_torch_fidelitys_and_may_count_batches(tmp_path: Path) -> None:
    """The published file does not count batches; one that PyTorch has saved does."""
    assert Path(URL_INCEPTION_V3).name == INCEPTION_FILE
    state = random_inception()
    names = [name for name in state if name.endswith("running_var")]
    state |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(5) for name in names}
    torch.save(state, tmp_path / INCEPTION_FILE)
    network = Inception(tmp_path / INCEPTION_FILE)
    assert torch.equal(network.layers[0].conv.weight, state["Conv2d_1a_3x3.conv.weight"])
    del state["Mixed_5b.branch1x1.conv.weight"]
    torch.save(state, tmp_path / INCEPTION_FILE)
    assert "missing: Mixed_5b.branch1x1.conv.weight" in refusal(Inception, tmp_path / INCEPTION_FILE)


# --- DINOv2 ---


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 260)])
def test_dinov2s_features_are_timms_class_token(height: int, width: int, full: MetricSuite) -> None:
    """Of timm's network for images of 224 pixels, and torchvision's transforms."""
    network = timm.create_model(DINOV2_S, pretrained=False, num_classes=0, img_size=224, global_pool="token").eval()
    state = random_dinov2()
    # As DINOv2's own code resamples positions from 37 to 16 a side: no antialiasing, and 0.1 added to the side.
    first, grid = state["pos_embed"].split([1, 37 * 37], dim=1)
    grid = grid.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    state["pos_embed"] = torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], dim=1)
    network.load_state_dict(state)
    resize = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC, antialias=True)
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.cat(pair(1, height, width))
    with torch.no_grad():
        expected, found = network(normalize(resize(pixels / 255.0))), full.distances["rfdd"].features(pixels)
    assert (found.dtype, found.shape) == (torch.float32, (2, 384))
    assert (expected[0] - expected[1]).abs().mean() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_dinov2_with_registers_has_timms_positions(tmp_path: Path) -> None:
    """Its authors resample them with antialiasing, as timm does; no position is of a register."""
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    network = timm.create_model(name, pretrained=False, num_classes=0)
    nn.init.normal_(network.pos_embed)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    network.set_input_size(img_size=(224, 224))
    found = DINOv2(name, tmp_path / "weights.safetensors")
    torch.testing.assert_close(found.transformer.pos_embed, network.pos_embed)


# --- DreamSim ---


def preprocess(image: Image.Image) -> Tensor:
    return transforms.ToTensor()(image.resize((8, 8)))[None]


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - 2.0 * b).mean(dim=(1, 2, 3))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the package, with a distance that is easy to check; the folders that it was asked to load from."""
    folders: list[str] = []

    def dreamsim(pretrained: bool, device: str, cache_dir: str) -> Any:
        folders.append(cache_dir)
        print(f"Using cached {cache_dir}")
        torch.hub.set_dir(cache_dir)  # as the package does before it asks PyTorch Hub for DINO
        return difference, preprocess

    module = types.ModuleType("dreamsim")
    module.__spec__ = importlib.machinery.ModuleSpec("dreamsim", None)
    module.dreamsim = dreamsim  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    return folders


@pytest.mark.parametrize("without", ["", *DREAMSIM_FILES])
@pytest.mark.parametrize("place", ["models", "dreamsim"])
def test_dreamsim_is_the_packages_where_that_would_not_download(
    package: list[str], place: str, without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From its own folder, models/, or ours. PyTorch Hub's folder, in which Inception is looked for, stays."""
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    for name in DREAMSIM_FILES:
        if name != without:
            (tmp_path / place / name).mkdir(parents=True)
    before = torch.hub.get_dir()
    suite = load("dreamsim")
    assert torch.hub.get_dir() == before
    assert capsys.readouterr().out == "", "what is printed may be a table or JSON"
    if without:
        assert not package
        assert "not on this machine" in suite.missing["dreamsim"]
        return
    assert [Path(folder).resolve() for folder in package] == [tmp_path / place]
    assert str(package[0]) in suite.files["dreamsim"]
    sides = pair(3, 40, 40)
    inputs = [torch.cat([preprocess(tvf.to_pil_image(image)) for image in side]) for side in sides]
    torch.testing.assert_close(suite.images["dreamsim"](*sides), difference(*inputs))


# --- which metrics there are ---


def test_what_is_asked_for_is_loaded_frozen_and_nothing_else(full: MetricSuite, folder: Path) -> None:
    assert (set(full.images), set(full.distances)) == ({"psnr", "ssim", "lpips", MSE}, {"rfid", "rfdd"})
    assert full.missing == {"dreamsim": "the package dreamsim is not installed: pip install dreamsim"}
    for distance in full.distances.values():
        network: Any = distance.features
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(module.training for module in network.modules())
    suite = load("psnr")
    assert set(suite.images) == {"psnr", MSE}
    assert suite.missing == {name: "not asked for" for name in METRICS if name != "psnr"}
    assert (suite.distances, suite.files) == ({}, {})
    assert "accepted: dreamsim, lpips, psnr, rfdd, rfid, ssim" in refusal(load, "psnr", "fid")


def test_images_too_small_for_lpips_are_told_beforehand() -> None:
    suite = load("lpips", size=30, random_backbones=True)
    assert set(suite.images) == {MSE}
    assert "at least 31 pixels" in suite.missing["lpips"]
    suite = load("lpips", size=31, random_backbones=True)
    assert suite.images["lpips"](*pair(1, 31, 40)).isfinite().all()


# --- weights that are not on this machine ---


def test_without_weights_the_reason_names_the_file() -> None:
    """And nothing is downloaded, as after every test here."""
    suite = load()
    assert set(suite.images) == {"psnr", "ssim", MSE}
    assert (suite.distances, suite.files) == ({}, {})
    assert set(suite.missing) == {*FILES, "dreamsim"}
    for name, file in FILES.items():
        for part in (file, "not on this machine", "DC_SSDAE_WEIGHTS", "--download"):
            assert part in suite.missing[name]
    assert VGG_FILE in load("lpips", protocol="rae").missing["lpips"]


def test_without_torch_fidelity_rfid_alone_is_missing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    suite = load("rfid", "rfdd")
    assert "torch-fidelity is not installed: pip install 'dc-ssdae[eval]'" in suite.missing["rfid"]
    assert set(suite.distances) == {"rfdd"}


@pytest.mark.parametrize("name", FILES)
def test_a_download_that_fails_is_an_error_of_one_line(name: str, asked: list[str]) -> None:
    """And is not made up for by random weights."""
    message = refusal(load, name, download=True, random_backbones=True)
    for part in (METRICS[name].title, FILES[name], "could not be downloaded", "DC_SSDAE_WEIGHTS", "--download"):
        assert part in message
    assert asked
    asked.clear()


def test_random_weights_are_noted_the_same_at_every_start_and_see_differences() -> None:
    """Of features that are almost constant every candidate would have a distance of 0.00."""
    torch.manual_seed(5)
    first, again = load(random_backbones=True), load(random_backbones=True)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(5).get_state())
    assert set(first.missing) == {"dreamsim"}
    for name in FILES:
        assert "random weights: comparable only within this report" in first.notes[name]
        assert first.files[name] == "random weights"
    reference, images = pair(2)
    assert torch.equal(first.images["lpips"](reference, images), again.images["lpips"](reference, images))
    for name in ("rfid", "rfdd"):
        before, after = (first.distances[name].features(side) for side in (reference, images))
        assert torch.equal(after, again.distances[name].features(images))
        assert (before - after).abs().mean() > 1e-3 * before.abs().mean()


# --- which file it is ---


def test_the_file_is_told_by_name_and_checksum_and_whether_it_is_the_published_one(
    full: MetricSuite, folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files on this machine go before random weights and downloads; the name of timm's file has no checksum."""
    digests = {name: hashlib.sha256((folder / file).read_bytes()).hexdigest() for name, file in FILES.items()}
    assert full.files == {name: f"{file}, SHA-256 {digests[name]}" for name, file in FILES.items()}
    assert full.notes.keys() == {"lpips", "rfid"}
    for note in full.notes.values():
        assert note == "its weights are not the published ones: comparable only within this report"
    monkeypatch.setattr(metric_networks, "sha256", lambda path: "7be5be79".ljust(64, "0"))
    assert load("lpips").notes == {}


# --- files that are something else ---


class Malicious:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["rfid", "lpips"])
def test_a_malicious_file_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace"
    torch.save({"fc.bias": Malicious(trace)}, tmp_path / FILES[name])
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    assert FILES[name] in refusal(load, name)
    assert not trace.exists()
    with contextlib.suppress(Exception):
        torch.load(tmp_path / FILES[name], weights_only=False)
    assert trace.exists(), "the file is harmless, and this test says nothing"
