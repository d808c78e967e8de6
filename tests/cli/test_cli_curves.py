"""`dc-ssdae curves`: the picture that it writes, and what it refuses."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")


def write_run(folder: Path, steps: int = 12) -> Path:
    folder.mkdir(parents=True)
    losses = ({"step": step, "loss/total": 1.0 / (step + 1), "loss/kl": 2.0} for step in range(steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
    (folder / "evaluations.jsonl").write_text('{"step": 12, "psnr": 21.5, "ssim": 0.5, "images": 3}\n')
    return folder


def one_line(run: Callable, *words: object) -> str:
    outcome = run("curves", *words)
    assert outcome.code == 2
    assert not outcome.out
    (line,) = outcome.err
    return line


def test_writes_a_picture(run: Callable, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    out = tmp_path / "new" / "curves.png"
    outcome = run("curves", *folders, "--out", out)
    assert outcome.code == 0
    assert outcome.out == [f"one, two -> {out}"]
    assert not outcome.err
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1200
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 10
    assert os.listdir(out.parent) == ["curves.png"]


def test_the_suffix_chooses_the_format(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "one")
    assert run("curves", folder, "--out", tmp_path / "a.svg").code == 0
    assert "loss: total" in (tmp_path / "a.svg").read_text()
    monkeypatch.chdir(tmp_path)
    assert run("curves", "one").out == ["one -> curves.png"]
    assert (tmp_path / "curves.png").is_file()


def test_damaged_lines_are_told(run: Callable, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    outcome = run("curves", folder, "--out", tmp_path / "a.png")
    assert outcome.code == 0
    assert outcome.err == [f"dc-ssdae curves: {folder / 'metrics.jsonl'}: 1 damaged line left out"]


def test_what_cannot_be_drawn(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "one")
    out = tmp_path / "a.png"
    assert f"there is no folder {tmp_path / 'absent'}" in one_line(run, tmp_path / "absent", "--out", out)
    assert "metrics.jsonl is missing" in one_line(run, folder, tmp_path, "--out", out)
    assert "no losses to draw yet" in one_line(run, write_run(tmp_path / "empty", 0), "--out", out)
    assert "unknown kind of picture '.jpg'" in one_line(run, folder, "--out", tmp_path / "a.jpg")
    assert "RUN" in one_line(run, "--out", out)
    assert not out.exists()

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    out.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    assert one_line(run, folder, "--out", out, "--overwrite") == f"dc-ssdae curves: {out}: No space left on device"
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*.partial"))
