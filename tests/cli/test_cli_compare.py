"""`dc-ssdae compare`: what it writes and prints of several models, one of which may fail, and what it refuses."""

import html
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_samples import Refusal, Run, Words, save_photos
from PIL import Image

pytestmark = pytest.mark.usefixtures("workplace")

FILES = ("index.html", "table.md", "table.json", "pareto.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, and a file that is none."""
    folder = save_photos(tmp_path_factory.mktemp("photos"), "0", "1", "2", "3")
    (folder / "3b.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def words(photos: Path) -> Words:
    setting = ("--size", 32, "--workers", 0, "--device", "cpu", "--rounds", 1, "--metrics", "psnr")
    return ("--data", photos, *setting, "--out", "out")


def table_of() -> Any:
    return json.loads(Path("out/table.json").read_text(encoding="utf-8"))


def rows_of() -> dict[str, Any]:
    return {row["model"]: row for row in table_of()["rows"]}


def page_of() -> str:
    return Path("out/index.html").read_text(encoding="utf-8")


def test_it_writes_four_files_and_prints_the_table(run: Run, model_dir: Path, words: Words, photos: Path) -> None:
    models = (model_dir, "mine=python:peers.Blocks", "jpeg:50", "bicubic:4", "new=preset:demo")
    labels = ["small", "mine", "jpeg:50", "bicubic:4", "new"]
    outcome = run("compare", *models, *words, "--batch", 2, "--rounds", 2, "--show", 2, "--steps", 2)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith(f"dc-ssdae compare: left out: cannot read image '{photos}/3b.png'")
    assert sorted(os.listdir("out")) == sorted(FILES)
    assert outcome.out[-1] == f"-> {', '.join(f'out/{name}' for name in FILES)}"
    printed = Path("out/table.md").read_text(encoding="utf-8")
    assert "\n".join(outcome.out[:-1]).strip() == printed.strip()

    rows, table = rows_of(), table_of()
    assert list(rows) == labels
    for row in rows.values():
        assert "failed" not in row
        assert row["psnr"]["low"] < row["psnr"]["value"] < row["psnr"]["high"]
        assert row["ssim"] == {"value": None, "low": None, "high": None, "reason": "not asked for"}
        assert row["decode"]["value"] > 0
    assert (rows["small"]["latent_shape"]["value"], rows["small"]["tokens"]["value"]) == ([4, 4, 4], 16)
    assert rows["mine"]["compression"]["value"] == 64
    assert rows["new"]["remarks"] == ["random weights"]
    assert rows["jpeg:50"]["bits_per_pixel"]["value"] > 0
    assert (rows["small"]["evaluations"]["value"], rows["jpeg:50"]["evaluations"]["value"]) == (2, None)
    assert (table["protocol"]["images"], table["protocol"]["data"]) == (4, photos.name)
    assert (table["speed"]["batch"], table["speed"]["rounds"]) == (2, 2)
    assert all(page_of().count(f"<b>{label}</b>") == 2 for label in labels)
    with Image.open("out/pareto.png") as picture:
        assert picture.width > 800


def test_figures_are_those_of_eval(run: Run, model_dir: Path, words: Words) -> None:
    assert run("compare", "jpeg:20", model_dir, *words).code == 0
    of_eval = [word for place, word in enumerate(words) if "--rounds" not in words[max(place - 1, 0) : place + 1]]
    assert run("eval", "--model", model_dir, *of_eval, "--out", "one").code == 0
    metrics = json.loads(Path("one/report.json").read_text(encoding="utf-8"))["metrics"]
    for name, cell in metrics.items():
        del cell["unit"]
        assert rows_of()["small"][name] == pytest.approx(cell)


def test_those_that_fail_are_in_their_rows_and_the_others_finish(run: Run, words: Words) -> None:
    models = ("jpeg:50", "bug=python:peers.bug", "greedy=python:peers.greedy", "bicubic:4")
    outcome = run("compare", *models, *words, "--batch", 2)
    assert outcome.code == 2
    rows, page = rows_of(), html.unescape(page_of())
    assert list(rows) == ["jpeg:50", "bug", "greedy", "bicubic:4"]
    assert outcome.out[-1].startswith("-> out/index.html, ")
    for label, line in zip(("bug", "greedy"), outcome.err[:2], strict=True):
        reason = rows[label]["failed"]
        assert line == f"dc-ssdae compare: {label} failed: {reason}"
        assert rows[label]["psnr"] == {"value": None, "low": None, "high": None, "reason": "failed"}
        assert any(line.startswith(f"| {label}") and f"| failed: {reason} |" in line for line in outcome.out)
        assert f"failed: {reason}" in page
    alone = run("compare", "jpeg:50", "bicubic:4", *words, "--batch", 2, "--overwrite")
    assert alone.code == 0
    for label, row in rows_of().items():
        assert row["psnr"] == rows[label]["psnr"]


def test_where_all_fail_nothing_is_written(run: Run, words: Words) -> None:
    models = ("python:peers.nan", "python:peers.bug")
    outcome = run("compare", *models, *words, "--debug")
    assert (outcome.code, outcome.out) == (2, [])
    assert any("peers.py" in line for line in outcome.err), "the traceback"
    told = [line for line in outcome.err if line.startswith("dc-ssdae compare: ")]
    assert [line.split(": ")[1].partition(";")[0] for line in told] == [
        "nan failed",
        "bug failed",
        "every model failed",
    ]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("models", "more", "named"),
    [
        ("jpeg:50", "--protocol dcea", "did you mean 'dcae'"),
        ("jpeg:50", "--data no/such/folder", "'no/such/folder'"),
        ("jpeg:50", "--data broken", "'broken/a.png'"),
        ("jpeg:50 mine=python:peers.Block", "", "did you mean 'Blocks'"),
        ("jpeg:50 mine=broken", "", "mine: "),
        ("a=jpeg:50 a=bicubic:4", "", "'a'"),
        ("small", "--sampler one_step --steps 2", "'num_steps'"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_measured(
    refusal: Refusal, words: Words, model_dir: Path, tmp_path: Path, models: str, more: str, named: str
) -> None:
    (tmp_path / "small").symlink_to(model_dir)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    assert named in refusal("compare", *models.split(), *words, *more.split())
    assert not Path("out").exists()


def test_several_processes_are_refused(refusal: Refusal, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "compare runs in one process" in refusal("compare", "bicubic:4", *words)
