"""`dc-ssdae latents`: its options, its lines, its exit codes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_samples import Refusal, Run, Words, save_photos

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.data.latents import LatentDataset
from dc_ssdae.data.transforms import center_crop, resize_shorter_side
from dc_ssdae.provenance import name_of_path


@pytest.fixture
def options(model_dir: Path) -> Words:
    """Three photos in photos/train, of two classes, and one in photos/validation, of the second."""
    save_photos(Path("photos"), "train/bird/0", "train/bird/1", "train/cat/2", "validation/cat/3")
    return ("--model", model_dir, "--device", "cpu", "--size", 32, "--workers", 0)


@pytest.fixture
def words(options: Words) -> Words:
    """A command that encodes the photos into the folder out."""
    return ("latents", "photos", "out", *options)


def test_lines_shards_and_the_reader(run: Run, refusal: Refusal, words: Words, model_dir: Path, tmp_path: Path) -> None:
    words += ("--shard-size", 2, "--flip")
    lines = ["train: 3 images in 2 shards -> out/train", "validation: 1 image in 1 shard -> out/validation"]
    assert run(*words) == (0, lines, [])
    dataset = LatentDataset("out/train", flip=False)
    image = read_image(Path("photos/train", dataset.stored(0).name)).pixels
    pixels = center_crop(resize_shorter_side(image, 32), 32)[None]
    for batch, key in ((pixels, "latent"), (pixels.flip(-1), "latent_flip")):
        with torch.inference_mode():
            z = DCSSDAE.from_pretrained(model_dir).encode(to_model_range(batch)).latent_dist.mode()
        torch.testing.assert_close(getattr(dataset.stored(0), key), z[0], atol=1e-5, rtol=1e-5)
    assert [dataset[index].label for index in range(3)] == [0, 0, 1]
    assert LatentDataset("out/validation")[0].label == 1
    manifest = Path("out/train/manifest.json").read_text()
    assert json.loads(manifest)["model"]["name"] == name_of_path(model_dir)
    assert str(tmp_path) not in manifest, "it tells nothing of where things lie"
    again = run(*words, "--model", shutil.copytree(model_dir, "other"))
    assert (again.code, again.out) == (0, lines)
    assert [line.rpartition(" is ")[2] for line in again.err] == ["finished already; nothing to do"] * 2
    assert "'out/train' was begun with store mean" in refusal(*words, "--store", "sample")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--store sample --seed 7", {"store": "sample", "seed": 7, "flip": False}),
        ("--dtype bfloat16 --images 2", {"store_dtype": "bfloat16", "compute_dtype": "bfloat16", "images": 2}),
        ("--store mean_std --store-dtype float16", {"store": "mean_std", "store_dtype": "float16"}),
    ],
)
def test_options_reach_the_manifest(run: Run, words: Words, more: str, expected: dict[str, object]) -> None:
    outcome = run(*words, "--split", "train", *more.split())
    assert (outcome.code, len(outcome.out), outcome.err) == (0, 1, [])
    (part,) = Path("out").iterdir()
    assert part.name == "train"
    assert expected.items() <= json.loads((part / "manifest.json").read_bytes())["settings"].items()


@pytest.mark.parametrize(("validation", "parts"), [("", {"": 2}), ("photos/validation", {"train": 2, "validation": 1})])
def test_images_that_a_yaml_names(run: Run, options: Words, validation: str, parts: dict[str, int]) -> None:
    own = {"class_path": "ImageFolder", "init_args": {"root": "photos/train/bird"}}
    Path("config.yaml").write_text(json.dumps({"data": {"dataset": own, "validation": validation or None}}))
    assert run("latents", "config.yaml", "out", *options).code == 0
    assert {name: len(LatentDataset(Path("out", name))) for name in parts} == parts


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {}", "section data"),
        ("data: {}", "data.root"),
        ("data: {root: .}", "lies in the source"),
        ("data: {root: 'pipe:touch ran'}", "'pipe:touch"),
        ("data: {class_path: HubDataset, root: 'pipe:touch ran'}", "'pipe:touch"),
        ("data: {root: 'http://127.0.0.1:9/0.tar::pipe:touch ran'}", "'pipe:touch"),
        ("data: {dataset: {class_path: Shards, init_args: {urls: ['gs://x/$(touch ran)']}}}", "'gs:"),
    ],
)
def test_a_yaml_that_names_no_images_or_runs_a_command(refusal: Refusal, options: Words, text: str, named: str) -> None:
    Path("config.yaml").write_text(text)
    assert named in refusal("latents", "config.yaml", "out", *options)
    assert not Path("ran").exists()


def test_images_that_are_broken_small_or_without_a_label_are_told(run: Run, words: Words, options: Words) -> None:
    Path("photos/train/bird/x.png").write_text("no image")
    outcome = run(*words)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 2)
    assert outcome.err[0].startswith("dc-ssdae latents: left out: cannot read image 'photos/train/bird/x.png'")
    assert "1 of 4 images are broken" in outcome.err[1]
    outcome = run(*words, "--max-broken-share", 0.25)
    assert outcome.out[0].endswith("; 1 broken, left out, listed in manifest.json")
    outcome = run("latents", "photos/train/cat", "cat", *options, "--size", 48)
    assert outcome.out == ["1 image in 1 shard -> cat; 1 without a label (-1)"]
    assert any("1 of 1 image" in line and "smaller than 48 px" in line for line in outcome.err)


def test_other_processes_are_silent(run: Run, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(*words, "--seed", 1) == (2, [], [])
