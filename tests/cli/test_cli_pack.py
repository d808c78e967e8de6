"""`dc-ssdae pack`: its options, its lines, its exit codes."""

import json
from pathlib import Path

import pytest
from cli_samples import Refusal, Run, save_photo

from dc_ssdae.data.shards import Shards


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two large photos in train/a, one of 20 by 30 pixels in validation/a."""
    root = tmp_path / "photos"
    for name, size in (("train/a/0", (40, 60)), ("train/a/1", (70, 50)), ("validation/a/2", (20, 30))):
        save_photo(root / f"{name}.png", *size)
    return root


def test_lines_and_shards(run: Run, refusal: Refusal, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("pack", photos, "--size", 32, out, "--shard-size", 1, "--workers", 1)
    kept = "1 kept byte by byte, colour profiles included"
    lines = [
        f"train: 2 images in 2 shards -> {out}/train",
        f"validation: 1 image in 1 shard -> {out}/validation; {kept}",
    ]
    assert run(*words) == (0, lines, [])
    assert {tuple(Shards(str(out / "train")).read(index).shape) for index in range(2)} == {(3, 32, 48), (3, 44, 32)}
    again = run(*words)
    assert (again.code, again.out) == (0, lines)
    assert len(again.err) == 2
    assert all("finished already" in line for line in again.err)
    assert f"'{out}/train' was begun with size 32" in refusal(*words, "--size", "none")


def test_options_reach_the_manifest(run: Run, photos: Path, tmp_path: Path) -> None:
    for number, (words, expected) in enumerate(
        (
            ("", {"size": 256, "format": "jpg", "quality": 95, "shard_size": 1000, "shuffle": True}),
            ("--size none --format png", {"size": None, "format": "png", "quality": None}),
            ("--format webp --quality 70 --keep-order", {"format": "webp", "quality": 70, "shuffle": False}),
        )
    ):
        out = tmp_path / str(number)
        assert run("pack", photos, out, *words.split(), "--workers", 1).code == 0
        assert expected.items() <= json.loads((out / "train" / "manifest.json").read_bytes())["settings"].items()


def test_broken_images(run: Run, photos: Path, tmp_path: Path) -> None:
    broken = photos / "train" / "a" / "x.jpg"
    broken.write_text("no image")
    words = ("pack", photos, tmp_path / "out", "--workers", 1)
    outcome = run(*words)
    assert (outcome.code, len(outcome.err)) == (2, 2)
    assert outcome.err[0].startswith(f"dc-ssdae pack: cannot read image '{broken}': ")
    assert "1 of 3 images are broken" in outcome.err[1]
    outcome = run(*words, "--max-broken-share", 0.5)
    assert (outcome.code, outcome.err) == (0, [])
    assert "1 broken, left out, listed in manifest.json" in outcome.out[0]


@pytest.mark.parametrize(
    ("target", "words", "named"),
    [
        ("out", "--size 0", "--size is '0'"),
        ("out", "--size half", "--size is 'half'"),
        ("out", "--format png --quality 90", "--quality"),
        ("out", "--max-broken-share nan", "--max-broken-share"),
        ("photos/out", "", "photos/out"),
    ],
)
def test_what_does_not_fit(refusal: Refusal, photos: Path, tmp_path: Path, target: str, words: str, named: str) -> None:
    assert named in refusal("pack", photos, tmp_path / target, *words.split())
    assert not (tmp_path / target).exists()
