"""`dc-ssdae curves`: the picture that it writes, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
from cli_samples import Refusal, Run
from PIL import Image

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def folders() -> None:
    """Two runs, one of which has a damaged line."""
    for name in ("one", "two"):
        Path(name).mkdir()
        losses = ({"step": step, "loss/total": 1.0 / (step + 1), "loss/kl": 2.0} for step in range(12))
        Path(name, "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
        Path(name, "evaluations.jsonl").write_text('{"step": 12, "psnr": 21.5, "ssim": 0.5, "images": 3}\n')
    with Path("two/metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')


def test_it_writes_a_picture_in_the_format_that_the_name_tells(run: Run) -> None:
    damaged = ["dc-ssdae curves: two/metrics.jsonl: 1 damaged line left out"]
    assert run("curves", "one", "two", "--out", "new/curves.svg") == (0, ["one, two -> new/curves.svg"], damaged)
    assert "loss: total" in Path("new/curves.svg").read_text()
    assert os.listdir("new") == ["curves.svg"]
    assert run("curves", "one") == (0, ["one -> curves.png"], [])
    with Image.open("curves.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1200)


def test_an_older_picture_is_kept(refusal: Refusal) -> None:
    out = Path("a.png")
    out.write_bytes(b"old")
    assert "--overwrite" in refusal("curves", "one", "--out", out)
    assert out.read_bytes() == b"old"
