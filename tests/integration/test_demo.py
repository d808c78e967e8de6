"""The demo end to end: photos in, a trained model and a report out."""

import json
import re

import pytest

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.main import main


@pytest.fixture(scope="module")
def demo(made_once):
    def run(folder):
        assert main(["demo", "--steps", "2", "--out", str(folder / "demo"), "--device", "cpu"]) == 0

    return made_once("demo", run) / "demo"


def test_the_report_is_self_contained_and_says_what_it_measured(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "$" not in re.sub(r"data:[^\"]*", "", page)
    for name in ("chelsea", "coffee", "rocket"):
        assert page.count(f'alt="{name}: ') == 8
    # The shipped model comes first, and beats plain resizing; two steps cannot: the report must own up to it.
    shipped, trained = (page.index(words) for words in ("dB above bicubic", "dB below bicubic"))
    assert shipped < page.index("random weights")
    assert trained > shipped
    assert "2 steps" in page


def test_a_run_of_steps_is_reproducible_and_prints_where_things_are(demo, tmp_path, capsys):
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "again" / "model") in printed
    assert str(tmp_path / "again" / "report.html") in printed
    assert DCSSDAE.from_pretrained(demo / "model").config.downsample_factor == 8
    losses = [
        [json.loads(line)["loss/total"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (demo, tmp_path / "again")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
