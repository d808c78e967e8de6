"""A run's folder is absent or complete, has one writer, and says where it came from."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from killed import CRASHED, run_in_child

from dc_ssdae.card import note_evaluation
from dc_ssdae.errors import InputError
from dc_ssdae.training import run as run_module
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.run import (
    WEIGHTS_FILE,
    RunFolder,
    create_run,
    describe_environment,
    publish_model,
    recover_run,
    remove_run,
    run_lock,
)
from dc_ssdae.weights import read_safetensors


def contents(path: Path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(path)): file.read_text() for file in files}


OLD = {"config.yaml": "old: 1\n", "model/config.json": "[]"}
NEW = {"config.yaml": "new: 1\n", "model/config.json": "{}"}


def create(path: Path, files: dict[str, str]) -> None:
    create_run(path, *files.values())


def checkpoint(step: int, best: int | None = None) -> Checkpoint:
    tensors = {file: {"weight": torch.full((5,), float(step))} for file in ("model", "ema", "optimizer")}
    state = {"step": step, "seconds": float(step), "best": None if best is None else {"step": best}}
    return Checkpoint(tensors, state)


def published(run: RunFolder) -> float:
    """The step whose weights RUN/model holds, whole."""
    return float(read_safetensors(run.model / WEIGHTS_FILE)["weight"][0])


# --- making one ---


@pytest.mark.parametrize("fail", [False, True])
def test_killed_at_any_operation_it_is_absent_or_complete(tmp_path: Path, fail: bool) -> None:
    seen = []
    for point in range(100):
        path = tmp_path / str(point) / "run"
        path.parent.mkdir()
        code = run_in_child(lambda path=path: create(path, NEW), point, fail)
        assert code != CRASHED
        seen.append(contents(path))
        if fail:
            assert [entry.name for entry in path.parent.iterdir()] == ["run"] * path.exists(), "litter"
        if path.exists():
            remove_run(path)
        create(path, NEW)
        assert contents(path) == NEW
        assert [entry.name for entry in path.parent.iterdir()] == ["run"], "what the kill left is not removed"
        if code == 0 and point > 5:  # to make a folder that is there may fail
            break
    assert seen[0] == {}
    assert seen[-1] == NEW
    assert all(found in ({}, NEW) for found in seen)


def test_what_is_there_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run is removed only where nobody trains it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    create(tmp_path / "run", OLD)
    before = contents(tmp_path)
    told = {"folder": "exists already and is no run", "link": "is no run", "run": "is a run already: .* --resume"}
    for name, message in told.items():
        with pytest.raises(InputError, match=message):
            create(tmp_path / name, NEW)
    monkeypatch.setattr(run_module, "run_lock", MagicMock(side_effect=InputError("another process has it")))
    with pytest.raises(InputError, match="another process has it"):
        remove_run(tmp_path / "run")
    assert contents(tmp_path) == before
    assert {entry.name for entry in tmp_path.iterdir()} == told.keys()


# --- its lock ---


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    owner = f"is being trained by process {os.getpid()} on .*; stop that first"

    def lock() -> None:
        run_lock(tmp_path).__enter__()

    def be_refused() -> None:
        with pytest.raises(InputError, match=owner):
            lock()

    assert run_in_child(lock, 1000) == 0, "it ends with the lock in its hands"
    with run_lock(tmp_path):
        assert run_in_child(be_refused, 1000) == 0
    assert run_in_child(lock, 1000) == 0


# --- its model ---


def train_to(run: RunFolder, step: int) -> None:
    """Save a checkpoint, the best so far, and publish its model."""
    tensors, state = checkpoint(step, best=step)
    state = {**state, "provenance": {"steps": step, "data": "photos"}}
    publish_model(run, run.checkpoints.save(Checkpoint(tensors, state), is_best=True), state)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run after step 10, which is its best, and whose model somebody has evaluated."""
    run = RunFolder(tmp_path / "run")
    parts = {part: {"class_path": "Some"} for part in ("encoder", "decoder", "dynamics")}
    create_run(run.path, "", json.dumps({"latent_channels": 4, "downsample_factor": 8, **parts}))
    train_to(run, 10)
    note_evaluation(run.model, {"protocol": "dcae", "data": "x", "images": 9, "metrics": {"psnr": {"value": 25.125}}})
    return run


def test_where_no_links_can_be_made_the_model_is_a_copy(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run.model / WEIGHTS_FILE).samefile(run.checkpoints.path / "last" / "ema.safetensors"), "a second copy"
    folder = run.checkpoints.save(checkpoint(20))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", MagicMock(side_effect=PermissionError(1, "Operation not permitted")))
        publish_model(run, folder, {"step": 20})
    recover_run(run)
    assert published(run) == 20.0
    assert not (run.model / WEIGHTS_FILE).samefile(folder / "ema.safetensors"), "the same content is left alone"


def test_killed_anywhere_between_checkpoint_and_model_the_next_start_makes_up_for_it(run: RunFolder) -> None:
    def told(run: RunFolder) -> tuple[float | None, int, bool, bool, str]:
        steps = json.loads((run.model / "config.json").read_text())["provenance"]["steps"]
        card, best = (run.model / "README.md").read_text(), (run.checkpoints.path / "best").resolve().name
        return published(run), steps, f"Steps**: {steps}" in card, "25.125" in card, best

    old, new = (10.0, 10, True, True, "step-00000010"), (20.0, 20, True, False, "step-00000020")
    recover_run(run)
    assert told(run) == old, "figures of these weights stay"
    found = set()
    for point in range(200):
        copy = RunFolder(shutil.copytree(run.path, run.path.with_name(f"copy{point}"), symlinks=True))
        (copy.model / ".abc.partial").write_text("half")
        code = run_in_child(lambda copy=copy: train_to(copy, 20), point)
        assert code != CRASHED
        found.add(told(copy))
        recover_run(copy)
        assert told(copy) == (old if (copy.checkpoints.path / "last").resolve().name == "step-00000010" else new)
        assert sorted(entry.name for entry in copy.model.iterdir()) == ["README.md", "config.json", WEIGHTS_FILE]
        if code == 0:
            break
    assert found == {old, (*old[:4], new[4]), (20.0, *old[1:4], new[4]), (20.0, 20, False, True, new[4]), new}


# --- where it came from ---


def test_the_environment_names_the_commit_of_a_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commit = "git -c user.name=A -c user.email=a@b -c commit.gpgsign=false commit -m first"
    subprocess.run(f"git init && touch code.py && git add code.py && {commit}", shell=True, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    for changed in (False, True):
        found = json.loads(json.dumps(describe_environment(torch.device("cpu"), 1, "NO")))
        assert found["git_of_folder"] == head + "-dirty" * changed
        (tmp_path / "code.py").write_text("second")
    monkeypatch.setenv("PATH", "")
    assert describe_environment(torch.device("cpu"), 1, "NO")["git_of_folder"] is None
