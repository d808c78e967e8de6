"""`dc-ssdae latents`: its options, its lines, its exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import random_pixels
from PIL import Image

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.data.latents import LatentDataset
from dc_ssdae.data.transforms import center_crop, resize_shorter_side
from dc_ssdae.provenance import name_of_path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos in train/, of two classes, and one in validation/, of the second."""
    root = tmp_path / "photos"
    for number, name in enumerate(("train/bird/0", "train/bird/1", "train/cat/2", "validation/cat/3")):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(40 + number, 60, seed=number)).save(path)
    return root


@pytest.fixture
def words(model_dir: Path, photos: Path, tmp_path: Path) -> list[Any]:
    """A command that encodes the photos into the folder out."""
    options = ["--model", model_dir, "--device", "cpu", "--size", 32, "--workers", 0]
    return ["latents", photos, tmp_path / "out", *options]


def test_lines_shards_and_the_reader(run: Callable, words: list, model_dir: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words += ["--shard-size", 2, "--flip"]
    lines = [f"train: 3 images in 2 shards -> {out}/train", f"validation: 1 image in 1 shard -> {out}/validation"]
    assert run(*words) == (0, lines, [])
    model = DCSSDAE.from_pretrained(model_dir)
    dataset = LatentDataset(out / "train", flip=False)
    pixels = [
        center_crop(resize_shorter_side(read_image(photos / "train" / dataset.stored(index).name).pixels, 32), 32)
        for index in range(2)
    ]
    for batch, key in ((torch.stack(pixels), "latent"), (torch.stack(pixels).flip(-1), "latent_flip")):
        with torch.inference_mode():
            z = model.encode(to_model_range(batch)).latent_dist.mode()
        for index in range(2):
            assert torch.equal(getattr(dataset.stored(index), key), z[index])
    assert [dataset[index].label for index in range(3)] == [0, 0, 1]
    assert LatentDataset(out / "validation")[0].label == 1
    assert dataset.classes == ["bird", "cat"]
    again = run(*words)
    assert (again.code, again.out) == (0, lines)
    assert [line.rpartition(" is ")[2] for line in again.err] == ["finished already; nothing to do"] * 2
    refused = run(*words, "--store", "sample")
    told = f"dc-ssdae latents: '{out}/train' was begun with store mean, not sample; choose another destination"
    assert (refused.code, refused.err) == (2, [told])


def test_options_reach_the_manifest(run: Callable, words: list, tmp_path: Path) -> None:
    plain = {"store": "mean", "flip": False, "store_dtype": "float32", "compute_dtype": "float32", "shard_size": 1000}
    sampled = {"store": "sample", "seed": 7, "store_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    stds = {"store": "mean_std", "store_dtype": "float16", "compute_dtype": "float32", "flip": True, "images": 2}
    for number, (more, expected) in enumerate(
        (
            ([], plain),
            (["--store", "sample", "--seed", 7, "--dtype", "bfloat16", "--batch", 2], sampled),
            (["--store", "mean_std", "--store-dtype", "float16", "--flip", "--images", 2], stds),
        )
    ):
        out = tmp_path / f"out_{number}"
        outcome = run("latents", words[1], out, *words[3:], "--split", "train", *more)
        assert (outcome.code, len(outcome.out), outcome.err) == (0, 1, [])
        assert expected.items() <= json.loads((out / "train" / "manifest.json").read_bytes())["settings"].items()
        assert [path.name for path in out.iterdir()] == ["train"]


def test_images_that_a_yaml_names(run: Callable, words: list, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    own = f"{{class_path: ImageFolder, init_args: {{root: '{photos}/train/bird'}}}}"
    for text, parts in (
        (f"data: {{root: '{photos}'}}", {"train": 3, "validation": 1}),
        (f"data: {{dataset: {own}}}", {"": 2}),
        (f"data: {{dataset: {own}, validation: '{photos}/validation'}}", {"train": 2, "validation": 1}),
    ):
        path.write_text(text)
        out = tmp_path / f"out_{len(parts)}_{sum(parts.values())}"
        assert run("latents", path, out, *words[3:]).code == 0
        assert {name: len(LatentDataset(out / name)) for name in parts} == parts
    for text, told in (
        ("model: {}", "has no section data"),
        ("data: {}", "either data.root or data.dataset must name"),
        ("data: [", "config.yaml"),
        (f"data: {{root: '{tmp_path}'}}", "lies in the source"),
        ("data: {root: 5}", f"data.root in {path} is 5; it must be of type str | None"),
        ("data: {root: [1]}", "data.root in"),
        (f"data: {{root: '{photos}', cache: 3}}", "data.cache in"),
        ("data: {dataset: 7}", "data.dataset in"),
        (f"data: {{root: 'pipe:touch {tmp_path}/ran'}}", "'pipe:touch"),
        (f"data: {{root: 'http://127.0.0.1:9/0.tar::pipe:touch {tmp_path}/ran'}}", "'pipe:touch"),
        (f"data: {{dataset: {{class_path: Shards, init_args: {{urls: ['gs://x/$(touch {tmp_path}/ran)']}}}}}}", "'gs:"),
        ("data: {dataset: {1: 2}}", "data.dataset in"),
        (f"data: {{root: '{photos}', validation: true}}", "data.validation in"),
    ):
        path.write_text(text)
        outcome = run("latents", path, tmp_path / "new", *words[3:])
        assert not (tmp_path / "ran").exists()
        assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
        assert told in outcome.err[0]


def test_broken_images(run: Callable, words: list, photos: Path) -> None:
    broken = photos / "train" / "bird" / "x.png"
    broken.write_text("no image")
    outcome = run(*words)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 2)
    assert outcome.err[0].startswith(f"dc-ssdae latents: left out: cannot read image '{broken}'")
    assert "1 of 4 images are broken, more than the share of 0.1" in outcome.err[1]
    outcome = run(*words, "--max-broken-share", 0.25)
    assert (outcome.code, outcome.err) == (0, [])
    assert outcome.out[0].endswith("; 1 broken, left out, listed in manifest.json")


def test_images_without_labels_are_told(run: Callable, words: list, photos: Path, tmp_path: Path) -> None:
    outcome = run("latents", photos / "train" / "bird", *words[2:])
    assert outcome.out == [f"2 images in 1 shard -> {tmp_path / 'out'}; 2 without a label (-1)"]


def test_another_model_is_refused(run: Callable, words: list, model_dir: Path, tmp_path: Path) -> None:
    assert run(*words).code == 0
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_bytes())
    assert manifest["model"]["name"] == name_of_path(model_dir)
    assert str(tmp_path) not in json.dumps(manifest)
    again = run(*words, "--model", other)  # the same by another name
    assert again.code == 0
    model = DCSSDAE.from_pretrained(other)
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1.5)
    model.save_pretrained(other)
    refused = run(*words, "--model", other)
    assert refused.code == 2
    assert refused.err == [
        f"dc-ssdae latents: '{tmp_path / 'out' / 'train'}' was encoded with another model than other; "
        "choose another destination"
    ]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--size", 30], "size 30 is no multiple of this model's f = 8; 32 is"),
        (["--size", 0], "--size"),
        (["--store", "std"], "--store"),
        (["--seed", 1], "--seed is for --store sample; mean is not random"),
        (["--store-dtype", "float64"], "--store-dtype"),
        (["--shard-size", 0], "--shard-size"),
        (["--images", 0], "--images"),
        (["--workers", -1], "--workers"),
        (["--split", "test"], "--split"),
        (["--max-broken-share", 2], "not a number from 0 to 1"),
        (["--shardsize", 5], "did you mean '--shard-size'"),
        (["--device", "cuda:99"], "no device 'cuda:99' on this machine"),
        (["--model", "absent"], "'absent': no such folder, nor the id of a model on the hub"),
    ],
)
def test_wrong_options(run: Callable, words: list, tmp_path: Path, more: list, told: str) -> None:
    outcome = run(*words, *more)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
    assert told in outcome.err[0]
    assert not (tmp_path / "out").exists()


def test_wrong_folders(run: Callable, words: list, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source, target, told in (
        (tmp_path / "missing", tmp_path / "out", "there is no folder"),
        (photos, photos / "out", "lies in the source"),
        (photos, tmp_path / "file", "is not a folder"),
        (photos / "train", tmp_path / "out", "it is not divided into parts"),
    ):
        outcome = run("latents", source, target, *words[3:], "--split", "validation")
        assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
        assert told in outcome.err[0]


def test_other_processes_are_silent(run: Callable, words: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(*words, "--seed", 1) == (2, [], [])


def test_images_that_were_enlarged_are_told(run: Callable, words: list) -> None:
    words[words.index(32)] = 48
    outcome = run(*words)
    assert [line.partition(" image")[0] for line in outcome.err if "smaller than 48 px" in line] == [
        "dc-ssdae latents: train: 3 of 3",
        "dc-ssdae latents: validation: 1 of 1",
    ]
