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
from dc_ssdae.evaluation.curves import (
    FORMATS,
    RunCurves,
    curves_figure,
    draw_curves,
    picture_format,
    read_run,
    read_runs,
    running_mean,
)

pytest.importorskip("matplotlib")


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_run(folder: Path, steps: int = 20, terms: tuple[str, ...] = ("kl", "total"), **more: Any) -> Path:
    """A run with one loss of 1/(step + 1) a term, and two evaluations."""
    losses = ({f"loss/{term}": 1.0 / (step + 1) for term in terms} for step in range(steps))
    write_lines(
        folder / "metrics.jsonl", ({"step": step, **loss, "lr": 0.1, **more} for step, loss in enumerate(losses))
    )
    evaluated = (steps // 2, steps)
    write_lines(
        folder / "evaluations.jsonl",
        ({"step": step, "psnr": 20.0 + step, "ssim": 0.5, "mse": 0.1, "images": 4} for step in evaluated),
    )
    return folder


def write_recipe(folder: Path, phases: Mapping[str, int]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("phases: {}\n")
    for name, steps in phases.items():
        write_run(folder / name, steps)
    return folder


def titles(runs: list[RunCurves]) -> list[str]:
    return [axes.get_title() for axes in curves_figure(runs).axes if axes.get_visible()]


def test_a_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.name == "run"
    assert run.end == 20
    assert set(run.losses) == {"kl", "total"}
    (curve,) = run.losses["total"]
    assert curve.steps == list(range(20))
    assert curve.values == [1.0 / (step + 1) for step in range(20)]
    (psnr,) = run.measures["psnr"]
    assert (psnr.steps, psnr.values) == ([10, 20], [30.0, 40.0])
    assert set(run.measures) == {"psnr", "ssim"}
    assert not run.notes
    assert not run.phases
    assert titles([run]) == ["loss: total", "loss: kl", "evaluation: PSNR (dB)", "evaluation: SSIM"]


def test_a_run_that_was_never_evaluated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluations.jsonl").unlink()
    assert titles([read_run(folder)]) == ["loss: total", "loss: kl"]


def test_phases_stand_one_after_the_other(tmp_path: Path) -> None:
    """In the order of their numbers, 10 after 2, those that have not begun left out; the distilled model last."""
    phases = {"distilled": 4, "10-quality": 5, "2-size": 6, "1-compression": 8}
    folder = write_recipe(tmp_path / "recipe", phases)
    (folder / "11-not_begun").mkdir()
    run = read_run(folder)
    assert run.phases == [(0, "compression"), (8, "size"), (14, "quality"), (19, "distilled")]
    assert run.end == 23
    steps = [step for curve in run.losses["total"] for step in curve.steps]
    assert steps == list(range(23))
    assert [curve.steps for curve in run.measures["ssim"]] == [[4, 8], [11, 14], [16, 19], [21, 23]]


def test_what_is_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = [1.0, None, float("nan"), float("inf"), "1", True, 10**400, 2.0]
    write_lines(folder / "metrics.jsonl", ({"step": step, "loss/total": v} for step, v in enumerate(values)))
    run = read_run(folder)
    (curve,) = run.losses["total"]
    assert curve.steps == list(range(8))
    assert curve.finite() == ([0, 7], [1.0, 2.0])
    (axes,) = curves_figure([run]).axes
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [step for line in crosses for step in line.get_xdata()] == [1, 2, 3, 4, 5, 6]


def test_damaged_lines_are_left_out_and_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 5)
    file = folder / "metrics.jsonl"
    wrong = b'{"step": "1", "loss/total": 9}\n[1]\nnull\n{"loss/total": 9}\n{"step": -1, "loss/total": 9}\n\n\xff\xfe\n'
    file.write_bytes(wrong + file.read_bytes()[:-10] + b"\n" + b"[" * 100_000 + b'\n{"step": 7, "loss/tot')
    run = read_run(folder)
    (curve,) = run.losses["total"]
    assert curve.steps == [0, 1, 2, 3]
    assert run.notes == [f"{file}: 9 damaged lines left out"]


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no losses to draw yet"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no losses to draw yet"):
        read_run(write_recipe(tmp_path / "recipe", {}))


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "c/other")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


def test_losses_are_on_a_logarithmic_scale_if_they_are_positive(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    entries = ({"step": step, "loss/total": 1.0 / (step + 1), "loss/repa": -0.5 + step} for step in range(9))
    write_lines(folder / "metrics.jsonl", entries)
    total, repa = curves_figure([read_run(folder)]).axes
    assert total.get_yscale() == "log"
    assert repa.get_yscale() == "linear"


@pytest.mark.parametrize("value", [5e-324, 1e-99, 1e99, 1.7e308], ids=str)
def test_values_at_the_ends_of_the_range(value: float, tmp_path: Path) -> None:
    folder = write_recipe(tmp_path / "recipe", {"1-one": 5})
    write_lines(folder / "distilled" / "metrics.jsonl", ({"step": step, "loss/total": value} for step in range(3)))
    assert draw_curves([read_run(folder)])


def test_a_random_backbone_is_told(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", terms=("total", "lpips", "repa"), random_backbones=["lpips"])
    other = write_run(tmp_path / "other")
    found = titles(read_runs([other, one]))
    assert "loss: lpips\n(random backbone: means nothing)" in found
    assert "loss: repa" in found


def test_running_mean() -> None:
    assert running_mean([], 10.0) == []
    assert running_mean([3.0] * 9, 4.0) == pytest.approx([3.0] * 9)
    assert running_mean([1.0, 5.0, 2.0], 1.0) == [1.0, 5.0, 2.0]
    noisy = [math.sin(2.0 * step) for step in range(1000)]
    smooth = running_mean(noisy, 50.0)
    assert smooth[0] == noisy[0]
    assert max(map(abs, smooth[200:])) < 0.1


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str, tmp_path: Path) -> None:
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert draw_curves([read_run(write_run(tmp_path / "run"))], kind).startswith(begins[kind])


def test_the_format_follows_from_the_name() -> None:
    names = {"a.png": "png", "a.SVG": "svg", "b/a.pdf": "pdf", "curves": "png"}
    assert {name: picture_format(Path(name)) for name in names} == names
    with pytest.raises(InputError, match=r"kind of picture '\.jpg'.*accepted: \.pdf, \.png, \.svg"):
        picture_format(Path("a.jpg"))


def test_a_picture_names_runs_as_they_are_called(tmp_path: Path) -> None:
    """Also those that matplotlib would leave out, or take for mathematics."""
    names = ["_hidden", "$x_1$", "50%_&", "plain"]
    svg = draw_curves(read_runs([write_run(tmp_path / name) for name in names]), "svg").decode()
    texts = [text.lstrip("\u200b") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    assert [name for name in names if name.replace("&", "&amp;") not in texts] == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'dc-ssdae\[eval\]'"):
        draw_curves([run])


@pytest.mark.parametrize(
    "recipes",
    [
        [{"1-one": 500}],
        [{"1-compression": 900, "2-resolution": 10, "3-frozen_decoder": 5, "4-a_very_long_name_of_a_phase": 3}],
        [{"1-compression": 900, "2-quality": 10}, {"1-compression": 890, "2-quality": 300, "distilled": 2}],
        [{f"{number}-phase{number}": 40 for number in range(1, 9)}],
    ],
    ids=["one", "short phases", "two recipes", "many phases"],
)
def test_no_text_lies_on_another_one(recipes: list[dict[str, int]], tmp_path: Path) -> None:
    folders = [write_recipe(tmp_path / f"recipe-{number}", phases) for number, phases in enumerate(recipes)]
    plain = write_run(tmp_path / "run", 700, ("total", "kl", "lpips", "repa"), random_backbones=["lpips", "repa"])
    figure = curves_figure(read_runs([*folders, plain, write_run(tmp_path / ("long-name-" * 9), 300)]))
    figure.draw_without_rendering()
    assert figure.bbox.width == 1200
    panels = [axes for axes in figure.axes if axes.get_visible()]
    texts = [text for axes in panels for text in (*axes.texts, axes.title, axes.xaxis.label)]
    texts += [label for axes in panels for axis in (axes.xaxis, axes.yaxis) for label in tick_labels(axis)]
    texts += figure.legends[0].get_texts()
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in texts]
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
