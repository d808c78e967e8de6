"""Distillation: the target by hand, what stays as it was, the cache on disk, stopping and going on, what is refused."""

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE, batch, make_images, run_config, yaml_of
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.data.loader import Drawing, Place, TrainingSamples
from dc_ssdae.data.sources import open_sources
from dc_ssdae.errors import InputError
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.losses import StepOutputs
from dc_ssdae.model_folder import read_config, write_latent_statistics
from dc_ssdae.parameter_groups import parameter_groups
from dc_ssdae.training.build import build_model, build_step, decoder_groups
from dc_ssdae.training.checkpoint import read_checkpoint
from dc_ssdae.training.config import DistillationConfig, RunConfig
from dc_ssdae.training.distillation import DistillationStep, TeacherCache
from dc_ssdae.training.distributed import start_processes
from dc_ssdae.training.launch import resume_run, start_run
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.run import WEIGHTS_FILE, RunFolder, create_run
from dc_ssdae.training.step import draw_noise
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Outcome, Trainer

DISK_KIB = 256
"""Of the file system that `small_disk` gives."""

VARIABLE = {"images_per_second", "seconds", "memory_gib"}
WEIGHTS = "diffusion_pytorch_model.safetensors"

DYNAMICS: dict[str, dict[str, Any]] = {
    "linear": {"class_path": "EquilibriumMatching"},
    "scaled": {"class_path": "EquilibriumMatching", "init_args": {"gradient_scale": 4.0}},
    "truncated": {"class_path": "EquilibriumMatching", "init_args": {"decay": "truncated", "gradient_scale": 4.0}},
    "piecewise": {"class_path": "EquilibriumMatching", "init_args": {"decay": "piecewise", "gradient_scale": 2.0}},
    "flow": {"class_path": "FlowMatching"},
    "image": {"class_path": "EquilibriumMatching", "init_args": {"prediction": "image"}},
}

# Of each: λ c(0), the slope L near the data, and the factor from (x̂ − target)² to the loss, c(0)².
FIELDS = {
    "linear": (1.0, 1.0, 1.0),
    "scaled": (4.0, 4.0, 1.0),
    "truncated": (4.0, 20.0, 1.0),
    "piecewise": (2.8, 10.0, 1.96),
    "image": (1.0, 1.0, 1.0),
}


class LooksAtTheImage(nn.Module):
    """A user's term: the mean of what the student is compared with."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.record.x.flatten(1).mean(dim=1) + 0.0 * outputs.prediction.mean()


class EndsTheRun(nn.Module):
    """A user's term that changes nothing, and sends a signal when it has counted down."""

    countdown: int | None = None
    """Of all objects of the class, because the loop builds them."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        if EndsTheRun.countdown is not None:
            EndsTheRun.countdown -= 1
            if EndsTheRun.countdown == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return 0.0 * outputs.prediction.mean()


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


def copy_of(teacher: Path, folder: Path) -> Path:
    shutil.copytree(teacher, folder)
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


def distillation_step(teacher: Path, perturbed: bool = True, **settings: Any) -> DistillationStep:
    """A student that starts near its teacher, or as it."""
    step = build_step(distillation(teacher, **settings))
    assert isinstance(step, DistillationStep)
    step.model.load_state_dict(step.teacher.state_dict())
    if perturbed:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in step.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return step.train()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine training images; nothing is evaluated."""
    return make_images(tmp_path_factory.mktemp("images") / "train", 9)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher of each dynamics."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: save_teacher(folder / name, name) for name in DYNAMICS}


def start(config: RunConfig, path: Path) -> Outcome:
    return start_run(config, yaml_of(config), path, cpu=True)


def resume(config: RunConfig, path: Path) -> Outcome | None:
    return resume_run(config, None, path, cpu=True)


def trainer_of(config: RunConfig, path: Path) -> Trainer:
    """A trainer before its first step, in a new run's folder or in one that is there."""
    assert config.distillation is not None
    if not path.exists():
        model = build_model(config.model).to_json_string()
        create_run(path, yaml_of(config), model, teacher=Path(config.distillation.teacher))
    data = config.data
    sources = open_sources(data.root, data.dataset, data.validation, data.cache)
    return Trainer(config, RunFolder(path), start_processes(None, cpu=True), sources, StopRequest())


def evaluations(trainer: Trainer) -> list[int]:
    """Gets an entry, the batch's size, at each evaluation of the teacher's decoder."""
    assert isinstance(trainer.module, DistillationStep)
    found: list[int] = []
    trainer.module.teacher.decoder.register_forward_pre_hook(lambda module, given: found.append(given[0].shape[0]))
    return found


def losses(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in VARIABLE}
        for line in read_lines(path / "metrics.jsonl")
    ]


def last(path: Path) -> dict[str, dict[str, Tensor]]:
    folder = RunFolder(path).checkpoints.last()
    assert folder is not None
    return {file: dict(group) for file, group in read_checkpoint(folder).tensors.items()}


def assert_same_runs(path: Path, other: Path) -> None:
    """Bit-identical weights, average and optimiser state, and the same losses at each step."""
    one, two = last(path), last(other)
    assert one.keys() == two.keys()
    for file in one:
        assert one[file].keys() == two[file].keys()
        different = [name for name, tensor in one[file].items() if not torch.equal(tensor, two[file][name])]
        assert not different, file
    assert losses(path) == losses(other)


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
        ("linear", 4, None),
        ("linear", 3, 0.3),
        ("scaled", 3, None),
        ("truncated", 3, None),
        ("truncated", 2, 0.02),
        ("piecewise", 3, None),
        ("flow", 1, None),
        ("flow", 3, None),
        ("image", 1, None),
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


@pytest.mark.parametrize("dynamics", ["linear", "flow"])
def test_the_level_and_the_number_of_the_draw_change_nothing(teachers: dict[str, Path], dynamics: str) -> None:
    step = distillation_step(teachers[dynamics], dynamics=dynamics)
    pixels, noise, level, latent_noise = batch(0)
    expected = step(pixels, noise, level, latent_noise).total
    for other in (torch.zeros(4), torch.ones(4), level.flip(0)):
        assert torch.equal(step(pixels, noise, other, latent_noise).total, expected)
    assert torch.equal(step(pixels, noise, level, latent_noise, torch.arange(4)).total, expected)
    for place, other in ((1, noise.flip(0)), (3, latent_noise.flip(0))):
        given = list(batch(0))
        given[place] = other
        assert not torch.equal(step(*given).total, expected)


def test_other_terms_compare_with_the_teachers_result(teacher: Path) -> None:
    term = {"weight": 1.0, "class_path": f"{__name__}.LooksAtTheImage"}
    step = distillation_step(teacher, losses={"looks": term})
    pixels, noise, level, latent_noise = batch(0)
    found = step(pixels, noise, level, latent_noise).terms["looks"]
    with torch.no_grad():
        z = step.teacher.posterior(pixels.float() / 127.5 - 1.0).sample(noise=latent_noise)
        expected = step.teacher.decode(z, num_steps=3, noise=noise).sample.mean()
    torch.testing.assert_close(found, expected)


def test_nothing_random_is_left_in_it(teacher: Path) -> None:
    step = distillation_step(teacher)
    torch.manual_seed(1)
    first = step(*batch(0)).total
    torch.manual_seed(2)
    assert torch.equal(first, step(*batch(0)).total)


def test_the_latent_is_the_teachers(teacher: Path) -> None:
    step = distillation_step(teacher)
    expected = step(*batch(0)).total
    with torch.no_grad():
        for parameter in step.model.encoder.parameters():
            parameter.zero_()
    assert torch.equal(step(*batch(0)).total, expected)


def test_images_do_not_join(teacher: Path) -> None:
    """The teacher works in evaluation mode, and the student's batch norm with its statistics."""
    step = distillation_step(teacher)
    parts = [step(*(tensor[place : place + 1] for tensor in batch(0))).total for place in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), step(*batch(0)).total, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_close(teacher: Path, precision: str) -> None:
    if not torch.amp.is_autocast_available("cpu"):
        pytest.skip("no autocast on this CPU")
    half, full = (distillation_step(teacher, precision=name) for name in (precision, "float32"))
    found, expected = half(*batch(0)), full(*batch(0))
    assert found.total.dtype == torch.float32
    assert not torch.equal(found.total, expected.total)
    torch.testing.assert_close(found.total, expected.total, atol=0.0, rtol=0.05)
    found.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in half.parameters() if p.grad is not None)


def test_channels_last_is_the_same_but_for_rounding(teacher: Path) -> None:
    step = distillation_step(teacher, channels_last=True)
    step.to(memory_format=torch.channels_last)
    expected = distillation_step(teacher)(*batch(0)).total
    torch.testing.assert_close(step(*batch(0)).total, expected, atol=1e-5, rtol=1e-4)


# --- teacher and student ---


def test_the_teacher_is_no_part_of_the_module(teacher: Path) -> None:
    step = distillation_step(teacher)
    mine = {id(tensor) for tensor in (*step.parameters(), *step.buffers())}
    theirs = [*step.teacher.parameters(), *step.teacher.buffers()]
    assert not any(id(tensor) in mine for tensor in theirs)
    assert step.state_dict().keys() == {f"model.{name}" for name in step.teacher.state_dict()}
    assert not any(module is step.teacher for module in step.modules())

    step.train()
    assert not any(module.training for module in step.teacher.modules())
    step(*batch(0)).total.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in step.teacher.parameters())
    expected = load_file(teacher / WEIGHTS)
    for name, tensor in step.teacher.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_teacher_moves_along(teacher: Path) -> None:
    step = distillation_step(teacher)
    assert {parameter.dtype for parameter in step.to(torch.float64).teacher.parameters()} == {torch.float64}
    weight = next(p for p in step.teacher.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    step.to(memory_format=torch.channels_last)
    weight = next(p for p in step.teacher.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    step.to("meta")
    assert {tensor.device.type for tensor in step.teacher.state_dict().values()} == {"meta"}


def test_gradients_reach_what_trains_and_nothing_else(teacher: Path) -> None:
    step = distillation_step(teacher)
    step(*batch(0)).total.backward()
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), f"no gradient reaches {name}"
        else:
            assert parameter.grad is None, name


@pytest.fixture(scope="module")
def whole_run(images: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    start(distillation(teacher, images), path)
    return path


def test_what_a_run_leaves_behind(whole_run: Path, teacher: Path) -> None:
    for line in read_lines(whole_run / "metrics.jsonl"):
        expected = {"step", "loss/total", "loss/dynamics", "gradient_norm", "lr", *VARIABLE}
        assert set(line) == expected
        assert line["gradient_norm"] > 0.0
    before = load_file(teacher / WEIGHTS)
    tensors = last(whole_run)
    assert tensors["model"].keys() == {f"model.{name}" for name in before}
    assert tensors["ema"].keys() == before.keys()
    changed = set()
    for name, tensor in before.items():
        same = [torch.equal(tensor, found) for found in (tensors["model"][f"model.{name}"], tensors["ema"][name])]
        if not any(same):
            changed.add(name)
        else:
            assert all(same), name
    frozen = before.keys() - changed
    assert sum("running" in name or "num_batches" in name for name in frozen) == 3, "the statistics of the batch norm"
    model = build_model(distillation(teacher).model)
    latent_inputs = parameter_groups(model)["decoder.latent_inputs"]
    assert frozen == {*latent_inputs, *(name for name in before if name.startswith("encoder."))}

    assert {file.name for file in (whole_run / "teacher").iterdir()} == {"config.json", WEIGHTS}
    kept = DCSSDAE.from_pretrained(whole_run / "teacher").state_dict()
    student = DCSSDAE.from_pretrained(whole_run / "model").state_dict()
    for name, tensor in before.items():
        assert torch.equal(kept[name], tensor), name
        assert torch.equal(student[name], tensors["ema"][name]), name
    assert not (whole_run / "teacher_cache").exists()


def test_the_same_again_is_the_same(whole_run: Path, images: Path, teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(77)
    start(distillation(teacher, images), tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole_run)


@pytest.mark.parametrize("dynamics", ["linear", "truncated", "flow"])
def test_a_teacher_of_one_step_has_nothing_to_teach(teachers: dict[str, Path], dynamics: str) -> None:
    step = distillation_step(teachers[dynamics], perturbed=False, dynamics=dynamics, teacher_steps=1)
    assert float(step(*batch(0)).total.detach()) < 1e-11, "more than rounding"
    step = distillation_step(teachers[dynamics], perturbed=False, dynamics=dynamics, teacher_steps=2)
    assert float(step(*batch(0)).total.detach()) > 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("schedule_free_radam", marks=pytest.mark.slow)])
def test_a_teacher_of_one_step_leaves_the_student_where_it_was(
    images: Path, teacher: Path, tmp_path: Path, optimizer: str
) -> None:
    """To within what Adam makes of rounding errors, whose size it divides out."""
    pixels, noise, _, latent_noise = batch(5)
    moved = {}
    for steps in (1, 3):
        path = tmp_path / str(steps)
        start(distillation(teacher, images, teacher_steps=steps, optimizer=optimizer, lr=1e-4), path)
        student, old = DCSSDAE.from_pretrained(path / "model"), DCSSDAE.from_pretrained(teacher)
        with torch.no_grad():
            z = old.posterior(pixels.float() / 127.5 - 1.0).sample(noise=latent_noise)
            before, after = (model.decode(z, noise=noise).sample for model in (old, student))
        moved[steps] = float((before - after).square().mean())
        totals = [line["loss/total"] for line in losses(path)]
        print(f"{optimizer}, teacher of {steps}: losses", *(f"{total:.2g}" for total in totals))
        assert (totals[0] < 1e-11) == (steps == 1)
    print(f"{optimizer}: mean squared change of the student's one step, by the teacher's steps: {moved}")
    assert moved[1] < 2e-5
    if optimizer == "adamw":  # the other one's first steps are far smaller
        assert moved[3] > 1e-4


# --- repeating crops and noise ---


def samples_of(config: RunConfig) -> TrainingSamples:
    """The samples that a trainer of this configuration reads."""
    assert config.distillation is not None
    sources = open_sources(config.data.root, None, None, None)
    drawing = Drawing(
        config.training.seed,
        config.training.batch_size,
        SIZE,
        config.data.aug_scale,
        config.data.flip,
        config.distillation.cache_steps,
    )
    return TrainingSamples(sources.train, drawing)


def test_crops_and_noise_come_again(images: Path, teacher: Path) -> None:
    repeating = samples_of(distillation(teacher, images, cache_steps=3))
    endless = samples_of(distillation(teacher, images))
    for step in range(8):
        for place in (0, 3):
            found, expected = repeating[Place(step, place)], endless[Place(step % 3, place)]
            assert int(found.draw) == 4 * (step % 3) + place
            assert torch.equal(found.pixels, expected.pixels)
            assert int(endless[Place(step, place)].draw) == 4 * step + place


def test_a_run_repeats_its_steps(images: Path, teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(distillation(teacher, images, cache_steps=3), tmp_path / "run")
    seen: list[tuple[Tensor, ...]] = []
    trainer.module.register_forward_pre_hook(lambda module, given: seen.append(given))
    trainer.run()
    assert len(seen) == 8
    for step in range(3, 8):
        for one, other in zip(seen[step], seen[step - 3], strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(seen[step][1], seen[step - 1][1])
    noise, _, latent_noise = draw_noise(trainer.module.model, SIZE, trainer.config.training.seed, 4, range(4, 8), "cpu")
    for place, expected in ((1, noise), (3, latent_noise), (4, torch.arange(4, 8))):
        assert torch.equal(seen[4][place], expected), "from the seed, the step and the place"


# --- the cache ---


@pytest.fixture(scope="module")
def cached_run(images: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps over a cache of three, which nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "cached"
    start(distillation(teacher, images, cache_steps=3), path)
    return path


def test_the_cache_spares_the_teacher_and_changes_nothing(
    images: Path, teacher: Path, tmp_path: Path, cached_run: Path
) -> None:
    config = distillation(teacher, images, cache_steps=3)
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
    assert every == [4] * 24
    kept = load_file(teacher / WEIGHTS)
    for name, tensor in without.module.teacher.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert_same_runs(tmp_path / "with", tmp_path / "without")
    assert_same_runs(tmp_path / "with", cached_run)


def test_a_file_holds_the_result_of_its_draw(cached_run: Path, teacher: Path, images: Path) -> None:
    config = distillation(teacher, images, cache_steps=3)
    samples = samples_of(config)
    model = DCSSDAE.from_pretrained(teacher)
    for step, place in ((0, 0), (1, 2), (2, 3)):
        sample = samples[Place(step, place)]
        noise, _, latent_noise = draw_noise(model, SIZE, config.training.seed, 4, [int(sample.draw)], "cpu")
        with torch.no_grad():
            posterior = model.posterior(sample.pixels[None].float() / 127.5 - 1.0)
            z = posterior.sample(noise=latent_noise)
            expected = model.decode(z, num_steps=3, noise=noise).sample[0]
        found = load_file(cached_run / "teacher_cache" / f"{4 * step + place:08d}.safetensors")
        assert found.keys() == {"image", "crc32"}
        assert found["image"].dtype == torch.float32
        torch.testing.assert_close(found["image"], expected, atol=1e-5, rtol=1e-5)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def rename_tensor(file: Path) -> None:
    save_file({"picture": load_file(file)["image"]}, file)


@pytest.mark.parametrize("damage", [truncate, zero, rename_tensor, Path.unlink])
def test_a_damaged_file_is_made_again(
    images: Path, teacher: Path, tmp_path: Path, cached_run: Path, damage: Any
) -> None:
    path = tmp_path / "run"
    trainer = trainer_of(distillation(teacher, images, cache_steps=3), path)
    shutil.copytree(cached_run / "teacher_cache", path / "teacher_cache")
    file = path / "teacher_cache" / "00000006.safetensors"
    expected = file.read_bytes()
    damage(file)
    made = evaluations(trainer)
    trainer.run()
    assert made == [4] * 3, "the batch of the damaged file, once"
    assert file.read_bytes() == expected
    assert_same_runs(path, cached_run)


def test_where_the_cache_cannot_be_written_it_is_said_once(
    images: Path, teacher: Path, tmp_path: Path, cached_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    trainer = trainer_of(distillation(teacher, images, cache_steps=3), path)
    (path / "teacher_cache").write_text("in the way")
    assert trainer.run() == Outcome(8, None)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(said) == 1
    assert str(path / "teacher_cache") in said[0]
    assert_same_runs(path, cached_run)


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
    assert all(file.suffix == ".safetensors" for file in (small_disk / "cache").iterdir()), "half a file is left"
    for file in (small_disk / "cache").iterdir():
        assert load_file(file)["image"].shape == (3, 64, 64)


def test_draws_count_modulo(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", 6)
    images = torch.randn(3, 3, 8, 8)
    assert cache.read(torch.tensor([0])) is None
    assert not (tmp_path / "cache").exists()
    cache.write(torch.tensor([4, 5, 6]), images)
    assert torch.equal(cache.read(torch.tensor([11, 10, 0])), images[[1, 0, 2]])
    assert cache.read(torch.tensor([4, 1])) is None


def test_a_spoiled_result_is_made_again(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, 6)
    cache.write(torch.arange(2), torch.randn(2, 3, 8, 8))
    file = tmp_path / "00000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert cache.read(torch.arange(2)) is None
    assert cache.read(torch.arange(1)) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.half(),
        lambda image: image.bfloat16(),
        lambda image: image.view(torch.int32),
        lambda image: image.flatten(),
        lambda image: image.fill_(torch.nan),
    ],
)
def test_a_result_that_was_exchanged_is_made_again(tmp_path: Path, change: Any) -> None:
    cache = TeacherCache(tmp_path, 6)
    cache.write(torch.arange(2), torch.randn(2, 3, 8, 8))
    first, second = (tmp_path / f"0000000{number}.safetensors" for number in range(2))
    entry = load_file(first)
    save_file({**entry, "image": change(entry["image"])}, first)
    assert cache.read(torch.arange(1)) is None
    shutil.copy(second, first)
    assert cache.read(torch.arange(1)) is None, "the result of another draw"


def test_images_in_channels_last_are_kept(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, 6)
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    cache.write(torch.arange(2), images)
    assert torch.equal(cache.read(torch.arange(2)), images)


# --- stopping and going on ---


@pytest.fixture
def stop_after() -> Iterator[Callable[[int | None], None]]:
    """Says after how many more steps the runs of a test get a signal."""

    def count(steps: int | None) -> None:
        EndsTheRun.countdown = steps

    yield count
    EndsTheRun.countdown = None


ENDS = {"ends": {"weight": 1.0, "class_path": f"{__name__}.EndsTheRun"}}


@pytest.mark.parametrize(("cache_steps", "optimizer"), [(None, "schedule_free_radam"), (3, "adamw")])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    images: Path,
    teacher: Path,
    tmp_path: Path,
    stop_after: Callable[[int | None], None],
    cache_steps: int | None,
    optimizer: str,
) -> None:
    """Whatever becomes of the teacher's own folder: the run has a copy."""
    own = copy_of(teacher, tmp_path / "original")
    config = distillation(own, images, cache_steps=cache_steps, optimizer=optimizer, checkpoint_every=100, losses=ENDS)
    start(config, tmp_path / "whole")
    path = tmp_path / "stopped"
    stop_after(4)
    assert start(config, path) == Outcome(4, "SIGTERM")
    save_teacher(own, seed=9)  # in its place
    stop_after(3)
    assert resume(config, path) == Outcome(7, "SIGTERM")
    shutil.rmtree(own)
    stop_after(None)
    assert resume(config, path) == Outcome(8, None)
    assert_same_runs(path, tmp_path / "whole")


def test_a_cache_that_is_gone_makes_no_difference(
    images: Path, teacher: Path, tmp_path: Path, cached_run: Path
) -> None:
    config = distillation(teacher, images, cache_steps=3)
    path = tmp_path / "run"
    stopped = trainer_of(config, path)
    seen: list[int] = []

    def stop(*rest: object) -> None:
        seen.append(1)
        if len(seen) == 5:
            stopped.stop.name = "a test"

    stopped.module.register_forward_pre_hook(stop)
    assert stopped.run() == Outcome(5, "a test")
    shutil.rmtree(path / "teacher_cache")
    assert resume(config, path) == Outcome(8, None)
    assert_same_runs(path, cached_run)


def test_other_parts_of_the_batch_read_the_same_cache(
    images: Path, teacher: Path, tmp_path: Path, cached_run: Path
) -> None:
    config = distillation(teacher, images, cache_steps=3, accumulation_steps=2)
    path = tmp_path / "run"
    trainer = trainer_of(config, path)
    shutil.copytree(cached_run / "teacher_cache", path / "teacher_cache")
    made = evaluations(trainer)
    trainer.run()
    assert made == []
    for found, expected in zip(losses(path), losses(cached_run), strict=True):
        assert found["loss/dynamics"] == pytest.approx(expected["loss/dynamics"], rel=1e-3)


# --- what is refused ---


def refused(config: RunConfig, path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        start(config, path)
    assert "\n" not in str(caught.value)
    assert not path.exists(), "a mistake leaves a run's folder"
    assert not list(path.parent.glob(".*partial"))


def test_mistakes_are_one_line(teachers: dict[str, Path], images: Path, tmp_path: Path) -> None:
    teacher, run = teachers["linear"], tmp_path / "run"
    good = distillation(teacher, images)
    refused(distillation(tmp_path / "nowhere", images), run, r"distillation\.teacher .*nowhere")
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    shutil.copy(teacher / "config.json", hollow)
    refused(distillation(hollow, images), run, r"distillation\.teacher .*hollow")
    truncated = copy_of(teacher, tmp_path / "cut")
    truncate(truncated / WEIGHTS)
    refused(distillation(truncated, images), run, r"distillation\.teacher .*cut")
    refused(
        distillation(teacher, images, teacher_steps=1, step_size=0.1),
        run,
        r"distillation\.step_size is for several steps",
    )
    flow = distillation(teachers["flow"], images, dynamics="flow", step_size=0.1)
    refused(flow, run, r"distillation\.step_size is for several steps")
    for train in (None, ["encoder"], ["encoder.latent_head", "decoder"]):
        refused(distillation(teacher, images, train=train), run, r"training\.train is .* the decoder alone")
    refused(distillation(teacher, images, train=["decoder.haed"]), run, r"training\.train: .*decoder\.head")
    with pytest.raises(InputError, match=r"distillation\.steps is 0"):
        replace(good, distillation=DistillationConfig(str(teacher), 0))
    with pytest.raises(InputError, match=r"distillation\.step_size is -0\.1"):
        DistillationConfig(str(teacher), 4, -0.1)
    with pytest.raises(InputError, match=r"distillation\.step_size is nan"):
        DistillationConfig(str(teacher), 4, math.nan)
    with pytest.raises(InputError, match=r"distillation\.cache_steps is 0"):
        DistillationConfig(str(teacher), 4, None, 0)
    with pytest.raises(InputError, match=r"distillation\.teacher is empty"):
        DistillationConfig(" ")


def test_a_model_of_another_kind_is_refused(teachers: dict[str, Path], images: Path, tmp_path: Path) -> None:
    good = distillation(teachers["linear"], images)
    wider = replace(good.model, latent_channels=6)
    refused(replace(good, model=wider), tmp_path / "run", r"distillation\.teacher .*linear does not fit; .* has shape")
    # The same tensors, and yet another model.
    refused(distillation(teachers["scaled"], images), tmp_path / "run", "has another dynamics than section model")


def test_a_run_does_not_go_on_with_other_settings(whole_run: Path, images: Path, teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole_run, path, symlinks=True)
    with pytest.raises(InputError, match=r"distillation\.steps was 3 when the run was saved and is 4"):
        resume(distillation(teacher, images, teacher_steps=4, steps=9), path)


def test_before_its_first_checkpoint_a_run_goes_on_without_the_original_teacher(
    images: Path, teacher: Path, tmp_path: Path
) -> None:
    original = copy_of(teacher, tmp_path / "original")
    config = distillation(original, images)
    whole = tmp_path / "whole"
    start(config, whole)
    trainer_of(config, tmp_path / "run")  # made and killed before the first step
    shutil.rmtree(original)
    assert resume(config, tmp_path / "run") == Outcome(8, None)
    assert_same_runs(whole, tmp_path / "run")


def test_writing_into_the_original_teacher_changes_nothing(images: Path, teacher: Path, tmp_path: Path) -> None:
    original = copy_of(teacher, tmp_path / "original")
    start(distillation(original, images, steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "teacher" / WEIGHTS_FILE).read_bytes()
    with (original / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"\xff" * 100)
    assert (tmp_path / "run" / "teacher" / WEIGHTS_FILE).read_bytes() == before


def test_a_student_starts_from_its_teacher_alone(images: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.init_from is not for a distillation"):
        start(distillation(teacher, images, init_from=str(teacher)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_latent_is_normalised_as_the_teachers(images: Path, tmp_path: Path) -> None:
    measured = save_teacher(tmp_path / "teacher")
    write_latent_statistics(measured, LatentStatistics([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0], 10))
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    expected = {name: read_config(measured)[name] for name in names}
    config = distillation(measured, images, latent_statistics=4, steps=4, checkpoint_every=1)
    start(config, tmp_path / "run")
    assert {name: read_config(tmp_path / "run" / "model")[name] for name in names} == expected
    resume(config.with_training(steps=6), tmp_path / "run")
    assert {name: read_config(tmp_path / "run" / "model")[name] for name in names} == expected
    # A teacher that knows none leaves them to be measured.
    unknown = save_teacher(tmp_path / "unknown")
    start(distillation(unknown, images, latent_statistics=4, steps=2), tmp_path / "other")
    assert read_config(tmp_path / "other" / "model")["latents_mean"] is not None
