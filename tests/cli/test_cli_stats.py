"""`dc-ssdae stats`: what it measures, prints and writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_samples import WEIGHTS, Run, Words, save_photos
from PIL import Image

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.data.transforms import center_crop, resize_shorter_side

SETTINGS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


@pytest.fixture
def words(model_dir: Path) -> Words:
    """A copy of the saved model, four PNG and one that is none in train/, and validation/, which is not to be read."""
    shutil.copytree(model_dir, "model")
    save_photos(Path("photos"), *(f"train/{number}" for number in range(4)))
    Path("photos/train/bad.png").write_bytes(b"no image")
    Path("photos/validation").mkdir()
    Image.new("RGB", (40, 40), "white").save("photos/validation/white.png")
    return ("stats", "--model", "model", "--data", "photos", "--device", "cpu", "--size", 32, "--workers", 0)


def config_of(model: str) -> dict:
    return json.loads(Path(model, "config.json").read_text())


@torch.no_grad()
def test_normalised_latents_have_mean_0_and_deviation_1(run: Run, words: Words, model_dir: Path) -> None:
    before, weights = config_of(str(model_dir)), (model_dir / WEIGHTS).read_bytes()
    outcome = run(*words, "--batch", 3)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith("dc-ssdae stats: left out: cannot read image 'photos/train/bad.png'")

    after = config_of("model")
    assert {name for name in after if after[name] != before.get(name)} == set(SETTINGS)
    assert Path("model", WEIGHTS).read_bytes() == weights
    assert {file.name for file in Path("model").iterdir()} == {"README.md", "config.json", WEIGHTS}

    loaded = DCSSDAE.from_pretrained("model")
    config = loaded.config
    pixels = [read_image(Path(f"photos/train/{number}.png")).pixels for number in range(4)]
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


def test_table_json_and_card_say_what_is_written(run: Run, words: Words) -> None:
    rows = dict(line.split(maxsplit=1) for line in run(*words).out)
    config = config_of("model")
    told = f"`scaling_factor` {config['scaling_factor']:.6g}, or channel by channel"
    assert told in Path("model/README.md").read_text()
    for name in SETTINGS:
        figures = config[name] if isinstance(config[name], list) else [config[name]]
        assert rows[name].split() == [f"{figure:.5g}" for figure in figures]
    assert (rows["images"], rows["size"], rows["written"]) == ("4", "32", "model/config.json")
    expected = {"images": 4, "size": 32, "broken": ["photos/train/bad.png"], "written": "model/config.json"}
    assert run(*words, "--json").json() == {**expected, **{name: config[name] for name in SETTINGS}}


def test_a_run_means_its_model_and_no_write_only_prints(run: Run, words: Words) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("")
    Path("model").rename("run/model")
    before = config_of("run/model")
    more = ("--model", "run", "--images", 2)
    outcome = run(*words, *more, "--no-write", "--size", 48, "--dtype", "bfloat16")
    assert not any(line.startswith("written") for line in outcome.out)
    assert outcome.err[-1].startswith("dc-ssdae stats: 2 of 2 images were smaller than 48 px")
    assert config_of("run/model") == before
    assert run(*words, *more).code == 0
    assert config_of("run/model")["scaling_factor"] != 1.0


def test_latents_that_are_not_finite(run: Run, words: Words) -> None:
    before = config_of("model")
    loaded = DCSSDAE.from_pretrained("model")
    torch.nn.init.constant_(next(loaded.encoder.parameters()), float("inf"))
    loaded.save_pretrained("model")
    outcome = run(*words)
    assert outcome.code == 2
    assert "not finite" in outcome.err[-1]
    assert config_of("model") == before


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fails_leaves_the_old_file(run: Run, words: Words, model_dir: Path) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    assert outcome.err[-1].endswith("config.json: No space left on device")
    assert Path("model/config.json").read_bytes() == (model_dir / "config.json").read_bytes()
    assert {file.name for file in Path("model").iterdir()} == {"README.md", "config.json", WEIGHTS}
    assert any(line.startswith("scaling_factor") for line in outcome.out), "the figures are lost"
    assert not any(line.startswith("written") for line in outcome.out)
