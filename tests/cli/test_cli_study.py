"""`dc-ssdae study sampling`: what it writes of one model and of two, and what it refuses."""

import json
from pathlib import Path

import pytest
from cli_samples import Run, Words, save_model, save_photos
from PIL import Image


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training image, two validation images, and a file that is none."""
    folder = save_photos(tmp_path_factory.mktemp("photos"), "train/0", "validation/1", "validation/2")
    (folder / "validation" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def words(model_dir: Path, photos: Path, tmp_path: Path) -> Words:
    given = ("--model", model_dir, "--data", photos, "--size", 16, "--out", tmp_path / "study", "--device", "cpu")
    grid = ("--steps", "1,2", "--step_sizes", "default,0.25", "--tolerances", "0.5", "--rounds", 1)
    return ("study", "sampling", *given, *grid)


def test_two_models(run: Run, words: Words, tmp_path: Path) -> None:
    flow, out = save_model(tmp_path / "fm", dynamics={"class_path": "FlowMatching"}), tmp_path / "study"
    outcome = run(*words, "--baseline", flow)
    assert outcome.code == 0
    (line,) = outcome.err
    assert "broken.png" in line
    assert outcome.out[-1].startswith(f"-> {out}/study.json, ")
    assert (out / "table.md").read_text(encoding="utf-8").splitlines() == outcome.out[:-2]
    content = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in content["measurements"][:3]] == ["fm"] * 3
    assert content["needed"]["psnr"]
    protocol, lpips = content["notes"]
    assert "2 images of 16 px" in protocol
    assert lpips.startswith("No LPIPS")
    with Image.open(out / "study.png") as picture:
        assert picture.width > 1000


def test_one_model_of_chosen_samplers(run: Run, words: Words, model_dir: Path) -> None:
    outcome = run(*words, "--model", f"mine={model_dir}", "--lpips", "none", "--samplers", "one_step,nesterov")
    assert outcome.code == 0
    rows = [line for line in outcome.out if line.startswith("| mine")]
    assert {row.split(" | ")[1] for row in rows} == {"one_step", "nesterov"}
    assert not any("LPIPS" in line for line in outcome.out)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--samplers nestorov", "did you mean 'nesterov'"),
        ("--samplers euler", "EquilibriumMatching"),
        ("--tolerances -1", "tolerance is -1.0"),
        ("--step_sizes x", "--step_sizes holds 'x'"),
        ("--baseline MODEL", "two models"),
    ],
)
def test_what_is_wrong_is_told_and_writes_nothing(
    run: Run, words: Words, model_dir: Path, tmp_path: Path, more: str, named: str
) -> None:
    outcome = run(*words, *more.replace("MODEL", str(model_dir)).split())
    assert (outcome.code, outcome.out) == (2, [])
    *left_out, line = outcome.err
    assert named in line
    assert all("broken.png" in other for other in left_out)
    assert not (tmp_path / "study").exists()
