"""`dc-ssdae distill`: what it takes over from the teacher's run, what it refuses, and short distillations."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from cli_samples import random_pixels, save_model
from PIL import Image
from safetensors.torch import load_file

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.distill import DEFAULT_STEPS
from dc_ssdae.presets import load_preset
from dc_ssdae.training.config import RunConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for a process's life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training images and two validation images."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 5), ("validation", 2)):
        (root / split).mkdir()
        for number in range(count):
            Image.fromarray(random_pixels(40, 44, seed=number)).save(root / split / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def teacher_run(model_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run, as far as a distillation reads it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    shutil.copytree(model_dir, folder / "model")
    config = {
        "model": load_preset("demo")["model"],
        "data": {"root": str(photos), "image_size": 32, "aug_scale": 1.5, "workers": 0, "validation_images": 2},
        "training": {
            "steps": 40,
            "minutes": 3.0,
            "batch_size": 2,
            "optimizer": "adamw",
            "lr": 3e-3,
            "weight_decay": 0.01,
            "ema_start": 17,
            "ema_decay": 0.9,
            "precision": "float32",
            "seed": 5,
            "output": "somewhere",
            "init_from": "somewhere/else",
            "latent_statistics": 3,
            "sample_images": 0,
        },
        "losses": {
            "dynamics": 2.0,
            "lpips": {"weight": 0.0, "init_args": {"net": "alex"}},
            "own": {"weight": 1.0, "class_path": "nowhere.Own"},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(RunConfig.from_mapping(config).to_mapping()))
    return folder


def printed(run: Callable, *words: object) -> dict[str, Any]:
    """The configuration that some words make."""
    outcome = run("distill", *words, "--print_config")
    assert (outcome.code, outcome.err) == (0, [])
    return yaml.safe_load("\n".join(outcome.out))


def one_line(run: Callable, *words: object) -> str:
    outcome = run("distill", *words)
    assert outcome.code == 2
    assert not outcome.out
    (line,) = outcome.err
    assert line.startswith("dc-ssdae distill: ")
    return line.removeprefix("dc-ssdae distill: ")


GROUPS = [
    *("decoder.image_inputs", "decoder.down.0", "decoder.down.1"),
    *("decoder.middle", "decoder.up.1", "decoder.head"),
]


class TestSettings:
    def test_images_of_a_teacher_run_no_command(self, run: Callable, teacher_run: Path, tmp_path: Path) -> None:
        teacher, ran = Path(shutil.copytree(teacher_run, tmp_path / "teacher", symlinks=True)), tmp_path / "ran"
        config = yaml.safe_load((teacher / "config.yaml").read_text())
        own = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(ran)]}}
        for data, told in (({"root": None, "dataset": own}, "Popen"), ({"root": f"pipe:touch {ran}"}, "pipe:touch")):
            (teacher / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], **data}}))
            assert told in one_line(run, "--teacher", teacher, "--training.output", tmp_path / "out")
            assert not ran.exists()
        given = printed(run, "--teacher", teacher, "--data.root", data["root"])
        assert given["data"]["root"] == data["root"]

    def test_of_a_run(self, run: Callable, teacher_run: Path, photos: Path) -> None:
        found = printed(run, "--teacher", teacher_run)
        assert found["distillation"] == {
            "teacher": str(teacher_run),
            "steps": DEFAULT_STEPS,
            "step_size": None,
            "cache_steps": None,
        }
        assert DEFAULT_STEPS == 8
        before = yaml.safe_load((teacher_run / "config.yaml").read_text())
        assert found["data"] == before["data"]
        changed = {name for name, value in found["training"].items() if before["training"][name] != value}
        assert changed == {
            "steps",
            "minutes",
            "lr",
            "weight_decay",
            "ema_start",
            "output",
            "init_from",
            "train",
            "seed",
        }
        training = found["training"]
        assert (training["steps"], training["minutes"], training["lr"]) == (20_000, None, 1e-4)
        assert (training["weight_decay"], training["ema_start"]) == (0.0, 0)
        assert (training["output"], training["init_from"]) == (None, None)
        assert training["train"] == GROUPS
        weights = {name: term["weight"] for name, term in found["losses"].items()}
        assert weights == {"dynamics": 2.0, "lpips": 0.0, "repa": 0.0, "kl": 0.0}
        assert found["losses"]["lpips"]["init_args"] == {"net": "alex"}
        widths = DCSSDAE.from_pretrained(teacher_run / "model").config["encoder"]["init_args"]["widths"]
        assert found["model"]["encoder"]["init_args"]["widths"] == list(widths)

    def test_of_a_runs_model(self, run: Callable, teacher_run: Path) -> None:
        found, expected = (printed(run, "--teacher", path) for path in (teacher_run / "model", teacher_run))
        assert found.pop("distillation")["teacher"] == str(teacher_run / "model")
        del expected["distillation"]
        assert found == expected

    def test_of_a_model_alone(self, run: Callable, model_dir: Path) -> None:
        assert printed(run, "--teacher", "photos_f8c16")["model"]["latent_channels"] == 16
        found = printed(run, "--teacher", model_dir, "--steps", "3")
        assert found["data"]["root"] is None
        assert found["distillation"]["steps"] == 3
        assert (found["training"]["steps"], found["training"]["batch_size"]) == (20_000, 192)
        weights = {name: term["weight"] for name, term in found["losses"].items()}
        assert weights == {"dynamics": 1.0, "lpips": 0.5, "repa": 0.0, "kl": 0.0}

    def test_of_a_recipes_run(self, run: Callable, teacher_run: Path, tmp_path: Path) -> None:
        """RUN/model leads to the last phase's; the settings are that phase's."""
        recipe = tmp_path / "recipe"
        shutil.copytree(teacher_run, recipe / "2-late")
        config = yaml.safe_load((teacher_run / "config.yaml").read_text())
        config["data"]["image_size"] = 64
        (recipe / "2-late" / "config.yaml").write_text(yaml.safe_dump(config))
        (recipe / "recipe.yaml").write_text("phases: {}\n")
        (recipe / "model").symlink_to(Path("2-late", "model"), target_is_directory=True)
        for teacher in (recipe, recipe / "model", recipe / "2-late"):
            found = printed(run, "--teacher", teacher)
            assert found["data"]["image_size"] == 64
            assert found["training"]["batch_size"] == 2

    def test_what_is_laid_over(self, run: Callable, teacher_run: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("training: {lr: 1.0e-3, steps: 50}\nlosses: {repa: 0.1}\ndistillation: {step_size: 0.2}\n")
        words = ("--teacher", teacher_run, "--steps=4", "--config", file)
        found = printed(run, *words, "--training.steps", 60, "--distillation.cache_steps", 7)
        assert (found["training"]["lr"], found["training"]["steps"], found["training"]["batch_size"]) == (1e-3, 60, 2)
        assert found["losses"]["repa"]["weight"] == 0.1
        assert found["distillation"] == {
            "teacher": str(teacher_run),
            "steps": 4,
            "step_size": 0.2,
            "cache_steps": 7,
        }
        assert printed(run, *words, "--distillation.step_size", "0.3")["distillation"]["step_size"] == 0.3

    def test_what_is_named_on_the_line_goes_over_a_file(self, run: Callable, teacher_run: Path, tmp_path: Path) -> None:
        """Such as the config.yaml of an earlier distillation of another teacher."""
        file = tmp_path / "config.yaml"
        file.write_text("distillation: {teacher: runs/other, steps: 2, step_size: 0.2}\n")
        found = printed(run, "--teacher", teacher_run, "--steps", 6, "--config", file)["distillation"]
        assert (found["teacher"], found["steps"], found["step_size"]) == (str(teacher_run), 6, 0.2)
        assert printed(run, "--teacher", teacher_run, "--config", file)["distillation"]["steps"] == 2

    def test_help(self, run: Callable) -> None:
        for words in (("--help",), ("--teacher", "x", "-h")):
            outcome = run("distill", *words)
            assert outcome.code == 0
            text = "\n".join(outcome.out)
            assert all(word in text for word in ("--teacher", "--steps", "--resume", "default 8", "step_size"))


class TestMistakes:
    def test_of_the_words(self, run: Callable, teacher_run: Path) -> None:
        assert one_line(run) == ("which model is to be taught from? --teacher DIR, a saved model's folder or a run's")
        assert "--teacher needs" in one_line(run, "--teacher")
        assert "--teacher needs" in one_line(run, "--teacher", "--steps", 3)
        assert "--teacher is empty" in one_line(run, "--teacher=")
        words = ("--teacher", teacher_run)
        for steps in ("0", "-1", "2.5", "many"):
            assert f"{steps!r} is not a whole number from 1 on" in one_line(run, *words, "--steps", steps)
        assert "--steps needs" in one_line(run, *words, "--steps")
        assert "--recipe is for a new run" in one_line(run, *words, "--recipe", "three_phase")
        assert "did you mean '--steps'" in one_line(run, *words, "--stepss", "3")
        assert "step_size" in one_line(run, *words, "--distillation.stepsize", "3")
        assert "distillation.step_size is 0" in one_line(run, *words, "--distillation.step_size", "0")
        assert "distillation.cache_steps is 0" in one_line(run, *words, "--distillation.cache_steps", "0")
        assert "unexpected word" in one_line(run, *words, teacher_run)

    def test_of_the_teacher(self, run: Callable, model_dir: Path, teacher_run: Path, tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        assert one_line(run, "--teacher", missing) == f"--teacher {missing}: no such folder"
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "holds no model: config.json is missing" in one_line(run, "--teacher", empty)
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        (damaged / "config.json").write_text("{")
        assert "is not JSON" in one_line(run, "--teacher", damaged)
        (damaged / "config.json").write_text("{}")
        assert "its config.json lacks latent_channels" in one_line(run, "--teacher", damaged)
        early = tmp_path / "early"
        (early / "model").mkdir(parents=True)
        shutil.copy(teacher_run / "config.yaml", early)
        shutil.copy(model_dir / "config.json", early / "model")
        assert "has no model yet: the first checkpoint writes it" in one_line(run, "--teacher", early)

    def test_before_anything_is_loaded(
        self, run: Callable, model_dir: Path, teacher_run: Path, photos: Path, tmp_path: Path
    ) -> None:
        """They leave no folder."""
        out = tmp_path / "out"

        def refused(*words: object) -> str:
            line = one_line(run, *words, "--training.output", out)
            assert not out.exists()
            return line

        hollow = tmp_path / "hollow"
        hollow.mkdir()
        shutil.copy(model_dir / "config.json", hollow)
        line = refused("--teacher", hollow, "--data.root", photos, "--losses.lpips", 0)
        assert line == f"distillation.teacher {hollow}: {hollow / WEIGHTS}: no such file"
        assert "data.root is not given" in refused("--teacher", model_dir, "--losses.lpips", 0)
        words = ("--teacher", teacher_run)
        assert "distillation.step_size is for several steps" in refused(
            *words, "--steps", 1, "--distillation.step_size", 0.5
        )
        line = refused(*words, "--training.train", "[encoder.latent_head, decoder]")
        assert "a distillation trains the decoder alone" in line
        assert "a distillation trains the decoder alone" in refused(*words, "--training.train", "null")
        assert "decoder.head" in refused(*words, "--training.train", "[decoder.haed]")
        assert "has tensor" in refused(*words, "--model.latent_channels", 6)
        assert "has another dynamics than section model" in refused(
            *words, "--model.dynamics.init_args.gradient_scale", 2
        )
        assert "widths has 4 stages" in refused(*words, "--config", "dc_f32c32_eqm", "--data.image_size", 64)

    def test_of_flow_matching(self, run: Callable, photos: Path, tmp_path: Path) -> None:
        flow = save_model(tmp_path / "flow", dynamics={"class_path": "FlowMatching"})
        words = ("--teacher", flow, "--data.root", photos, "--losses.lpips", 0, "--training.output", tmp_path / "out")
        line = one_line(run, *words, "--distillation.step_size", 0.5)
        assert "distillation.step_size is for several steps of equilibrium matching" in line

    def test_of_resuming(self, run: Callable, teacher_run: Path, tmp_path: Path) -> None:
        line = one_line(run, "--resume", teacher_run)
        assert (
            line == f"--resume {teacher_run} is no distillation; go on with it by dc-ssdae train --resume {teacher_run}"
        )
        for words in (("--teacher", teacher_run), ("--steps", "3")):
            line = one_line(run, "--resume", teacher_run, *words)
            assert line == "--resume goes on with the run's own teacher; leave --teacher and --steps out"
        assert "no such folder" in one_line(run, "--resume", tmp_path / "nowhere")
        assert "so it is no run" in one_line(run, "--resume", tmp_path)
        assert "--resume needs" in one_line(run, "--resume")


@pytest.fixture(scope="module")
def short(teacher_run: Path) -> tuple[object, ...]:
    """The words of a distillation of four steps."""
    return ("--teacher", teacher_run, "--steps", 2, "--training.steps", 4, "--training.checkpoint_every", 2)


def steps_done(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


class TestDistilling:
    def test_whole(
        self, run: Callable, short: tuple[object, ...], teacher_run: Path, photo: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        outcome = run("distill", *short, "--training.output", out)
        assert outcome.code == 0, outcome.err
        assert steps_done(out) == [1, 2, 3, 4]
        assert f"done after step 4: the model is {out / 'model'}" in "\n".join(outcome.err)
        names = ["teacher, 1 step", "teacher, 2 steps", "student, 1 step"]
        for line, name in zip(outcome.out[1:4], names, strict=True):
            assert line.startswith(name)
        assert "2 validation images of 32 px" in outcome.out[4]
        report = json.loads((out / "distillation.json").read_text())
        assert [entry["name"] for entry in report["decodings"]] == names
        assert (out / "distillation.png").is_file()
        student, teacher = (load_file(path / WEIGHTS) for path in (out / "model", teacher_run / "model"))
        assert student.keys() == teacher.keys()
        different = {name for name in student if not torch.equal(student[name], teacher[name])}
        assert different
        assert all(name.startswith("decoder.") for name in different)
        assert run("reconstruct", photo, "--model", out, "--out", tmp_path / "reconstructed").code == 0
        config = yaml.safe_load((out / "config.yaml").read_text())
        assert config["distillation"]["teacher"] == str(teacher_run)

        # Done: it compares again, and trains no more.
        (out / "distillation.json").unlink()
        again = run("distill", "--resume", out)
        assert again.code == 0
        assert again.out == outcome.out
        assert json.loads((out / "distillation.json").read_text()) == report
        assert steps_done(out) == [1, 2, 3, 4]

        # More steps.
        assert run("distill", "--resume", out, "--training.steps", 5).code == 0
        assert steps_done(out) == [1, 2, 3, 4, 5]
        line = one_line(run, "--resume", out, "--training.lr", 1e-3)
        assert "training.lr is 0.0001" in line
        assert "distillation.steps is 2" in one_line(run, "--resume", out, "--distillation.steps", 4)
        assert "is a run already" in one_line(run, *short, "--training.output", out)

        # The other command goes on with it too.
        outcome = run("train", "--resume", out, "--training.steps", 6)
        assert outcome.code == 0, outcome.err
        assert steps_done(out) == [1, 2, 3, 4, 5, 6]
        assert load_file(out / "checkpoints/last/model.safetensors").keys() == {f"model.{name}" for name in student}

    def test_of_flow_matching(self, run: Callable, photos: Path, tmp_path: Path) -> None:
        flow, out = save_model(tmp_path / "flow", dynamics={"class_path": "FlowMatching"}), tmp_path / "out"
        words = ("--teacher", flow, "--data.root", photos, "--data.image_size", 32, "--data.workers", 0)
        words += ("--losses.lpips", 0, "--training.batch_size", 2, "--training.precision", "float32")
        outcome = run("distill", *words, "--steps", 3, "--training.steps", 2, "--training.output", out)
        assert outcome.code == 0, outcome.err
        assert any(line.startswith("teacher, 3 steps") for line in outcome.out)

    def test_where_it_writes_if_it_is_not_told(
        self, run: Callable, short: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert run("distill", *short, "--training.steps", 1).code == 0
        assert os.listdir(tmp_path / "runs") == ["first-distilled"]

    def test_without_validation_images(
        self, run: Callable, short: tuple[object, ...], photos: Path, tmp_path: Path
    ) -> None:
        words = ("--data.root", photos / "train", "--training.output", tmp_path / "out", "--training.steps", 1)
        outcome = run("distill", *short, *words)
        assert outcome.code == 0
        assert any("2 training images" in line for line in outcome.out)
