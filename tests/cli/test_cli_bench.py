"""`dc-ssdae bench`: its words, tables and JSON. How fast anything is, is not asked."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_samples import random_pixels
from PIL import Image

from dc_ssdae import DCSSDAE
from dc_ssdae.evaluation.profile import count_flops

TRAIN = ("bench", "train", "--config", "demo", "--training.batch_size=1", "--data.image_size", 16, "--device", "cpu")
QUARTILES = re.compile(r"[\d,.]+?\.\.[\d,.]+")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with train/, which holds four PNG of 40 by 40 pixels."""
    folder = tmp_path / "photos"
    (folder / "train").mkdir(parents=True)
    for number in range(4):
        Image.fromarray(random_pixels(40, 40, seed=number)).save(folder / "train" / f"{number}.png")
    return folder


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def one_line(run: Callable, *words: object) -> str:
    outcome = run(*words)
    assert outcome.code == 2
    assert not outcome.out
    (line,) = outcome.err
    return line


def test_without_a_benchmark_says_which_there_are(run: Callable) -> None:
    assert (
        one_line(run, "bench")
        == "dc-ssdae bench: which benchmark of encode, decode, train, data? dc-ssdae bench --help describes them"
    )
    assert "unknown benchmark 'tain' (did you mean 'train'?)" in one_line(run, "bench", "tain")
    assert "unknown option '--jso'" in one_line(run, "bench", "--jso")


@pytest.mark.parametrize("words", [(), ("encode",), ("decode",), ("data",), ("train",)])
def test_help(words: tuple[str, ...], run: Callable) -> None:
    outcome = run("bench", *words, "--help")
    assert outcome.code == 0
    assert outcome.out[0].startswith("usage: dc-ssdae bench")
    assert not outcome.err


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_models_in_alternation(run: Callable, work: str) -> None:
    words = ("bench", work, "preset:demo", "--against", "diffusers:AutoencoderTiny", "--size", "32,64", "--rounds", 1)
    outcome = run(*words, "--device", "cpu")
    assert outcome.code == 0
    assert max(map(len, outcome.out)) <= 100
    rows = [re.split(r" {2,}", line) for line in outcome.out[: outcome.out.index("")]]
    assert [row[:2] for row in rows[1:]] == [
        [label, size] for size in ("32", "64") for label in ("preset:demo", "AutoencoderTiny")
    ]
    assert [row[4] == "-" for row in rows[1:]] == [True, False] * 2
    outcome = run(*words[:3], "--size", 64, "--rounds", 1, "--json", "--device", "cpu")
    found = json.loads("\n".join(outcome.out))
    (entry,) = found["figures"]
    flops = count_flops(DCSSDAE.from_preset("demo"), 64)
    expected = flops.encode if work == "encode" else flops.decode_step
    assert 0.9 * expected < entry["flops"] <= expected
    assert 0.0 < entry["share_of_peak"] < 1.0
    assert found["machine"]["threads"] == 1


@pytest.mark.parametrize("model", ["jpeg:75", "diffusers:AutoencoderNone", "preset:none"])
def test_what_has_no_networks_is_refused(run: Callable, model: str) -> None:
    assert model.rpartition(":")[2] in one_line(run, "bench", "decode", model, "--device", "cpu")


def test_data_table(run: Callable, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = "long" * 20
    Path(long).symlink_to(photos / "train")
    (photos / "train" / "1-bad.png").write_bytes(b"no image")
    outcome = run("bench", "data", "photos", long, "--packed", "--seconds", 0.01, "--image-size", 32)
    assert outcome.code == 0
    assert max(map(len, outcome.out)) <= 100
    cells = [re.split(r" {2,}", line) for line in outcome.out[: outcome.out.index("")]]
    rows = [row for row in cells if len(row) > 1]  # the others go on with the name of the line above
    assert "".join(row[0] for row in cells[4:7]).startswith(long)
    assert rows[0] == ["source", "stage", "images/s", "quartiles", "ratio", "quartiles"]
    assert [row[1] for row in rows[1:]] == ["read+decode", "crop+flip", "whole sample"] * 3
    assert len({row[0] for row in rows[1:]}) == 3
    for row in rows[1:]:
        low, high = map(number, row[3].split(".."))
        assert 0.0 < low <= number(row[2]) <= high
        assert number(row[4]) > 0.0
        assert QUARTILES.fullmatch(row[5])
    assert {row[4] for row in rows[1:4]} == {"1.000"}
    text = " ".join(outcome.out[len(cells) :])
    assert "Images per second of one process with one thread: medians of 7 rounds of " in text
    assert "Crops of 32 px" in text
    assert re.search(r"Measured on .*, \d+ cores?, 1 thread, PyTorch \S+, Python \S+\.", text)
    assert "1 broken among the images measured, replaced by others as in training" in text
    assert "the first 4 were used" in text
    assert [line for line in outcome.err if "1-bad.png" in line] == outcome.err  # packing told of it


def test_data_as_json(run: Callable, photos: Path) -> None:
    words = ("--seconds", 0.01, "--image-size", 32, "--aug-scale", 1.5, "--workers", "0,1", "--json")
    outcome = run("bench", "data", photos, photos / "train", *words)
    assert outcome.code == 0
    assert not outcome.err
    figures = json.loads("\n".join(outcome.out))
    assert (figures["benchmark"], figures["image_size"], figures["aug_scale"]) == ("data", 32, 1.5)
    assert figures["machine"]["threads"] == 1
    assert [source["name"] for source in figures["sources"]] == [str(photos), str(photos / "train")]
    for source in figures["sources"]:
        assert source["images"] == 4
        assert source["broken"] == []
        assert list(source["stages"]) == ["read", "crop", "sample"]
        assert list(source["loader"]) == ["1"]
        assert source["loader"]["1"]["images_per_second"]["median"] > 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "there is no folder 'nowhere'"),
        ((), "the following arguments are required: SOURCE"),
        (("",), "argument SOURCE: the name is empty"),
        ((".", "--seconds", "0"), "argument --seconds: '0' is not a number from 0.001 on"),
        ((".", "--seconds", "nan"), "argument --seconds: 'nan' is not a number from 0.001 on"),
        ((".", "--aug-scale", "0.5"), "argument --aug-scale: '0.5' is not a number from 1 on"),
        ((".", "--image-size", "7"), "argument --image-size: '7' is not a whole number from 8 to 65536"),
        ((".", "--workers", "1,x"), "argument --workers[^:]*: 'x' is not a whole number from 0 to 1024"),
        ((".", "--worker", "1"), r"unknown option '--worker' \(did you mean '--workers'\?\)"),
    ],
)
def test_mistakes_of_data_are_one_line(words: tuple[str, ...], message: str, run: Callable) -> None:
    assert re.match(f"dc-ssdae bench( data)?: {message}", one_line(run, "bench", "data", *words))


def test_an_empty_folder_and_shards_that_cannot_be_packed(run: Callable, tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "there are no images in" in one_line(run, "bench", "data", tmp_path / "empty")
    assert run("pack", photos / "train", tmp_path / "shards", "--workers", 1).code == 0
    message = one_line(run, "bench", "data", tmp_path / "shards", "--packed")
    assert "only a folder of images can be packed" in message


def test_steps_table(run: Callable) -> None:
    outcome = run(*TRAIN, "--steps", 2, "--compare", "training.gradient_checkpointing=true")
    assert outcome.code == 0
    assert not outcome.err
    assert max(map(len, outcome.out)) <= 100
    first, second = (index for index, line in enumerate(outcome.out) if not line)
    speeds, costs = (
        [re.split(r" {2,}", line) for line in lines] for lines in (outcome.out[:first], outcome.out[first + 1 : second])
    )
    assert [row[0] for row in speeds] == ["configuration", "demo", "training.gradient_checkpointing=true"]
    assert [row[0] for row in costs] == [row[0] for row in speeds]
    for row in speeds[1:]:
        low, high = map(number, row[3].split(".."))
        assert low <= number(row[2]) <= high
        assert number(row[1]) * number(row[2]) == pytest.approx(1000.0, rel=0.05)  # one image a step
    assert speeds[1][4:] == ["1", "-"]
    assert number(speeds[2][4]) > 0.0
    assert all(number(cell) > 0.0 for cell in costs[1][1:4])
    assert number(costs[1][4]) > 0.0
    assert costs[2][4] == "-"  # a process has but one largest resident set
    text = " ".join(outcome.out[second:])
    assert "2 steps of 1 random image of 16 px, float32, adamw; medians, compared in alternation" in text
    assert "Memory: resident set of this process." in text


def test_steps_as_json(run: Callable) -> None:
    outcome = run(*TRAIN, "--json", "--steps=1")
    assert outcome.code == 0
    figures = json.loads("\n".join(outcome.out))
    assert (figures["benchmark"], figures["steps"]) == ("train", 1)
    assert figures["config"]["data"]["image_size"] == 16
    (entry,) = figures["configurations"]
    assert entry["name"] == "demo"
    assert entry["batch_size"] == 1
    assert entry["seconds"]["median"] > 0.0
    assert set(entry["phases"]) == {"forward", "backward", "update"}
    assert figures["machine"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the configuration has no section model"),
        (("--config", "dmeo"), "--config: unknown preset 'dmeo' (did you mean 'demo'?)"),
        (("--config", "demo", "--stepz", "3"), "unknown option '--stepz' (did you mean '--steps'?)"),
        (("--config", "demo", "--steps", "0"), "argument --steps: '0' is not a whole number from 1 on"),
        (("--config", "demo", "--steps"), "argument --steps: expected one argument"),
        (("--config", "demo", "--device", "gpu"), "argument --device: unknown device 'gpu'"),
        (("--config", "demo", "--device", "cuda:99"), "no device 'cuda:99'"),
        (("--config", "demo", "--training.lr", "-1"), "training.lr is -1"),
        (("--config", "demo", "extra"), "unexpected word 'extra'"),
        (("--config", "demo", "--compare", "compile=true"), "--compare 'compile=true' is no setting with a value"),
        (("--config", "demo", "--compare", "training.compile"), "--compare 'training.compile' is no setting with a"),
        (("--config", "demo", "--compare", "training.compil=true"), "unknown setting of training 'compil' (did you"),
        (
            ("--config", "demo", "--training.precision", "float16", "--device", "cpu", "--data.image_size", "31"),
            "data.",
        ),
    ],
)
def test_mistakes_of_train_are_one_line(words: tuple[str, ...], message: str, run: Callable) -> None:
    assert message in one_line(run, "bench", "train", *words)


def test_configuration_can_be_printed(run: Callable) -> None:
    outcome = run(*TRAIN, "--print_config")
    assert outcome.code == 0
    assert "image_size: 16" in "\n".join(outcome.out)
