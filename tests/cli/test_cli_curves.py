"""`dc-ssdae curves`: the picture that it writes, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
from cli_samples import Refusal, Run
from PIL import Image

pytest.importorskip("matplotlib")


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    losses = ({"step": step, "loss/total": 1.0 / (step + 1), "loss/kl": 2.0} for step in range(12))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
    (folder / "evaluations.jsonl").write_text('{"step": 12, "psnr": 21.5, "ssim": 0.5, "images": 3}\n')
    return folder


def test_it_writes_a_picture_in_the_format_that_the_name_tells(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    out = tmp_path / "new" / "curves.svg"
    assert run("curves", *folders, "--out", out) == (0, [f"one, two -> {out}"], [])
    assert "loss: total" in out.read_text()
    assert os.listdir(out.parent) == ["curves.svg"]
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    monkeypatch.chdir(tmp_path)
    outcome = run("curves", "one")
    assert (outcome.code, outcome.out) == (0, ["one -> curves.png"])
    assert outcome.err == ["dc-ssdae curves: one/metrics.jsonl: 1 damaged line left out"]
    with Image.open("curves.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1200)


def test_what_cannot_be_drawn(refusal: Refusal, tmp_path: Path) -> None:
    folder, out = write_run(tmp_path / "one"), tmp_path / "a.png"
    assert str(tmp_path / "absent") in refusal("curves", tmp_path / "absent", "--out", out)
    assert "'.jpg'" in refusal("curves", folder, "--out", tmp_path / "a.jpg")
    out.write_bytes(b"old")
    assert "--overwrite" in refusal("curves", folder, "--out", out)
    assert out.read_bytes() == b"old"


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_the_older_picture(refusal: Refusal, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"old")
    line = refusal("curves", write_run(tmp_path / "one"), "--out", out, "--overwrite")
    assert line == f"{out}: No space left on device"
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "one"]
