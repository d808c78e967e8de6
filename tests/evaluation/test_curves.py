"""Curves of runs: what is read, how phases are joined, and whether the picture can be read."""

import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dc_ssdae import InputError
from dc_ssdae.evaluation.curves import RunCurves, curves_figure, read_run, read_runs, running_mean, save_picture

pytest.importorskip("matplotlib")


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_run(folder: Path, steps: int = 20, terms: tuple[str, ...] = ("kl", "total"), **more: Any) -> Path:
    """A run with one loss of 1/step a term, and two evaluations."""
    losses = ({"step": step, **{f"loss/{term}": 1.0 / step for term in terms}} for step in range(1, steps + 1))
    write_lines(folder / "metrics.jsonl", ({**loss, "lr": 0.1, **more} for loss in losses))
    evaluated = ({"step": step, "psnr": 20.0 + step, "ssim": 0.5, "images": 4} for step in (steps // 2, steps))
    write_lines(folder / "evaluations.jsonl", evaluated)
    return folder


def write_recipe(folder: Path, phases: Mapping[str, int]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("phases: {}\n")
    for name, steps in phases.items():
        write_run(folder / name, steps)
    return folder


def titles(runs: list[RunCurves]) -> list[str]:
    return [axes.get_title() for axes in curves_figure(runs).axes]


def test_a_run_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    run = read_run(folder)
    assert (run.name, run.starts, run.notes) == ("run", {}, [])
    assert set(run.values) == {"loss/kl", "loss/total", "psnr", "ssim"}
    assert run.values["loss/total"] == [(step, 1.0 / step) for step in range(1, 21)]
    assert run.values["psnr"] == [(10, 30.0), (20, 40.0)]
    assert titles([run]) == ["loss: total", "loss: kl", "PSNR (dB)", "SSIM"]
    (folder / "evaluations.jsonl").unlink()
    assert titles([read_run(folder)]) == ["loss: total", "loss: kl"]


def test_phases_stand_one_after_the_other(tmp_path: Path) -> None:
    """In the order of their numbers, 10 after 2, those that have not begun left out; the distilled model last."""
    phases = {"distilled": 4, "10-quality": 5, "2-size": 6, "1-compression": 8}
    folder = write_recipe(tmp_path / "recipe", phases)
    (folder / "11-not_begun").mkdir()
    run = read_run(folder)
    assert run.starts == {"compression": 0, "size": 8, "quality": 14, "distilled": 19}
    assert [step for step, _ in run.values["loss/total"]] == list(range(1, 24))
    assert [step for step, _ in run.values["ssim"]] == [4, 8, 11, 14, 16, 19, 21, 23]
    figure = curves_figure([run])
    (caption,) = (text.get_text() for text in figure.texts if "phases" in text.get_text())
    assert caption == "phases: 1 compression, 2 size, 3 quality, 4 distilled"
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3", "4"]
    lines = [line for line in figure.axes[0].lines if line.get_linewidth() == 1.6]
    assert [[*line.get_xdata()] for line in lines] == [
        [*range(1, 9)],
        [*range(9, 15)],
        [*range(15, 20)],
        [*range(20, 24)],
    ]


def test_what_is_not_finite_is_a_cross(tmp_path: Path) -> None:
    values = [1.0, None, float("nan"), float("inf"), 2.0]
    write_lines(tmp_path / "metrics.jsonl", ({"step": step, "loss/total": v} for step, v in enumerate(values)))
    (axes,) = curves_figure([read_run(tmp_path)]).axes
    crosses, lines = ([line for line in axes.lines if (line.get_marker() == "x") == wanted] for wanted in (True, False))
    assert [list(line.get_xdata()) for line in crosses] == [[1, 2, 3]]
    assert [list(line.get_xdata()) for line in lines] == [[0, 4], [0, 4]]
    assert "not finite" in axes.get_xlabel()


def test_damaged_lines_are_left_out_and_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 5)
    file = folder / "metrics.jsonl"
    wrong = b'{"step": null, "loss/total": 9}\n[1]\nnull\n{"loss/total": 9}\n\xff\xfe\n'
    file.write_bytes(wrong + file.read_bytes()[:-10] + b'\n{"step": 7, "loss/tot')
    run = read_run(folder)
    assert [step for step, _ in run.values["loss/total"]] == [1, 2, 3, 4]
    assert run.notes == [f"{file}: 7 damaged lines left out"]


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "evaluated" / "evaluations.jsonl", [{"step": 1, "psnr": 20.0}])
    for folder in (tmp_path / "absent", tmp_path / "empty", tmp_path / "evaluated", write_recipe(tmp_path / "new", {})):
        with pytest.raises(InputError, match=re.escape(str(folder))):
            read_run(folder)


def test_runs_are_called_by_their_names_or_paths(tmp_path: Path) -> None:
    """Also by those that matplotlib would take for mathematics, or leave out."""
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "c/_$x_1$_&")]
    runs = read_runs(folders)
    assert [run.name for run in runs] == [str(folders[0]), str(folders[1]), "_$x_1$_&"]
    assert "\u200b_$x_1$_&amp;" in re.findall(
        r"<text[^>]*>([^<]*)</text>", save_picture(lambda: curves_figure(runs), "svg").decode()
    )


def test_losses_are_on_a_logarithmic_scale_if_they_are_positive(tmp_path: Path) -> None:
    entries = ({"step": step, "loss/total": 1.0 / (step + 1), "loss/repa": -0.5 + step} for step in range(9))
    write_lines(tmp_path / "metrics.jsonl", entries)
    total, repa = curves_figure([read_run(tmp_path)]).axes
    assert (total.get_yscale(), repa.get_yscale()) == ("log", "linear")


def test_a_random_backbone_is_told(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", terms=("total", "lpips", "repa"), random_backbones=["lpips"])
    found = titles(read_runs([write_run(tmp_path / "other"), one]))
    assert "loss: lpips\n(random backbone: means nothing)" in found
    assert "loss: repa" in found


def test_running_mean() -> None:
    assert running_mean([3.0] * 9, 4.0) == pytest.approx([3.0] * 9)
    assert running_mean([1.0, 5.0, 2.0], 1.0) == [1.0, 5.0, 2.0]
    smooth = running_mean([math.sin(2.0 * step) for step in range(1000)], 50.0)
    assert max(map(abs, smooth[200:])) < 0.1


def test_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "run"))
    for kind, begins in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        assert save_picture(lambda: curves_figure([run]), kind).startswith(begins)
    with pytest.raises(InputError, match=r"'pgn' \(did you mean 'png'"):
        save_picture(lambda: curves_figure([run]), "pgn")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'dc-ssdae\[eval\]'"):
        save_picture(lambda: curves_figure([run]))


@pytest.mark.parametrize(
    "recipes",
    [
        [],
        [{"1-compression": 900, "2-resolution": 100, "3-frozen_decoder": 50, "4-a_very_long_name_of_a_phase": 30}],
        [{"1-compression": 900, "2-quality": 100}, {"1-compression": 890, "2-quality": 300, "distilled": 200}],
    ],
    ids=["runs", "short phases", "two recipes"],
)
def test_no_text_lies_on_another_one(recipes: list[dict[str, int]], tmp_path: Path) -> None:
    folders = [write_recipe(tmp_path / f"recipe-{number}", phases) for number, phases in enumerate(recipes)]
    plain = write_run(tmp_path / "run", 700, ("total", "kl", "lpips", "repa"), random_backbones=["lpips", "repa"])
    figure = curves_figure(read_runs([*folders, plain, write_run(tmp_path / ("long-name-" * 9), 300)]))
    figure.draw_without_rendering()
    assert figure.bbox.width == 1200
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.title, axes.xaxis.label)]
    texts += [label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in tick_labels(axis)]
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in (*texts, *figure.texts)]
    assert len(boxes) > 60
    together = itertools.combinations(boxes, 2)
    assert [(one, other) for (one, box), (other, place) in together if box.overlaps(place)] == []
    within = figure.bbox.padded(1.0)
    assert [name for name, box in boxes if not (within.containsx(box.x0) and within.containsx(box.x1))] == []
    assert [name for name, box in boxes if not (within.containsy(box.y0) and within.containsy(box.y1))] == []


def tick_labels(axis: Any) -> list[Any]:
    """The labels that are drawn: those within the limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in ticks if low <= place <= high]
