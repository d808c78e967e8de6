"""The demo end to end: photos in, a trained model and a report out."""

import re

from tiny import metrics

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.main import main


def test_it_is_reproducible_and_the_report_says_what_it_measured(tmp_path, capsys):
    demo, again = tmp_path / "demo", tmp_path / "again"
    for folder in (demo, again):
        assert main(["demo", "--steps", "2", "--out", str(folder), "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert str(folder / "model") in printed
        assert str(folder / "report.html") in printed
    assert len(metrics(demo)) == 2
    assert metrics(demo) == metrics(again)
    assert DCSSDAE.from_pretrained(demo / "model").config.downsample_factor == 8

    page = (demo / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page), "it is not self-contained"
    for name in ("chelsea", "coffee", "rocket"):
        assert page.count(f'alt="{name}: ') == 8
    # The shipped model comes first, and beats plain resizing; two steps cannot: the report must own up to it.
    shipped, trained = (page.index(words) for words in ("dB above bicubic", "dB below bicubic"))
    assert shipped < page.index("random weights")
    assert trained > shipped
    assert "2 steps" in page
