"""What the tests of whole runs share: data and configuration, starting runs as a user does, comparing them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import torch
import yaml
from safetensors.torch import load_file
from tiny import MODEL, metrics

from dc_ssdae.cli.main import main


def write_config(path: Path, root: Path, **training: object) -> Path:
    """Write a configuration of the demo's model, smaller still."""
    config = {
        "model": MODEL,
        "data": {"root": str(root), "image_size": 32, "workers": 0, "validation_images": 5},
        "training": {
            "steps": 40,
            "batch_size": 4,
            "lr": 1.0e-3,
            "precision": "float32",
            "ema_decay": 0.9,
            "ema_start": 3,
            "checkpoint_every": 2,
            "evaluate_every": 10,
            "sample_images": 2,
            **training,
        },
        "losses": {"lpips": 0.0, "repa": 0.0},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def command(words: list[str], processes: int = 1) -> list[str]:
    """The command line of `dc-ssdae train`, in one process or several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "dc_ssdae", "train", *words]


def environment() -> dict[str, str]:
    """One thread, so that results do not hang on how many cores there are; no GPU."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)])),
    }


def start(words: list[str], log: Path, processes: int = 1, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command(words, processes),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            cwd=cwd,
        )


def train(words: list[str], log: Path, processes: int = 1, cwd: Path | None = None, apart: bool = False) -> int:
    """Run to the end; gives the exit code.

    One process is this one, which has imported everything already, unless it is to run apart from it.
    """
    if processes == 1 and not apart:
        return train_here(words, log, cwd or Path.cwd())
    process = start(words, log, processes, cwd)
    try:
        return process.wait(timeout=300)
    finally:
        kill(process)


def train_here(words: list[str], log: Path, cwd: Path) -> int:
    """As `train`, in this process, with what `environment` sets there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            log.open("a") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            contextlib.chdir(cwd),
            mock.patch.dict(os.environ, environment()),
            mock.patch.object(sys, "path", [*sys.path, str(Path(__file__).parent)]),
        ):
            return main(["train", *words])
    finally:
        torch.set_num_threads(threads)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a run and to all its processes, which the launcher puts into sessions of their own."""
    try:
        family = psutil.Process(process.pid)
        for member in [family, *family.children(recursive=True)]:
            member.kill()
    except psutil.NoSuchProcess:
        pass
    process.wait()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same_runs(run: Path, other: Path) -> None:
    """Bit-identical weights, average (buffers included) and optimiser state, and the same losses at each step."""
    for name in ("model", "ema", "optimizer"):
        first, second = (load_file(path / "checkpoints/last" / f"{name}.safetensors") for path in (run, other))
        assert first.keys() == second.keys()
        assert first
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), f"{name}: {key}"
    assert any("running_mean" in key for key in load_file(run / "checkpoints/last/ema.safetensors"))
    states = [json.loads((path / "checkpoints/last/state.json").read_text()) for path in (run, other)]
    for state in states:
        state.pop("seconds")
    assert states[0] == states[1]
    assert metrics(run) == metrics(other)
    for name in ("config.json", "README.md"):
        assert (run / "model" / name).read_text() == (other / "model" / name).read_text()
    assert (run / "evaluations.jsonl").read_text() == (other / "evaluations.jsonl").read_text()
