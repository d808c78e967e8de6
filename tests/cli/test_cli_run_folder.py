"""`--model` that is a training run's folder, and `--import` for models that name a user's classes."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.classes import import_class, importing_from
from dc_ssdae.model_folder import model_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"

OWN_ENCODER = """
from torch import nn

from dc_ssdae import DiagonalGaussian


class OwnEncoder(nn.Module):
    def __init__(self, latent_channels: int, downsample_factor: int, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, downsample_factor, downsample_factor)
        self.out = nn.Conv2d(width, 2 * latent_channels, 1)

    def forward(self, x):
        return DiagonalGaussian.from_moments(self.out(self.patch(x)))
"""


@pytest.fixture
def run_dir(model_dir: Path, tmp_path: Path) -> Path:
    """The folder of a training run that has written a checkpoint and its model."""
    folder = tmp_path / "runs" / "first"
    (folder / "checkpoints" / "last").mkdir(parents=True)
    (folder / "config.yaml").write_text("model:\n  latent_channels: 4\n")
    shutil.copytree(model_dir, folder / "model")
    return folder


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A saved model with an encoder of `own_encoders.py` in the current folder, which is not imported any more."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "own_encoders.py").write_text(OWN_ENCODER)
    monkeypatch.chdir(project)
    with importing_from(project):
        own = import_class("own_encoders.OwnEncoder")
    part = {"class_path": "own_encoders.OwnEncoder", "init_args": {"width": 16}}
    DCSSDAE.from_preset("demo", encoder=part, classes=[own]).save_pretrained(project / "saved")
    del sys.modules["own_encoders"]
    yield project / "saved"
    for name in ("own_encoders", "other_encoders", "broken"):
        sys.modules.pop(name, None)


class TestRunFolder:
    def test_every_command_takes_a_run(self, run: Callable, run_dir: Path, photo: Path, tmp_path: Path) -> None:
        """With what it would give for the model's own folder."""
        for number, model in enumerate((run_dir, run_dir / "model")):
            out = tmp_path / str(number)
            assert run("reconstruct", photo, "--model", model, "--out", out).code == 0
            assert run("encode", photo, "--model", model, "--out", out).code == 0
            assert run("decode", out / "photo.safetensors", "--model", model, "--out", out / "decoded").code == 0
        for name in ("photo.png", "decoded/photo.png"):
            assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
        of_run, of_model = (load_file(tmp_path / name / "photo.safetensors")["latent"] for name in "01")
        assert torch.equal(of_run, of_model)
        of_run, of_model = (
            json.loads("\n".join(run("info", path, "--json").out)) for path in (run_dir, run_dir / "model")
        )
        assert of_run.pop("name") == str(run_dir)
        del of_model["name"]
        assert of_run == of_model

    @pytest.mark.parametrize("has_config", [True, False], ids=["config without weights", "no model folder"])
    def test_a_run_before_its_first_checkpoint(
        self, has_config: bool, run: Callable, run_dir: Path, photo: Path, tmp_path: Path
    ) -> None:
        if has_config:
            (run_dir / "model" / WEIGHTS).unlink()
        else:
            shutil.rmtree(run_dir / "model")
        message = f"{run_dir} has no model yet: the first checkpoint writes it"
        for command, words in (
            ("reconstruct", (photo, "--model", run_dir, "--out", tmp_path / "out")),
            ("encode", (photo, "--model", run_dir, "--out", tmp_path / "out")),
            ("info", (run_dir,)),
        ):
            outcome = run(command, *words)
            assert outcome.code == 2
            assert outcome.err == [f"dc-ssdae {command}: {message}"]
        with pytest.raises(InputError, match="has no model yet"):
            model_folder(run_dir)

    def test_which_folder_is_meant(self, run_dir: Path, model_dir: Path, tmp_path: Path) -> None:
        assert model_folder(run_dir) == model_folder(str(run_dir / "model")) == run_dir / "model"
        DCSSDAE.from_pretrained(run_dir / "model").save_pretrained(run_dir / "model", max_shard_size="50KB")
        (run_dir / "model" / WEIGHTS).unlink()
        assert model_folder(run_dir) == run_dir / "model", "with weights in shards"
        (run_dir / "config.yaml").unlink()
        assert model_folder(run_dir) == run_dir / "model"
        # A model's own folder is itself, whatever lies beside its files.
        own = Path(shutil.copytree(model_dir, tmp_path / "own"))
        shutil.copytree(model_dir, own / "model")
        (own / "config.yaml").write_text("")
        assert model_folder(own) == own
        empty = tmp_path / "empty"
        empty.mkdir()
        assert model_folder(empty) == empty


class TestImport:
    def test_a_model_with_a_class_of_the_current_folder(
        self, run: Callable, own_model: Path, photo: Path, tmp_path: Path
    ) -> None:
        before = list(sys.path)
        words = ("reconstruct", photo, "--model", own_model, "--out", tmp_path / "out")
        outcome = run(*words)
        assert outcome.code == 2
        assert outcome.err == [
            "dc-ssdae reconstruct: encoder class 'own_encoders.OwnEncoder' is not imported, or is no class: "
            "import own_encoders first, or pass the class as classes=[OwnEncoder]"
        ]
        assert "own_encoders" not in sys.modules
        assert run(*words, "--import", "own_encoders").code == 0
        assert Image.open(tmp_path / "out" / "photo.png").size == (37, 24)
        assert sys.path == before

    def test_a_class_that_has_moved_to_another_module(
        self, run: Callable, own_model: Path, photo: Path, tmp_path: Path
    ) -> None:
        Path("own_encoders.py").rename("other_encoders.py")
        words = ("encode", photo, "--model", own_model, "--out", tmp_path / "out")
        assert run(*words, "--import", "json", "--import", "other_encoders").code == 0
        profile = json.loads("\n".join(run("info", own_model, "--import", "other_encoders", "--json").out))
        assert profile["encoder"]["class_path"] == "other_encoders.OwnEncoder"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module", "no module named 'no_such_module'"),
            ("broken", "importing broken failed with ZeroDivisionError: division by zero ("),
            ("", "argument --import: the name is empty"),
        ],
    )
    def test_what_cannot_be_imported(
        self, name: str, message: str, run: Callable, own_model: Path, photo: Path, tmp_path: Path
    ) -> None:
        Path("broken.py").write_text("x = 1\n1 / 0\n")
        outcome = run("encode", photo, "--model", own_model, "--out", tmp_path / "out", "--import", name)
        assert outcome.code == 2
        (line,) = outcome.err
        assert line.startswith(f"dc-ssdae encode: {message}")


def test_a_model_saved_as_one_variant_alone_needs_no_word_more(run: Callable, tmp_path: Path, photo: Path) -> None:
    model = DCSSDAE.from_preset("demo")
    model.save_pretrained(tmp_path / "half", variant="fp16")
    words = ("reconstruct", photo, "--out", tmp_path / "out", "--device", "cpu", "--model")
    assert run(*words, tmp_path / "half").code == 0
