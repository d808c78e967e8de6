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


def check_spread(cell: str) -> float:
    """Check a cell "median (low..high)", whose quartiles are rounded to fewer digits; gives the median."""
    median, low, high = map(float, re.split(r" \(|\.\.", cell.replace(",", "").removesuffix(")")))
    assert 0.0 < low <= 1.01 * median <= 1.02 * high
    return median


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
    assert (found["benchmark"], found["machine"]["threads"], found["machine"]["device"]) == ("decode", 1, "cpu")


def test_data(run: Run, photos: Path) -> None:
    Path("photos/train/1-bad.png").write_bytes(b"no image")
    words = ("bench", "data", photos, "--seconds", 0.01, "--image-size", 32, "--workers", "0,1")
    outcome = run(*words, photos / "train", "--packed", "--aug-scale", 1.5, "--json")
    assert outcome.code == 0
    figures = outcome.json()
    assert (figures["benchmark"], figures["image_size"], figures["aug_scale"]) == ("data", 32, 1.5)
    held = [(source["name"], source["images"], len(source["broken"])) for source in figures["sources"]]
    assert held == [("photos", 4, 1), ("photos/train", 4, 1), ("photos (packed)", 3, 0)]
    assert outcome.err
    assert all("1-bad.png" in line for line in outcome.err), "packing told of it"
    found = columns(run(*words).out)
    assert found["name"] == ["photos"]
    for rate in ("stages.read", "stages.sample", "loader.1"):
        check_spread(found[f"{rate}.images_per_second"][0])
        assert found[f"{rate}.ratio"] == ["1 (1..1)"]
    assert "1-bad.png" in found["broken"][0]


def test_steps(run: Run) -> None:
    outcome = run(*TRAIN, "--steps", 2, "--compare", "training.gradient_checkpointing=true")
    assert (outcome.code, outcome.err) == (0, [])
    found = columns(outcome.out)
    assert found["name"] == ["demo", "training.gradient_checkpointing=true"]
    for seconds, rate in zip(found["seconds"], found["images_per_second"], strict=True):
        assert check_spread(seconds) * check_spread(rate) == pytest.approx(1.0, rel=0.05)  # one image per step
    assert found["ratio"][0] == "-"
    check_spread(found["ratio"][1])
    assert all(check_spread(found[f"phases.{phase}"][0]) for phase in ("forward", "backward", "update"))
    assert int(found["peak_memory_bytes"][0].replace(",", "")) > 0
    assert found["peak_memory_bytes"][1] == "-", "a process has but one largest resident set"
    figures = run(*TRAIN, "--json", "--steps=1").json()
    assert (figures["benchmark"], figures["steps"], figures["config"]["data"]["image_size"]) == ("train", 1, 16)
    assert set(figures["configurations"][0]["phases"]) == {"forward", "backward", "update"}
