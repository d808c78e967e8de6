"""`dc-ssdae pack`: its options, its lines, its exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_samples import random_pixels
from PIL import Image

from dc_ssdae.data.shards import Shards


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two large photos in train/a, one of 20 by 30 pixels in validation/a."""
    root = tmp_path / "photos"
    for name, size in (("train/a/0", (40, 60)), ("train/a/1", (70, 50)), ("validation/a/2", (20, 30))):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(*size)).save(path)
    return root


def test_lines_and_shards(run: Callable, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["pack", photos, out, "--size", 32, "--shard-size", 1, "--workers", 1]
    assert run(*words) == (
        0,
        [
            f"train: 2 images in 2 shards -> {out}/train",
            f"validation: 1 image in 1 shard -> {out}/validation; 1 kept byte by byte (at most 32 pixels), "
            "colour profiles included",
        ],
        [],
    )
    shapes = {tuple(Shards(str(out / "train")).read(index).shape) for index in range(2)}
    assert shapes == {(3, 32, 48), (3, 44, 32)}
    code, lines, errors = run(*words)
    assert (code, len(lines)) == (0, 2)
    assert all("finished already" in line for line in errors)
    code, lines, errors = run(*words[:3], "--size", "none")
    assert (code, lines) == (2, [])
    assert errors == [f"dc-ssdae pack: '{out}/train' was begun with size 32, not None; choose another destination"]


def test_options_reach_the_manifest(run: Callable, photos: Path, tmp_path: Path) -> None:
    for number, (words, expected) in enumerate(
        (
            ((), {"size": 256, "format": "jpg", "quality": 95, "shard_size": 1000, "shuffle": True}),
            (("--size", "none", "--format", "png"), {"size": None, "format": "png", "quality": None}),
            (
                ("--format", "webp", "--quality", 70, "--keep-order"),
                {"format": "webp", "quality": 70, "shuffle": False},
            ),
        )
    ):
        out = tmp_path / f"out_{number}"
        assert run("pack", photos, out, *words).code == 0
        settings = json.loads((out / "train" / "manifest.json").read_bytes())["settings"]
        assert {name: settings[name] for name in expected} == expected


def test_broken_images(run: Callable, photos: Path, tmp_path: Path) -> None:
    broken = photos / "train" / "a" / "x.jpg"
    broken.write_text("no image")
    words = ["pack", photos, tmp_path / "out"]
    code, lines, errors = run(*words)
    assert code == 2
    assert len(errors) == 2
    assert "1 of 3 images are broken" in errors[1]
    code, lines, errors = run(*words, "--max-broken-share", 0.5)
    assert (code, errors) == (0, [])
    assert "1 broken, left out, listed in manifest.json" in lines[0]
    code, _, errors = run("pack", photos, tmp_path / "again", "--max-broken-share", 0.5)
    assert code == 0
    assert len(errors) == 1
    assert errors[0].startswith(f"dc-ssdae pack: cannot read image '{broken}': ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--size", "0"], "--size"),
        (["--size", "half"], "'half' is not a whole number from 1 on"),
        (["--format", "gif"], "--format"),
        (["--format", "png", "--quality", "90"], "--quality is for jpg and webp"),
        (["--quality", "101"], "from 1 to 100"),
        (["--shard-size", "0"], "--shard-size"),
        (["--workers", "0"], "--workers"),
        (["--max-broken-share", "2"], "not a number from 0 to 1"),
        (["--max-broken-share", "nan"], "not a number from 0 to 1"),
        (["--shardsize", "5"], "did you mean '--shard-size'"),
    ],
)
def test_wrong_options(run: Callable, photos: Path, tmp_path: Path, words: list[str], told: str) -> None:
    code, lines, errors = run("pack", photos, tmp_path / "out", *words)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert told in errors[0]
    assert not (tmp_path / "out").exists()


def test_wrong_folders(run: Callable, photos: Path, tmp_path: Path) -> None:
    for source, target, told in (
        (tmp_path / "missing", tmp_path / "out", "missing"),
        (photos, photos / "out", "lies in the source"),
        ("", tmp_path / "out", "empty"),
    ):
        code, lines, errors = run("pack", source, target)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert told in errors[0]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dc_ssdae.cli.main import main; main(['pack', '--help']); "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "False False"
    assert "--max-broken-share" in result.stdout
