"""Metrics that look through networks, against their packages on the same files; weights that are not to be had."""

import contextlib
import copy
import hashlib
import importlib.machinery
import io
import os
import re
import shutil
import socket
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision import models, transforms

from dc_ssdae import InputError
from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation import metric_networks, metrics
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.metric_networks import DREAMSIM_FILES, MSE, Inception, MetricSuite, load_metrics
from dc_ssdae.evaluation.protocol import PROTOCOLS

ALEX_FILE = "alexnet-owt-7be5be79.pth"
VGG_FILE = "vgg16-397923af.pth"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
DINOV2_FILE = f"{DINOV2_S}.safetensors"
FILES = {"lpips": ALEX_FILE, "rfid": INCEPTION_FILE, "rfdd": DINOV2_FILE}
"""Of the metrics whose weights can be downloaded, by the default protocol."""

# --- files as their libraries keep them, with random numbers ---


def random_trunk(build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """torchvision's file of a network; the classifier takes the room of one number."""
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


def random_inception() -> dict[str, Tensor]:
    """torch-fidelity's file: a plain dict that comes from TensorFlow, so that batch norms have no count of batches."""
    with torch.device("meta"):  # its constructor insists on weights
        extractor = object.__new__(FeatureExtractorInceptionV3)
        with contextlib.suppress(RuntimeError, NotImplementedError, FileNotFoundError):
            extractor.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="/nowhere")  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in extractor.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            state[name] = 0.5 + drawn.abs()
        elif name.endswith("bn.weight"):
            state[name] = 1.0 + 0.2 * drawn
        elif tensor.ndim > 1:
            state[name] = drawn * (2.0 / tensor[0].numel()) ** 0.5
        else:
            state[name] = 0.2 * drawn
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
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME whose checkpoints are the files of all networks."""
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(random_trunk(models.alexnet), folder / ALEX_FILE)
    torch.save(random_trunk(models.vgg16), folder / VGG_FILE)
    torch.save(random_inception(), folder / INCEPTION_FILE)
    save_file(random_dinov2(), folder / DINOV2_FILE)
    return home


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    return home / "hub" / "checkpoints"


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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Loading is most of the work, and what is computed is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MetricSuite:
    """All metrics, with random weights and downloads allowed, where everything but DreamSim is on this machine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = take_offline(monkeypatch, tmp_path_factory.mktemp("full"))
        monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(folder))
        suite = load(random_backbones=True, download=True)
        assert not asked, "the network was asked"
        return suite


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> MetricSuite:
    """All metrics, with random weights."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = take_offline(monkeypatch, tmp_path_factory.mktemp("random"))
        torch.manual_seed(5)
        suite = load(random_backbones=True)
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


def error_of(attempt: Callable[..., Any], *args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        attempt(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pair(count: int = 3, height: int = 64, width: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images and others between resembling and unlike them, uint8 (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 300.0 * torch.rand(count, 3, 6, 6, generator=generator) - 20.0
    reference = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    strength = torch.linspace(5.0, 60.0, count).view(-1, 1, 1, 1)
    images = 0.9 * reference + strength * torch.randn(reference.shape, generator=generator)
    return tuple(x.round().clamp(0, 255).to(torch.uint8) for x in (reference, images))  # type: ignore[return-value]


# --- LPIPS ---


@pytest.mark.parametrize(("protocol", "net"), [("dcae", "alex"), ("lightningdit", "vgg")])
def test_lpips_is_the_packages(
    protocol: str, net: str, home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load("lpips", protocol=protocol).images["lpips"]
    monkeypatch.setenv("TORCH_HOME", str(home))
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # seconds, for numbers that are overwritten
        theirs = lpips.LPIPS(net=net, verbose=False)
    reference, images = pair(4, 48, 72)
    with torch.no_grad():
        expected = theirs(images / 127.5 - 1.0, reference / 127.5 - 1.0).flatten()
        found = ours(reference, images)
        one_by_one = torch.cat([ours(reference[i : i + 1], images[i : i + 1]) for i in range(4)])
        unchanged = ours(reference, reference)
    assert expected.min() > 1e-3, "a comparison of zeros would say nothing"
    assert (found.dtype, found.shape) == (torch.float64, (4,))
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one_by_one, found, rtol=1e-5, atol=1e-7)
    assert unchanged.abs().max() < 1e-7
    beyond = [1.3 * (side / 127.5 - 1.0) for side in (reference, images)]  # unrounded, and nobody clamps them
    with torch.no_grad():
        torch.testing.assert_close(ours(*beyond), theirs(*beyond[::-1]).flatten().double(), rtol=1e-5, atol=1e-7)


def test_lpips_of_images_that_are_too_small_is_refused(full: MetricSuite) -> None:
    ours = full.images["lpips"]
    assert ours(*pair(1, 31, 40)).isfinite().all()
    message = error_of(ours, *pair(1, 40, 30))
    assert "LPIPS of alex needs images of at least 31 pixels" in message
    assert "--size" in message


# --- Inception ---


@pytest.fixture(scope="module")
def inception(folder: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's own, from the same file."""
    path = str(folder / INCEPTION_FILE)
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)


def first_input(network: nn.Module, layer: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the first layer sees, and the features."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    found = network(pixels)
    handle.remove()
    return seen[0], found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize(("height", "width"), [(40, 56), (320, 310)])
def test_inceptions_features_are_torch_fidelitys(
    height: int, width: int, folder: Path, inception: FeatureExtractorInceptionV3
) -> None:
    pixels = torch.cat(pair(1, height, width))
    network = Inception(folder / INCEPTION_FILE).eval()
    with torch.no_grad():
        seen, found = first_input(network, network.layers[0], pixels)
        expected_input, expected = first_input(inception, inception.Conv2d_1a_3x3, pixels)
    assert (found.dtype, found.shape) == (torch.float32, (2, 2048))
    assert (expected[0] - expected[1]).abs().mean() > 0.01 * expected.std()
    assert torch.equal(seen, expected_input)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("protocol", ["dcae", "lightningdit"])
def test_inception_of_dcae_and_lightningdit_sees_what_pytorch_fid_gives_it(
    protocol: str, weights: Path, inception: FeatureExtractorInceptionV3
) -> None:
    """pytorch-fid's definition: images in [0, 1], PyTorch's bilinear interpolation, then to [-1, 1]."""
    pixels = torch.cat(pair(1, 40, 56))
    network = load("rfid", protocol=protocol).distances["rfid"].features
    definition = 2.0 * nn.functional.interpolate(pixels / 255.0, (299, 299), mode="bilinear", align_corners=False) - 1.0
    with torch.no_grad():
        seen, found = first_input(network, network.layers[0], pixels)  # type: ignore[arg-type, attr-defined]
        handle = inception.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: (definition,))
        (expected,) = inception(pixels)
        handle.remove()
        (by_tensorflow,) = inception(pixels)
    torch.testing.assert_close(seen, definition, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert (found - by_tensorflow).abs().mean() > 1e-3 * expected.std(), "the two inputs make no difference here"


@pytest.mark.slow
def test_rfid_is_torchmetrics_of_the_same_file_to_the_end(weights: Path) -> None:
    ours, theirs = rfid_by_both(load("rfid", protocol="rae"), weights)
    assert theirs > 0.1
    assert ours == pytest.approx(theirs, rel=1e-5)


def rfid_by_both(full: MetricSuite, folder: Path) -> tuple[float, float]:
    """Ours, in two batches, and torchmetrics' own.

    torchmetrics resizes with antialiasing unless told otherwise; torch-fidelity and TensorFlow before it, by which
    published figures are taken, do not.
    """
    reference, images = pair(3)
    distance = copy.deepcopy(full.distances["rfid"])
    assert isinstance(distance, FrechetDistance)
    for part in (slice(0, 2), slice(2, 3)):
        distance.add(reference[part], images[part], ["a", "b", "c"][part])
    path = str(folder / INCEPTION_FILE)
    theirs = FrechetInceptionDistance(feature_extractor_weights_path=path, antialias=False)
    theirs.update(reference, real=True)
    theirs.update(images, real=False)
    value = distance.finish(Processes()).value
    assert value is not None
    return value, float(theirs.compute())


def test_inceptions_file_may_count_batches(tmp_path: Path) -> None:
    """The published file does not; one that PyTorch has saved does."""
    state = random_inception()
    assert len(state) == 472
    state |= {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(5)
        for name in list(state)
        if name.endswith("running_var")
    }
    assert len(state) == 566
    torch.save(state, tmp_path / INCEPTION_FILE)
    network = Inception(tmp_path / INCEPTION_FILE)
    assert torch.equal(network.layers[0].conv.weight, state["Conv2d_1a_3x3.conv.weight"])


def test_inceptions_file_is_where_torch_fidelity_keeps_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(URL_INCEPTION_V3).name == INCEPTION_FILE
    file = metric_networks.inception_file()
    assert file.cached() is None
    monkeypatch.setenv("TORCH_HOME", str(home))
    assert file.cached() == home / "hub" / "checkpoints" / INCEPTION_FILE


# --- DINOv2 ---


@pytest.fixture(scope="module")
def dinov2() -> Callable[[Tensor], Tensor]:
    """The class token, by timm's network for images of 224 pixels and torchvision's transforms."""
    network = timm.create_model(DINOV2_S, pretrained=False, num_classes=0, img_size=224, global_pool="token").eval()
    state = random_dinov2()
    # As DINOv2's own code resamples positions from 37 to 16 a side: no antialiasing, and 0.1 added to the side.
    first, grid = state["pos_embed"].split([1, 37 * 37], dim=1)
    grid = grid.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    assert grid.shape[-2:] == (16, 16)
    state["pos_embed"] = torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], dim=1)
    network.load_state_dict(state)
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        return network(prepare(pixels.float() / 255.0))

    return features


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 260)])
def test_dinov2s_features_are_timms_class_token(
    height: int, width: int, full: MetricSuite, dinov2: Callable[[Tensor], Tensor]
) -> None:
    reference, images = pair(1, height, width)
    pixels = torch.cat([reference, images])
    expected = dinov2(pixels)
    found = full.distances["rfdd"].features(pixels)
    assert (found.dtype, found.shape) == (torch.float32, (2, 384))
    assert (expected[0] - expected[1]).abs().mean() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rfdd_is_the_distance_of_these_features(full: MetricSuite, dinov2: Callable[[Tensor], Tensor]) -> None:
    class Features(nn.Module):
        num_features = 384

        def forward(self, pixels: Tensor) -> Tensor:
            return dinov2(pixels).double()

    reference, images = pair(3)
    theirs = FrechetInceptionDistance(feature=Features())
    theirs.update(reference, real=True)
    theirs.update(images, real=False)
    distance = copy.deepcopy(full.distances["rfdd"])
    distance.add(reference, images, list("abc"))
    assert distance.finish(Processes()).value == pytest.approx(float(theirs.compute()), rel=1e-4)


# --- DreamSim ---

DREAMSIM_FETCHES = (
    *("dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar", "clip_vitb16_pretrain.pth.tar", "ensemble_lora"),
    # It builds DINO by torch.hub.load("facebookresearch/dino:main", "dino_vitb16") with this folder as the hub's,
    # which downloads the code, and runs it, and the weights.
    *("facebookresearch_dino_main", "checkpoints/dino_vitbase16_pretrain.pth"),
)
"""All that version 0.2.1 of the package has in its folder after its first start; without it, it downloads."""


class DreamSim:
    """Stands for the package: its function `dreamsim` as a caller sees it, with a distance that is easy to check."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.batches: list[int] = []
        module = types.ModuleType("dreamsim")
        module.__spec__ = importlib.machinery.ModuleSpec("dreamsim", None)
        module.dreamsim = self.dreamsim  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "dreamsim", module)

    def dreamsim(self, pretrained: bool = True, device: str = "cuda", cache_dir: str = "./models") -> Any:
        self.calls.append({"pretrained": pretrained, "device": device, "cache_dir": cache_dir})
        print(f"Using cached {cache_dir}")
        torch.hub.set_dir(cache_dir)  # as the package does before it asks PyTorch Hub for DINO
        return self.network, self.preprocess

    def network(self, a: Tensor, b: Tensor) -> Tensor:
        self.batches.append(len(a))
        weight = torch.linspace(0.5, 1.5, a[0].numel()).view(a.shape[1:])
        return ((a - 2.0 * b) * weight).mean(dim=(1, 2, 3)).float()

    @staticmethod
    def preprocess(image: Image.Image) -> Tensor:
        """The package's: (1, 3, 224, 224) in [0, 1]."""
        return transforms.ToTensor()(image.resize((224, 224), Image.Resampling.BICUBIC))[None]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> DreamSim:
    return DreamSim(monkeypatch)


def place_dreamsim(folder: Path, without: str = "") -> Path:
    for name in DREAMSIM_FETCHES:
        if name != without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"weights")
    return folder


def test_dreamsim_is_the_packages(
    package: DreamSim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    place_dreamsim(tmp_path / "dreamsim")
    suite = load("dreamsim")
    assert package.calls == [{"pretrained": True, "device": "cpu", "cache_dir": str(tmp_path / "dreamsim")}]
    assert capsys.readouterr().out == "", "what is printed may be a table or JSON"
    assert str(tmp_path / "dreamsim") in suite.files["dreamsim"]
    assert "dreamsim" not in suite.missing

    reference, images = pair(3, 40, 40)
    found = suite.images["dreamsim"](reference, images)
    assert (found.dtype, found.shape) == (torch.float64, (3,))
    assert package.batches == [3]
    sides = [
        [package.preprocess(Image.fromarray(np.moveaxis(x.numpy(), 0, -1))) for x in side]
        for side in (reference, images)
    ]
    expected = torch.cat([package.network(a, b) for a, b in zip(*sides, strict=True)])
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(suite.images["dreamsim"](reference[:1], images[:1]), found[:1], rtol=1e-5, atol=1e-7)


def test_dreamsims_own_folder_is_looked_into_too(package: DreamSim, tmp_path: Path) -> None:
    place_dreamsim(tmp_path / "models")
    assert "dreamsim" in load("dreamsim").images
    assert [Path(call["cache_dir"]).resolve() for call in package.calls] == [tmp_path / "models"]


def test_dreamsim_leaves_pytorch_hubs_folder_where_it_is(
    package: DreamSim, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Inception, which is looked for afterwards, is not found in the cache, and is downloaded elsewhere."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    place_dreamsim(tmp_path / "models")
    before = torch.hub.get_dir()
    load("dreamsim")
    assert len(package.calls) == 1
    assert torch.hub.get_dir() == before


@pytest.mark.parametrize("without", DREAMSIM_FETCHES)
def test_dreamsim_is_missing_where_the_package_would_download(package: DreamSim, without: str, tmp_path: Path) -> None:
    place_dreamsim(tmp_path / "models", without)
    suite = load("dreamsim")
    assert not package.calls
    assert "dreamsim" not in suite.images
    assert "not on this machine" in suite.missing["dreamsim"]
    assert "models" in suite.missing["dreamsim"]


def test_dreamsims_files_are_those_of_the_package() -> None:
    assert set(DREAMSIM_FILES) <= set(DREAMSIM_FETCHES)


def test_dreamsim_without_its_package_says_so(tmp_path: Path) -> None:
    place_dreamsim(tmp_path / "models")
    assert load("dreamsim").missing["dreamsim"] == "the package dreamsim is not installed: pip install dreamsim"


# --- which metrics there are ---


def test_the_protocol_says_which_formulas(weights: Path) -> None:
    reference, images = pair()
    for protocol, ssim in (("dcae", metrics.ssim_each), ("original", metrics.scikit_ssim_each)):
        found = load("psnr", "ssim", protocol=protocol).images
        assert set(found) == {"psnr", "ssim", MSE}
        assert torch.equal(found["ssim"](reference, images), ssim(reference, images))
        assert torch.equal(found["psnr"](reference, images), metrics.psnr_each(reference, images))
        assert torch.equal(found[MSE](reference, images), metrics.mse_each(reference, images))


@pytest.mark.parametrize(("protocol", "smallest"), [("dcae", 6), ("original", 7)])
def test_images_too_small_for_ssim_are_told_beforehand(protocol: str, smallest: int) -> None:
    assert "ssim" in load("ssim", protocol=protocol, size=smallest).images
    sides = [torch.zeros(1, 3, smallest, smallest, dtype=torch.uint8)] * 2
    assert load("ssim", protocol=protocol, size=smallest).images["ssim"](*sides).item() == pytest.approx(1.0)
    assert f"at least {smallest} pixels" in error_of(load, "ssim", protocol=protocol, size=smallest - 1)


def test_only_what_is_asked_for_is_loaded(weights: Path) -> None:
    suite = load("lpips", "psnr")
    assert set(suite.images) == {"lpips", "psnr", MSE}
    assert not suite.distances
    assert suite.missing == {name: "not asked for" for name in METRICS if name not in ("lpips", "psnr")}
    assert set(suite.files) == {"lpips"}


def test_nothing_asked_for_leaves_the_squared_error() -> None:
    suite = load_metrics(PROTOCOLS["dcae"], torch.device("cpu"), wanted=[])
    assert set(suite.images) == {MSE}
    assert set(suite.missing) == set(METRICS)


def test_everything_is_asked_for_where_nothing_is_named(full: MetricSuite) -> None:
    suite = full
    assert set(suite.images) == {"psnr", "ssim", "lpips", MSE}
    assert set(suite.distances) == {"rfid", "rfdd"}
    assert set(suite.missing) == {"dreamsim"}


@pytest.mark.parametrize("name", ["fid", "PSNR", "mse", ""])
def test_an_unknown_metric_is_refused(name: str) -> None:
    message = error_of(load, "psnr", name)
    assert "unknown metric" in message
    assert "accepted: dreamsim, lpips, psnr, rfdd, rfid, ssim" in message


def test_networks_are_frozen_and_evaluated(full: MetricSuite) -> None:
    for distance in full.distances.values():
        network = distance.features
        assert isinstance(network, nn.Module)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(module.training for module in network.modules())


def test_loading_is_silent_and_disturbs_no_random_numbers(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load("lpips", "rfid", "rfdd")
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)


# --- weights that are not on this machine ---


def test_without_weights_the_reason_names_the_file() -> None:
    """And nothing is downloaded, as after every test here."""
    suite = load()
    assert set(suite.images) == {"psnr", "ssim", MSE}
    assert not suite.distances
    assert not suite.files
    assert set(suite.missing) == {*FILES, "dreamsim"}
    for name, file in FILES.items():
        for part in (file, "not on this machine", "DC_SSDAE_WEIGHTS", "--download"):
            assert part in suite.missing[name]


def test_the_protocol_says_which_weights() -> None:
    assert VGG_FILE in load("lpips", protocol="rae").missing["lpips"]


def test_an_empty_folder_has_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    assert set(load().missing) == {*FILES, "dreamsim"}


def test_a_folder_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path / "absent"))
    assert "DC_SSDAE_WEIGHTS" in error_of(load)


def test_the_cache_of_pytorch_hub_is_searched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(home))
    suite = load("lpips", "rfdd")
    assert set(suite.files) == {"lpips"}
    assert "not on this machine" in suite.missing["rfdd"]


def test_without_torch_fidelity_rfid_alone_is_missing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    suite = load("rfid", "rfdd")
    assert "torch-fidelity is not installed: pip install 'dc-ssdae[eval]'" in suite.missing["rfid"]
    assert set(suite.distances) == {"rfdd"}


@pytest.mark.parametrize("name", FILES)
def test_a_download_that_fails_is_an_error_of_one_line(name: str, asked: list[str]) -> None:
    message = error_of(load, name, download=True)
    for part in (METRICS[name].title, FILES[name], "could not be downloaded", "DC_SSDAE_WEIGHTS", "--download"):
        assert part in message
    assert asked
    asked.clear()


def test_a_download_that_fails_is_not_made_up_for_by_random_weights(asked: list[str]) -> None:
    assert ALEX_FILE in error_of(load, "lpips", download=True, random_backbones=True)
    asked.clear()


def test_a_download_is_kept_and_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(url: str, target: str, hash_prefix: str | None = None, **_: Any) -> None:
        fetched.append(f"{url} {hash_prefix}")
        shutil.copy(folder / Path(target).name, target)

    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        suite = load("lpips", download=True)
        assert "lpips" in suite.images
        assert ALEX_FILE in suite.files["lpips"]
    assert fetched == [f"{models.AlexNet_Weights.IMAGENET1K_V1.url} 7be5be79"]
    assert (tmp_path / "torch_home" / "hub" / "checkpoints" / ALEX_FILE).is_file()


# --- random weights ---


def test_random_weights_are_noted(random: MetricSuite) -> None:
    assert set(random.missing) == {"dreamsim"}
    assert set(random.notes) == set(FILES)
    for name in FILES:
        assert "random weights" in random.notes[name]
        assert "only within this report" in random.notes[name]
        assert random.files[name] == "random weights"


def test_random_weights_are_the_same_at_every_start(random: MetricSuite) -> None:
    reference, images = pair(1)
    torch.manual_seed(6)
    again = load(random_backbones=True)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(6).get_state())
    assert torch.equal(again.images["lpips"](reference, images), random.images["lpips"](reference, images))
    for name in ("rfid", "rfdd"):
        first, second = (suite.distances[name].features(images) for suite in (random, again))
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["rfid", "rfdd"])
def test_random_weights_see_differences(name: str, random: MetricSuite) -> None:
    """Of features that are almost constant every candidate would have a distance of 0.00."""
    before, after = (random.distances[name].features(side) for side in pair(2))
    assert (before - after).abs().mean() > 1e-3 * before.abs().mean()


def test_weights_on_this_machine_are_preferred(full: MetricSuite) -> None:
    assert not any("random" in text for text in (*full.notes.values(), *full.files.values()))


# --- which file it is ---


def test_the_file_is_told_by_name_and_checksum(full: MetricSuite, folder: Path) -> None:
    assert set(full.files) == set(FILES)
    for name, file in FILES.items():
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert full.files[name] == f"{file}, SHA-256 {digest}"


def test_weights_that_are_not_the_published_ones_are_noted(full: MetricSuite, folder: Path) -> None:
    for name, published in (("lpips", "7be5be79"), ("rfid", "6726825d")):
        digest = metric_networks.sha256(folder / FILES[name])
        for part in ("not the published ones", digest[:8], published, "only within this report"):
            assert part in full.notes[name]
    assert "rfdd" not in full.notes, "the name of timm's file has no checksum"


def test_published_weights_are_not_noted(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def published(path: Path) -> str:
        match = re.search("-([0-9a-f]{8})[.]pth", path.name)
        return (match.group(1) if match else "").ljust(64, "0")

    monkeypatch.setattr(metric_networks, "sha256", published)
    suite = load("lpips")
    assert not suite.notes
    assert suite.files["lpips"].endswith("7be5be79".ljust(64, "0"))


# --- files that are something else ---


@pytest.mark.parametrize(("name", "share"), [("lpips", 0.999), ("rfid", 0.0), ("rfid", 0.999), ("rfdd", 0.999)])
def test_a_damaged_file_is_named_in_one_line(
    name: str, share: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    content = (folder / FILES[name]).read_bytes()
    (tmp_path / FILES[name]).write_bytes(content[: int(share * len(content))])
    assert FILES[name] in error_of(load, name)


@pytest.mark.parametrize(("name", "other"), [("lpips", INCEPTION_FILE), ("rfid", ALEX_FILE)])
def test_another_networks_file_is_refused(
    name: str, other: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    (tmp_path / FILES[name]).symlink_to(folder / other)
    message = error_of(load, name)
    assert FILES[name] in message
    assert "does not fit" in message


def test_an_inception_without_a_layer_is_refused(tmp_path: Path) -> None:
    state = random_inception()
    del state["Mixed_5b.branch1x1.conv.weight"]
    torch.save(state, tmp_path / INCEPTION_FILE)
    error = error_of(Inception, tmp_path / INCEPTION_FILE)
    assert INCEPTION_FILE in error
    assert "missing: Mixed_5b.branch1x1.conv.weight" in error


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
    assert FILES[name] in error_of(load, name)
    assert not trace.exists()
    with contextlib.suppress(Exception):
        torch.load(tmp_path / FILES[name], weights_only=False)
    assert trace.exists(), "the file is harmless, and this test says nothing"
