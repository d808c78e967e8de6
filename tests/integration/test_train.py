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
from training_runs import environment, start, train, train_apart, write_config

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.training.logging import read_lines

OWN_CLASSES = """
import torch
from torch import nn
from dc_ssdae import DiagonalGaussian


class Patches(nn.Module):
    def __init__(self, latent_channels: int, downsample_factor: int, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 2 * latent_channels, downsample_factor, downsample_factor, bias=bias)
        self.rate = torch.linspace(0.0, 1.0, 3)[1].item()  # a number read off a tensor, as for stochastic depth

    def forward(self, x):
        return DiagonalGaussian.from_moments(self.conv(x))


class Edges(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs):
        return (self.scale * outputs.clean_estimate.diff(dim=-1)).square().mean()


class Stripes(list):
    def __init__(self, count: int):
        super().__init__((torch.full((3, 40, 40), 30 * row, dtype=torch.uint8), "a label") for row in range(count))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", 12)
    make_images(root / "val", 3, seed=1)
    return root


def test_a_runs_folder_holds_what_a_lab_needs_and_may_go_on_for_longer_but_not_be_another(tmp_path, data):
    config = write_config(tmp_path / "mine.yaml", data, steps=6, checkpoint_every=3, evaluate_every=4, keep_every=3)
    log, run = tmp_path / "log", tmp_path / "runs" / "mine"
    assert train_apart(["--config", str(config)], log, cwd=tmp_path) == 0, log.read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["root"] == str(data)
    assert config["training"]["optimizer"] == "schedule_free_radam"
    (start_line,) = read_lines(run / "environment.jsonl")
    assert start_line["command"][1:4] == ["-m", "dc_ssdae", "train"]

    best = max(read_lines(run / "evaluations.jsonl"), key=lambda line: line["psnr"])["step"]
    checkpoints = run / "checkpoints"
    assert (checkpoints / "last").resolve().name == "step-00000006"
    assert (checkpoints / "best").resolve().name == f"step-{best:08d}"
    kept = {"step-00000003", "step-00000006", f"step-{best:08d}"}
    assert {entry.name for entry in checkpoints.iterdir()} == {"last", "best", *kept}
    assert (run / "samples" / "step-00000006.png").is_file()

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}

    before = times()
    assert train(["--resume", str(run)], log) == 0
    assert "is finished" in log.read_text()
    assert train(["--resume", str(run), "--training.lr", "0.5"], log) == 2
    assert "training.lr is 0.001" in log.read_text().splitlines()[-1]
    assert times() == before
    assert train(["--resume", str(run), "--training.steps", "8"], log) == 0, log.read_text()
    assert len(metrics(run)) == 8
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["steps"] == 8


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


def test_a_run_resumes_on_another_number_of_processes(tmp_path, data):
    config = write_config(tmp_path / "c.yaml", data, steps=6, checkpoint_every=3, evaluate_every=100)
    log, whole, mixed = tmp_path / "log", tmp_path / "whole", tmp_path / "mixed"
    assert train(["--config", str(config), "--training.output", str(whole)], log) == 0, log.read_text()
    words = ["--config", str(config), "--training.output", str(mixed), "--training.steps", "3"]
    assert train_apart(words, log, processes=2) == 0, log.read_text()
    assert train(["--resume", str(mixed), "--training.steps", "6"], log) == 0, log.read_text()
    for one, other in zip(metrics(whole), metrics(mixed), strict=True):
        assert one["loss/total"] == pytest.approx(other["loss/total"], rel=1e-4)


@pytest.mark.slow  # the tutorial trains its own encoder and loss in every run of the suite
def test_an_own_encoder_loss_and_data_set_train_from_a_yaml(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_CLASSES)
    config = yaml.safe_load(write_config(tmp_path / "c.yaml", tmp_path, steps=3, optimizer="adamw").read_text())
    config["model"]["encoder"] = {"class_path": "mine.Patches", "init_args": {"bias": False}}
    config["losses"]["edges"] = {"weight": 0.1, "class_path": "mine.Edges"}
    stripes = {"class_path": "mine.Stripes", "init_args": {"count": 7}}
    config["data"] = {"dataset": stripes, "validation": stripes, "image_size": 32, "workers": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--config", "c.yaml", "--training.output", "run"]
    assert train_apart(words, log, cwd=tmp_path) == 0, log.read_text()
    assert load_file(run / "checkpoints/last/model.safetensors")["objective.terms.edges.scale"] != 1.0
    assert train_apart(["--resume", "run", "--training.steps", "5"], log, cwd=tmp_path) == 0, log.read_text()
    assert [line["loss/edges"] > 0 for line in metrics(run)] == [True] * 5

    with pytest.raises(InputError, match=r"mine\.Patches.*not imported"):
        DCSSDAE.from_pretrained(run / "model")
    script = "import mine, sys; from dc_ssdae import DCSSDAE; print(DCSSDAE.from_pretrained('run/model').encoder.rate)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True)
    assert loaded.stdout.strip() == b"0.5", loaded.stderr
