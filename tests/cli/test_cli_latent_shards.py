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
def photos(tmp_path: Path) -> Path:
    """Three photos in train/, of two classes, and one in validation/, of the second."""
    return save_photos(tmp_path / "photos", "train/bird/0", "train/bird/1", "train/cat/2", "validation/cat/3")


@pytest.fixture
def options(model_dir: Path) -> Words:
    return ("--model", model_dir, "--device", "cpu", "--size", 32, "--workers", 0)


@pytest.fixture
def words(photos: Path, tmp_path: Path, options: Words) -> Words:
    """A command that encodes the photos into the folder out."""
    return ("latents", photos, tmp_path / "out", *options)


def test_lines_shards_and_the_reader(
    run: Run, refusal: Refusal, words: Words, model_dir: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words += ("--shard-size", 2, "--flip")
    lines = [f"train: 3 images in 2 shards -> {out}/train", f"validation: 1 image in 1 shard -> {out}/validation"]
    assert run(*words) == (0, lines, [])
    dataset = LatentDataset(out / "train", flip=False)
    image = read_image(photos / "train" / dataset.stored(0).name).pixels
    pixels = center_crop(resize_shorter_side(image, 32), 32)[None]
    for batch, key in ((pixels, "latent"), (pixels.flip(-1), "latent_flip")):
        with torch.inference_mode():
            z = DCSSDAE.from_pretrained(model_dir).encode(to_model_range(batch)).latent_dist.mode()
        torch.testing.assert_close(getattr(dataset.stored(0), key), z[0], atol=1e-5, rtol=1e-5)
    assert [dataset[index].label for index in range(3)] == [0, 0, 1]
    assert LatentDataset(out / "validation")[0].label == 1
    assert dataset.classes == ["bird", "cat"]
    manifest = (out / "train" / "manifest.json").read_text()
    assert json.loads(manifest)["model"]["name"] == name_of_path(model_dir)
    assert str(tmp_path) not in manifest, "it tells nothing of where things lie"
    other = shutil.copytree(model_dir, tmp_path / "other")
    again = run(*words, "--model", other)
    assert (again.code, again.out) == (0, lines)
    assert [line.rpartition(" is ")[2] for line in again.err] == ["finished already; nothing to do"] * 2
    assert f"'{out}/train' was begun with store mean" in refusal(*words, "--store", "sample")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            "--store sample --seed 7 --dtype bfloat16 --batch 2",
            {"store": "sample", "seed": 7, "store_dtype": "bfloat16", "compute_dtype": "bfloat16"},
        ),
        (
            "--store mean_std --store-dtype float16 --flip --images 2",
            {"store": "mean_std", "store_dtype": "float16", "flip": True, "images": 2},
        ),
    ],
)
def test_options_reach_the_manifest(
    run: Run, words: Words, tmp_path: Path, more: str, expected: dict[str, object]
) -> None:
    outcome = run(*words, "--split", "train", *more.split())
    assert (outcome.code, len(outcome.out), outcome.err) == (0, 1, [])
    (part,) = (tmp_path / "out").iterdir()
    assert part.name == "train"
    assert expected.items() <= json.loads((part / "manifest.json").read_bytes())["settings"].items()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{dataset: OWN}", {"": 2}),
        ("{dataset: OWN, validation: 'PHOTOS/validation'}", {"train": 2, "validation": 1}),
    ],
)
def test_images_that_a_yaml_names(
    run: Run, options: Words, photos: Path, tmp_path: Path, text: str, parts: dict[str, int]
) -> None:
    own = "{class_path: ImageFolder, init_args: {root: 'PHOTOS/train/bird'}}"
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(f"data: {text}".replace("OWN", own).replace("PHOTOS", str(photos)))
    assert run("latents", path, out, *options).code == 0
    assert {name: len(LatentDataset(out / name)) for name in parts} == parts


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {}", "section data"),
        ("data: {}", "data.root"),
        ("data: {root: 'PARENT'}", "lies in the source"),
        ("data: {dataset: {1: 2}}", "data.dataset"),
        ("data: {root: 'pipe:touch PARENT/ran'}", "'pipe:touch"),
        ("data: {root: 'http://127.0.0.1:9/0.tar::pipe:touch PARENT/ran'}", "'pipe:touch"),
        ("data: {dataset: {class_path: Shards, init_args: {urls: ['gs://x/$(touch PARENT/ran)']}}}", "'gs:"),
    ],
)
def test_a_yaml_that_names_no_images_or_runs_a_command(
    refusal: Refusal, options: Words, tmp_path: Path, text: str, named: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("PARENT", str(tmp_path)))
    assert named in refusal("latents", path, tmp_path / "out", *options)
    assert not (tmp_path / "ran").exists()


def test_images_that_are_broken_small_or_without_a_label_are_told(
    run: Run, words: Words, options: Words, photos: Path, tmp_path: Path
) -> None:
    broken = photos / "train" / "bird" / "x.png"
    broken.write_text("no image")
    outcome = run(*words)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 2)
    assert outcome.err[0].startswith(f"dc-ssdae latents: left out: cannot read image '{broken}'")
    assert "1 of 4 images are broken" in outcome.err[1]
    outcome = run(*words, "--max-broken-share", 0.25)
    assert outcome.out[0].endswith("; 1 broken, left out, listed in manifest.json")
    outcome = run("latents", photos / "train" / "cat", tmp_path / "cat", *options, "--size", 48)
    assert outcome.out == [f"1 image in 1 shard -> {tmp_path / 'cat'}; 1 without a label (-1)"]
    assert any("1 of 1 image" in line and "smaller than 48 px" in line for line in outcome.err)


@pytest.mark.parametrize(
    ("source", "target", "more", "named"),
    [
        ("photos", "out", "--size 30", "f = 8"),
        ("photos", "out", "--seed 1", "--seed is for --store sample"),
        ("photos", "photos/out", "", "lies in the source"),
        ("photos", "file", "", "not a folder"),
        ("photos/train", "out", "--split validation", "not divided into parts"),
        ("missing", "out", "", "missing"),
    ],
)
def test_what_does_not_fit(
    refusal: Refusal, options: Words, photos: Path, tmp_path: Path, source: str, target: str, more: str, named: str
) -> None:
    (tmp_path / "file").write_text("")
    assert named in refusal("latents", tmp_path / source, tmp_path / target, *options, *more.split())
    assert not (tmp_path / target).is_dir()


def test_other_processes_are_silent(run: Run, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(*words, "--seed", 1) == (2, [], [])
