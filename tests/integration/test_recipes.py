"""`dc-ssdae train --recipe` as a user meets it: all phases by one command, kills in each of them, mistakes."""

from pathlib import Path

import pytest
from PIL import Image
from tiny import make_images
from training_runs import train, write_config

from dc_ssdae.cli.main import main

STEPS = 2
FOLDERS = ("1-low_resolution", "2-latent_adaptation", "3-decoder_refinement")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", 12)
    make_images(root / "val", 3, seed=1)
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory, data) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", data, steps=1, optimizer="adamw")


def words(config: Path) -> list[str]:
    """The packaged recipe, small."""
    small = ["--data.image_size", "32", "--training.batch_size", "4", "--training.steps", str(STEPS)]
    return ["--recipe", "three_phase", "--config", str(config), *small, "--training.evaluate_every", "100"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config) -> Path:
    """A recipe that nothing disturbed, in the folder that it gets by itself."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(words(config), folder / "log", cwd=folder) == 0, (folder / "log").read_text()
    assert f"done after step {STEPS}: the model is runs/tiny-three_phase/model" in (folder / "log").read_text()
    return folder / "runs" / "tiny-three_phase"


def test_its_folder_serves_as_a_model(whole, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (20, 30), "teal").save(photo)
    for number, model in enumerate((whole, whole / FOLDERS[2], whole / FOLDERS[0])):
        out = tmp_path / str(number)
        assert main(["reconstruct", str(photo), "--model", str(model), "--out", str(out)]) == 0
    results = [(tmp_path / str(number) / "photo.png").read_bytes() for number in range(3)]
    assert results[0] == results[1] != results[2]
