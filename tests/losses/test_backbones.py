"""The frozen network that a term computes features with, and the search for its weights."""

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
from tiny_models import refusal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

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

    def __init__(self) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(Net())
        self.head = nn.Linear(2, 2)


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_has_nothing_that_is_saved_trained_or_synchronised() -> None:
    term = Term()
    assert list(term.state_dict()) == ["head.weight", "head.bias"]
    assert [name for name, _ in term.named_parameters()] == ["head.weight", "head.bias"]
    assert not list(term.buffers())
    assert [type(module) for module in term.modules()] == [Term, FrozenBackbone, nn.Linear]
    term.requires_grad_().train()
    assert not any(parameter.requires_grad for parameter in term.backbone.network.parameters())
    assert not any(module.training for module in term.backbone.network.modules())


def test_it_moves_with_the_rest_and_keeps_its_values_over_the_meta_device() -> None:
    term = Term()
    expected = term.backbone(X)
    term.to("meta")
    assert term.head.weight.is_meta
    term.to_empty(device="cpu")
    assert torch.equal(term.backbone(X), expected)
    term.to(torch.float64)
    assert term.backbone.network.conv.weight.dtype == torch.float64


def test_a_copy_has_weights_of_its_own() -> None:
    term = Term()
    expected = term.backbone(X)
    copies = [copy.deepcopy(term), pickle.loads(pickle.dumps(term))]
    term.backbone.network.conv.weight.data.zero_()
    assert all(torch.equal(other.backbone(X), expected) for other in copies)


def test_compiling_compiles_the_network_in_place() -> None:
    term, counter = Term(), CompileCounter()
    expected = term.backbone(X)
    term.backbone.compile(backend=counter)
    torch.testing.assert_close(term.backbone(X), expected)
    assert counter.frame_count == 1
    assert list(term.state_dict()) == ["head.weight", "head.bias"]


# --- precision ---


@pytest.mark.parametrize("within_autocast", [False, True])
def test_the_precision_is_its_own(within_autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=within_autocast):
        assert FrozenBackbone(nn.Conv2d(3, 4, 3), "bfloat16")(X).dtype == torch.bfloat16
        for precision in ("auto", "float32"):  # "auto" is float32 on the CPU
            backbone = FrozenBackbone(nn.Conv2d(3, 4, 3), precision, bfloat16_is_safe=True)
            assert backbone(X).dtype == torch.float32
    assert "unknown precision of a backbone 'bf16'" in refusal(FrozenBackbone, Net(), "bf16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("safe", [False, True])
def test_auto_takes_bfloat16_on_cuda_where_it_is_safe(safe: bool) -> None:
    backbone = FrozenBackbone(nn.Conv2d(3, 4, 3), bfloat16_is_safe=safe).to("cuda")
    computes_in_it = torch.cuda.is_bf16_supported(including_emulation=False)
    assert backbone(X.cuda()).dtype == (torch.bfloat16 if safe and computes_in_it else torch.float32)


# --- where weights are looked for ---


class Library:
    """A library's cache and download of one file, in a folder."""

    def __init__(self, folder: Path, online: bool) -> None:
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
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders for the setting, the environment variable, which names its own, and the library's cache."""
    found = [tmp_path / name for name in ("setting", "variable", "cache")]
    for folder in found:
        folder.mkdir()
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(found[1]))
    return found


def test_the_search_ends_at_the_first_place(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    setting, variable, cache = folders
    monkeypatch.setenv("HOME", str(setting.parent))
    file = Library(cache, online=True).file
    for folder in folders:
        (folder / "net.pth").touch()
    assert find_weights("mine", file, "random") is None
    assert find_weights("mine", file, "~/setting") == setting / "net.pth"
    assert find_weights("mine", file, None) == variable / "net.pth"
    (variable / "net.pth").rename(variable / "authors.pth")
    assert find_weights("mine", file, None) == variable / "authors.pth"
    (variable / "authors.pth").unlink()
    assert find_weights("mine", file, None) == cache / "net.pth"
    (cache / "net.pth").unlink()
    assert find_weights("mine", file, None) == cache / "net.pth", "downloaded"


def test_a_folder_that_is_named_must_exist_and_hold_the_file(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Library(folders[2], online=True).file
    (folders[1] / "net.pth").touch()
    message = refusal(find_weights, "mine", file, str(folders[0]))
    for part in ("losses.mine.init_args.weights", "net.pth or authors.pth", "somewhere"):
        assert part in message
    wrong = str(folders[0] / "absent")
    assert f"losses.mine.init_args.weights is {wrong!r}" in refusal(find_weights, "mine", file, wrong)
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", wrong)
    assert f"DC_SSDAE_WEIGHTS is {wrong!r}" in refusal(find_weights, "mine", file, None)


def test_without_a_network_one_line_says_what_to_do(folders: list[Path]) -> None:
    message = refusal(find_weights, "mine", Library(folders[2], online=False).file, None)
    for part in ("net.pth", "somewhere", "no route", "losses.mine.init_args.weights", "DC_SSDAE_WEIGHTS"):
        assert part in message
    assert "--losses.mine 0" in message


# --- libraries' caches and downloads ---


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    return tmp_path / "home"


def test_a_hub_file_is_downloaded_into_its_cache(empty_caches: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    source = (tmp_path / "net.pth").rename(tmp_path / f"net-{digest[:8]}.pth")
    file = hub_file(source.as_uri())
    assert file.cached() is None
    assert find_weights("mine", file, None) == empty_caches / "hub" / "checkpoints" / source.name == file.cached()


@pytest.mark.usefixtures("empty_caches")
def test_a_host_that_does_not_answer_is_asked_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, timeout: float, **__: Any) -> None:
        assert timeout <= 10
        raise URLError("no answer")

    monkeypatch.setattr("dc_ssdae.losses.backbones.urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    assert "no answer" in refusal(find_weights, "mine", hub_file("https://host.invalid/net.pth"), None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    message = refusal(find_weights, "mine", hugging_face_file("owner/net", ("net.safetensors",)), None)
    for part in ("net.safetensors", "owner/net", "no answer"):
        assert part in message


def test_a_file_is_found_in_the_hugging_face_cache(empty_caches: Path) -> None:
    file = hugging_face_file("owner/net", ("net.safetensors",))
    assert file.cached() is None
    path = empty_caches / "models--owner--net" / "snapshots" / "0123" / "model.safetensors"
    for file_there, content in ((path, ""), (path.parents[2] / "refs" / "main", "0123")):
        file_there.parent.mkdir(parents=True)
        file_there.write_text(content)
    assert file.cached() == path


# --- reading files ---


class Payload:
    """Would make a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_both_formats_are_read_and_what_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    path, state = tmp_path / name, nn.Linear(8, 64).state_dict()
    assert name in refusal(read_weights, path), "it is missing"
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_weights(path).items())
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 3], content[:-20], b"<html>404</html>"):
        path.write_bytes(damaged)
        assert name in refusal(read_weights, path)


def test_what_holds_no_tensors_by_name_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    for content in ([1, 2], {"model": {"weight": torch.zeros(2)}}, {"weight": Payload(tmp_path / "run")}):
        torch.save(content, path)
        assert "net.pth" in refusal(read_weights, path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "missing: weight"),
        ({"bias": torch.zeros(3)}, "bias has shape (3,)"),
        ({f"layer.{index}": torch.zeros(1) for index in range(99)}, "and 94 more"),
    ],
)
def test_tensors_must_fit_exactly(change: dict[str, Tensor | None], message: str) -> None:
    network = nn.Linear(2, 2)
    tensors = {n: tensor for n, tensor in {**network.state_dict(), **change}.items() if tensor is not None}
    line = refusal(load_exactly, network, tensors, Path("net.pth"))
    assert line.startswith("net.pth ")
    assert message in line
    assert len(line) < 500


def test_random_weights_are_fixed_and_disturb_nothing() -> None:
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with fixed_random_state():
            drawn.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*drawn)
