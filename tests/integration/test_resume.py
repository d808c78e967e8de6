"""Runs that are killed at random instants end as if nothing had happened."""

import random
import time
from pathlib import Path

import pytest
from tiny import make_images, metrics
from training_runs import assert_same_runs, count_lines, kill, start, train, write_config

from dc_ssdae import DCSSDAE
from dc_ssdae.training.checkpoint import read_checkpoint

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", 30)
    make_images(root / "validation", 5, seed=1)
    return root


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def wait_for(process, condition) -> bool:
    """Wait until a condition holds; False if the run ended before."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.0005)
    return False


def kill_and_resume(folder: Path, data: Path, kills: int, processes: int, seed: int) -> tuple[Path, int]:
    """Kill a run again and again, every third time within a checkpoint's write; gives it, and those kills."""
    generator = random.Random(seed)
    run, log = folder / "killed", folder / "log"
    config = write_config(folder / "config.yaml", data, steps=STEPS)
    words = ["--config", str(config), "--training.output", str(run)]
    within_writes = 0
    # At most so far that the run cannot end before the kill.
    targets = sorted(generator.sample(range(1, STEPS - 3), kills))
    for number, target in enumerate(targets):
        process = start(["--resume", str(run)] if run.exists() else words, log, processes)
        try:
            reached = wait_for(process, lambda target=target: count_lines(run / "metrics.jsonl") >= target)
            if number % 3 == 0:
                reached = wait_for(process, lambda: is_writing(run))
            else:
                time.sleep(generator.uniform(0.0, 0.05))
        finally:
            kill(process)
        assert reached, log.read_text()
        within_writes += is_writing(run)
        if (run / "checkpoints/last").exists():
            checkpoint = read_checkpoint(run / "checkpoints/last")
            assert checkpoint.state["step"] >= target - 3
            DCSSDAE.from_pretrained(run / "model")
    assert train(["--resume", str(run)], log, processes) == 0, log.read_text()
    return run, within_writes


def check(tmp_path: Path, data: Path, kills: int, processes: int, seed: int) -> None:
    config = write_config(tmp_path / "config.yaml", data, steps=STEPS)
    whole = tmp_path / "whole"
    words = ["--config", str(config), "--training.output", str(whole)]
    assert train(words, tmp_path / "log", processes) == 0, (tmp_path / "log").read_text()
    run, within_writes = kill_and_resume(tmp_path, data, kills, processes, seed)
    print(f"{kills} kills, {within_writes} of them within a checkpoint's write")
    assert within_writes >= kills // 10
    assert len(metrics(whole)) == STEPS
    assert_same_runs(run, whole)


def test_a_run_killed_three_times_ends_bit_identical(tmp_path, data):
    check(tmp_path, data, kills=3, processes=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_twenty_times_ends_bit_identical(tmp_path, data, processes):
    check(tmp_path, data, kills=20, processes=processes, seed=2)
