"""`dc-ssdae bench`: its words, tables and JSON. How fast anything is, is not asked."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_samples import Refusal, Run, save_photos

from dc_ssdae import DCSSDAE
from dc_ssdae.evaluation.profile import count_flops

TRAIN = ("bench", "train", "--config", "demo", "--training.batch_size=1", "--data.image_size", 16, "--device", "cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with train/, which holds three PNG."""
    return save_photos(tmp_path / "photos", "train/0", "train/1", "train/2")


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


def test_data_table(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = "long" * 20
    Path(long).symlink_to(photos / "train")
    (photos / "train" / "1-bad.png").write_bytes(b"no image")
    outcome = run("bench", "data", "photos", long, "--packed", "--seconds", 0.01, "--image-size", 32, "--json")
    assert outcome.code == 0
    sources = outcome.json()["sources"]
    assert [source["name"] for source in sources] == ["photos", long, "photos (packed)"]
    assert [len(source["broken"]) for source in sources] == [1, 1, 0]
    assert {source["stages"]["read"]["ratio"]["median"] for source in sources[:1]} == {1.0}
    assert all("1-bad.png" in line for line in outcome.err), "packing told of it"
    found = columns(run("bench", "data", "photos", "--seconds", 0.01, "--image-size", 32).out)
    for stage in ("read", "crop", "sample"):
        check_spread(found[f"stages.{stage}.images_per_second"][0])
        assert found[f"stages.{stage}.ratio"] == ["1 (1..1)"]


def test_data_as_json(run: Run, photos: Path) -> None:
    words = ("--seconds", 0.01, "--image-size", 32, "--aug-scale", 1.5, "--workers", "0,1", "--json")
    outcome = run("bench", "data", photos, photos / "train", *words)
    assert (outcome.code, outcome.err) == (0, [])
    figures = outcome.json()
    assert (figures["benchmark"], figures["image_size"], figures["aug_scale"]) == ("data", 32, 1.5)
    assert [source["name"] for source in figures["sources"]] == [str(photos), str(photos / "train")]
    for source in figures["sources"]:
        assert (source["images"], source["broken"]) == (3, [])
        assert list(source["stages"]) == ["read", "crop", "sample"]
        assert list(source["loader"]) == ["1"]
        assert source["loader"]["1"]["images_per_second"]["median"] > 0.0


def test_steps_table(run: Run) -> None:
    outcome = run(*TRAIN, "--steps", 2, "--compare", "training.gradient_checkpointing=true")
    assert (outcome.code, outcome.err) == (0, [])
    found = columns(outcome.out)
    assert found["name"] == ["demo", "training.gradient_checkpointing=true"]
    for name in ("seconds", "images_per_second", "phases.forward", "phases.backward", "phases.update"):
        for cell in found[name]:
            check_spread(cell)
    assert found["ratio"][0] == "-"
    check_spread(found["ratio"][1])
    assert found["peak_memory_bytes"][1] == "-", "a process has but one largest resident set"


def test_steps_as_json(run: Run) -> None:
    figures = run(*TRAIN, "--json", "--steps=1").json()
    assert (figures["benchmark"], figures["steps"], figures["machine"]["device"]) == ("train", 1, "cpu")
    assert figures["config"]["data"]["image_size"] == 16
    (entry,) = figures["configurations"]
    assert (entry["name"], entry["batch_size"]) == ("demo", 1)
    assert entry["seconds"]["median"] > 0.0
    assert set(entry["phases"]) == {"forward", "backward", "update"}


def test_the_configuration_can_be_printed(run: Run) -> None:
    assert "  image_size: 16" in run(*TRAIN, "--print_config").out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("decode jpeg:75", "jpeg:75"),
        ("encode preset:demmo", "did you mean 'demo'"),
        ("data nowhere", "nowhere"),
        ("data empty", "no images"),
        ("data shards.tar --packed", "shards.tar"),
        ("data empty --workers 1,1025", "--workers"),
        ("train", "section model"),
        ("train --config dmeo", "did you mean 'demo'"),
        ("train --config demo --stepz 3", "did you mean '--steps'"),
        ("train --config demo --device gpu", "'gpu'"),
        ("train --config demo --training.lr -1", "training.lr"),
        ("train --config demo --data.image_size 31", "31"),
        ("train --config demo --compare compile=true", "'compile'"),
        ("train --config demo --compare training.compil=true", "'compil'"),
    ],
)
def test_mistakes_are_one_line(
    words: str, named: str, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards.tar").touch()
    assert named in refusal("bench", *words.split())
