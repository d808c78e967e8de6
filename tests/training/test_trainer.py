"""Whole runs of a tiny model: what is skipped, saved, stopped, resumed and refused."""

import errno
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from terms import HOOKED, Hooked, at, send
from tiny import VARIABLE, differences, different, fill, last, metrics, resume, run_config, start, trainer_of
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.training import build as build_module
from dc_ssdae.training import checkpoint as checkpoint_module
from dc_ssdae.training import measurements as measurements_module
from dc_ssdae.training import start as start_module
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.loop import Outcome, TrainingFailed
from dc_ssdae.training.run import WEIGHTS_FILE, RunFolder
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.training.trainer import Trainer

DISK_KIB = 12288
"""Of the file system that `small_disk` gives."""


def times(factors: Mapping[int, float]) -> Callable[[int, Tensor], Tensor]:
    """A hook that multiplies the value of some calls."""
    return lambda call, value: value * factors.get(call, 1.0)


@pytest.fixture(scope="module")
def whole_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    start(run_config(images, losses=HOOKED, evaluate_every=4), path)
    return path


# --- an undisturbed run ---


def test_what_a_run_leaves_behind(whole_run: Path, images: Path) -> None:
    assert [line["step"] for line in metrics(whole_run)] == list(range(1, 9)), "steps done"
    for line in read_lines(whole_run / "metrics.jsonl"):
        expected = {"step", "loss/total", "loss/dynamics", "loss/kl", "loss/hooked", "gradient_norm", "lr", *VARIABLE}
        assert set(line) == expected
        total = line["loss/dynamics"] + 1e-6 * line["loss/kl"] + 0.1 * line["loss/hooked"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-6)
    assert [line["step"] for line in read_lines(whole_run / "evaluations.jsonl")] == [4, 8]
    checkpoint = last(whole_run)
    state = checkpoint.state
    assert (state["step"], state["images_drawn"], state["epoch"], state["place_in_epoch"]) == (8, 32, 3, 5)
    assert (state["skipped_steps"], state["images_in_data_set"], state["processes"]) == (0, 9, 1)
    model = DCSSDAE.from_pretrained(whole_run / "model")
    assert different(model.state_dict(), checkpoint.tensors["ema"]) == set()
    hooked = [float(checkpoint.tensors["model"][f"objective.terms.hooked.{name}"]) for name in ("value", "seen")]
    assert hooked[0] != pytest.approx(0.3, abs=1e-6)
    assert hooked[1] == 32
    assert "objective.terms.hooked.value/exp_avg" in checkpoint.tensors["optimizer"]
    provenance = model.config.provenance
    assert provenance == state["provenance"]
    (evaluation,), line = provenance["evaluations"], read_lines(whole_run / "evaluations.jsonl")[-1]
    assert evaluation["metrics"] == {name: {"value": line[name]} for name in ("psnr", "ssim", "mse")}
    assert (evaluation["step"], evaluation["images"]) == (8, line["images"])
    assert (evaluation["data"], provenance["data"]) == (f"{images.name}/validation", images.name)
    assert (provenance["images"], provenance["steps"], provenance["version"]) == (9, 8, version("dc-ssdae"))


# --- steps that are not finite ---


def not_finite_latent(trainer: Trainer, call: int) -> None:
    """A latent that poisons the decoder and the statistics of its batch norm."""
    calls = count()

    def poison(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, z, *rest = inputs
        return (x, z * math.inf if next(calls) == call else z, *rest)

    trainer.module.model.decoder.register_forward_pre_hook(poison)


def not_finite_gradient(trainer: Trainer, call: int) -> None:
    """A finite loss whose gradient is not: the root at 0."""
    Hooked.hook = lambda seen, value: value + (value * 0.0).sqrt() if seen == call else value


@pytest.mark.parametrize(
    ("break_", "named", "parts", "optimizer"),
    [
        (not_finite_latent, ["loss/total", "loss/dynamics", "loss/hooked"], 2, "schedule_free_radam"),
        (not_finite_gradient, ["gradient_norm"], 1, "adamw"),
    ],
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    break_: Callable[[Trainer, int], None],
    named: list[str],
    parts: int,
    optimizer: str,
) -> None:
    config = run_config(photos, losses=HOOKED, steps=4, accumulation_steps=parts, optimizer=optimizer)
    trainer, states = trainer_of(config, tmp_path / "run"), []
    trainer.module.register_forward_pre_hook(lambda *_: states.append(trainer.state_dict()))
    break_(trainer, 3 * parts - 1)
    assert trainer.run() == Outcome(4, None)
    before, after, end = states[2 * parts], states[3 * parts], last(tmp_path / "run")

    assert differences(before, after) == set()
    groups = [[{**group, "lr": None} for group in state.state["optimizer"]["groups"]] for state in (before, after)]
    assert groups[0] == groups[1]
    assert all(tensor.isfinite().all() for group in end.tensors.values() for tensor in group.values())
    changed = differences(after, end)
    assert any("optimizer" in name for name in changed)
    assert any("running_mean" in name for name in changed), "no batch norm is in this test"
    assert [state.state["skipped_steps"] for state in (before, after, end)] == [0, 1, 1]
    entries = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [entry.get("skipped") for entry in entries] == [None, None, named, None]
    assert entries[2][named[-1]] is None
    assert f"step 3 skipped: {', '.join(named)} not finite (1 in a row)" in capsys.readouterr().err


def test_the_last_good_checkpoint_is_named_and_gone_on_with(whole_run: Path, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = run_config(images, losses=HOOKED, max_skipped_steps=3, evaluate_every=4)
    Hooked.hook = times({3: math.nan, 4: math.nan, 5: math.nan})
    told = r"step 6: loss/total, loss/hooked not finite \(3 in a row\); the last good checkpoint is .*step-00000002$"
    with pytest.raises(TrainingFailed, match=told):
        start(config, path)
    # What was due after step 4 is not written.
    assert {entry.name for entry in (path / "checkpoints").iterdir()} == {"last", "step-00000002"}
    Hooked.hook = None
    assert resume(config, path) == Outcome(8, None)
    assert differences(last(path), last(whole_run)) == set()
    assert metrics(path) == metrics(whole_run)


def test_a_run_that_skipped_every_step_fails_without_a_model(images: Path, tmp_path: Path) -> None:
    Hooked.hook = lambda call, value: value * math.nan
    with pytest.raises(TrainingFailed, match="all 2 steps were skipped"):
        start(run_config(images, losses=HOOKED, steps=2, checkpoint_every=1, max_skipped_steps=3), tmp_path / "run")
    assert not (tmp_path / "run" / "model" / WEIGHTS_FILE).exists()
    assert len(metrics(tmp_path / "run")) == 2


def test_who_loses_the_race_for_the_lock_leaves_the_winners_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_module, "run_lock", MagicMock(side_effect=InputError("another process has it")))
    with pytest.raises(InputError, match="another process has it"):
        start(run_config(images), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_last_step_that_is_skipped_ends_the_run_all_the_same(images: Path, tmp_path: Path) -> None:
    Hooked.hook = times({7: math.nan})
    config = run_config(images, losses=HOOKED)
    assert start(config, tmp_path / "run") == Outcome(8, None)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [8]
    assert resume(config, tmp_path / "run") is None


# --- signals ---


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(photos: Path, tmp_path: Path, precision: str) -> None:
    training = {"optimizer": "schedule_free_radam", "steps": 7, "checkpoint_every": 100, "precision": precision}
    config = run_config(photos, losses=HOOKED, **training)
    start(config, tmp_path / "whole")
    path = tmp_path / "stopped"
    Hooked.hook = at({2: send(signal.SIGHUP)})
    assert start(config, path) == Outcome(3, "SIGHUP")
    assert last(path).state["step"] == 3
    assert resume(config, path) == Outcome(6, "SIGHUP")
    Hooked.hook = None
    assert resume(config, path) == Outcome(7, None)
    assert differences(last(path), last(tmp_path / "whole")) == set()
    assert last(path).state["gradient_scaler"] == last(tmp_path / "whole").state["gradient_scaler"]
    assert metrics(path) == metrics(tmp_path / "whole")


def test_an_evaluation_that_a_signal_came_before_is_done_when_the_run_goes_on(
    whole_run: Path, images: Path, tmp_path: Path
) -> None:
    config = run_config(images, losses=HOOKED, evaluate_every=4, checkpoint_every=3)
    path = tmp_path / "stopped"
    Hooked.hook = at({3: send(signal.SIGTERM)})
    assert start(config, path) == Outcome(4, "SIGTERM")
    assert read_lines(path / "evaluations.jsonl") == []
    Hooked.hook = at({0: send(signal.SIGTERM)})  # again, before the next checkpoint but for the signal's own
    assert resume(config, path) == Outcome(5, "SIGTERM")
    Hooked.hook = None
    assert resume(config, path) == Outcome(8, None)
    assert read_lines(path / "evaluations.jsonl") == read_lines(whole_run / "evaluations.jsonl")
    links = [(run / "checkpoints" / "best").resolve().name for run in (path, whole_run)]
    assert links[0] == links[1]
    assert differences(last(path), last(whole_run)) == set()


@pytest.mark.parametrize("measured", ["evaluation", "latent"])
def test_a_signal_ends_an_evaluation_and_a_measurement(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: str
) -> None:
    """The weights are saved by then; the next start does what is left, and ends as a run that nothing disturbed."""
    config = run_config(images, data={"validation_images": 3}, steps=2, latent_statistics=9, batch_size=1)
    work, calls = {"evaluation": "reconstruct", "latent": "posterior"}[measured], []

    def stopping(step: TrainingStep, pixels: Tensor) -> Any:
        calls.append(len(list((tmp_path / "run" / "checkpoints").glob("step-00000002"))))
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(step, pixels)

    whole = getattr(TrainingStep, work)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, work, stopping)
        assert start(config, tmp_path / "run") == Outcome(2, "SIGTERM")
    assert calls == [1], "one batch, after the checkpoint"
    assert DCSSDAE.from_pretrained(tmp_path / "run" / "model").config.latents_mean is None or measured == "evaluation"
    assert resume(config, tmp_path / "run") == Outcome(2, None)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [2]
    assert DCSSDAE.from_pretrained(tmp_path / "run" / "model").config.latents_mean is not None
    assert resume(config, tmp_path / "run") is None


PLAIN = {"decoder": {"class_path": "tiny_models.PatchDecoder"}}
FEATURES = {"features": {"class_path": "terms.FeatureNorm"}}


class WrongShape(nn.Module):
    def forward(self, outputs: Any) -> Tensor:
        return outputs.prediction.mean() * torch.ones(2, 2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"wandb": True}, r"training\.wandb "),
        ({"train": ["decoder"], "losses": {"kl": 0.0}}, r"training\.train leaves the encoder out"),
        ({"losses": {"lpips": {"init_args": {"weights": "nowhere"}}}}, r"losses\.lpips\.init_args\.weights is "),
        ({"model": PLAIN, "losses": FEATURES}, "PatchDecoder has no forward_with_features"),
        # Which the first step alone can tell:
        ({"losses": {"wrong": {"class_path": "test_trainer.WrongShape"}}}, r"losses\.wrong .*\(2, 2\)"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(build_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=told) as caught:
        start(run_config(images, **settings), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_third_interrupt_interrupts(photos: Path, tmp_path: Path) -> None:
    Hooked.hook = at({2: send(signal.SIGINT, 3)})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        start(run_config(photos, losses=HOOKED, checkpoint_every=1), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert last(tmp_path / "run").state["step"] == 2


# --- disks ---


def test_the_last_checkpoint_must_be_written(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of those before need not: the run goes on."""
    config, full = run_config(photos, steps=6, losses=HOOKED), MagicMock(side_effect=OSError(errno.ENOSPC, "No space"))
    with monkeypatch.context() as patch:
        Hooked.hook = at({2: lambda: patch.setattr(checkpoint_module, "write_checkpoint", full)})
        with pytest.raises(TrainingFailed, match=r"step 6: the checkpoint cannot be written .*step-00000002$"):
            start(config, tmp_path / "run")
    assert {entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()} == {"last", "step-00000002"}
    Hooked.hook = None
    assert resume(config, tmp_path / "run") == Outcome(6, None)


def test_a_run_lives_through_a_full_disk(
    whole_run: Path, images: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Hooked.hook = at({3: lambda: fill(small_disk), 5: lambda: (small_disk / "filler").unlink()})
    path = small_disk / "run"
    config = run_config(images, losses=HOOKED, evaluate_every=4, sample_images=2)
    assert start(config, path) == Outcome(8, None)
    assert "step 4: the checkpoint cannot be written" in capsys.readouterr().err
    assert differences(last(path), last(whole_run)) == set()
    assert metrics(path) == metrics(whole_run), "lines of the time when the disk was full are missing"
    assert [line["step"] for line in read_lines(path / "evaluations.jsonl")] == [4, 8]
    best = (path / "checkpoints" / "best").resolve().name
    assert best == "step-00000008", "the evaluation at step 4 has no checkpoint, so it is not the best"


# --- settings ---


def test_the_gradient_is_clipped(photos: Path, tmp_path: Path) -> None:
    trainer = trainer_of(run_config(photos, steps=3, gradient_clip=0.05), tmp_path / "run")
    norms = []

    def note(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))

    trainer.optimizer.register_step_pre_hook(note)
    trainer.run()
    logged = [line["gradient_norm"] for line in metrics(tmp_path / "run")]
    assert min(logged) > 0.05, "nothing to clip in this test"
    assert norms == pytest.approx([0.05] * 3, rel=1e-4)


def test_accumulated_parts_make_the_mean_gradient(photos: Path, tmp_path: Path) -> None:
    """Where the norm of latents does not train, no image of a batch knows of another."""
    found = []
    for parts in (1, 2):
        settings = {"losses": {"kl": 0.01}, "train": ["encoder", "decoder.head"]}
        start(run_config(photos, steps=1, accumulation_steps=parts, **settings), tmp_path / str(parts))
        found.append(metrics(tmp_path / str(parts))[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0]["gradient_norm"] > 0.0


def test_the_clock_ends_a_run(photos: Path, tmp_path: Path) -> None:
    config = run_config(photos, steps=None, minutes=1e-6)
    assert start(config, tmp_path / "run") == Outcome(1, None)
    assert last(tmp_path / "run").state["step"] == 1
    assert resume(config, tmp_path / "run") is None
    assert resume(config.with_training(steps=3, minutes=100.0), tmp_path / "run") == Outcome(3, None)


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("mse", [2.0, 3.0, 1.0, math.nan, 1.0], 3),
        ("ssim", [math.nan, 1.0, 3.0, 2.0, math.inf], 3),
        ("psnr", [math.nan], None),
    ],
)
def test_the_best_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, values: list[float], best: int | None
) -> None:
    given = iter(values)
    zeros = {"psnr": 0.0, "ssim": 0.0, "mse": 0.0}
    monkeypatch.setattr(measurements_module, "means", lambda *_: {**zeros, name: next(given)})
    start(run_config(images, steps=len(values), evaluate_every=1, best_metric=name), tmp_path / "run")
    state = last(tmp_path / "run").state
    link = RunFolder(tmp_path / "run").checkpoints.best()
    assert (link and link.name) == (best and f"step-{best:08d}")
    assert state["best"] == (best and {"metric": name, "value": values[best - 1], "step": best})
    (evaluation,) = state["provenance"]["evaluations"]
    assert (name in evaluation["metrics"]) == math.isfinite(values[-1]), "what is not finite is no figure"


def test_an_evaluation_sees_the_average_and_leaves_no_trace(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, seen = trainer_of(run_config(images, steps=4, evaluate_every=2), tmp_path / "run"), []
    model, decoder = trainer.module.model, trainer.module.model.decoder

    def look(*_: object) -> None:
        if not decoder.training:
            assert different(model.state_dict(), trainer.ema.state_dict()) == set()
            seen.append(trainer.step)

    decoder.register_forward_pre_hook(look)
    trainer.run()
    assert set(seen) == {2, 4}
    ends = last(tmp_path / "run").tensors
    weights = {name.removeprefix("model."): tensor for name, tensor in ends["model"].items()}
    assert any("weight" in name for name in different(weights, ends["ema"]))
    # The same run without evaluations.
    start(run_config(images / "train", steps=4), tmp_path / "other")
    assert capsys.readouterr().err.count("has no validation/: nothing is evaluated") == 1
    assert differences(last(tmp_path / "run"), last(tmp_path / "other")) == set()


# --- data ---


def test_broken_images_are_each_named_once_over_all_starts_and_too_many_end_a_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, path = shutil.copytree(images, tmp_path / "broken"), tmp_path / "run"
    for name in ("train/image0001.png", "train/image0004.png", "train/image0007.png", "validation/image0001.png"):
        (root / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 9 training images cannot be read, more than data\.max_broken_share"):
        start(run_config(root, data={"max_broken_share": 0.3}, checkpoint_every=1), tmp_path / "ended")
    capsys.readouterr()
    config = run_config(root, losses=HOOKED, data={"max_broken_share": 0.4}, evaluate_every=2)
    Hooked.hook = at({4: send(signal.SIGTERM)})
    assert start(config, path) == Outcome(5, "SIGTERM")
    Hooked.hook = None
    assert resume(config, path) == Outcome(8, None)
    named = sorted((line["split"], Path(line["name"]).name) for line in read_lines(path / "broken_images.jsonl"))
    expected = [("train", f"image{index:04d}.png") for index in (1, 4, 7)]
    assert named == [*expected, ("validation", "image0001.png")]
    assert capsys.readouterr().err.count("skipped: ") == 4
    assert [line["images"] for line in read_lines(path / "evaluations.jsonl")] == [2] * 4


def test_a_data_set_of_another_length_or_other_names_is_refused(images: Path, tmp_path: Path) -> None:
    root = shutil.copytree(images, tmp_path / "images")
    start(run_config(root, steps=2), tmp_path / "run")
    image = root / "train" / "image0000.png"
    image.rename(renamed := image.with_name("renamed.png"))
    with pytest.raises(InputError, match="have other names"):
        resume(run_config(root, steps=4), tmp_path / "run")
    renamed.unlink()
    with pytest.raises(InputError, match="began with 9 images; now there are 8"):
        resume(run_config(root, steps=4), tmp_path / "run")


# --- another state ---


def test_another_state_is_refused(whole_run: Path, images: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole_run, tmp_path / "run", symlinks=True)
    with pytest.raises(InputError, match=r"model\.safetensors does not fit; left over: objective\.terms\.hooked"):
        resume(run_config(images, steps=9), path)


def test_a_gradient_that_overflows_float16_halves_the_scale(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(photos, losses=HOOKED, steps=4, precision="float16", max_skipped_steps=1)
    # With a scale of 1024 the gradient is too large for float32, with half of it not.
    trainer = trainer_of(config, tmp_path / "run")
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**10})
    Hooked.hook = lambda call, value: value + 6.4e34 * (value - value.detach()) if call == 1 else value
    assert trainer.run() == Outcome(4, None)
    assert "overflows float16, whose scale is halved" in capsys.readouterr().err
    state = last(tmp_path / "run").state
    assert (state["skipped_steps"], state["gradient_scaler"]["scale"]) == (1, 2.0**9)
