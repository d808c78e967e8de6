"""What a run writes down survives kills and full disks, line by line."""

import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import fill, run_config

from dc_ssdae.training.logging import JsonLines, Loggers, read_lines
from dc_ssdae.training.run import RunFolder

DISK_KIB = 256
"""Of the file system that `small_disk` gives."""


def entry(step: int, **more: Any) -> dict[str, Any]:
    figures = dict.fromkeys(("gradient_norm", "lr", "images_per_second", "memory_gib"), 1.0)
    return {"step": step, "loss/total": 0.5, "seconds": 1.5 * (step + 1), **figures, **more}


# --- lines ---


@pytest.mark.parametrize(("step", "left"), [(2, [0, 1]), (math.inf, [0, 1, 2, 3, 4])])
@pytest.mark.parametrize("end", ["", '{"step": 3, "x', "\x00\x00\x00"])
def test_cutting_back_and_what_a_kill_in_a_line_leaves(tmp_path: Path, step: float, left: list[int], end: str) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl", pytest.fail)
    lines.cut(step)
    assert not lines.path.exists()
    for index in range(5):
        lines.write({"step": index})
    before = lines.path.stat().st_ino
    with lines.path.open("a") as file:
        file.write(end)
    assert [line["step"] for line in read_lines(lines.path)] == [0, 1, 2, 3, 4]
    lines.cut(step)
    assert (lines.path.stat().st_ino == before) == (len(left) == 5 and not end), "what stays is not written again"
    lines.write({"step": 99})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [*left, 99]
    assert [path.name for path in lines.path.parent.iterdir()] == ["lines.jsonl"]


# --- loggers ---


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def scalars(run: RunFolder) -> dict[str, list[int]]:
    """Steps by name, of everything that TensorBoard shows."""
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_once(run: RunFolder) -> None:
    for first_step in (0, 2):
        loggers = Loggers(run, run_config(), True, first_step)
        for step in range(first_step + 1, first_step + 5):
            loggers.step(entry(step, **{"loss/mine": math.nan if step == 1 else 2.0}))
        loggers.evaluation({"step": first_step + 4, "psnr": 21.5, "images": 4})
        loggers.pictures(*torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), first_step + 4)
        loggers.close()
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6], "cut back to where it starts"
    found = scalars(run)
    assert found["loss/total"] == [1, 2, 3, 4, 5, 6]
    assert found["loss/mine"] == [2, 3, 4, 5, 6]
    assert found["evaluation/psnr"] == [6]
    names = {"gradient_norm", "lr", "images_per_second", "seconds", "memory_gib"}
    assert {f"train/{name}" for name in names} <= set(found)
    assert (run.path / "samples" / "step-00000004.png").is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_a_run(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(small_disk / "run")
    run.path.mkdir()
    loggers = Loggers(run, run_config(), True, 0)
    loggers.step(entry(0))
    fill(small_disk)
    for step in range(1, 200):
        loggers.step(entry(step))
    loggers.pictures(*torch.randint(0, 256, (2, 4, 3, 64, 64), dtype=torch.uint8), 199)
    (small_disk / "filler").unlink()
    loggers.close()
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(200))
    said = capsys.readouterr().err
    assert "metrics.jsonl cannot be written" in said
    assert "samples" in said
    assert said.count("tensorboard cannot be written") == 1


def test_a_run_of_weights_and_biases_goes_on_under_its_id(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 4):
        loggers = Loggers(run, run_config(wandb=True), True, first_step)
        loggers.step(entry(first_step + 1, **{"loss/mine": math.nan}))
        loggers.close()
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first == second
    assert first["id"].startswith("run-")
    assert (first["dir"], first["resume"]) == (str(run.path), "allow")
    logged = wandb.init.return_value.log.call_args_list
    assert [call.kwargs["step"] for call in logged] == [1, 5]
    assert "loss/total" in logged[0].args[0]
    assert "loss/mine" not in logged[0].args[0]
    assert wandb.init.return_value.finish.call_count == 2
