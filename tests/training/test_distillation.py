"""Distillation: the target by hand, what stays as it was, the cache on disk, stopping and going on, what is refused."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from terms import HOOKED, Hooked, at, send
from tiny import VARIABLE, batch, metrics, resume, run_config, start, trainer_of
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.files import sha256
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.losses import StepOutputs
from dc_ssdae.model_folder import read_config, write_latent_statistics
from dc_ssdae.parameter_groups import parameter_groups
from dc_ssdae.training.build import build_model, build_step, decoder_groups
from dc_ssdae.training.checkpoint import read_checkpoint
from dc_ssdae.training.config import DistillationConfig, RunConfig
from dc_ssdae.training.distillation import DistillationStep, TeacherCache
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.run import WEIGHTS_FILE
from dc_ssdae.training.trainer import Outcome, Trainer

DISK_KIB = 256
"""Of the file system that `small_disk` gives."""

DYNAMICS: dict[str, dict[str, Any]] = {
    "linear": {"class_path": "EquilibriumMatching"},
    "truncated": {"class_path": "EquilibriumMatching", "init_args": {"decay": "truncated", "gradient_scale": 4.0}},
    "piecewise": {"class_path": "EquilibriumMatching", "init_args": {"decay": "piecewise", "gradient_scale": 2.0}},
    "flow": {"class_path": "FlowMatching"},
    "image": {"class_path": "EquilibriumMatching", "init_args": {"prediction": "image"}},
}

# Of each: λ c(0), the slope L near the data, and the factor from (x̂ − target)² to the loss, c(0)².
FIELDS = {
    "linear": (1.0, 1.0, 1.0),
    "truncated": (4.0, 20.0, 1.0),
    "piecewise": (2.8, 10.0, 1.96),
    "image": (1.0, 1.0, 1.0),
}


class LooksAtTheImage(nn.Module):
    """A user's term: the mean of what the student is compared with."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.record.x.flatten(1).mean(dim=1) + 0.0 * outputs.prediction.mean()


def random_model(dynamics: str = "linear", seed: int = 1) -> DCSSDAE:
    """A tiny model of which nothing is zero, nor as it was made."""
    torch.manual_seed(seed)
    model = build_model(run_config(model={"dynamics": DYNAMICS[dynamics]}).model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point() and not tensor.any():
                tensor.normal_(std=0.05)
    return model.eval()


def save_teacher(folder: Path, dynamics: str = "linear", seed: int = 1) -> Path:
    random_model(dynamics, seed).save_pretrained(folder)
    return folder


def student_groups(config: RunConfig) -> list[str]:
    """What `dc-ssdae distill` trains."""
    return [name for name in decoder_groups(config.model) if name != "decoder.latent_inputs"]


def distillation(
    teacher: Path,
    root: Path | None = None,
    teacher_steps: int = 3,
    step_size: float | None = None,
    cache_steps: int | None = None,
    dynamics: str = "linear",
    losses: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    """A distillation of 8 steps of 4 images."""
    config = run_config(
        root,
        losses={"kl": 0.0, **(losses or {})},
        model={"dynamics": DYNAMICS[dynamics]},
        **{"weight_decay": 0.0, "latent_statistics": 0, **training},
    )
    if "train" not in training:
        config = config.with_training(train=student_groups(config))
    return replace(config, distillation=DistillationConfig(str(teacher), teacher_steps, step_size, cache_steps))


def distillation_step(teacher: Path, **settings: Any) -> DistillationStep:
    """A student that starts near its teacher."""
    step = build_step(distillation(teacher, **settings))
    assert isinstance(step, DistillationStep)
    step.model.load_state_dict(step.teacher.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in step.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return step.train()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher of each dynamics."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: save_teacher(folder / name, name) for name in DYNAMICS}


def evaluations(trainer: Trainer) -> list[int]:
    """Gets an entry, the batch's size, at each evaluation of the teacher's decoder."""
    assert isinstance(trainer.module, DistillationStep)
    found: list[int] = []
    trainer.module.teacher.decoder.register_forward_pre_hook(lambda module, given: found.append(given[0].shape[0]))
    return found


def outcome(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What equal runs have in common: the losses of each step; weights, average and optimiser state to the bit."""
    return metrics(path), {file.name: sha256(file) for file in (path / "checkpoints" / "last").glob("*.safetensors")}


# --- the target ---


def by_hand(name: str, model: DCSSDAE, z: Tensor, noise: Tensor, steps: int, step_size: float | None) -> Tensor:
    """The K-step sample, written out from the formulas."""
    if name == "flow":
        times = [(1.0 - place / steps) ** 4 for place in range(steps + 1)]
        x = noise
        for now, then in pairwise(times):
            x = x + (now - then) * model.decoder(x, z, torch.full((len(z),), now))
        return x
    scale, slope, _ = FIELDS[name]

    def field(x: Tensor) -> Tensor:
        return x - model.decoder(x, z) if name == "image" else model.decoder(x, z)

    if step_size is not None:
        x, rest = noise, steps
    else:
        x, rest = noise - field(noise) / scale, steps - 1
        step_size = min(1.0, 1.5 / max(rest, 1)) / slope
    for _ in range(rest):
        x = x - step_size * field(x)
    return x


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
    step = distillation_step(teachers[dynamics], dynamics=dynamics, teacher_steps=steps, step_size=step_size)
    pixels, noise, level, latent_noise = batch(0)
    found = step(pixels, noise, level, latent_noise)

    model = random_model(dynamics)
    x = pixels.float() / 127.5 - 1.0
    with torch.no_grad():
        posterior = model.encoder(x)
        z = posterior.mean + (0.5 * posterior.logvar).exp() * latent_noise
        target = by_hand(dynamics, model, z, noise, steps, step_size)
        same = model.decode(z, num_steps=steps, step_size=step_size, noise=noise).sample
        torch.testing.assert_close(same, target, atol=1e-5, rtol=1e-5)
        student = step.model.eval()
        if dynamics == "flow":
            landed, factor = noise + student.decoder(noise, z, torch.ones(4)), 1.0
        else:
            scale, _, factor = FIELDS[dynamics]
            answer = student.decoder(noise, z)
            landed = answer if dynamics == "image" else noise - answer / scale
        one_step = student.decode(z, noise=noise).sample
    torch.testing.assert_close(landed, one_step, atol=1e-5, rtol=1e-5)
    expected = factor * (landed - target).square().mean()
    assert expected > 1e-5, "student and teacher agree: there is nothing to see"
    torch.testing.assert_close(found.terms["dynamics"], expected, atol=1e-6, rtol=1e-4)
    assert found.terms.keys() == {"dynamics"}
    assert torch.equal(found.total, found.terms["dynamics"])


def test_what_the_loss_depends_on(teacher: Path) -> None:
    step = distillation_step(teacher)
    pixels, noise, level, latent_noise = batch(0)
    expected = step(pixels, noise, level, latent_noise).total
    torch.manual_seed(2)
    assert torch.equal(step(pixels, noise, torch.zeros(4), latent_noise, torch.arange(4)).total, expected)
    assert not torch.equal(step(pixels, noise.flip(0), level, latent_noise).total, expected)
    assert not torch.equal(step(pixels, noise, level, latent_noise.flip(0)).total, expected)
    # The teacher works in evaluation mode, and the student's batch norm with its statistics: images do not join.
    parts = [step(*(tensor[place : place + 1] for tensor in batch(0))).total for place in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for parameter in step.model.encoder.parameters():
            parameter.zero_()
    assert torch.equal(step(*batch(0)).total, expected), "the latent is the teacher's"


def test_other_terms_compare_with_the_teachers_result(teacher: Path) -> None:
    term = {"weight": 1.0, "class_path": f"{__name__}.LooksAtTheImage"}
    step = distillation_step(teacher, losses={"looks": term})
    pixels, noise, level, latent_noise = batch(0)
    found = step(pixels, noise, level, latent_noise).terms["looks"]
    with torch.no_grad():
        z = step.teacher.posterior(pixels.float() / 127.5 - 1.0).sample(noise=latent_noise)
        expected = step.teacher.decode(z, num_steps=3, noise=noise).sample.mean()
    torch.testing.assert_close(found, expected)


# --- teacher and student ---


def test_the_teacher_is_no_part_of_the_module_but_moves_along(teacher: Path) -> None:
    step = distillation_step(teacher)
    mine = {id(tensor) for tensor in (*step.parameters(), *step.buffers())}
    assert not any(id(tensor) in mine for tensor in (*step.teacher.parameters(), *step.teacher.buffers()))
    assert step.state_dict().keys() == {f"model.{name}" for name in step.teacher.state_dict()}
    step(*batch(0)).total.backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    assert not any(module.training for module in step.teacher.modules())
    expected = load_file(teacher / WEIGHTS_FILE)
    for name, tensor in step.teacher.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    step.to(torch.float64, memory_format=torch.channels_last)
    weight = next(p for p in step.teacher.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def whole_run(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    start(distillation(teacher, photos), path)
    return path


def test_what_a_run_leaves_behind(whole_run: Path, teacher: Path) -> None:
    for line in read_lines(whole_run / "metrics.jsonl"):
        expected = {"step", "loss/total", "loss/dynamics", "gradient_norm", "lr", *VARIABLE}
        assert set(line) == expected
        assert line["gradient_norm"] > 0.0
    before, tensors = load_file(teacher / WEIGHTS_FILE), read_checkpoint(whole_run / "checkpoints" / "last").tensors
    assert tensors["model"].keys() == {f"model.{name}" for name in before}
    assert tensors["ema"].keys() == before.keys()
    frozen = {name for name, tensor in before.items() if torch.equal(tensor, tensors["model"][f"model.{name}"])}
    assert frozen == {name for name, tensor in before.items() if torch.equal(tensor, tensors["ema"][name])}
    assert sum("running" in name or "num_batches" in name for name in frozen) == 3, "the statistics of the batch norm"
    latent_inputs = parameter_groups(build_model(distillation(teacher).model))["decoder.latent_inputs"]
    assert frozen == {*latent_inputs, *(name for name in before if name.startswith("encoder."))}

    kept, student = (DCSSDAE.from_pretrained(whole_run / part).state_dict() for part in ("teacher", "model"))
    for name, tensor in before.items():
        assert torch.equal(kept[name], tensor), name
        assert torch.equal(student[name], tensors["ema"][name]), name
    copy = whole_run / "teacher" / WEIGHTS_FILE
    assert not copy.samefile(teacher / WEIGHTS_FILE), "who writes into the teacher would change the run's"
    assert not (whole_run / "teacher_cache").exists()


# --- the cache ---


def test_the_cache_spares_the_teacher_and_changes_nothing(photos: Path, teacher: Path, tmp_path: Path) -> None:
    config = distillation(teacher, photos, cache_steps=3, steps=5)
    with_cache = trainer_of(config, tmp_path / "with")
    spared = evaluations(with_cache)
    with_cache.run()
    assert spared == [4] * 9, "three steps of three evaluations, and none from then on"
    files = sorted((tmp_path / "with" / "teacher_cache").iterdir())
    assert [file.name for file in files] == [f"{number:08d}.safetensors" for number in range(12)]

    without = trainer_of(config, tmp_path / "without")
    assert isinstance(without.module, DistillationStep)
    without.module.cache = None
    every = evaluations(without)
    without.run()
    assert every == [4] * 15
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        lambda file: shutil.copy(file.with_name("00000001.safetensors"), file),  # the result of another draw
        lambda file: save_file({**load_file(file), "image": load_file(file)["image"].half()}, file),
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
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith("no more results are kept")
    assert "No space left" in said[0]
    assert torch.equal(cache.read(torch.arange(4)), images)
    assert cache.read(torch.arange(8, 12)) is None
    for file in (small_disk / "cache").iterdir():
        assert load_file(file)["image"].shape == (3, 64, 64)


# --- stopping and going on ---


def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(photos: Path, teacher: Path, tmp_path: Path) -> None:
    """Whatever becomes of the teacher's own folder: the run has a copy."""
    own = tmp_path / "original"
    shutil.copytree(teacher, own)
    config = distillation(own, photos, cache_steps=3, checkpoint_every=100, losses=HOOKED)
    config = config.with_training(train=[*student_groups(config), "losses.hooked"])
    start(config, tmp_path / "whole")
    path = tmp_path / "stopped"
    Hooked.hook = at({3: send(signal.SIGTERM)})
    assert start(config, path) == Outcome(4, "SIGTERM")
    save_teacher(own, seed=9)  # in its place
    Hooked.hook = at({2: send(signal.SIGTERM)})
    assert resume(config, path) == Outcome(7, "SIGTERM")
    shutil.rmtree(own)
    shutil.rmtree(path / "teacher_cache", ignore_errors=True)
    Hooked.hook = None
    assert resume(config, path) == Outcome(8, None)
    assert outcome(path) == outcome(tmp_path / "whole")


# --- what is refused ---


def refused(config: RunConfig, path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        start(config, path)
    assert "\n" not in str(caught.value)
    assert not path.exists(), "a mistake leaves a run's folder"
    assert not list(path.parent.glob(".*partial"))


def test_mistakes_leave_no_run(teachers: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    teacher, run = teachers["linear"], tmp_path / "run"
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher, damaged)
    (damaged / WEIGHTS_FILE).write_bytes((damaged / WEIGHTS_FILE).read_bytes()[:1000])
    refused(distillation(damaged, photos), run, r"distillation\.teacher .*damaged")
    refused(distillation(tmp_path / "nowhere", photos), run, r"distillation\.teacher .*nowhere")
    refused(distillation(teachers["flow"], photos, dynamics="flow", step_size=0.1), run, "step_size is for a descent")
    refused(distillation(teacher, photos, train=None), run, r"training\.train is .* the decoder alone")
    refused(distillation(teacher, photos, init_from=str(teacher)), run, r"training\.init_from")
    good = distillation(teacher, photos)
    refused(replace(good, model=replace(good.model, latent_channels=6)), run, "linear does not fit; .* has shape")
    # The same tensors, and yet another model.
    refused(distillation(teachers["truncated"], photos), run, "has another dynamics than section model")


def test_the_latent_is_normalised_as_the_teachers(photos: Path, tmp_path: Path) -> None:
    measured = save_teacher(tmp_path / "teacher")
    write_latent_statistics(measured, LatentStatistics([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0], 10))
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    expected = {name: read_config(measured)[name] for name in names}
    config = distillation(measured, photos, latent_statistics=4, steps=1)
    start(config, tmp_path / "run")
    resume(config.with_training(steps=2), tmp_path / "run")
    assert {name: read_config(tmp_path / "run" / "model")[name] for name in names} == expected
