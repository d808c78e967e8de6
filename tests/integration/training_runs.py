"""What the tests of whole runs share: data and configuration, starting runs as a user does, comparing them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import torch
import yaml
from tiny import last, metrics, run_config

from dc_ssdae.cli.main import main


def write_config(path: Path, root: Path, **training: object) -> Path:
    """Write the configuration of a run of the tiny model, of 40 steps, with evaluations and samples."""
    settings = {"steps": 40, "optimizer": "schedule_free_radam", "evaluate_every": 10, "sample_images": 2, **training}
    path.write_text(yaml.safe_dump(run_config(root, **settings).to_mapping()))
    return path


def environment() -> dict[str, str]:
    """One thread, so that results do not hang on how many cores there are; no GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def start(words: list[str], log: Path, processes: int = 1, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start `dc-ssdae train` in a process group of its own, in one process or several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "dc_ssdae", "train", *words]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True, cwd=cwd
        )


def train_apart(words: list[str], log: Path, processes: int = 1, cwd: Path | None = None) -> int:
    """Run `dc-ssdae train` to the end in processes of its own; gives the exit code."""
    process = start(words, log, processes, cwd)
    try:
        return process.wait(timeout=300)
    finally:
        kill(process)


def train(words: list[str], log: Path, cwd: Path | None = None, command: str = "train") -> int:
    """Run a command to the end in this process, which has imported everything already; gives the exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            log.open("a") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            contextlib.chdir(cwd or Path.cwd()),
            mock.patch.dict(os.environ, environment()),
        ):
            return main([command, *words])
    finally:
        torch.set_num_threads(threads)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a run and to all its processes, which the launcher puts into sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in [family, *family.children(recursive=True)]:
            member.kill()
    process.wait()


def assert_same_runs(run: Path, other: Path) -> None:
    """Bit-identical weights, average (buffers included) and optimiser state, and the same losses at each step."""
    one, two = last(run), last(other)
    for file, tensors in one.tensors.items():
        torch.testing.assert_close(two.tensors[file], dict(tensors), atol=0.0, rtol=0.0)
    assert any("running_mean" in name for name in one.tensors["ema"])
    assert {**one.state, "seconds": None} == {**two.state, "seconds": None}
    assert metrics(run) == metrics(other)
    for name in ("model/config.json", "model/README.md", "evaluations.jsonl"):
        assert (run / name).read_text() == (other / name).read_text()
