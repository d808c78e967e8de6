"""`dc-ssdae study sampling`: what it writes of one model and of two, and what it refuses."""

import json
from pathlib import Path

import pytest
from cli_samples import Run, Words, save_model, save_photos


@pytest.fixture
def words(model_dir: Path) -> Words:
    """One training image, two validation images, and a file that is none."""
    save_photos(Path("photos"), "train/0", "validation/1", "validation/2")
    Path("photos/validation/broken.png").write_bytes(b"no picture")
    given = ("--model", model_dir, "--data", "photos", "--size", 16, "--out", "study", "--device", "cpu")
    grid = ("--steps", "1,2", "--step_sizes", "default,0.25", "--tolerances", "0.5", "--rounds", 1)
    return ("study", "sampling", *given, *grid)


def test_two_models(run: Run, words: Words) -> None:
    flow = save_model(Path("fm"), dynamics={"class_path": "FlowMatching"})
    outcome = run(*words, "--baseline", flow)
    assert outcome.code == 0
    (line,) = outcome.err
    assert "broken.png" in line
    assert outcome.out[-1].startswith("-> study/index.html, ")
    assert Path("study/table.md").read_text(encoding="utf-8").splitlines() == outcome.out[:-2]
    content = json.loads(Path("study/study.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in content["measurements"][:3]] == ["fm"] * 3
    assert content["needed"]["psnr"]
    protocol, lpips = content["notes"]
    assert "2 images of 16 px" in protocol
    assert lpips.startswith("No LPIPS")
    assert Path("study/study.png").is_file()


def test_one_model_of_chosen_samplers(run: Run, words: Words, model_dir: Path) -> None:
    outcome = run(*words, "--model", f"mine={model_dir}", "--lpips", "none", "--samplers", "one_step,nesterov")
    assert outcome.code == 0
    rows = [line for line in outcome.out if line.startswith("| mine")]
    assert {row.split(" | ")[1] for row in rows} == {"one_step", "nesterov"}
    assert not any("LPIPS" in line for line in outcome.out)
