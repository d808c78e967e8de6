"""Distillation: the target by hand, what stays as it was, the cache on disk, stopping and going on, what is refused."""

import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from states import random_model
from terms import HOOKED, Hooked, at, send
from tiny import batch, differences, different, last, metrics, resume, run_config, start, trainer_of
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.losses import StepOutputs
from dc_ssdae.model_folder import read_config, write_latent_statistics
from dc_ssdae.parameter_groups import parameter_groups
from dc_ssdae.training.build import build_model, build_step, decoder_groups
from dc_ssdae.training.config import DistillationConfig, RunConfig
from dc_ssdae.training.distillation import DistillationStep, TeacherCache
from dc_ssdae.training.loop import Outcome
from dc_ssdae.training.run import WEIGHTS_FILE

DISK_KIB = 256
"""Of the file system that `small_disk` gives."""

DYNAMICS: dict[str, dict[str, Any]] = {
    "linear": {"class_path": "EquilibriumMatching"},
    "truncated": {"class_path": "EquilibriumMatching", "init_args": {"decay": "truncated", "gradient_scale": 4.0}},
    "piecewise": {"class_path": "EquilibriumMatching", "init_args": {"decay": "piecewise", "gradient_scale": 2.0}},
    "flow": {"class_path": "FlowMatching"},
    "image": {"class_path": "EquilibriumMatching", "init_args": {"prediction": "image"}},
}

FACTORS = {"linear": 1.0, "truncated": 1.0, "piecewise": 1.96, "flow": 1.0, "image": 1.0}
"""Of each from (x̂ − target)² to the loss: c(0)²."""


class LooksAtTheImage(nn.Module):
    """A user's term: the mean of what the student is compared with."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.record.x.flatten(1).mean(dim=1) + 0.0 * outputs.prediction.mean()


def distillation(
    teacher: Path,
    root: Path | None = None,
    dynamics: str = "linear",
    losses: Mapping[str, Any] | None = None,
    taught: Mapping[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    """A distillation of 8 steps of 4 images, which trains what `dc-ssdae distill` trains and terms of the user."""
    given, model = {"weight_decay": 0.0, "latent_statistics": 0, **training}, {"dynamics": DYNAMICS[dynamics]}
    config = run_config(root, losses={"kl": 0.0, **(losses or {})}, model=model, **given)
    if "train" not in training:
        own = [f"losses.{name}" for name in losses or {}]
        groups = [name for name in decoder_groups(config.model) if name != "decoder.latent_inputs"]
        config = config.with_training(train=[*groups, *own])
    return replace(config, distillation=DistillationConfig(str(teacher), **{"steps": 3, **(taught or {})}))


def distillation_step(teacher: Path, **settings: Any) -> DistillationStep:
    """A student near its teacher, also in its encoder, which is not to be used."""
    step: Any = build_step(distillation(teacher, **settings))
    step.model.load_state_dict(step.teacher.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return step.train()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher of each dynamics."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in DYNAMICS:
        random_model(dynamics=DYNAMICS[name]).save_pretrained(folder / name)
    write_latent_statistics(folder / "linear", LatentStatistics([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0], 10))
    return {name: folder / name for name in DYNAMICS}


@pytest.fixture(scope="module")
def teacher(teachers: dict[str, Path]) -> Path:
    return teachers["linear"]


def evaluations(trainer: Any) -> list[int]:
    """Gets an entry, the batch's size, at each evaluation of the teacher's decoder."""
    found: list[int] = []
    trainer.module.teacher.decoder.register_forward_pre_hook(lambda module, given: found.append(given[0].shape[0]))
    return found


# --- the target ---


@pytest.mark.parametrize(
    ("dynamics", "steps", "step_size"),
    [
        ("linear", 1, None),
        ("truncated", 3, None),
        ("truncated", 2, 0.02),
        ("piecewise", 3, None),
        ("flow", 3, None),
        ("image", 3, None),
    ],
)
def test_the_loss_by_hand(teachers: dict[str, Path], dynamics: str, steps: int, step_size: float | None) -> None:
    looks = {"weight": 0.5, "class_path": f"{__name__}.LooksAtTheImage"}
    settings = {"taught": {"steps": steps, "step_size": step_size}, "losses": {"looks": looks}, "train": ["decoder"]}
    step = distillation_step(teachers[dynamics], dynamics=dynamics, **settings)
    pixels, noise, level, latent_noise = batch(0)
    found = step(pixels, noise, level, latent_noise)

    model, student = random_model(dynamics=DYNAMICS[dynamics]), step.model.eval()
    with torch.no_grad():
        posterior = model.encoder(pixels.float() / 127.5 - 1.0)
        z = posterior.mean + (0.5 * posterior.logvar).exp() * latent_noise
        target = model.decode(z, num_steps=steps, step_size=step_size, noise=noise).sample
        expected = FACTORS[dynamics] * (student.decode(z, noise=noise).sample - target).square().mean()
    assert expected > 1e-5, "student and teacher agree: there is nothing to see"
    torch.testing.assert_close(found.terms["dynamics"], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.terms["looks"], target.mean(), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.total, found.terms["dynamics"] + 0.5 * found.terms["looks"])


# --- teacher and student ---


def test_the_teacher_is_no_part_of_the_module_but_moves_along(teacher: Path) -> None:
    step = distillation_step(teacher)
    assert step.state_dict().keys() == {f"model.{name}" for name in step.teacher.state_dict()}
    step(*batch(0)).total.backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    assert not any(module.training for module in step.teacher.modules())
    assert different(step.teacher.state_dict(), load_file(teacher / WEIGHTS_FILE)) == set()
    step.to(torch.float64, memory_format=torch.channels_last)
    weight = next(p for p in step.teacher.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def whole_run(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    start(distillation(teacher, photos, latent_statistics=4), path)
    return path


def test_what_a_run_leaves_behind(whole_run: Path, teacher: Path) -> None:
    before, tensors = load_file(teacher / WEIGHTS_FILE), last(whole_run).tensors
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors["model"].items()}
    frozen = before.keys() - different(before, weights)
    assert frozen == before.keys() - different(before, tensors["ema"])
    assert sum("running" in name or "num_batches" in name for name in frozen) == 3, "the statistics of the batch norm"
    latent_inputs = parameter_groups(build_model(distillation(teacher).model))["decoder.latent_inputs"]
    assert frozen == {*latent_inputs, *(name for name in before if name.startswith("encoder."))}

    kept, student = (DCSSDAE.from_pretrained(whole_run / part) for part in ("teacher", "model"))
    assert different(kept.state_dict(), before) == set()
    assert different(student.state_dict(), tensors["ema"]) == set()
    configs = [read_config(folder) for folder in (teacher, whole_run / "model")]
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        assert configs[0][name] == configs[1][name], "the latent is the teacher's, and so is how it is normalised"
    copy = whole_run / "teacher" / WEIGHTS_FILE
    assert not copy.samefile(teacher / WEIGHTS_FILE), "who writes into the teacher would change the run's"
    assert not (whole_run / "teacher_cache").exists()


def assert_same_runs(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert differences(last(one), last(other)) == set()


# --- the cache ---


def test_the_cache_spares_the_teacher_and_changes_nothing(photos: Path, teacher: Path, tmp_path: Path) -> None:
    config = distillation(teacher, photos, taught={"cache_steps": 3}, steps=5)
    with_cache = trainer_of(config, tmp_path / "with")
    spared = evaluations(with_cache)
    with_cache.run()
    assert spared == [4] * 9, "three steps of three evaluations, and none from then on"
    files = sorted((tmp_path / "with" / "teacher_cache").iterdir())
    assert [file.name for file in files] == [f"{number:08d}.safetensors" for number in range(12)]

    without: Any = trainer_of(config, tmp_path / "without")
    without.module.cache = None
    every = evaluations(without)
    without.run()
    assert every == [4] * 15
    assert_same_runs(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        lambda file: shutil.copy(file.with_name("00000001.safetensors"), file),  # the result of another draw
    ],
)
def test_a_result_that_is_not_what_was_written_is_not_read(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = TeacherCache(tmp_path, 6)
    cache.write(torch.arange(2), torch.randn(2, 3, 8, 8))
    damage(tmp_path / "00000000.safetensors")
    assert cache.read(torch.arange(2)) is None
    assert cache.read(torch.tensor([1])) is not None


def test_a_full_disk_is_said_once(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = TeacherCache(small_disk / "cache", 100)
    images = torch.randn(4, 3, 64, 64)  # 48 KiB each
    for start_ in range(0, 16, 4):
        cache.write(torch.arange(start_, start_ + 4), images)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no more results are kept")
    assert torch.equal(cache.read(torch.arange(4)), images)
    assert cache.read(torch.arange(8, 12)) is None


# --- stopping and going on ---


def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(photos: Path, teacher: Path, tmp_path: Path) -> None:
    """Whatever becomes of the teacher's own folder: the run has a copy."""
    own = shutil.copytree(teacher, tmp_path / "original")
    config = distillation(own, photos, taught={"cache_steps": 3}, checkpoint_every=100, losses=HOOKED)
    start(config, tmp_path / "whole")
    path = tmp_path / "stopped"
    Hooked.hook = at({3: send(signal.SIGTERM)})
    assert start(config, path) == Outcome(4, "SIGTERM")
    shutil.rmtree(own)
    shutil.rmtree(path / "teacher_cache", ignore_errors=True)
    Hooked.hook = None
    assert resume(config, path) == Outcome(8, None)
    assert_same_runs(path, tmp_path / "whole")


# --- what is refused ---


def test_mistakes_leave_no_run(teachers: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    teacher, path = teachers["linear"], tmp_path / "new" / "run"
    path.parent.mkdir()
    damaged = shutil.copytree(teacher, tmp_path / "damaged")
    (damaged / WEIGHTS_FILE).write_bytes((damaged / WEIGHTS_FILE).read_bytes()[:1000])
    good = distillation(teacher, photos)
    for config, told in (
        (distillation(damaged, photos), r"distillation\.teacher .*damaged"),
        (distillation(tmp_path / "nowhere", photos), r"distillation\.teacher .*nowhere"),
        (distillation(teachers["flow"], photos, dynamics="flow", taught={"step_size": 0.1}), "step_size"),
        (distillation(teacher, photos, train=None), r"training\.train is .* the decoder alone"),
        (distillation(teacher, photos, init_from=str(teacher)), r"training\.init_from"),
        (replace(good, model=replace(good.model, latent_channels=6)), "linear does not fit; .* has shape"),
        # The same tensors, and yet another model.
        (distillation(teachers["truncated"], photos), "has another dynamics than section model"),
    ):
        with pytest.raises(InputError, match=told) as caught:
            start(config, path)
        assert "\n" not in str(caught.value)
        assert not list(path.parent.iterdir()), "a mistake leaves a run's folder"
