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


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def lines(tmp_path: Path, warnings: list[str]) -> JsonLines:
    return JsonLines(tmp_path / "lines.jsonl", warnings.append)


def entry(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss/total": 0.5,
        "gradient_norm": 1.0,
        "lr": 1e-3,
        "images_per_second": 10.0,
        "seconds": 1.5 * (step + 1),
        "memory_gib": 0.1,
        **more,
    }


# --- lines ---


@pytest.mark.parametrize(("step", "left"), [(2, [0, 1]), (math.inf, [0, 1, 2, 3, 4])])
def test_cutting_back(lines: JsonLines, step: float, left: list[int]) -> None:
    lines.cut(step)
    assert not lines.path.exists()
    for index in range(5):
        lines.write({"step": index})
    before = lines.path.stat().st_ino
    lines.cut(step)
    assert (lines.path.stat().st_ino == before) == (len(left) == 5), "what is to stay is not written again"
    lines.write({"step": 99})
    assert [line["step"] for line in read_lines(lines.path)] == [*left, 99]
    assert [path.name for path in lines.path.parent.iterdir()] == ["lines.jsonl"]


@pytest.mark.parametrize("end", ['{"step": 3, "x', "\x00\x00\x00"])
def test_a_kill_in_the_middle_of_a_line(lines: JsonLines, end: str) -> None:
    for index in range(3):
        lines.write({"step": index})
    with lines.path.open("a") as file:
        file.write(end)
    assert [line["step"] for line in read_lines(lines.path) if line.get("step") in (0, 1, 2)] == [0, 1, 2]
    lines.cut(math.inf)
    lines.write({"step": 3})
    assert [json.loads(line) for line in lines.path.read_text().splitlines()] == [{"step": n} for n in range(4)]


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
    picture = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    for step in range(1, 200):
        loggers.step(entry(step))
        if step % 50 == 0:
            loggers.evaluation({"step": step, "psnr": 20.0, "images": 1})
            loggers.pictures(picture, picture, step)
    (small_disk / "filler").unlink()
    loggers.close()
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(200))
    assert [line["step"] for line in read_lines(run.path / "evaluations.jsonl")] == [50, 100, 150]
    said = capsys.readouterr().err
    assert "metrics.jsonl cannot be written" in said
    assert "samples" in said
    assert said.count("tensorboard cannot be written") == 1


def test_a_run_of_weights_and_biases_goes_on_under_its_id(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(wandb=True)
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 4):
        loggers = Loggers(run, config, True, first_step)
        loggers.step(entry(first_step + 1, **{"loss/mine": math.nan}))
        loggers.evaluation({"step": first_step + 1, "psnr": 21.5, "images": 4})
        loggers.close()
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first == second
    assert first["id"].startswith("run-")
    assert (first["dir"], first["resume"]) == (str(run.path), "allow")
    logged = wandb.init.return_value.log.call_args_list
    (scalars_, evaluation), steps = logged[:2], logged[::2]
    assert scalars_.args[0]["loss/total"] == 0.5
    assert "loss/mine" not in scalars_.args[0]
    assert evaluation.args == ({"evaluation/psnr": 21.5},)
    assert [call.kwargs["step"] for call in steps] == [1, 5]
    assert wandb.init.return_value.finish.call_count == 2
