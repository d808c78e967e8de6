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
from killed import CRASHED, FAILED, KILLED, run_in_child
from tiny import run_config

from dc_ssdae.errors import InputError
from dc_ssdae.model_card import note_evaluation
from dc_ssdae.training import run as run_module
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.run import (
    WEIGHTS_FILE,
    RunFolder,
    RunLock,
    append_line,
    check_new,
    create_run,
    describe_environment,
    is_finished,
    publish_model,
    recover_run,
)
from dc_ssdae.weights import read_safetensors


def contents(path: Path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(path)): file.read_text() for file in files}


NEW = {"config.yaml": "new: 1\n", "model/config.json": "{}"}


def checkpoint(step: int, best: int | None = None) -> Checkpoint:
    tensors = {file: {"weight": torch.full((5,), float(step))} for file in ("model", "ema", "optimizer")}
    state = {"step": step, "seconds": float(step), "best": None if best is None else {"step": best}}
    return Checkpoint(tensors, state)


def published(run: RunFolder) -> float | None:
    """The step whose weights RUN/model holds, whole."""
    file = run.model / WEIGHTS_FILE
    return float(read_safetensors(file)["weight"][0]) if file.exists() else None


# --- making one ---


def test_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "run"
    create_run(path, "new: 1\n", "{}")
    assert contents(path) == NEW
    assert [entry.name for entry in path.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("fail", [False, True])
def test_killed_at_any_operation_it_is_absent_or_complete(tmp_path: Path, fail: bool) -> None:
    seen = set()
    for point in range(100):
        path = tmp_path / str(point) / "run"
        path.parent.mkdir()
        code = run_in_child(lambda path=path: create_run(path, "new: 1\n", "{}"), point, fail)
        assert code != CRASHED
        seen.add((code, path.exists()))
        assert not path.exists() or contents(path) == NEW
        if fail:
            assert [entry.name for entry in path.parent.iterdir()] in ([], ["run"]), "litter"
        if not path.exists():
            create_run(path, "new: 1\n", "{}")
            assert contents(path) == NEW
            assert [entry.name for entry in path.parent.iterdir()] == ["run"], "what the kill left is not removed"
        if code == 0 and point > 5:  # to make a folder that is there may fail
            break
    assert (0, True) in seen
    assert (FAILED if fail else KILLED, False) in seen


@pytest.mark.parametrize("fail", [False, True])
def test_replaced_at_any_operation_it_is_absent_or_complete(tmp_path: Path, fail: bool) -> None:
    old = {"config.yaml": "old: 1\n", "model/config.json": "[]"}
    seen = set()
    for point in range(100):
        path = tmp_path / str(point) / "run"
        create_run(path, "old: 1\n", "[]")
        code = run_in_child(lambda path=path: create_run(path, "new: 1\n", "{}", replace=True), point, fail)
        assert code != CRASHED
        found = contents(path) if path.exists() else None
        assert found in ((old, NEW) if fail else (None, old, NEW)), "a failure leaves the old one there"
        seen.add(None if found is None else found["config.yaml"])
        if code == 0 and point > 5:
            break
    assert found == NEW
    assert seen == {"old: 1\n", "new: 1\n"} | (set() if fail else {None})


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("there", ["run", "folder", "file", "dangling link"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, there: str, replace: bool) -> None:
    path = tmp_path / "there"
    if there == "run":
        create_run(path, "old: 1\n", "[]")
    elif there == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    elif there == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    if there == "run" and replace:
        create_run(path, "new: 1\n", "{}", replace)
        assert contents(path) == NEW
        assert [entry.name for entry in tmp_path.iterdir()] == ["there"]
        return
    message = r"is a run already: go on with it by --resume" if there == "run" else "exists already and is no run"
    for work in (lambda: create_run(path, "new: 1\n", "{}", replace), lambda: check_new(path)):
        with pytest.raises(InputError, match=message) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]
    if there == "run":
        assert (path / "config.yaml").read_text() == "old: 1\n"


def test_a_run_that_is_being_trained_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(lock: RunLock) -> None:
        raise InputError("another process has it")

    create_run(tmp_path / "run", "old: 1\n", "[]")
    monkeypatch.setattr(RunLock, "acquire", lose)
    with pytest.raises(InputError, match="another process has it"):
        create_run(tmp_path / "run", "new: 1\n", "{}", replace=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "old: 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_run_that_another_process_began_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(path: Path) -> None:
        path.mkdir()
        (path / "config.yaml").write_text("theirs: 1\n")

    monkeypatch.setattr(run_module, "check_new", lose)
    with pytest.raises(OSError, match="not empty"):
        create_run(tmp_path / "run", "new: 1\n", "{}")
    assert (tmp_path / "run" / "config.yaml").read_text() == "theirs: 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_what_is_another_runs_or_may_be_alive_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (tmp_path / f".{name}.{'0' * 32}.partial" for name in ("run", "run.old"))
    mine.mkdir()
    other.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(RunLock, "acquire", lambda lock: None)  # as on a file system without locks
        create_run(tmp_path / "run", "new: 1\n", "{}")
    assert mine.is_dir()
    create_run(tmp_path / "run", "new: 1\n", "{}", replace=True)
    assert not mine.exists()
    assert other.is_dir()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        create_run(tmp_path / "run", "new: 1\n", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "run" / "config.yaml").stat().st_mode & 0o777 == 0o640


# --- its lock ---


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of tmp_path, and what it inherits to its children."""
    program = (
        "import sys, subprocess\n"
        "from pathlib import Path\n"
        "from dc_ssdae.training.run import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]))\n"
        "lock.acquire()\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
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
    lock = RunLock(tmp_path)
    with pytest.raises(InputError, match=rf"is being trained by process {owner.pid} on .*; stop that first") as caught:
        lock.acquire()
    assert "\n" not in str(caught.value)
    lock.release()  # nothing to give back
    owner.kill()
    owner.wait()
    lock.acquire()
    code = run_in_child(RunLock(tmp_path).acquire, 1000)
    assert code == CRASHED, "a child took the lock too"
    lock.release()
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert run_in_child(RunLock(tmp_path).acquire, 1000) == 0


# --- its model ---


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run after step 10, which is its best."""
    path = tmp_path / "run"
    create_run(path, "", "{}")
    run = RunFolder(path)
    folder = run.checkpoints.save(checkpoint(10, best=10), is_best=True)
    publish_model(run, folder / "ema.safetensors")
    return run


def copies(run: RunFolder, fail: bool, last_point: int = 200) -> Iterator[tuple[int, RunFolder]]:
    """Copies of a run whose next checkpoint and model were stopped at each of their operations."""
    for point in range(last_point):
        path = run.path.with_name(f"copy{point}")
        shutil.copytree(run.path, path, symlinks=True)
        copy = RunFolder(path)

        def work(copy: RunFolder = copy) -> None:
            folder = copy.checkpoints.save(checkpoint(20, best=20), is_best=True)
            publish_model(copy, folder / "ema.safetensors")

        code = run_in_child(work, point, fail)
        assert code != CRASHED
        yield code, copy
        if code == 0 and not fail:
            return


def test_the_model_is_the_checkpoints_average(run: RunFolder) -> None:
    assert published(run) == 10.0
    assert (run.model / WEIGHTS_FILE).samefile(run.checkpoints.last() / "ema.safetensors"), "a second copy"
    folder = run.checkpoints.save(checkpoint(20))
    publish_model(run, folder / "ema.safetensors")
    publish_model(run, folder / "ema.safetensors")
    assert published(run) == 20.0
    assert sorted(entry.name for entry in run.model.iterdir()) == ["config.json", WEIGHTS_FILE]


def test_where_no_links_can_be_made_it_is_a_copy(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.checkpoints.save(checkpoint(20))

    def link(*rest: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    publish_model(run, folder / "ema.safetensors")
    assert published(run) == 20.0
    assert not (run.model / WEIGHTS_FILE).samefile(folder / "ema.safetensors")
    assert sorted(entry.name for entry in run.model.iterdir()) == ["config.json", WEIGHTS_FILE]
    recover_run(run)
    assert not (run.model / WEIGHTS_FILE).samefile(folder / "ema.safetensors"), "the same content is left alone"


def test_killed_anywhere_between_checkpoint_and_model_the_next_start_makes_up_for_it(run: RunFolder) -> None:
    found = set()
    for _, copy in copies(run, fail=False):
        before = (published(copy), copy.checkpoints.best().name)
        assert before[0] in (10.0, 20.0), "the model is whole at any instant"
        recover_run(copy)
        last = copy.checkpoints.last()
        step = 10.0 if last.name == "step-00000010" else 20.0
        assert published(copy) == step
        assert copy.checkpoints.best() == last
        assert sorted(entry.name for entry in copy.model.iterdir()) == ["config.json", WEIGHTS_FILE]
        found.add((step, *before))
    assert {
        (10.0, 10.0, "step-00000010"),
        (20.0, 10.0, "step-00000010"),
        (20.0, 10.0, "step-00000020"),
        (20.0, 20.0, "step-00000020"),
    } <= found


def test_killed_anywhere_config_and_card_say_what_the_weights_are(tmp_path: Path) -> None:
    base = RunFolder(tmp_path / "run")
    parts = {part: {"class_path": "Some"} for part in ("encoder", "decoder", "dynamics")}
    create_run(base.path, "", json.dumps({"latent_channels": 4, "downsample_factor": 8, **parts}))

    def train_to(run: RunFolder, step: int) -> None:
        saved = checkpoint(step)
        provenance = {"steps": step, "data": "photos"}
        saved.state["provenance"] = provenance  # type: ignore[index]
        folder = run.checkpoints.save(saved)
        publish_model(run, folder / "ema.safetensors", provenance=provenance)

    def told(run: RunFolder) -> tuple[float | None, int, bool, bool]:
        steps = json.loads((run.model / "config.json").read_text())["provenance"]["steps"]
        card = (run.model / "README.md").read_text()
        return published(run), steps, f"{steps} steps" in card, "25.125" in card

    train_to(base, 10)
    note_evaluation(base.model, {"protocol": "dcae", "data": "x", "images": 9, "metrics": {"psnr": {"value": 25.125}}})
    recover_run(base)
    assert told(base) == (10.0, 10, True, True), "figures of these weights stay"
    found = set()
    for point in range(200):
        copy = RunFolder(tmp_path / f"copy{point}")
        shutil.copytree(base.path, copy.path, symlinks=True)
        code = run_in_child(lambda copy=copy: train_to(copy, 20), point)
        assert code != CRASHED
        found.add(told(copy))
        recover_run(copy)
        last = copy.checkpoints.last()
        assert last is not None
        expected = (10.0, 10, True, True) if last.name == "step-00000010" else (20.0, 20, True, False)
        assert told(copy) == expected
        assert sorted(entry.name for entry in copy.model.iterdir()) == ["README.md", "config.json", WEIGHTS_FILE]
        if code == 0:
            break
    assert {(10.0, 10, True, True), (20.0, 10, True, True), (20.0, 20, False, True), (20.0, 20, True, False)} == found


def test_failing_anywhere_the_model_stays_whole(run: RunFolder) -> None:
    for code, copy in copies(run, fail=True, last_point=70):
        assert published(copy) in ((10.0, 20.0) if code == FAILED else (20.0,))
        assert not list(copy.model.glob("*.partial")), "litter"


def test_a_run_without_checkpoints_has_nothing_to_recover(tmp_path: Path) -> None:
    create_run(tmp_path / "run", "new: 1\n", "{}")
    (tmp_path / "run" / "model" / ".abc.partial").write_text("half")
    recover_run(RunFolder(tmp_path / "run"))
    assert contents(tmp_path / "run") == NEW


@pytest.mark.parametrize(
    ("budget", "finished"),
    [
        ({"steps": 10}, True),
        ({"steps": 11}, False),
        ({"steps": None, "minutes": 10 / 60}, True),
        ({"steps": None, "minutes": 1.0}, False),
        ({"steps": 11, "minutes": 0.1}, True),
    ],
)
def test_whether_the_budget_is_spent(run: RunFolder, budget: dict[str, float], finished: bool) -> None:
    assert is_finished(run, run_config(**budget).training) == finished


def test_a_run_that_has_not_begun_is_not_finished(tmp_path: Path) -> None:
    assert not is_finished(RunFolder(tmp_path), run_config(steps=1).training)


# --- where it came from ---


def test_the_environment_is_json(tmp_path: Path) -> None:
    path = tmp_path / "environment.jsonl"
    for device in ("cpu", "another"):
        append_line(path, describe_environment({"device": device, "cuda": None}))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["device"], second["device"]) == ("cpu", "another")
    assert first["command"] == sys.orig_argv
    assert torch.__version__.startswith(first["versions"]["torch"])
    assert {"time", "folder", "host", "platform", "python", "git", "device", "cuda"} <= first.keys()


def test_the_commit_of_a_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def found() -> object:
        return describe_environment({})["git_of_folder"]

    monkeypatch.chdir(tmp_path)
    assert found() is None
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    git("tag", "v1")
    assert found() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "not added").write_text("2")
    assert found() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "code.py").write_text("2")
    assert found() == {"commit": git("rev-parse", "HEAD"), "changed": True}
    monkeypatch.setenv("PATH", "")
    assert found() is None
