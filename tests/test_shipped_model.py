"""The model that comes with the package: where it is taken, what it weighs, and that it is good."""

from pathlib import Path

import pytest
import torch

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.main import main
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.evaluation.reconstruction import measure_photo
from dc_ssdae.model_folder import model_folder, read_config
from dc_ssdae.presets import SHIPPED_MODEL


def test_it_is_small_and_known_in_full() -> None:
    folder = model_folder(SHIPPED_MODEL)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12_000_000
    config = read_config(folder)
    assert (config["downsample_factor"], config["latent_channels"]) == (8, 16)
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16


def test_it_beats_resizing_to_as_many_values() -> None:
    photos = pytest.importorskip("dc_ssdae.data.sample_photos").sample_photos("held_out")
    model = DCSSDAE.from_pretrained()
    assert model.dtype == torch.float32
    assert not model.training
    results = [measure_photo(model, photo.name, resize_shorter_side(photo.pixels, 256), 1) for photo in photos]
    gains = [result.figures["psnr"] - result.figures["psnr_bicubic"] for result in results]
    assert min(gains) > 0.5
    assert sum(gains) / len(gains) > 1.5


def test_it_is_taken_where_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 24), (200, 30, 90)).save("photo.png")
    assert main(["reconstruct", "photo.png", "--out", "out"]) == 0
    red, green, blue = Image.open("out/photo.png").convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert max(abs(red - 200), abs(green - 30), abs(blue - 90)) < 8


def test_a_folder_of_that_name_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(SHIPPED_MODEL).mkdir()
    assert model_folder(SHIPPED_MODEL) == Path(SHIPPED_MODEL)
