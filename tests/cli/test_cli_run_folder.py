"""`--model` that is a training run's folder, and `--import` for models that name a user's classes."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_samples import WEIGHTS, Refusal, Run
from safetensors.torch import load_file
from tiny_models import loading_refusal

from dc_ssdae import DCSSDAE
from dc_ssdae.classes import import_class, importing_from
from dc_ssdae.model_folder import model_folder

OWN_ENCODER = """
from tiny_models import PatchEncoder


class OwnEncoder(PatchEncoder):
    pass
"""


@pytest.fixture
def own_model(tmp_path: Path) -> Iterator[Path]:
    """A saved model with an encoder of `own_encoders.py` in the current folder, which is not imported any more."""
    Path("own_encoders.py").write_text(OWN_ENCODER)
    with importing_from(tmp_path):
        own = import_class("own_encoders.OwnEncoder")
    DCSSDAE.from_preset("demo", encoder={"class_path": "own_encoders.OwnEncoder"}, classes=[own]).save_pretrained(
        "saved"
    )
    del sys.modules["own_encoders"]
    yield Path("saved")
    for name in ("own_encoders", "other_encoders"):
        sys.modules.pop(name, None)


def test_which_folder_is_meant(model_dir: Path) -> None:
    run = Path("runs/first")
    shutil.copytree(model_dir, run / "model")
    assert model_folder(run) == run / "model"
    (run / "config.yaml").touch()
    for folder in (run, str(run), run / "model"):
        assert model_folder(folder) == run / "model"
    # A model's own folder is itself, whatever lies beside its files.
    shutil.copytree(model_dir, "own")
    shutil.copytree(run, "own", dirs_exist_ok=True)
    assert model_folder("own") == Path("own")
    assert model_folder("runs") == Path("runs")
    (run / "model" / WEIGHTS).unlink()
    assert f"{WEIGHTS}: no such file" in loading_refusal(run)
    DCSSDAE.from_pretrained(model_dir).save_pretrained(run / "model", max_shard_size="50KB")
    assert not (run / "model" / WEIGHTS).exists()
    assert model_folder(run) == run / "model"
    shutil.rmtree(run / "model")
    assert "runs/first holds no model" in loading_refusal(run)


def test_a_class_of_the_current_folder(run: Run, refusal: Refusal, own_model: Path, photo: Path) -> None:
    before = list(sys.path)
    words = ("encode", photo, "--model", own_model, "--out", "out")
    assert "'own_encoders.OwnEncoder'" in refusal(*words)
    assert "own_encoders" not in sys.modules
    assert run(*words, "--import", "own_encoders").code == 0
    assert load_file("out/photo.safetensors")["latent"].shape == (4, 3, 5)
    assert sys.path == before
    sizes = run("info", own_model, "--groups", "--json", "--import", "own_encoders").json()
    assert next(iter(sizes.items())) == ("encoder", 8 * (3 * 8 * 8 + 1)), "one group, as it names none"
    Path("own_encoders.py").rename("other_encoders.py")
    moved = run("info", own_model, "--import", "json", "--import", "other_encoders", "--json", "--device", "cpu").json()
    assert moved["encoder"] == {"class_path": "other_encoders.OwnEncoder", "variance": True}


def test_a_model_saved_as_one_variant_alone_needs_no_word_more(run: Run, photo: Path) -> None:
    DCSSDAE.from_preset("demo").save_pretrained("half", variant="fp16")
    assert run("encode", photo, "--model", "half", "--out", "out").code == 0
