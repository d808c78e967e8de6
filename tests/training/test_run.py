"""A run's folder is absent or complete, has one writer, and says where it came from."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed import CRASHED, run_in_child
from tiny import run_config

from dc_ssdae.card import note_evaluation
from dc_ssdae.errors import InputError
from dc_ssdae.training import run as run_module
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.run import (
    WEIGHTS_FILE,
    RunFolder,
    create_run,
    describe_environment,
    is_finished,
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


def published(run: RunFolder) -> float | None:
    """The step whose weights RUN/model holds, whole."""
    file = run.model / WEIGHTS_FILE
    return float(read_safetensors(file)["weight"][0]) if file.exists() else None


# --- making one ---


@pytest.mark.parametrize("fail", [False, True])
def test_killed_at_any_operation_it_is_absent_or_complete(tmp_path: Path, fail: bool) -> None:
    seen = []
    for point in range(100):
        path = tmp_path / str(point) / "run"
        path.parent.mkdir()
        code = run_in_child(lambda path=path: create(path, NEW), point, fail)
        assert code != CRASHED
        seen.append(contents(path) if path.exists() else None)
        if fail:
            assert [entry.name for entry in path.parent.iterdir()] == ["run"] * path.exists(), "litter"
        if path.exists():
            remove_run(path)
        create(path, NEW)
        assert contents(path) == NEW
        assert [entry.name for entry in path.parent.iterdir()] == ["run"], "what the kill left is not removed"
        if code == 0 and point > 5:  # to make a folder that is there may fail
            break
    assert seen[-1] == NEW
    assert all(found in (None, NEW) for found in seen)
    assert None in seen


def test_what_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link"):
        with pytest.raises(InputError, match="exists already and is no run"):
            create(tmp_path / name, NEW)
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "link"}
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


def test_a_run_is_removed_only_where_nobody_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(folder: Path) -> None:
        raise InputError("another process has it")

    path = tmp_path / "run"
    create(path, OLD)
    with pytest.raises(InputError, match=f"is a run already: go on with it by --resume {path}"):
        create(path, NEW)
    monkeypatch.setattr(run_module, "run_lock", lose)
    with pytest.raises(InputError, match="another process has it"):
        remove_run(path)
    assert contents(path) == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


# --- its lock ---


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of tmp_path, and what it inherits to its children."""
    program = (
        "import sys, subprocess\n"
        "from pathlib import Path\n"
        "from dc_ssdae.training.run import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, owner: "subprocess.Popen[str]") -> None:
    refusal = rf"is being trained by process {owner.pid} on .*; stop that first"
    with pytest.raises(InputError, match=refusal) as caught, run_lock(tmp_path):
        pass
    assert "\n" not in str(caught.value)
    owner.kill()
    owner.wait()
    with run_lock(tmp_path):
        code = run_in_child(lambda: run_lock(tmp_path).__enter__(), 1000)
        assert code == CRASHED, "a child took the lock too"
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert run_in_child(lambda: run_lock(tmp_path).__enter__(), 1000) == 0


# --- its model ---


def train_to(run: RunFolder, step: int) -> None:
    """Save a checkpoint, the best so far, and publish its model."""
    provenance = {"steps": step, "data": "photos"}
    saved = checkpoint(step, best=step)
    saved.state["provenance"] = provenance  # type: ignore[index]
    folder = run.checkpoints.save(saved, is_best=True)
    publish_model(run, folder / "ema.safetensors", provenance=provenance)


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
    last = run.checkpoints.last()
    assert last is not None
    assert (run.model / WEIGHTS_FILE).samefile(last / "ema.safetensors"), "a second copy"

    def link(*rest: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    folder = run.checkpoints.save(checkpoint(20))
    monkeypatch.setattr(os, "link", link)
    publish_model(run, folder / "ema.safetensors")
    monkeypatch.undo()
    recover_run(run)
    assert published(run) == 20.0
    assert not (run.model / WEIGHTS_FILE).samefile(folder / "ema.safetensors"), "the same content is left alone"


def test_killed_anywhere_between_checkpoint_and_model_the_next_start_makes_up_for_it(run: RunFolder) -> None:
    def told(run: RunFolder) -> tuple[float | None, int, bool, bool, str]:
        steps = json.loads((run.model / "config.json").read_text())["provenance"]["steps"]
        card, best = (run.model / "README.md").read_text(), run.checkpoints.best()
        assert best is not None
        return published(run), steps, f"**Steps**: {steps}\n" in card, "25.125" in card, best.name

    old, new = (10.0, 10, True, True, "step-00000010"), (20.0, 20, True, False, "step-00000020")
    recover_run(run)
    assert told(run) == old, "figures of these weights stay"
    found = set()
    for point in range(200):
        copy = RunFolder(run.path.with_name(f"copy{point}"))
        shutil.copytree(run.path, copy.path, symlinks=True)
        (copy.model / ".abc.partial").write_text("half")
        code = run_in_child(lambda copy=copy: train_to(copy, 20), point)
        assert code != CRASHED
        found.add(told(copy))
        recover_run(copy)
        last = copy.checkpoints.last()
        assert last is not None
        assert told(copy) == (old if last.name == "step-00000010" else new)
        assert sorted(entry.name for entry in copy.model.iterdir()) == ["README.md", "config.json", WEIGHTS_FILE]
        if code == 0:
            break
    assert found == {old, (*old[:4], new[4]), (20.0, *old[1:4], new[4]), (20.0, 20, False, True, new[4]), new}


def test_whether_the_budget_is_spent(run: RunFolder) -> None:
    for budget, finished in (({"steps": 10}, True), ({"steps": 11}, False), ({"steps": 11, "minutes": 0.1}, True)):
        assert is_finished(run, run_config(**budget).training) == finished


# --- where it came from ---


def test_the_environment_names_the_commit_of_a_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init")
    (tmp_path / "code.py").write_text("first")
    git("add", "code.py")
    git("commit", "-m", "first")
    for changed in (False, True):
        found = describe_environment(torch.device("cpu"), 1, "NO")
        assert json.loads(json.dumps(found)) == found
        assert found["git_of_folder"] == {"commit": git("rev-parse", "HEAD"), "changed": changed}
        (tmp_path / "code.py").write_text("second")
    monkeypatch.setenv("PATH", "")
    assert describe_environment(torch.device("cpu"), 1, "NO")["git_of_folder"] is None
