"""`dc-ssdae distill`: what it takes over from the teacher's run, what it refuses, and short distillations."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from cli_samples import WEIGHTS, Refusal, Run, save_model, save_photos
from safetensors.torch import load_file

from dc_ssdae.presets import load_preset
from dc_ssdae.training.config import RunConfig

GROUPS = [f"decoder.{name}" for name in ("image_inputs", "down.0", "down.1", "middle", "up.1", "head")]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps its state for a process's life."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training images and two validation images."""
    names = ("train/0", "train/1", "train/2", "validation/3", "validation/4")
    return save_photos(tmp_path_factory.mktemp("photos"), *names)


@pytest.fixture(scope="module")
def teacher(model_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run, as far as a distillation reads it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    shutil.copytree(model_dir, folder / "model")
    training = {"steps": 40, "minutes": 3.0, "batch_size": 2, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01}
    training |= {"ema_start": 17, "precision": "float32", "seed": 5, "latent_statistics": 3, "sample_images": 0}
    training |= {"output": "somewhere", "init_from": "somewhere/else"}
    config = {
        "model": load_preset("demo")["model"],
        "data": {"root": str(photos), "image_size": 32, "aug_scale": 1.5, "workers": 0, "validation_images": 2},
        "training": training,
        "losses": {
            "dynamics": 2.0,
            "lpips": {"weight": 0.0, "init_args": {"net": "alex"}},
            "own": {"weight": 1.0, "class_path": "nowhere.Own"},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(RunConfig.from_mapping(config).to_mapping()))
    return folder


@pytest.fixture
def printed(run: Run) -> Callable[..., dict[str, Any]]:
    """The configuration that some words make."""

    def print_config(*words: object) -> dict[str, Any]:
        outcome = run("distill", *words, "--print_config")
        assert (outcome.code, outcome.err) == (0, [])
        return yaml.safe_load("\n".join(outcome.out))

    return print_config


def config_of(run_folder: Path) -> dict[str, Any]:
    return yaml.safe_load((run_folder / "config.yaml").read_text())


def weights_of(config: dict[str, Any]) -> dict[str, float]:
    return {name: term["weight"] for name, term in config["losses"].items()}


def test_images_of_a_teacher_run_no_command(printed: Callable, refusal: Refusal, teacher: Path) -> None:
    copy, config = Path(shutil.copytree(teacher, "teacher")), config_of(teacher)
    own = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
    for data, told in (({"root": None, "dataset": own}, "Popen"), ({"root": "pipe:touch ran"}, "pipe:touch")):
        (copy / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], **data}}))
        assert told in refusal("distill", "--teacher", copy, "--training.output", "out")
        assert not Path("ran").exists()
    assert printed("--teacher", copy, "--data.root", data["root"])["data"]["root"] == data["root"]


def test_settings_of_a_run_and_of_its_model(printed: Callable, teacher: Path) -> None:
    found, before = printed("--teacher", teacher), config_of(teacher)
    assert found["distillation"] == {"teacher": str(teacher), "steps": 8, "step_size": None, "cache_steps": None}
    assert found["data"] == before["data"]
    changed = {"steps": 20_000, "minutes": None, "lr": 1e-4, "weight_decay": 0.0, "ema_start": 0}
    changed |= {"output": None, "init_from": None, "train": GROUPS, "seed": found["training"]["seed"]}
    assert found["training"] == {**before["training"], **changed}
    assert found["training"]["seed"] != before["training"]["seed"]
    assert weights_of(found) == {"dynamics": 2.0, "lpips": 0.0, "repa": 0.0, "kl": 0.0}
    assert found["losses"]["lpips"]["init_args"] == {"net": "alex"}
    assert found["model"]["encoder"]["init_args"]["widths"] == [16, 32, 64, 64]
    of_model = printed("--teacher", teacher / "model")
    assert of_model == {**found, "distillation": {**found["distillation"], "teacher": str(teacher / "model")}}


def test_settings_of_a_model_alone(printed: Callable, model_dir: Path) -> None:
    assert printed("--teacher", "photos_f8c16")["model"]["latent_channels"] == 16
    found = printed("--teacher", model_dir, "--steps", "3")
    assert (found["data"]["root"], found["distillation"]["steps"]) == (None, 3)
    assert (found["training"]["steps"], found["training"]["batch_size"]) == (20_000, 192)
    assert weights_of(found) == {"dynamics": 1.0, "lpips": 0.5, "repa": 0.0, "kl": 0.0}


def test_settings_of_a_recipes_run(printed: Callable, teacher: Path) -> None:
    """RUN/model leads to the model of the last phase, whose settings are taken."""
    shutil.copytree(teacher, "2-late")
    Path("recipe.yaml").write_text("phases: {}\n")
    Path("model").symlink_to("2-late/model", target_is_directory=True)
    for path in (".", "model", "2-late"):
        assert printed("--teacher", path)["data"]["image_size"] == 32


def test_settings_that_are_laid_over(printed: Callable, teacher: Path) -> None:
    """A file over the teacher's run, such as an earlier distillation's config.yaml; and the line over both."""
    Path("mine.yaml").write_text(
        "training: {lr: 1.0e-3, steps: 50}\nlosses: {repa: 0.1}\n"
        "distillation: {teacher: runs/other, steps: 2, step_size: 0.2}\n"
    )
    words = ("--teacher", teacher, "--config", "mine.yaml")
    found = printed(*words, "--steps=4", "--training.steps", 60, "--distillation.cache_steps", 7)
    assert (found["training"]["lr"], found["training"]["steps"], found["training"]["batch_size"]) == (1e-3, 60, 2)
    assert found["losses"]["repa"]["weight"] == 0.1
    assert found["distillation"] == {"teacher": str(teacher), "steps": 4, "step_size": 0.2, "cache_steps": 7}
    distillation = printed(*words, "--distillation.step_size", "0.3")["distillation"]
    assert (distillation["steps"], distillation["step_size"]) == (2, 0.3)


def steps_done(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_distillation(run: Run, refusal: Refusal, teacher: Path) -> None:
    words = ("distill", "--teacher", teacher, "--steps", 2, "--training.steps", 2)
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert any("PSNR on 2 validation images: teacher, 1 step " in line for line in outcome.err)
    out = Path("runs/first-distilled")
    assert os.listdir("runs") == [out.name]
    assert steps_done(out) == [1, 2]
    assert any(f"done after step 2: the model is {out / 'model'}" in line for line in outcome.err)
    names = ["teacher, 1 step", "teacher, 2 steps", "student, 1 step"]
    assert all(name in outcome.out[0] for name in names)
    assert any("2 validation images of 32 px" in line for line in outcome.out)
    report = json.loads((out / "distillation.json").read_text())
    assert [entry["name"] for entry in report["decodings"]] == names
    assert (out / "distillation.png").is_file()
    page = (out / "distillation.html").read_text(encoding="utf-8")
    assert [page.count(f': {name}" draggable') for name in names] == [2, 2, 2]
    student, before = (load_file(path / "model" / WEIGHTS) for path in (out, teacher))
    changed = {name.partition(".")[0] for name in student if not torch.equal(student[name], before[name])}
    assert changed == {"decoder"}

    # Done: it compares again, and trains no more.
    (out / "distillation.json").unlink()
    assert run("distill", "--resume", out).out == outcome.out
    assert json.loads((out / "distillation.json").read_text()) == report
    assert "training.lr is 0.0001" in refusal("distill", "--resume", out, "--training.lr", 1e-3)
    assert "distillation.steps is 2" in refusal("distill", "--resume", out, "--distillation.steps", 4)
    assert "is a run already" in refusal(*words)
    # More steps, also by the other command.
    for number, command in enumerate(("distill", "train"), start=3):
        assert run(command, "--resume", out, "--training.steps", number).code == 0
        assert steps_done(out) == list(range(1, number + 1))


def test_a_distillation_of_flow_matching_without_validation_images(run: Run, photos: Path) -> None:
    flow = save_model(Path("flow"), dynamics={"class_path": "FlowMatching"})
    data = ("--data.root", photos / "train", "--data.image_size", 32, "--data.workers", 0)
    training = ("--training.batch_size", 2, "--training.precision", "float32", "--training.steps", 1)
    outcome = run("distill", "--teacher", flow, *data, *training, "--steps", 3, "--losses.lpips", 0)
    assert outcome.code == 0, outcome.err
    assert "teacher, 3 steps" in outcome.out[0]
    assert any("3 training images" in line for line in outcome.out)
