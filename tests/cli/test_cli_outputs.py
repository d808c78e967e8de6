"""No command replaces a file that is there, and each says so before it starts."""

import json
from pathlib import Path

import pytest
from cli_samples import Refusal, Run
from PIL import Image

from dc_ssdae.cli.common import table

COMMANDS = {
    "reconstruct photo.png --model absent": "photo.png",
    "reconstruct photo.png --model absent --return_trajectory": "photo-trajectory.png",
    "encode photo.png --model absent": "photo.safetensors",
    "decode photo.safetensors --model absent": "photo.png",
    "export --model absent": "encoder.pt2",
    "convert original absent --preset demo": "config.json",
    "convert diffusers absent": "config.json",
    "eval --model absent/x --data .": "images.csv",
    "compare bicubic:4 --data absent": "pareto.png",
}


@pytest.mark.usefixtures("photo")
@pytest.mark.parametrize("words", COMMANDS)
def test_a_file_that_is_there_is_kept(words: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mine = Path("out", COMMANDS[words])
    mine.parent.mkdir()
    mine.write_text("mine")
    line = refusal(*words.split(), "--out", "out")
    assert "--overwrite" in line
    assert "absent" not in line, "said before anything is opened"
    # With it, the next thing to be missed is an input.
    assert "--overwrite" not in refusal(*words.split(), "--out", "out", "--overwrite")
    assert mine.read_text() == "mine"


def test_overwriting(run: Run, model_dir: Path, photo: Path) -> None:
    out, mine = Path("out"), Path("mine")
    out.mkdir()
    for name in ("photo.png", "photo.safetensors"):
        (out / name).symlink_to(mine.absolute())
    mine.write_text("mine")
    words = ("--model", model_dir, "--out", out, "--overwrite")
    assert run("encode", photo, *words).code == 0
    assert run("decode", out / "photo.safetensors", *words).code == 0
    assert Image.open(out / "photo.png").size == (37, 24)
    assert mine.read_text() == "mine", "a link is replaced, not what it leads to"


def test_a_demo_and_a_run_are_kept(refusal: Refusal) -> None:
    config, words = Path("mine/config.yaml"), ("demo", "--steps", 1, "--out", "mine")
    config.parent.mkdir()
    config.write_text(json.dumps({"dataset": "dc_ssdae.data.sample_photos.SamplePhotos"}))
    assert "--overwrite" in refusal(*words)
    config.write_text("a run")
    assert "mine" in refusal(*words, "--overwrite", "--device", "cpu")
    assert config.read_text() == "a run"


def test_a_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    label, long = "a_label_of_one_word." * 2, "a[red]b" * 20
    rows = [("name", "what", "n"), (label, long, "12,345,678"), ("a word, and others", "", "1")]
    lines = table(rows, "llr").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(f"{label}  a"), "labels are not folded"
    assert "".join(line[len(label) + 2 :].split()[0] for line in lines[1:-1]) == long, "nothing is lost, nor markup"
    assert lines[1].endswith("  12,345,678")
    assert lines[-1].split("  ")[0] == "a word, and others"
    assert len(lines[-1]) == len(lines[1])
    assert all(line.isprintable() for line in lines)
