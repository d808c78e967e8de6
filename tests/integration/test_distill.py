"""Distillation end to end: one step comes to land where several did; one that is killed ends as if it had not been."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny import make_images, metrics
from training_runs import train, write_config

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.main import main
from dc_ssdae.data.images import read_image

TEACHER_STEPS = 100
STUDENT_STEPS = 70
K = 6


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its state for a process's life."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", 24)
    make_images(root / "validation", 8, seed=1)
    return root


@pytest.fixture(scope="module")
def teacher(data: Path, made_once: Any) -> Path:
    """A run of a small model, trained until one step and several clearly differ."""
    return made_once("teacher", partial(train_teacher, data)) / "run"


def train_teacher(data: Path, folder: Path) -> None:
    settings = {
        "steps": TEACHER_STEPS,
        "optimizer": "adamw",
        "lr": 3.0e-3,
        "gradient_clip": 1.0,
        "ema_start": 0,
        "checkpoint_every": 1000,
        "evaluate_every": 1000,
        "sample_images": 0,
        "latent_statistics": 0,
    }
    config = write_config(folder / "config.yaml", data, **settings)
    assert train(["--config", str(config), "--training.output", str(folder / "run")], folder / "log") == 0


def distil(words: list[str]) -> int:
    _forget()
    return main(["distill", *words])


def distances(run: Path) -> list[float]:
    """From the teacher's K-step result: of the teacher's one step, of its K steps, of the student's one step."""
    report = json.loads((run / "distillation.json").read_text())
    return [entry["to_target"] for entry in report["decodings"]]


def elsewhere(teacher: Path, student: Path, data: Path, steps: int) -> tuple[float, float]:
    """The distances of the one-step results with noise and samples of the latent other than the comparison's."""
    models = [DCSSDAE.from_pretrained(path / "model") for path in (teacher, student)]
    crops = [read_image(file).pixels[:, :32, :32] for file in sorted((data / "validation").iterdir())]
    x = torch.stack(crops).float() / 127.5 - 1.0
    generator = torch.Generator().manual_seed(99)
    noise = torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        z = models[0].encode(x).latent_dist.sample(generator=generator)
        target = models[0].decode(z, num_steps=steps, noise=noise).sample
        one, other = (float((model.decode(z, noise=noise).sample - target).square().mean()) for model in models)
    return one, other


def test_one_step_comes_closer_to_several(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "student"
    words = ["--teacher", str(teacher), "--steps", str(K), "--training.output", str(run)]
    words += ["--training.steps", str(STUDENT_STEPS), "--training.lr", "2e-3"]
    assert distil(words) == 0
    table = capsys.readouterr().out
    one, several, student = distances(run)
    other_one, other_student = elsewhere(teacher, run, data, K)
    losses = [line["loss/dynamics"] for line in metrics(run)]
    assert several == 0.0
    assert one > 0.01, "the teacher's one step and its several do not differ: there is nothing to learn"
    assert student < 0.5 * one
    assert other_student < 0.5 * other_one
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    # What is printed is what is written.
    found = next(line.split()[1:] for line in table.splitlines() if line.startswith("to_target"))
    assert [float(number) for number in found] == pytest.approx([one, several, student], rel=1e-3)
