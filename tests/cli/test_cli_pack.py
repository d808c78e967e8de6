"""`dc-ssdae pack`: its options, its lines, its exit codes."""

import json
from pathlib import Path

import pytest
from cli_samples import Refusal, Run, save_photo

from dc_ssdae.data.shards import Shards


@pytest.fixture(autouse=True)
def photos() -> None:
    """Two large photos in photos/train/a, one of 20 by 30 pixels in photos/validation/a."""
    for name, size in (("train/a/0", (40, 60)), ("train/a/1", (70, 50)), ("validation/a/2", (20, 30))):
        save_photo(Path(f"photos/{name}.png"), *size)


def test_lines_and_shards(run: Run, refusal: Refusal) -> None:
    words = ("pack", "photos", "--size", 32, "out", "--shard-size", 1, "--workers", 1)
    kept = "1 kept byte by byte, colour profiles included"
    lines = ["train: 2 images in 2 shards -> out/train", f"validation: 1 image in 1 shard -> out/validation; {kept}"]
    assert run(*words) == (0, lines, [])
    assert {tuple(Shards("out/train").read(index)[0].shape) for index in range(2)} == {(3, 32, 48), (3, 44, 32)}
    again = run(*words)
    assert (again.code, again.out, len(again.err)) == (0, lines, 2)
    assert all("finished already" in line for line in again.err)
    assert "'out/train' was begun with size 32" in refusal(*words, "--size", "none")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"size": 256, "format": "jpg", "quality": 95, "shard_size": 1000, "shuffle": True}),
        ("--size none --format png", {"size": None, "format": "png", "quality": None}),
        ("--format webp --quality 70 --keep-order", {"format": "webp", "quality": 70, "shuffle": False}),
    ],
)
def test_options_reach_the_manifest(run: Run, words: str, expected: dict[str, object]) -> None:
    assert run("pack", "photos", "out", *words.split(), "--workers", 1).code == 0
    assert expected.items() <= json.loads(Path("out/train/manifest.json").read_bytes())["settings"].items()


def test_broken_images(run: Run) -> None:
    Path("photos/train/a/x.jpg").write_text("no image")
    words = ("pack", "photos", "out", "--workers", 1)
    outcome = run(*words)
    assert (outcome.code, len(outcome.err)) == (2, 2)
    assert outcome.err[0].startswith("dc-ssdae pack: left out: cannot read image 'photos/train/a/x.jpg': ")
    assert "1 of 3 images are broken" in outcome.err[1]
    outcome = run(*words, "--max-broken-share", 0.5)
    assert (outcome.code, outcome.err) == (0, [])
    assert "1 broken, left out, listed in manifest.json" in outcome.out[0]
