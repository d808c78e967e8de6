"""`--model` that is a training run's folder, and `--import` for models that name a user's classes."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_samples import WEIGHTS, Refusal, Run
from safetensors.torch import load_file

from dc_ssdae import DCSSDAE
from dc_ssdae.classes import import_class, importing_from
from dc_ssdae.model_folder import model_folder

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


def test_every_command_takes_a_run(run: Run, run_dir: Path, photo: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("gone", ["model", f"model/{WEIGHTS}"])
def test_a_run_before_its_first_checkpoint(
    gone: str, refusal: Refusal, run_dir: Path, photo: Path, tmp_path: Path
) -> None:
    path = run_dir / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for words in (("encode", photo, "--out", tmp_path / "out", "--model"), ("info",)):
        assert str(run_dir) in refusal(*words, run_dir)


def test_which_folder_is_meant(run_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    for folder in (run_dir, str(run_dir), run_dir / "model"):
        assert model_folder(folder) == run_dir / "model"
    (run_dir / "config.yaml").unlink()
    assert model_folder(run_dir) == run_dir / "model"
    # A model's own folder is itself, whatever lies beside its files.
    own = Path(shutil.copytree(model_dir, tmp_path / "own"))
    shutil.copytree(model_dir, own / "model")
    (own / "config.yaml").write_text("")
    assert model_folder(own) == own
    assert model_folder(tmp_path) == tmp_path
    (run_dir / "model" / WEIGHTS).unlink()
    DCSSDAE.from_pretrained(model_dir).save_pretrained(run_dir / "model", max_shard_size="50KB")
    assert not (run_dir / "model" / WEIGHTS).exists()
    assert model_folder(run_dir) == run_dir / "model"


def test_a_class_of_the_current_folder(
    run: Run, refusal: Refusal, own_model: Path, photo: Path, tmp_path: Path
) -> None:
    before = list(sys.path)
    words = ("encode", photo, "--model", own_model, "--out", tmp_path / "out")
    assert "'own_encoders.OwnEncoder'" in refusal(*words)
    assert "own_encoders" not in sys.modules
    assert run(*words, "--import", "own_encoders").code == 0
    assert load_file(tmp_path / "out" / "photo.safetensors")["latent"].shape == (4, 3, 5)
    assert sys.path == before
    sizes = run("info", own_model, "--groups", "--json", "--import", "own_encoders").json()
    assert next(iter(sizes.items())) == ("encoder", 16 * (3 * 8 * 8 + 1) + 8 * (16 + 1)), "one group, as it names none"
    profile = run("info", own_model, "--import", "own_encoders", "--json", "--device", "cpu").json()
    assert profile["encoder"] == {"class_path": "own_encoders.OwnEncoder", "width": 16}
    assert profile["sizes"]["256"]["encode_flops"] > 0


def test_a_class_that_has_moved_to_another_module(run: Run, own_model: Path) -> None:
    Path("own_encoders.py").rename("other_encoders.py")
    profile = run("info", own_model, "--import", "json", "--import", "other_encoders", "--json").json()
    assert profile["encoder"]["class_path"] == "other_encoders.OwnEncoder"


@pytest.mark.parametrize(
    ("name", "named"), [("no_such_module", "'no_such_module'"), ("broken", "line 2"), ("../own", "'../own'")]
)
def test_what_cannot_be_imported(name: str, named: str, refusal: Refusal, own_model: Path) -> None:
    Path("broken.py").write_text("x = 1\n1 / 0\n")
    assert named in refusal("info", own_model, "--import", name)


def test_a_model_saved_as_one_variant_alone_needs_no_word_more(run: Run, tmp_path: Path, photo: Path) -> None:
    DCSSDAE.from_preset("demo").save_pretrained(tmp_path / "half", variant="fp16")
    assert run("encode", photo, "--model", tmp_path / "half", "--out", tmp_path / "out").code == 0
