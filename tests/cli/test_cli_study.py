"""`dc-ssdae study sampling`: what it writes of one model and of two, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_samples import random_pixels, save_model
from PIL import Image

GRID = ("--steps", "1,2", "--step_sizes", "default,0.25", "--tolerances", "0.5", "--rounds", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 1), ("validation", 3)):
        (folder / split).mkdir()
        for index in range(count):
            Image.fromarray(random_pixels(24, 40, seed=index)).save(folder / split / f"{index}.png")
    (folder / "validation" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def flow_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "fm"
    return save_model(folder, dynamics={"class_path": "FlowMatching"})


def test_two_models(run: Any, model_dir: Path, flow_dir: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    words = ("study", "sampling", "--model", model_dir, "--baseline", flow_dir, "--data", photos, "--size", 16)
    outcome = run(*words, "--out", out, *GRID)
    assert outcome.code == 0
    assert len(outcome.err) == 1
    assert "broken.png" in outcome.err[0]
    assert outcome.out[-1].startswith(f"-> {out}/study.json, ")
    assert (out / "table.md").read_text(encoding="utf-8").splitlines() == outcome.out[:-2]
    content = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in content["measurements"][:3]] == ["fm"] * 3
    assert content["needed"]["psnr"]
    assert "3 images of 16 px" in content["notes"][0]
    assert content["notes"][1].startswith("No LPIPS: the weights of vgg are not on this machine")
    assert "is no run" in content["notes"][2]
    with Image.open(out / "study.png") as picture:
        assert picture.width > 1000


def test_one_model_of_chosen_samplers(run: Any, model_dir: Path, photos: Path, tmp_path: Path) -> None:
    words = ("study", "sampling", "--model", model_dir, "--data", photos, "--size", 16, "--lpips", "none")
    outcome = run(*words, "--samplers", "one_step,nesterov", "--out", tmp_path / "study", *GRID)
    assert outcome.code == 0
    rows = [line for line in outcome.out if line.startswith(f"| {model_dir.name}")]
    assert {row.split(" | ")[1] for row in rows} == {"one_step", "nesterov"}
    assert not any("LPIPS" in line for line in outcome.out)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--samplers", "nestorov"], "did you mean 'nesterov'"),
        (["--samplers", "euler"], "EquilibriumMatching has none of these samplers"),
        (["--tolerances", "-1"], "tolerance is -1.0"),
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 on"),
        (["--step_sizes", "x"], "argument --step_sizes: 'x' is not a number"),
        (["--size", "20"], "both sides must be multiples of f = 8"),
        (["--baseline", "MODEL"], "two models are called"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(
    run: Any, model_dir: Path, photos: Path, tmp_path: Path, words: list[str], named: str
) -> None:
    words = [str(model_dir) if word == "MODEL" else word for word in words]
    given = ["study", "sampling", "--model", model_dir, "--data", photos, "--size", 16, "--out", tmp_path / "study"]
    outcome = run(*given, *words)
    assert outcome.code == 2
    assert outcome.out == []
    *left_out, line = outcome.err
    assert named in line
    assert all("broken.png" in other for other in left_out)
    assert not (tmp_path / "study").exists()


def test_which_study(run: Any) -> None:
    outcome = run("study")
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert "STUDY" in outcome.err[0]
