"""Models from the hub, out of a cache that is made by hand: as strict as from a folder, and nothing is fetched."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import refusal

from dc_ssdae import DCSSDAE

COMMIT = "a" * 40
STEM = "diffusion_pytorch_model"


@pytest.fixture
def snapshot(saved_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of me/model in a cache, with the saved model in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--me--model"
    folder = repository / "snapshots" / COMMIT
    shutil.copytree(saved_folder, folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def load(snapshot: Path, **given: Any) -> DCSSDAE:
    return DCSSDAE.from_pretrained("me/model", cache_dir=snapshot.parents[2], **given)


def test_it_is_the_model_that_was_saved(snapshot: Path, saved_folder: Path) -> None:
    loaded = load(snapshot)
    assert not loaded.training
    expected = DCSSDAE.from_pretrained(saved_folder).state_dict()
    torch.testing.assert_close(loaded.state_dict(), expected, atol=0.0, rtol=0.0)
    assert loaded.config["_name_or_path"] == "me/model"


def test_a_subfolder_a_variant_and_a_dtype(snapshot: Path) -> None:
    model = load(snapshot)
    shutil.rmtree(snapshot)
    model.save_pretrained(snapshot / "vae", variant="fp16", max_shard_size="20KB")
    loaded = load(snapshot, subfolder="vae", variant="fp16", torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.encoder.conv_in.weight.equal(model.encoder.conv_in.weight.bfloat16())


def test_what_is_damaged_or_names_a_pickle_is_refused_in_one_line(snapshot: Path) -> None:
    os.truncate(snapshot / f"{STEM}.safetensors", 50_000)
    assert ".safetensors is truncated" in refusal(load, snapshot)
    index = {"metadata": {"total_size": 1}, "weight_map": {"encoder.conv_in.bias": "w.bin"}}
    (snapshot / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    assert "w.bin" in refusal(load, snapshot)


def test_what_is_not_there_is_an_error_of_the_system(snapshot: Path) -> None:
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        DCSSDAE.from_pretrained("me/other", cache_dir=snapshot.parents[2])


def test_only_a_models_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, saved_folder: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **given: Any) -> str:
        asked.update(given, name=name)
        return str(saved_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    DCSSDAE.from_pretrained("me/model", revision="v1", token="secret", local_files_only=True)
    patterns = asked.pop("allow_patterns")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)
    given = {name: value for name, value in asked.items() if value is not None}
    assert given == {"name": "me/model", "revision": "v1", "token": "secret", "local_files_only": True}
