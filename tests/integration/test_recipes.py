"""`dc-ssdae train --recipe` as a user meets it: all phases by one command, kills in each of them, mistakes."""

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_runs import assert_same_runs, count_lines, kill, make_images, start, train, write_config

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


def wait_for(process, condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds; False if the command ended before."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.0005)
    return False


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


@pytest.mark.slow  # tests/training/test_phases.py kills within one process
def test_killed_in_every_phase_it_ends_bit_identical(whole, config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    conditions = [
        lambda: count_lines(run / FOLDERS[0] / "metrics.jsonl") >= 3,
        lambda: (run / FOLDERS[1]).exists(),
        lambda: count_lines(run / FOLDERS[2] / "metrics.jsonl") >= 5,
    ]
    for condition in conditions:
        new = [*words(config), "--training.output", str(run)]
        process = start(["--resume", str(run)] if run.exists() else new, log)
        try:
            reached = wait_for(process, condition)
        finally:
            kill(process)
        assert reached, log.read_text()
    assert train(["--resume", str(run)], log) == 0, log.read_text()
    assert log.read_text().count(" begins: ") == 3
    for name in FOLDERS:
        assert_same_runs(run / name, whole / name)
    assert os.readlink(run / "model") == f"{FOLDERS[2]}/model"


@pytest.mark.slow
def test_a_signal_ends_it_with_0_and_it_goes_on_for_longer(whole, config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    long = ["--phases.latent_adaptation.training.steps", "5000"]
    process = start([*words(config), "--training.output", str(run), *long], log)
    try:
        assert wait_for(process, lambda: count_lines(run / FOLDERS[1] / "metrics.jsonl") >= 2), log.read_text()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        kill(process)
    step = json.loads((run / FOLDERS[1] / "checkpoints/last/state.json").read_text())["step"]
    assert f"stopped by SIGTERM after step {step}; go on with: dc-ssdae train --resume {run}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert os.readlink(run / "model") == f"{FOLDERS[0]}/model"
    assert not (run / FOLDERS[2]).exists()

    shorter = ["--training.steps", str(max(STEPS, step + 1)), "--phases.decoder_refinement.training.steps", "2"]
    assert train(["--resume", str(run), *shorter], log) == 0, log.read_text()
    phases = yaml.safe_load((run / "recipe.yaml").read_text())["phases"]
    assert [phase["training"]["steps"] for phase in phases.values()] == [STEPS, max(STEPS, step + 1), 2]
    assert_same_runs(run / FOLDERS[0], whole / FOLDERS[0])


def test_resuming_a_finished_recipe_says_so(whole, capsys):
    assert main(["train", "--resume", str(whole)]) == 0
    message = capsys.readouterr().err.strip()
    longer = "--phases.decoder_refinement.training.steps N goes on to N"
    assert message == f"dc-ssdae train: {whole} is finished: 3 phases, all budgets spent ({longer})"


def test_mistakes_are_one_line_and_leave_nothing(config, tmp_path, capsys):
    run = tmp_path / "run"
    for more, expected in (
        (["--phases.decoder_refinement.training.train", "[decoder.heads]"], "phase decoder_refinement: training.train"),
        (["--phases.decoder_refinement.data.image_size", "36"], "phase decoder_refinement: data.image_size is 36"),
        (["--phases.decoder_refinement.data.root", str(tmp_path / "nowhere")], "phase decoder_refinement: "),
        (["--phases.latent_adaptation.training.batch_size", "0"], "phase latent_adaptation: training.batch_size is 0"),
        (["--phases.latent_adaption.training.lr", "1"], "did you mean 'latent_adaptation'?"),
        (["--data.root", str(tmp_path / "nowhere")], "phase low_resolution: "),
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
        (["--config", "demo"], "--config and --recipe are for a new run"),
        (["--phases.low.training.steps", "50"], "unknown phase of the recipe 'low'"),
    ):
        assert main(["train", "--resume", str(whole), *more]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert expected in message
    assert (whole / "recipe.yaml").read_bytes() == before


def test_a_folder_that_exists_is_refused(whole, config, capsys):
    assert main(["train", *words(config), "--training.output", str(whole)]) == 2
    assert f"--resume {whole}" in capsys.readouterr().err
