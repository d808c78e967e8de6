"""`dc-ssdae stats`: what it measures, prints and writes, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_samples import WEIGHTS, Outcome, Refusal, Run, Words, save_photos
from PIL import Image

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.data.transforms import center_crop, resize_shorter_side

SETTINGS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with train/, which holds four PNG and one that is none, and validation/, which is not to be read."""
    folder = save_photos(tmp_path / "photos", *(f"train/{number}" for number in range(4)))
    (folder / "train" / "bad.png").write_bytes(b"no image")
    (folder / "validation").mkdir()
    Image.new("RGB", (40, 40), "white").save(folder / "validation" / "white.png")
    return folder


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be written into."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def words(model: Path, photos: Path) -> Words:
    return ("stats", "--model", model, "--data", photos, "--device", "cpu", "--size", 32, "--workers", 0)


@pytest.fixture
def stats(run: Run, words: Words) -> Callable[..., Outcome]:
    return lambda *more: run(*words, *more)


def config_of(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())


@torch.no_grad()
def test_normalised_latents_have_mean_0_and_deviation_1(stats: Run, model: Path, photos: Path) -> None:
    before, weights = config_of(model), (model / WEIGHTS).read_bytes()
    outcome = stats("--batch", 3)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith("dc-ssdae stats: left out: cannot read image")
    assert "bad.png" in line

    after = config_of(model)
    assert {name for name in after if after[name] != before.get(name)} == set(SETTINGS)
    assert {name: before[name] for name in before if name not in SETTINGS}.items() <= after.items()
    assert (model / WEIGHTS).read_bytes() == weights
    assert {file.name for file in model.iterdir()} == {"README.md", "config.json", WEIGHTS}

    loaded = DCSSDAE.from_pretrained(model)
    config = loaded.config
    pixels = [read_image(photos / "train" / f"{number}.png").pixels for number in range(4)]
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


def test_table_json_and_card_say_what_is_written(stats: Run, model: Path, photos: Path) -> None:
    table = stats()
    config = config_of(model)
    assert (
        f"`scaling_factor` {config['scaling_factor']:.6g}, or channel by channel" in (model / "README.md").read_text()
    )
    rows = dict(line.split(maxsplit=1) for line in table.out)
    assert rows["scaling_factor"] == f"{config['scaling_factor']:,.5g}"
    assert rows["latents_mean"].split() == [f"{mean:,.5g}" for mean in config["latents_mean"]]
    assert rows["images"] == "4"
    assert any(line.startswith("written ") for line in table.out)
    told = stats("--json").json()
    assert {name: told[name] for name in SETTINGS} == {name: config[name] for name in SETTINGS}
    assert (told["images"], told["size"]) == (4, 32)
    assert told["broken"] == [str(photos / "train" / "bad.png")]
    assert told["written"] == str(model / "config.json")


def test_a_run_means_its_model_and_no_write_only_prints(stats: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    model.rename(tmp_path / "run" / "model")
    before = config_of(tmp_path / "run" / "model")
    more = ("--model", tmp_path / "run", "--images", 2)
    outcome = stats(*more, "--no-write", "--size", 48, "--dtype", "bfloat16")
    assert outcome.out[-1].split() == ["written", "-"]
    assert outcome.err[-1].startswith("dc-ssdae stats: 2 of 2 images were smaller than 48 px")
    assert config_of(tmp_path / "run" / "model") == before
    assert stats(*more).code == 0
    assert config_of(tmp_path / "run" / "model")["scaling_factor"] != 1.0
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.yaml", "model"}


def test_what_cannot_be_measured(
    refusal: Refusal, stats: Run, words: Words, model: Path, photos: Path, tmp_path: Path
) -> None:
    before = (model / "config.json").read_bytes()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for more, named in (
        (("--size", 30), "f = 8"),
        (("--model", "owner/model"), "owner/model"),
        (("--model", photos), "config.json is missing"),
        (("--data", tmp_path / "absent"), "absent"),
        (("--data", tmp_path / "broken"), "a.png"),
    ):
        assert named in refusal(*words, *more)
    assert (model / "config.json").read_bytes() == before
    loaded = DCSSDAE.from_pretrained(model)
    torch.nn.init.constant_(next(loaded.encoder.parameters()), float("inf"))
    loaded.save_pretrained(model)
    outcome = stats()
    assert outcome.code == 2
    assert "not finite" in outcome.err[-1]
    assert (model / "config.json").read_bytes() == before


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fails_leaves_the_old_file(stats: Run, model: Path) -> None:
    before = (model / "config.json").read_bytes()
    outcome = stats()
    assert outcome.code == 2
    assert outcome.err[-1].endswith("config.json: No space left on device")
    assert (model / "config.json").read_bytes() == before
    assert {file.name for file in model.iterdir()} == {"README.md", "config.json", WEIGHTS}
    assert any(line.startswith("scaling_factor") for line in outcome.out), "the figures are lost"
    assert outcome.out[-1].split() == ["written", "-"]
