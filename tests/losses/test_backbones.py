"""The frozen network that a term computes features with, and the search for its weights."""

import copy
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_models import refusal
from torch import Tensor, nn

from dc_ssdae.losses.backbones import (
    FrozenBackbone,
    WeightsFile,
    find_weights,
    hub_file,
    hugging_face_file,
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


def test_it_moves_with_the_rest_and_keeps_its_values_over_the_meta_device_and_in_copies() -> None:
    term = Term()
    expected = term.backbone(X)
    term.to("meta")
    assert term.head.weight.is_meta
    term.to_empty(device="cpu")
    assert torch.equal(term.backbone(X), expected)
    copies = [copy.deepcopy(term), pickle.loads(pickle.dumps(term))]
    term.to(torch.float64)
    assert term.backbone.network.conv.weight.dtype == torch.float64
    term.backbone.network.conv.weight.data.zero_()
    assert all(torch.equal(other.backbone(X), expected) for other in copies)


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


def search(cache: Path, weights: str | None, online: bool = True) -> Path | None:
    """Look for a file that its library would have in the folder `cache`, or download."""

    def download() -> Path:
        if not online:
            raise OSError("no route\nto the host")
        return cache / "downloaded.pth"

    path = cache / "net.pth"
    file = WeightsFile(("net.pth", "authors.pth"), "somewhere", lambda: path if path.is_file() else None, download)
    return find_weights("mine", file, weights)


def test_the_search_ends_at_the_first_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, variable, cache = (tmp_path / name for name in ("setting", "variable", "cache"))
    for folder in (setting, variable, cache):
        folder.mkdir()
        (folder / "net.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(variable))
    assert search(cache, "random") is None
    assert search(cache, "~/setting") == setting / "net.pth"
    assert search(cache, None) == variable / "net.pth"
    (variable / "net.pth").rename(variable / "authors.pth")
    assert search(cache, None) == variable / "authors.pth"
    (variable / "authors.pth").unlink()
    assert search(cache, None) == cache / "net.pth"
    (cache / "net.pth").unlink()
    assert search(cache, None) == cache / "downloaded.pth"


def test_weights_that_are_nowhere_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = str(tmp_path / "absent")
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    for weights, parts in (
        (str(tmp_path), ("losses.mine.init_args.weights", "net.pth or authors.pth", "somewhere")),
        (absent, ("losses.mine.init_args.weights", absent)),
        (None, ("net.pth", "somewhere", "no route", "losses.mine.init_args.weights", "DC_SSDAE_WEIGHTS")),
    ):
        message = refusal(search, tmp_path, weights, online=weights is not None)
        assert all(part in message for part in parts)
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", absent)
    assert f"DC_SSDAE_WEIGHTS is {absent!r}" in refusal(search, tmp_path, None)


# --- libraries' caches and downloads ---


def test_a_hub_file_is_downloaded_into_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    source = (tmp_path / "net.pth").rename(tmp_path / f"net-{digest[:8]}.pth")
    file = hub_file(source.as_uri())
    assert file.cached() is None
    assert find_weights("mine", file, None) == file.cached()
    assert file.cached() == tmp_path / "home" / "hub" / "checkpoints" / source.name


def test_a_file_is_found_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    file = hugging_face_file("owner/net", ("net.safetensors",))
    assert file.cached() is None
    path = tmp_path / "models--owner--net" / "snapshots" / "0123" / "model.safetensors"
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
