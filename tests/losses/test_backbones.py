"""The frozen network that a term looks through, and the search for its weights."""

import copy
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from dc_ssdae import InputError
from dc_ssdae.losses.backbones import (
    FrozenBackbone,
    WeightsFile,
    find_weights,
    fixed_random_state,
    hub_file,
    hugging_face_file,
    load_exactly,
    read_weights,
)


class Net(nn.Module):
    """A convolution, a dropout that evaluation mode switches off, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.drop = nn.Dropout(0.9)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.conv(x)) + self.shift


class Term(nn.Module):
    """A term with something that trains beside its backbone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(Net(), **settings)
        self.head = nn.Linear(2, 2)


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8)


# --- what others see of it ---


def test_it_has_nothing_that_is_saved_trained_or_synchronised() -> None:
    term = Term()
    assert list(term.state_dict()) == ["head.weight", "head.bias"]
    assert [name for name, _ in term.named_parameters()] == ["head.weight", "head.bias"]
    assert not list(term.buffers())
    assert [type(module) for module in term.modules()] == [Term, FrozenBackbone, nn.Linear]
    term.requires_grad_()
    assert not any(parameter.requires_grad for parameter in term.backbone.network.parameters())


def test_it_stays_in_evaluation_mode() -> None:
    x, term = images(), Term()
    expected = term.backbone(x)
    term.train()
    assert not any(module.training for module in term.backbone.network.modules())
    torch.testing.assert_close(term.backbone(x), expected, rtol=0, atol=0)


def test_gradients_pass_through_it_to_its_input() -> None:
    x, term = images().requires_grad_(), Term()
    term.backbone(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert term.backbone.network.conv.weight.grad is None


# --- moving and copying ---


def test_it_moves_with_the_rest() -> None:
    term = Term()
    network, before = term.backbone.network, term.backbone.network.conv.weight.clone()
    term.to(torch.float64)
    assert network.conv.weight.dtype == network.shift.dtype == torch.float64
    term.to(memory_format=torch.channels_last)
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not network.conv.weight.is_contiguous()
    torch.testing.assert_close(network.conv.weight, before.double(), rtol=0, atol=0)
    assert not network.conv.weight.requires_grad


def test_it_outlives_a_journey_over_the_meta_device() -> None:
    x, term = images(), Term()
    expected = term.backbone(x)
    term.to("meta")
    assert term.head.weight.is_meta
    torch.testing.assert_close(term.backbone(x), expected, rtol=0, atol=0)
    term.to_empty(device="cpu")
    torch.testing.assert_close(term.backbone(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda term: pickle.loads(pickle.dumps(term))])
def test_a_copy_has_weights_of_its_own(copied: Any) -> None:
    x, term = images(), Term()
    expected = term.backbone(x)
    other = copied(term)
    term.backbone.network.conv.weight.data.zero_()
    torch.testing.assert_close(other.backbone(x), expected, rtol=0, atol=0)
    assert list(other.state_dict()) == list(term.state_dict())
    assert not other.backbone.network.conv.weight.requires_grad


def test_compiling_compiles_the_network_in_place() -> None:
    x, term = images(), Term()
    expected = term.backbone(x)
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    term.backbone.compile(backend=backend)
    torch.testing.assert_close(term.backbone(x), expected)
    assert compiled
    assert list(term.state_dict()) == ["head.weight", "head.bias"]


# --- precision ---


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, torch.float32),
        ({"bfloat16_is_safe": True}, torch.float32),  # on the CPU
        ({"precision": "float32", "bfloat16_is_safe": True}, torch.float32),
        ({"precision": "bfloat16"}, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("within_autocast", [False, True])
def test_the_precision_is_its_own(settings: dict[str, Any], expected: torch.dtype, within_autocast: bool) -> None:
    network = nn.Conv2d(3, 4, 3)
    backbone = FrozenBackbone(network, **settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=within_autocast):
        assert backbone(images()).dtype == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("safe", [False, True])
def test_auto_takes_bfloat16_on_cuda_where_it_is_safe(safe: bool) -> None:
    backbone = FrozenBackbone(nn.Conv2d(3, 4, 3), bfloat16_is_safe=safe).to("cuda")
    computes_in_it = torch.cuda.is_bf16_supported(including_emulation=False)
    assert backbone(images().cuda()).dtype == (torch.bfloat16 if safe and computes_in_it else torch.float32)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown precision of a backbone 'bf16'.*auto, bfloat16, float32"):
        FrozenBackbone(Net(), "bf16")


# --- where weights are looked for ---


class Library:
    """A library's cache and download of one file, in a folder."""

    def __init__(self, folder: Path, online: bool = False) -> None:
        self.folder, self.online = folder, online
        self.file = WeightsFile(("net.pth", "authors.pth"), "somewhere", self.cached, self.download)

    def cached(self) -> Path | None:
        path = self.folder / "net.pth"
        return path if path.is_file() else None

    def download(self) -> Path:
        if not self.online:
            raise OSError("no route\nto the host")
        (self.folder / "net.pth").touch()
        return self.folder / "net.pth"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Folders for the setting, the environment variable, which is set, and the library's cache."""
    found = tuple(tmp_path / name for name in ("setting", "variable", "cache"))
    for folder in found:
        folder.mkdir()
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(found[1]))
    return found  # type: ignore[return-value]


def test_the_search_ends_at_the_first_place(folders: tuple[Path, Path, Path]) -> None:
    setting, variable, cache = folders
    library = Library(cache, online=True)
    for folder in folders:
        (folder / "net.pth").touch()
    assert find_weights("mine", library.file, "random") is None
    assert find_weights("mine", library.file, str(setting)) == setting / "net.pth"
    assert find_weights("mine", library.file, None) == variable / "net.pth"
    (variable / "net.pth").rename(variable / "authors.pth")
    assert find_weights("mine", library.file, None) == variable / "authors.pth"
    (variable / "authors.pth").unlink()
    assert find_weights("mine", library.file, None) == cache / "net.pth"
    (cache / "net.pth").unlink()
    assert find_weights("mine", library.file, None) == cache / "net.pth", "downloaded"


def test_a_home_folder_is_understood(folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    setting = folders[0]
    (setting / "net.pth").touch()
    monkeypatch.setenv("HOME", str(setting.parent))
    assert find_weights("mine", Library(folders[2]).file, "~/setting") == setting / "net.pth"


def test_the_settings_folder_must_hold_the_file(folders: tuple[Path, Path, Path]) -> None:
    setting, variable, cache = folders
    (variable / "net.pth").touch()
    message = error_of(Library(cache, online=True).file, str(setting))
    assert "losses.mine.init_args.weights" in message
    assert "net.pth or authors.pth" in message
    assert "somewhere" in message


def test_what_is_no_folder_is_refused(folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    setting, _, cache = folders
    (cache / "net.pth").touch()
    library = Library(cache)
    for wrong in (setting / "absent", cache / "net.pth"):
        assert "not a folder" in error_of(library.file, str(wrong))
        with monkeypatch.context() as patch:
            patch.setenv("DC_SSDAE_WEIGHTS", str(wrong))
            message = error_of(library.file, None)
        assert "environment variable DC_SSDAE_WEIGHTS" in message
        assert "not a folder" in message


def test_without_a_network_one_line_says_what_to_do(folders: tuple[Path, Path, Path]) -> None:
    message = error_of(Library(folders[2]).file, None)
    for part in ("net.pth", "somewhere", "no route", "losses.mine.init_args.weights", "DC_SSDAE_WEIGHTS"):
        assert part in message
    assert "--losses.mine 0" in message


def error_of(file: WeightsFile, weights: str | None) -> str:
    with pytest.raises(InputError) as caught:
        find_weights("mine", file, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- PyTorch Hub ---


def test_a_hub_file_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    source = (tmp_path / "net.pth").rename(tmp_path / f"net-{digest[:8]}.pth")
    file = hub_file(source.as_uri())
    assert (file.names, file.origin) == ((source.name,), source.as_uri())
    assert file.cached() is None
    path = file.download()
    assert path == tmp_path / "home" / "hub" / "checkpoints" / source.name
    assert file.cached() == path
    assert path.is_file()


def test_a_damaged_download_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    source = tmp_path / "net-e3b0c442.pth"
    source.write_bytes(b"not nothing")
    file = hub_file(source.as_uri())
    assert "invalid hash value" in error_of(file, None)
    assert file.cached() is None


def test_a_host_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, timeout: float, **__: Any) -> None:
        assert timeout <= 10
        raise URLError("no answer")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert "no answer" in error_of(hub_file("https://host.invalid/net.pth"), None)


# --- Hugging Face ---


def test_a_file_is_found_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    file = hugging_face_file("owner/net", ("net.safetensors",))
    assert file.cached() is None
    repository = tmp_path / "models--owner--net"
    path = repository / "snapshots" / "0123" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert file.cached() == path


def test_it_is_downloaded_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: asked.append((url, timeout)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, filename: str(tmp_path / filename))
    file = hugging_face_file("owner/net", ())
    assert file.download() == tmp_path / "model.safetensors"
    ((url, timeout),) = asked
    assert url.endswith("/owner/net/resolve/main/model.safetensors")
    assert timeout <= 10


def test_the_hub_is_asked_once_before_the_library_tries_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    message = error_of(hugging_face_file("owner/net", ("net.safetensors",)), None)
    assert "net.safetensors" in message
    assert "owner/net" in message
    assert "no answer" in message


# --- reading files ---


class Payload:
    """Would make a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(params=["net.pth", "net.safetensors"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    state = nn.Linear(8, 64).state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def test_both_formats_are_read(saved: Path) -> None:
    network = nn.Linear(8, 64)
    tensors = read_weights(saved)
    load_exactly(network, tensors, saved)
    torch.testing.assert_close(network.state_dict(), tensors, rtol=0, atol=0)


def test_pytorchs_former_format_is_read(tmp_path: Path) -> None:
    state = nn.Linear(8, 64).state_dict()
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_weights(tmp_path / "net.pth"), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert saved.name in reading_error(saved)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x02.", b"version https://git-lfs\n", bytes(4096)])
def test_a_foreign_file_is_named(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    assert saved.name in reading_error(saved)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"weight": torch.zeros(2)}}, nn.Linear(2, 2)])
def test_what_holds_no_tensors_by_name_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "net.pth")
    assert "net.pth" in reading_error(tmp_path / "net.pth")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "run")}, tmp_path / "net.pth")
    reading_error(tmp_path / "net.pth")
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_named(saved: Path) -> None:
    saved.unlink()
    assert saved.name in reading_error(saved)


def reading_error(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r'net\.pth .*Missing key.*"weight"'),
        ({"other": torch.zeros(1)}, r'net\.pth .*Unexpected key.*"other"'),
        ({"bias": torch.zeros(3)}, r"net\.pth .*size mismatch for bias"),
    ],
)
def test_tensors_must_fit_exactly(change: dict[str, Tensor | None], message: str) -> None:
    network = nn.Linear(2, 2)
    tensors = {n: tensor for n, tensor in {**network.state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        load_exactly(network, tensors, Path("net.pth"))


# --- random weights ---


def test_random_weights_are_fixed_and_disturb_nothing() -> None:
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with fixed_random_state():
            drawn.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*drawn)
    torch.set_rng_state(before)
