"""`dc-ssdae stats`: what it measures, prints and writes, and what it refuses."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_samples import random_pixels
from PIL import Image

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.data.transforms import center_crop, resize_shorter_side

SETTINGS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with train/, which holds six PNG and one that is none, and validation/, which is not to be read."""
    folder = tmp_path / "photos"
    for part in ("train", "validation"):
        (folder / part).mkdir(parents=True)
    for number in range(6):
        Image.fromarray(random_pixels(40 + number, 60, seed=number)).save(folder / "train" / f"{number}.png")
    (folder / "train" / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40), "white").save(folder / "validation" / "white.png")
    return folder


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be written into."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def words(model: object, photos: Path, *more: object) -> tuple[object, ...]:
    return ("stats", "--model", model, "--data", photos, "--device", "cpu", "--size", 32, "--workers", 0, *more)


def one_line(run: Callable, *given: object) -> str:
    outcome = run(*given)
    assert outcome.code == 2
    assert not outcome.out
    (line,) = outcome.err
    return line


@torch.no_grad()
def test_normalised_latents_have_mean_0_and_deviation_1(run: Callable, model: Path, photos: Path) -> None:
    before, weights = json.loads((model / "config.json").read_text()), (model / WEIGHTS).read_bytes()
    outcome = run(*words(model, photos, "--batch", 4))
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith("dc-ssdae stats: left out: cannot read image")
    assert "bad.png" in line

    after = json.loads((model / "config.json").read_text())
    assert {name for name in after if after[name] != before.get(name)} == set(SETTINGS)
    assert (model / WEIGHTS).read_bytes() == weights
    assert {file.name for file in model.iterdir()} == {"README.md", "config.json", WEIGHTS}

    loaded = DCSSDAE.from_pretrained(model)
    config = loaded.config
    pixels = [read_image(photos / "train" / f"{number}.png").pixels for number in range(6)]
    x = torch.stack([center_crop(resize_shorter_side(image, 32), 32) for image in pixels])
    posterior = loaded.encode(to_model_range(x)).latent_dist
    z = torch.stack([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(200)])
    mean, std = (torch.tensor(config[name]).view(1, 1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    each = ((z - mean) / std).transpose(0, 2).flatten(1)
    torch.testing.assert_close(each.mean(dim=1), torch.zeros(4), atol=0.02, rtol=0.0)
    torch.testing.assert_close(each.std(dim=1), torch.ones(4), atol=0.02, rtol=0.0)
    together = (z - config.shift_factor) * config.scaling_factor
    assert abs(together.mean().item()) < 0.02
    assert abs(together.std().item() - 1.0) < 0.02


def test_table_and_json_say_what_is_written(run: Callable, model: Path, photos: Path) -> None:
    assert "of the latent are not known" in (model / "README.md").read_text()
    table = run(*words(model, photos))
    config = json.loads((model / "config.json").read_text())
    card = (model / "README.md").read_text()
    assert f"`scaling_factor` {config['scaling_factor']:.6g}, or channel by channel" in card
    rows = [line.split() for line in table.out]
    assert rows[0] == ["channel", "mean", "std"]
    for channel in range(4):
        mean, std = config["latents_mean"][channel], config["latents_std"][channel]
        assert rows[1 + channel] == [str(channel), f"{mean:.5g}", f"{std:.5g}"]
    assert ["scaling_factor", f"{config['scaling_factor']:.5g}"] in rows
    assert table.out[-1] == f"6 images of 32 x 32 pixels -> {model / 'config.json'}"

    told = json.loads("\n".join(run(*words(model, photos, "--json")).out))
    assert {name: told[name] for name in SETTINGS} == {name: config[name] for name in SETTINGS}
    assert (told["images"], told["size"], told["broken"]) == (6, 32, [str(photos / "train" / "bad.png")])
    assert told["written"] == str(model / "config.json")


def test_no_write_only_prints(run: Callable, model: Path, photos: Path) -> None:
    before = (model / "config.json").read_bytes()
    outcome = run(*words(model, photos, "--no-write", "--images", 2, "--dtype", "bfloat16"))
    assert outcome.code == 0
    assert outcome.out[-1] == "2 images of 32 x 32 pixels not written"
    assert (model / "config.json").read_bytes() == before


def test_a_run_means_its_model(run: Callable, model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    model.rename(folder / "model")
    assert run(*words(folder, photos)).code == 0
    assert json.loads((folder / "model" / "config.json").read_text())["scaling_factor"] != 1.0
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "model"}


def test_what_cannot_be_measured(run: Callable, model: Path, photos: Path, tmp_path: Path) -> None:
    before = (model / "config.json").read_bytes()
    assert "both sides must be multiples of f = 8; pad it to 32×32" in one_line(
        run, *words(model, photos, "--size", 30)
    )
    assert "owner/model is no folder of a model" in one_line(run, *words("owner/model", photos))
    assert "there is no folder" in one_line(run, *words(model, tmp_path / "absent"))
    assert "config.json is missing" in one_line(run, *words(photos, photos))
    assert "--images" in one_line(run, *words(model, photos, "--images", 0))
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("a.png", "b.png"):
        (broken / name).write_bytes(b"no image")
    line = one_line(run, *words(model, broken))
    assert "none of 2 images can be read; the first: " in line
    assert "a.png" in line
    assert (model / "config.json").read_bytes() == before


def test_a_model_that_gives_infinities(run: Callable, model: Path, photos: Path) -> None:
    loaded = DCSSDAE.from_pretrained(model)
    with torch.no_grad():
        next(loaded.encoder.parameters()).fill_(float("inf"))
    loaded.save_pretrained(model)
    before = (model / "config.json").read_bytes()
    outcome = run(*words(model, photos))
    assert outcome.code == 2
    assert outcome.err[-1] == (
        "dc-ssdae stats: the latents' statistics are not finite: the encoder gives infinities, or NaN"
    )
    assert (model / "config.json").read_bytes() == before


def test_a_disk_that_fails_leaves_the_old_file(
    run: Callable, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    before = (model / "config.json").read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    outcome = run(*words(model, photos))
    assert outcome.code == 2
    assert outcome.err[-1].endswith("config.json: No space left on device")
    assert (model / "config.json").read_bytes() == before
    assert {file.name for file in model.iterdir()} == {"README.md", "config.json", WEIGHTS}
    assert any(line.startswith("scaling_factor") for line in outcome.out), "the figures are lost"
    assert outcome.out[-1].endswith("not written")


def test_images_that_were_enlarged_are_told(run: Callable, model: Path, photos: Path) -> None:
    outcome = run(*words(model, photos, "--size", 48, "--no-write"))
    assert outcome.code == 0
    assert outcome.err[-1].startswith("dc-ssdae stats: 6 of 6 images were smaller than 48 px")
