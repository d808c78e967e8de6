"""Runs that are killed at random instants end as if nothing had happened."""

import random
import time
from functools import partial
from pathlib import Path

import pytest
from tiny import make_images, metrics
from training_runs import assert_same_runs, kill, start, train, train_apart, write_config

from dc_ssdae import DCSSDAE
from dc_ssdae.training.checkpoint import read_checkpoint

STEPS = 40


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process, condition) -> bool:
    """Wait until a condition holds; False if the run ended before."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.0005)
    return False


TWENTY = [pytest.param(20, processes, marks=pytest.mark.slow) for processes in (1, 2)]


@pytest.mark.parametrize(("kills", "processes"), [(2, 1), *TWENTY])
def test_a_run_that_is_killed_ends_bit_identical(tmp_path: Path, kills: int, processes: int) -> None:
    """Every third time within a checkpoint's write."""
    make_images(tmp_path / "train", 30)
    make_images(tmp_path / "validation", 5, seed=1)
    whole, run, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    words = ["--config", str(write_config(tmp_path / "config.yaml", tmp_path, steps=STEPS)), "--training.output"]
    to_the_end = train if processes == 1 else partial(train_apart, processes=processes)
    assert to_the_end([*words, str(whole)], log) == 0, log.read_text()

    generator, within_writes = random.Random(kills), 0
    # At most so far that the run cannot end before the kill.
    targets = sorted(generator.sample(range(1, STEPS - 3), kills))
    for number, target in enumerate(targets):
        process = start(["--resume", str(run)] if run.exists() else [*words, str(run)], log, processes)
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
            assert read_checkpoint(run / "checkpoints/last").state["step"] >= target - 3
            DCSSDAE.from_pretrained(run / "model")
    assert to_the_end(["--resume", str(run)], log) == 0, log.read_text()
    assert within_writes >= kills // 10
    assert len(metrics(whole)) == STEPS
    assert_same_runs(run, whole)
