"""`dc-ssdae convert original`: a checkpoint under the original's names becomes a model of this package."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dc_ssdae import DCSSDAE
from dc_ssdae.interop.original import original_model_names


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: whole checkpoints are hundreds of megabytes."""
    yield tmp_path
    for entry in tmp_path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def under_original_names(model: DCSSDAE) -> dict[str, torch.Tensor]:
    names = original_model_names(model)
    return {names[ours]: tensor for ours, tensor in model.state_dict().items()}


def test_checkpoint_of_the_reports_baseline(run: Callable, scratch: Path) -> None:
    model = DCSSDAE.from_preset("vq_f8c4_fm", decoder={"window_radius": 7}).half()
    save_file(under_original_names(model), scratch / "original.safetensors")
    words = ("convert", "original", scratch / "original.safetensors", "--preset", "vq_f8c4_fm")
    outcome = run(*words, "--out", scratch / "converted")
    assert outcome.code == 0
    assert not outcome.err
    assert outcome.out == [
        "decoder window_radius: 7, as the checkpoint shows (preset: 8)",
        f"{scratch}/original.safetensors: {34163664 + 14091979:,} parameters -> {scratch}/converted",
    ]
    converted = DCSSDAE.from_pretrained(scratch / "converted")
    assert converted.config.decoder["init_args"]["window_radius"] == 7
    assert converted.dtype == torch.float32
    state = converted.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the demo preset's architecture under the original's names."""
    path = tmp_path / "original.safetensors"
    save_file(under_original_names(DCSSDAE.from_preset("demo")), path)
    return path


def test_nothing_overridden_says_nothing_of_it(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    outcome = run("convert", "original", checkpoint, "--preset", "demo", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert len(outcome.out) == 1
    assert run("info", tmp_path / "out").code == 0


def test_folder_with_something_in_it_is_refused(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    for out in (tmp_path, checkpoint):
        before = sorted(path.name for path in tmp_path.iterdir())
        outcome = run("convert", "original", checkpoint, "--preset", "demo", "--out", out)
        line = f"dc-ssdae convert: --out {out} exists and is not an empty folder; name a new one"
        assert outcome == (2, [], [line])
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_does_not_fit_is_one_line_and_writes_nothing(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    def message(path: Path, preset: str) -> str:
        outcome = run("convert", "original", path, "--preset", preset, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert not outcome.out
        assert not (tmp_path / "out").exists()
        (line,) = outcome.err
        return line

    assert "unknown preset 'dmo' (did you mean 'demo'?)" in message(checkpoint, "dmo")
    assert "no such file" in message(tmp_path / "absent.safetensors", "demo")
    assert "pickle" in message(tmp_path / "x.ckpt", "demo")
    assert "encoder.conv_in.weight" in message(checkpoint, "vq_f8c4_fm")
    names = under_original_names(DCSSDAE.from_preset("demo"))
    moved = names.pop("encoder.project_in.conv.conv.bias")
    save_file({**names, "encoder.project_inn.conv.conv.bias": moved}, checkpoint)
    line = message(checkpoint, "demo")
    assert "missing: encoder.project_in.conv.conv.bias" in line
    assert "left over: encoder.project_inn.conv.conv.bias" in line
