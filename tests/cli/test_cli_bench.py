"""`dc-ssdae bench`: its words, tables and JSON. How fast anything is, is not asked."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_samples import Run, save_photos

from dc_ssdae import DCSSDAE
from dc_ssdae.evaluation.profile import count_flops

TRAIN = ("bench", "train", "--config", "demo", "--training.batch_size=1", "--data.image_size", 16, "--device", "cpu")


@pytest.fixture
def photos() -> Path:
    """A folder with train/, which holds three PNG."""
    return save_photos(Path("photos"), "train/0", "train/1", "train/2")


def columns(lines: Sequence[str]) -> dict[str, list[str]]:
    """The cells of the table that is printed, by its lines' names."""
    assert max(map(len, lines[: lines.index("")])) <= 100
    cells = [re.split(r" {2,}", line) for line in lines[: lines.index("")]]
    return {name: values for name, *values in cells}


def check_spread(cell: str) -> None:
    median, low, high = (
        float(number.replace(",", "")) for number in re.findall(r"[0-9,.e+-]+[0-9]", re.sub(r"\.\.", " ", cell))
    )
    assert 0.0 < low <= 1.01 * median <= 1.02 * high, "rounded to fewer digits"


def test_models_in_alternation(run: Run) -> None:
    words = ("bench", "encode", "preset:demo", "--against", "other=preset:demo", "--rounds", 1, "--device", "cpu")
    outcome = run(*words, "--size", "32")
    assert outcome.code == 0
    found = columns(outcome.out)
    assert found["label"] == ["preset:demo", "other"]
    assert found["size"] == ["32", "32"]
    assert found["ratio"][0] == "-"
    check_spread(found["ratio"][1])


def test_a_model_as_json(run: Run) -> None:
    found = run("bench", "decode", "preset:demo", "--size", 64, "--rounds", 1, "--device", "cpu", "--json").json()
    (entry,) = found["figures"]
    expected = count_flops(DCSSDAE.from_preset("demo"), 64).decode_step
    assert 0.9 * expected < entry["flops"] <= expected
    assert 0.0 < entry["share_of_peak"] < 1.0
    assert (found["benchmark"], found["machine"]["threads"]) == ("decode", 1)


def test_data(run: Run, photos: Path) -> None:
    Path("photos/train/1-bad.png").write_bytes(b"no image")
    words = ("bench", "data", photos, "--seconds", 0.01, "--image-size", 32)
    outcome = run(*words, photos / "train", "--packed", "--aug-scale", 1.5, "--workers", "0,1")
    assert outcome.code == 0
    rows, text = tables(outcome.out)[0][1:], " ".join(outcome.out)
    names, stages = (
        ("photos", "photos/train", "photos (packed)"),
        ("read+decode", "crop+flip", "whole sample", "1 worker"),
    )
    assert [row[:2] for row in rows] == [[name, stage] for name in names for stage in stages]
    for row in rows:
        check_spread(*row[2:4])
        check_spread(*row[4:])
    assert {row[4] for row in rows[:4]} == {"1.000"}
    for told in ("aug_scale 1.5", "1 broken among the images measured", "the first 3 were used"):
        assert told in text
    assert outcome.err
    assert all("1-bad.png" in line for line in outcome.err), "packing told of it"
    figures = run(*words, "--json").json()
    assert (figures["benchmark"], figures["image_size"], figures["sources"][0]["images"]) == ("data", 32, 4)


def test_steps(run: Run) -> None:
    outcome = run(*TRAIN, "--steps", 2, "--compare", "training.gradient_checkpointing=true")
    assert (outcome.code, outcome.err) == (0, [])
    speeds, costs, _ = tables(outcome.out)
    for rows in (speeds, costs):
        assert [row[0] for row in rows] == ["configuration", "demo", "training.gradient_checkpointing=true"]
    for row in speeds[1:]:
        check_spread(*row[2:4])
        assert number(row[1]) * number(row[2]) == pytest.approx(1000.0, rel=0.05)  # one image per step
    assert speeds[1][4:] == ["1", "-"]
    check_spread(*speeds[2][4:])
    assert all(number(cell) > 0.0 for cell in costs[1][1:5])
    assert costs[2][4] == "-", "a process has but one largest resident set"
    assert "2 steps of 1 random image of 16 px, float32, adamw" in " ".join(outcome.out)
    figures = run(*TRAIN, "--json", "--steps=1").json()
    assert (figures["benchmark"], figures["steps"], figures["config"]["data"]["image_size"]) == ("train", 1, 16)
    assert set(figures["configurations"][0]["phases"]) == {"forward", "backward", "update"}
