"""No command replaces a file that is there, and each says so before it starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from dc_ssdae.cli import compare, eval, study
from dc_ssdae.cli.common import table

COMMANDS = {
    "reconstruct": ("reconstruct photo.png --model absent --out out", "photo.png"),
    "trajectory": ("reconstruct photo.png --model absent --out out --return_trajectory", "photo-trajectory.png"),
    "encode": ("encode photo.png --model absent --out out", "photo.safetensors"),
    "decode": ("decode photo.safetensors --model absent --out out", "photo.png"),
    "curves": ("curves absent --out out/curves.png", "curves.png"),
    "export": ("export --model absent --out out", "encoder.pt2"),
    "original": ("convert original absent --preset demo --out out", "config.json"),
    "diffusers": ("convert diffusers absent --out out", "config.json"),
    **{f"eval-{name}": ("eval --model absent/x --data . --out out", name) for name in eval.FILES},
    **{f"compare-{name}": ("compare bicubic:4 --data absent --out out", name) for name in compare.FILES},
    **{f"study-{name}": ("study sampling --model absent --data . --out out", name) for name in study.FILES},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_there_is_kept(
    run: Callable, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words, name = COMMANDS[command]
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    outcome = run(*words.split())
    assert outcome.code == 2
    (line,) = outcome.err
    assert "--overwrite" in line
    assert "absent" not in line, "said before anything is opened"
    # With it, the next thing to be missed is an input.
    outcome = run(*words.split(), "--overwrite")
    assert outcome.code == 2
    assert "--overwrite" not in outcome.err[0]
    assert mine.read_text() == "mine"


def test_overwriting(run: Callable, model_dir: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("photo.png", "photo.safetensors"):
        (out / name).symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    words = ("--model", model_dir, "--out", out, "--overwrite")
    assert run("encode", photo, *words).code == 0
    with safe_open(out / "photo.safetensors", "pt") as file:
        assert set(file.keys()) == {"latent", "original_size"}
    assert run("decode", out / "photo.safetensors", *words).code == 0
    assert Image.open(out / "photo.png").size == (37, 24)
    assert (tmp_path / "mine").read_text() == "mine", "a link is replaced, not what it leads to"


def test_a_demo_and_a_run_are_kept(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"dataset": "dc_ssdae.data.sample_photos.SamplePhotos"}))
    outcome = run("demo", "--steps", 1, "--out", tmp_path)
    assert outcome.code == 2
    assert "--overwrite" in outcome.err[0]
    (tmp_path / "config.yaml").write_text("a run")
    assert run("demo", "--steps", 1, "--out", tmp_path, "--overwrite", "--device", "cpu").code == 2
    assert (tmp_path / "config.yaml").read_text() == "a run"


@pytest.mark.parametrize("width", [80, 100])
def test_a_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "a[red]b" * 20
    lines = table([("name", "n"), (long, "12,345,678"), ("a word, and others", "1")], "lr").splitlines()
    assert max(map(len, lines)) <= width
    assert "".join(line.split()[0] for line in lines[1:-1]) == long, "nothing is lost, nor taken for markup"
    assert lines[1].endswith("  12,345,678")
    assert lines[-1].split("  ")[0] == "a word, and others"
    assert len(lines[-1]) == len(lines[1])
    assert all(line.isprintable() for line in lines)
