"""Checkpoints: killed, failed or damaged at any point, what was there before stays."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from killed import CRASHED, FAILED, KILLED, run_in_child
from tiny import differences

from dc_ssdae.errors import InputError
from dc_ssdae.training.checkpoint import (
    TENSOR_FILES,
    Checkpoint,
    CheckpointFolder,
    read_checkpoint,
    write_checkpoint,
)

FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}


def checkpoint(step: int, best: int | None = None) -> Checkpoint:
    tensors = {
        file: {"weight": torch.full((5,), step + 0.1 * place), "count": torch.tensor(step)}
        for place, file in enumerate(TENSOR_FILES)
    }
    state = {"step": step, "seconds": 0.1 + step, "best": None if best is None else {"step": best, "value": 1 / 3}}
    return Checkpoint(tensors, state)


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert {key: value for key, value in found.state.items() if key != "format"} == expected.state
    assert differences(found, expected) == set()


def names(folder: CheckpointFolder) -> set[str]:
    return {entry.name for entry in folder.path.iterdir()}


def steps_of(folder: CheckpointFolder) -> tuple[int | None, int | None]:
    """The steps of the last and of the best, both of which must be whole."""
    last, best = (path and read_checkpoint(path).state["step"] for path in (folder.last(), folder.best()))
    return last, best


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """A run's checkpoints after step 20, whose best is step 10."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(checkpoint(10, best=10), is_best=True)
    folder.save(checkpoint(20, best=10))
    return folder


# --- writing and reading ---


def test_what_is_written_is_read(tmp_path: Path) -> None:
    kinds = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(2).bfloat16(),
        "whole numbers": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
        "not finite": torch.tensor([float("inf"), -0.0]),
    }
    state = {"step": 3, "seconds": 1 / 3, "best": None, "groups": [{"lr": 5e-324, "k": 2**53 + 1, "foreach": None}]}
    expected = Checkpoint({"model": kinds, "ema": {}, "optimizer": {"a/step": torch.tensor(3.0)}}, state)
    write_checkpoint(tmp_path / "c", expected)
    assert_same(read_checkpoint(tmp_path / "c"), expected)
    assert {entry.name for entry in (tmp_path / "c").iterdir()} == FILES


def test_last_best_and_those_kept_for_good(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep_every=40)
    assert (folder.last(), folder.best()) == (None, None)
    folder.recover()
    assert not folder.path.exists()
    kept = []
    for step, is_best in ((10, False), (20, True), (30, False), (40, False), (50, True), (60, False)):
        assert folder.save(checkpoint(step), is_best) == folder.path / f"step-{step:08d}"
        kept.append(steps_of(folder))
        assert_same(read_checkpoint(folder.last()), checkpoint(step))
    assert kept == [(10, None), (20, 20), (30, 20), (40, 20), (50, 50), (60, 50)]
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "step-00000010-copy").mkdir()
    folder.clean()
    steps = {f"step-{step:08d}" for step in (40, 50, 60)}
    assert names(folder) == {"last", "best", *steps, "notes.txt", "step-00000010-copy"}
    folder.path.rename(tmp_path / "moved")
    assert steps_of(CheckpointFolder(tmp_path / "moved")) == (60, 50)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = CheckpointFolder(tmp_path).save(checkpoint(1))
    finally:
        os.umask(before)
    assert {entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {0o640}


def test_another_state_takes_the_place_of_the_one_of_a_step_that_is_saved(folder: CheckpointFolder) -> None:
    tensors = folder.path / "last" / "model.safetensors"
    before = tensors.stat().st_mtime_ns
    folder.save(checkpoint(20, best=20)._replace(tensors={}), is_best=True)
    assert_same(read_checkpoint(folder.last()), checkpoint(20, best=20))
    assert steps_of(folder) == (20, 20)
    assert tensors.stat().st_mtime_ns == before


# --- killed and failed ---


def all_points(folder: CheckpointFolder, fail: bool) -> Iterator[tuple[int, CheckpointFolder]]:
    """Copies of a folder in which the next checkpoint, the best, was stopped at each of its file operations."""
    new, in_a_row = checkpoint(30, best=30), 0
    for point in range(1000):
        copy = CheckpointFolder(shutil.copytree(folder.path, folder.path.with_name(f"copy{point}"), symlinks=True))
        code = run_in_child(lambda copy=copy: copy.save(new, is_best=True), point, fail)
        assert code != CRASHED
        yield code, copy
        # Failures while old folders are taken away are passed over; there are fewer of them in a row.
        in_a_row = in_a_row + 1 if code == 0 else 0
        if in_a_row > (15 if fail else 0):
            assert point > 20, "the operations were not counted"
            return


def test_killed_at_any_operation_the_last_is_the_old_or_the_new(folder: CheckpointFolder) -> None:
    ends = set()
    for code, copy in all_points(folder, fail=False):
        assert code in (0, KILLED)
        step, best = steps_of(copy)
        ends.add((step, best))
        expected = checkpoint(20, best=10) if step == 20 else checkpoint(30, best=30)
        assert_same(read_checkpoint(copy.last()), expected)
        # As the next start does.
        copy.recover()
        best = 30 if step == 30 else 10
        assert steps_of(copy) == (step, best)
        assert names(copy) == {"last", "best", f"step-{step:08d}", f"step-{best:08d}"}
        # And it goes on.
        if step == 20:
            copy.save(checkpoint(30, best=30), is_best=True)
        assert steps_of(copy) == (30, 30)
    assert ends == {(20, 10), (30, 10), (30, 30)}


def test_failing_at_any_operation_leaves_a_whole_last(folder: CheckpointFolder) -> None:
    codes = set()
    for code, copy in all_points(folder, fail=True):
        codes.add(code)
        step, _ = steps_of(copy)
        assert step in ((20, 30) if code == FAILED else (30,))
        copy.clean()
        assert not [name for name in names(copy) if name.endswith(".partial")]
        copy.save(checkpoint(40, best=10))
        assert steps_of(copy)[0] == 40
    assert codes == {0, FAILED}


# --- damaged ---


def test_a_last_that_is_damaged_or_was_taken_away_is_no_new_beginning(folder: CheckpointFolder) -> None:
    """One flipped bit is noticed, and how to take another checkpoint is said."""
    last = folder.of_step(20)
    tensors, state = last / "optimizer.safetensors", last / "state.json"
    content, advice = tensors.read_bytes(), f"is damaged.*ln -sfn step-NUMBER {folder.path}/last"
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    cases = [*((tensors, damaged, advice) for damaged in (flipped, b"", content[:-8])), (tensors, None, "")]
    cases += [(state, damaged, "") for damaged in (b'{"format": 1, "step": 20', b'{"format": 99, "step": 20}', None)]
    for file, damaged, told in cases:
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{file}.*{told}") as caught:
            read_checkpoint(folder.last())
        assert "\n" not in str(caught.value)
    shutil.rmtree(last)
    with pytest.raises(InputError, match="leads to step-00000020, which is not there"):
        folder.last()


def test_folders_in_the_place_of_links_become_links_again(folder: CheckpointFolder, tmp_path: Path) -> None:
    """As `cp -rL`, or a file system without links, leaves them."""
    copy = CheckpointFolder(shutil.copytree(folder.path, tmp_path / "copy", symlinks=False))
    copy.recover()
    assert steps_of(copy) == (20, 10)
    assert (copy.path / "last").is_symlink()
    copy.save(checkpoint(30))
    assert steps_of(copy) == (30, 10)
    assert names(copy) == {"last", "best", "step-00000010", "step-00000030"}


def test_what_the_disk_refuses_only_when_flushed_is_not_taken_for_written(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = steps_of(folder), names(folder)
    monkeypatch.setattr(os, "fsync", MagicMock(side_effect=OSError(errno.EDQUOT, "no more")))
    with pytest.raises(OSError, match="no more"):
        folder.save(checkpoint(40))
    assert (steps_of(folder), names(folder)) == before
