"""`dc-ssdae compare`: what it writes and prints of several models, one of which may fail, and what it refuses."""

import html
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_samples import Refusal, Run, Words

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def words(measuring: Words) -> Words:
    return (*measuring, "--out", "out", "--rounds", 1)


def table_of() -> Any:
    return json.loads(Path("out/table.json").read_text(encoding="utf-8"))


def rows_of() -> dict[str, Any]:
    return {row["model"]: row for row in table_of()["rows"]}


def page_of() -> str:
    return html.unescape(Path("out/index.html").read_text(encoding="utf-8"))


def test_it_writes_four_files_and_prints_the_table(
    run: Run, model_dir: Path, measuring: Words, words: Words, five_photos: Path
) -> None:
    models = (model_dir, "mine=python:peers.Blocks", "jpeg:50", "bicubic:4", "new=preset:demo")
    labels = ["small", "mine", "jpeg:50", "bicubic:4", "new"]
    outcome = run("compare", *models, *words, "--batch", 2, "--rounds", 2, "--show", 2, "--steps", 2)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith(f"dc-ssdae compare: left out: cannot read image '{five_photos}/3b.png'")
    assert sorted(os.listdir("out")) == ["index.html", "pareto.png", "table.json", "table.md"]
    assert outcome.out[-1].startswith("-> out/index.html, ")
    printed = Path("out/table.md").read_text(encoding="utf-8")
    assert "\n".join(outcome.out[:-1]).strip() == printed.strip()

    rows, table = rows_of(), table_of()
    assert list(rows) == labels
    assert rows["new"]["remarks"] == ["random weights"]
    assert (rows["small"]["evaluations"]["value"], rows["jpeg:50"]["evaluations"]["value"]) == (2, None)
    assert (table["protocol"]["images"], table["protocol"]["data"]) == (5, five_photos.name)
    assert (table["speed"]["batch"], table["speed"]["rounds"]) == (2, 2)
    assert all(page_of().count(f"<b>{label}</b>") == 2 for label in labels)
    # The figures are those of eval.
    assert run("eval", "--model", model_dir, *measuring, "--batch", 2, "--steps", 2, "--out", "one").code == 0
    metrics = json.loads(Path("one/report.json").read_text(encoding="utf-8"))["metrics"]
    for name, cell in metrics.items():
        del cell["unit"]
        assert rows["small"][name] == pytest.approx(cell)


def test_those_that_fail_are_in_their_rows_and_the_others_finish(run: Run, words: Words) -> None:
    models = ("jpeg:50", "bug=python:peers.bug", "greedy=python:peers.greedy", "bicubic:4")
    outcome = run("compare", *models, *words, "--batch", 2)
    assert outcome.code == 2
    rows, page = rows_of(), page_of()
    assert list(rows) == ["jpeg:50", "bug", "greedy", "bicubic:4"]
    for label, line in zip(("bug", "greedy"), outcome.err[:2], strict=True):
        reason = rows[label]["failed"]
        assert line == f"dc-ssdae compare: {label} failed: {reason}"
        assert any(line.startswith(f"| {label} (failed: {reason})") for line in outcome.out)
        assert f"failed: {reason}" in page
    assert run("compare", "jpeg:50", "bicubic:4", *words, "--batch", 2, "--overwrite").code == 0
    for label, row in rows_of().items():
        assert row["psnr"] == rows[label]["psnr"]


def test_where_all_fail_nothing_is_written(run: Run, words: Words) -> None:
    outcome = run("compare", "python:peers.nan", "python:peers.bug", *words, "--debug")
    assert (outcome.code, outcome.out) == (2, [])
    assert any("peers.py" in line for line in outcome.err), "the traceback"
    told = [line.split(": ")[1] for line in outcome.err if line.startswith("dc-ssdae compare: ")]
    assert told == ["nan failed", "bug failed", "every model failed; nothing is written"]
    assert not Path("out").exists()


def test_several_processes_are_refused(refusal: Refusal, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "compare runs in one process" in refusal("compare", "bicubic:4", *words)
