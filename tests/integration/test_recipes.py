"""`dc-ssdae train --recipe` as a user meets it: all phases by one command, kills in each of them, mistakes."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import count_lines, make_images, train, write_config

from dc_ssdae.cli.main import main

STEPS = 12
FOLDERS = ("1-low_resolution", "2-latent_adaptation", "3-decoder_refinement")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", 12)
    make_images(root / "val", 3, seed=1)
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory, data) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", data, steps=1, optimizer="adamw")


def words(config: Path) -> list[str]:
    """The packaged recipe, small."""
    small = ["--data.image_size", "32", "--training.batch_size", "4", "--training.steps", str(STEPS)]
    return ["--recipe", "three_phase", "--config", str(config), *small, "--training.evaluate_every", "100"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config) -> Path:
    """A recipe that nothing disturbed, in the folder that it gets by itself."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(words(config), folder / "log", cwd=folder) == 0, (folder / "log").read_text()
    said = (folder / "log").read_text()
    assert f"done after step {STEPS}: the model is runs/tiny-three_phase/model" in said
    for place, name in enumerate(FOLDERS):
        assert f"phase {name[2:]} ({place + 1} of 3) begins: runs/tiny-three_phase/{name}" in said
    return folder / "runs" / "tiny-three_phase"


def test_all_phases_run_and_each_leaves_a_checkpoint(whole):
    assert {entry.name for entry in whole.iterdir()} == {".lock", "model", "recipe.yaml", *FOLDERS}
    weights = [load_file(whole / name / "checkpoints/last/ema.safetensors") for name in FOLDERS]
    for name in FOLDERS:
        assert json.loads((whole / name / "checkpoints/last/state.json").read_text())["step"] == STEPS
        assert count_lines(whole / name / "metrics.jsonl") == STEPS
    changed = [{key for key in one if not torch.equal(one[key], other[key])} for one, other in pairwise(weights)]
    inputs = {f"decoder.latent_norm.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert inputs <= changed[0]
    prefixes = ("encoder.stages.3.", "encoder.latent_head.", "decoder.latent_", "decoder.context.")
    assert all(name.startswith(prefixes) for name in changed[0])
    assert changed[1]
    assert all(name.startswith(("decoder.up.3.", "decoder.norm_out.", "decoder.conv_out.")) for name in changed[1])


def test_its_folder_serves_as_a_model(whole, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (20, 30), "teal").save(photo)
    for number, model in enumerate((whole, whole / FOLDERS[2], whole / FOLDERS[0])):
        out = tmp_path / str(number)
        assert main(["reconstruct", str(photo), "--model", str(model), "--out", str(out)]) == 0
    results = [(tmp_path / str(number) / "photo.png").read_bytes() for number in range(3)]
    assert results[0] == results[1] != results[2]


def test_resuming_a_finished_recipe_says_so(whole, capsys):
    assert main(["train", "--resume", str(whole)]) == 0
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"dc-ssdae train: {whole} is finished: ")
    assert "--phases.decoder_refinement.training.steps N" in message


def test_mistakes_are_one_line_and_leave_nothing(config, tmp_path, capsys):
    run = tmp_path / "run"
    for more, expected in (
        (["--phases.decoder_refinement.training.train", "[decoder.heads]"], "phase decoder_refinement: training.train"),
        (["--phases.decoder_refinement.data.image_size", "36"], "phase decoder_refinement: data.image_size is 36"),
        (["--phases.latent_adaption.training.lr", "1"], "did you mean 'latent_adaptation'?"),
        (["--training.processes", "2"], "training.processes is 2"),
        (["--training.init_from", str(tmp_path / "nowhere")], "phase low_resolution: training.init_from"),
    ):
        assert main(["train", *words(config), "--training.output", str(run), *more]) == 2, more
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert expected in message
        assert list(tmp_path.iterdir()) == []


def test_what_cannot_change_is_one_line(whole, capsys):
    before = (whole / "recipe.yaml").read_bytes()
    for more, expected in (
        (["--phases.low_resolution.training.steps", "50"], "phase low_resolution is finished"),
        (["--config", "demo"], "--config is for a new run"),
        (["--phases.low.training.steps", "50"], "unknown phase of the recipe 'low'"),
    ):
        assert main(["train", "--resume", str(whole), *more]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert expected in message
    assert (whole / "recipe.yaml").read_bytes() == before
