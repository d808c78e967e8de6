"""`dc-ssdae train` as a user meets it: a run's folder, stopping and going on, broken images, classes of one's own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import make_images, metrics
from training_runs import environment, start, train, write_config

from dc_ssdae import DCSSDAE, InputError

OWN_CLASSES = '''
import torch
from torch import nn
from dc_ssdae import DiagonalGaussian


class Patches(nn.Module):
    """An encoder: one strided convolution."""

    def __init__(self, latent_channels: int, downsample_factor: int, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 2 * latent_channels, downsample_factor, downsample_factor, bias=bias)

    def forward(self, x):
        return DiagonalGaussian.from_moments(self.conv(x))


class Edges(nn.Module):
    """A loss term with a parameter: horizontal differences."""

    def __init__(self, power: float = 2.0):
        super().__init__()
        self.power = power
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs):
        difference = (outputs.clean_estimate - outputs.record.x).diff(dim=-1)
        return (self.scale * difference).abs().pow(self.power).flatten(1).mean(dim=1)


class Stripes:
    """A data set of `count` images."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((3, 40, 40), index * 255 // self.count, dtype=torch.uint8), "a label"
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", 12)
    make_images(root / "val", 3, seed=1)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A run of 6 steps, evaluated at 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "mine.yaml", data, steps=6, checkpoint_every=3, evaluate_every=4, keep_every=3)
    assert train(["--config", str(config)], folder / "log", cwd=folder, apart=True) == 0, (folder / "log").read_text()
    return folder / "runs" / "mine"


def test_a_runs_folder_holds_what_a_lab_needs(finished, data):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["data"]["root"] == str(data)
    assert config["training"]["optimizer"] == "schedule_free_radam"

    (start_line,) = [json.loads(line) for line in (finished / "environment.jsonl").read_text().splitlines()]
    assert start_line["command"][1:4] == ["-m", "dc_ssdae", "train"]

    evaluations = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()]
    checkpoints = finished / "checkpoints"
    assert (checkpoints / "last").resolve().name == "step-00000006"
    best = max(evaluations, key=lambda line: line["psnr"])
    assert (checkpoints / "best").resolve().name == f"step-{best['step']:08d}"
    kept = {"step-00000003", "step-00000006", f"step-{best['step']:08d}"}
    assert {entry.name for entry in checkpoints.iterdir()} == {"last", "best", *kept}
    assert (finished / "samples" / "step-00000006.png").is_file()


def test_resuming_a_finished_run_says_so(finished, tmp_path):

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}

    before = times()
    log = tmp_path / "log"
    assert train(["--resume", str(finished)], log) == 0
    assert "is finished" in log.read_text()
    assert times() == before


def test_a_signal_saves_and_ends_with_0(tmp_path, data):
    words = ["--config", str(write_config(tmp_path / "c.yaml", data, steps=2000, checkpoint_every=2000))]
    run, log = tmp_path / "run", tmp_path / "log"
    process = start([*words, "--training.output", str(run), "--data.workers", "2"], log)
    while process.poll() is None and (not (run / "metrics.jsonl").exists() or not metrics(run)):
        pass
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster and a terminal do: to the workers that read images too
    assert process.wait(timeout=60) == 0, log.read_text()
    step = json.loads((run / "checkpoints/last/state.json").read_text())["step"]
    assert step == len(metrics(run))
    assert step < 2000
    assert f"stopped by SIGTERM after step {step}" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_run_may_go_on_for_longer_but_not_be_another(finished, tmp_path, data):
    config = write_config(tmp_path / "c.yaml", data, steps=4, evaluate_every=4)
    log, run = tmp_path / "log", tmp_path / "run"
    assert train(["--config", str(config), "--training.output", str(run)], log) == 0
    assert train(["--resume", str(run), "--training.steps", "6"], log) == 0, log.read_text()
    assert len(metrics(run)) == 6
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["steps"] == 6
    assert train(["--resume", str(run), "--training.lr", "0.5"], log) == 2
    assert "training.lr is 0.001" in log.read_text().splitlines()[-1]


def test_a_run_resumes_on_another_number_of_processes(tmp_path, data):
    config = write_config(tmp_path / "c.yaml", data, steps=6, checkpoint_every=3, evaluate_every=100)
    log, whole, mixed = tmp_path / "log", tmp_path / "whole", tmp_path / "mixed"
    assert train(["--config", str(config), "--training.output", str(whole)], log) == 0, log.read_text()
    words = ["--config", str(config), "--training.output", str(mixed), "--training.steps", "3"]
    assert train(words, log, processes=2) == 0, log.read_text()
    assert train(["--resume", str(mixed), "--training.steps", "6"], log) == 0, log.read_text()
    for one, other in zip(metrics(whole), metrics(mixed), strict=True):
        assert one["loss/total"] == pytest.approx(other["loss/total"], rel=1e-4)


def test_an_own_encoder_loss_and_data_set_train_from_a_yaml(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_CLASSES)
    config = yaml.safe_load(write_config(tmp_path / "c.yaml", tmp_path, steps=3, optimizer="adamw").read_text())
    config["model"]["encoder"] = {"class_path": "mine.Patches", "init_args": {"bias": False}}
    config["losses"] |= {"edges": {"weight": 0.1, "class_path": "mine.Edges", "init_args": {"power": 1.0}}}
    stripes = {"class_path": "mine.Stripes", "init_args": {"count": 7}}
    config["data"] = {"dataset": stripes, "validation": stripes, "image_size": 32, "workers": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--config", "c.yaml", "--training.output", "run"]
    assert train(words, log, cwd=tmp_path, apart=True) == 0, log.read_text()
    assert all(line["loss/edges"] > 0 for line in metrics(run))
    trained = load_file(run / "checkpoints/last/model.safetensors")
    assert trained["objective.terms.edges.scale"] != 1.0
    assert train(["--resume", "run", "--training.steps", "5"], log, cwd=tmp_path, apart=True) == 0, log.read_text()
    assert len(metrics(run)) == 5

    with pytest.raises(InputError, match=r"mine\.Patches.*not imported"):
        DCSSDAE.from_pretrained(run / "model")
    script = "import mine, sys; from dc_ssdae import DCSSDAE; print(DCSSDAE.from_pretrained('run/model').encoder)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True)
    assert b"Patches" in loaded.stdout, loaded.stderr
