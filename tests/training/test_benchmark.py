"""The benchmark of training steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.profile import count_flops
from dc_ssdae.presets import load_preset
from dc_ssdae.training.benchmark import WARM_UP_STEPS, measure_training
from dc_ssdae.training.build import build_model
from dc_ssdae.training.config import RunConfig

CPU = torch.device("cpu")


def demo_config(**training: Any) -> RunConfig:
    preset = load_preset("demo")
    given = {"batch_size": 2, "precision": "float32", "optimizer": "adamw", **training}
    losses = {"lpips": 0.0, "repa": 0.0}
    data = {"image_size": 16}
    return RunConfig.from_mapping({"model": preset["model"], "data": data, "training": given, "losses": losses})


class OutOfMemory(nn.Module):
    """A loss term for which memory is never enough."""

    def forward(self, _: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")


class OtherFailure(nn.Module):
    """A loss term with a bug."""

    def forward(self, _: Any) -> Tensor:
        raise RuntimeError("shapes do not fit")


def test_step_figures_are_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    class Counting(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Counting)
    config = demo_config(accumulation_steps=2)
    (figures,) = measure_training("demo", config, {}, CPU, 2)
    assert steps == WARM_UP_STEPS + 1 + 2 + 1  # before each measurement one that is not timed
    seconds, speed = figures.seconds, figures.images_per_second
    assert 0.0 < seconds.low <= seconds.median <= seconds.high
    assert speed.median == pytest.approx(2 / seconds.median)
    assert 0.0 < speed.low <= speed.median <= speed.high
    assert figures.phases is not None
    assert list(figures.phases) == ["forward", "backward", "update"]
    assert all(phase.low > 0.0 for phase in figures.phases.values())
    flops = count_flops(build_model(config.model), 16)
    assert figures.flops == 3 * 2 * (flops.encode + flops.decode_step)
    assert figures.tflops_per_second == pytest.approx(figures.flops / seconds.median / 1e12)
    assert figures.peak_memory_bytes is not None
    assert figures.peak_memory_bytes > 2**20
    assert figures.ratio is None
    assert (figures.name, figures.batch_size, figures.not_finite) == ("demo", 2, 0)


def test_comparison_gives_a_ratio_of_images_a_second() -> None:
    other = demo_config(batch_size=1, optimizer="schedule_free_radam", gradient_checkpointing=True)
    plain, compared = measure_training("demo", demo_config(batch_size=1), {"other": other}, CPU, 3)
    assert (plain.name, compared.name) == ("demo", "other")
    assert plain.ratio is None
    assert compared.ratio is not None
    rounds = compared.ratio
    assert 0.0 < rounds.low <= rounds.median <= rounds.high
    assert compared.flops == plain.flops
    assert compared.peak_memory_bytes is None
    assert compared.not_finite == 0


def test_steps_that_are_not_finite_are_counted() -> None:
    weights = {"kl": {"weight": 1e38}, "lpips": 0.0, "repa": 0.0}  # the gradient overflows
    config = RunConfig.from_mapping({**demo_config(lr=1e30, gradient_clip=None).to_mapping(), "losses": weights})
    (figures,) = measure_training("demo", config, {}, CPU, 2)
    assert figures.not_finite == 2


def test_out_of_memory_is_an_input_error_and_bugs_are_not() -> None:
    def with_term(kind: type) -> RunConfig:
        losses = {"lpips": 0.0, "repa": 0.0, "own": {"weight": 1.0, "class_path": f"{__name__}.{kind.__name__}"}}
        return RunConfig.from_mapping({**demo_config().to_mapping(), "losses": losses})

    with pytest.raises(InputError, match=r"^out of memory on cpu: demo with training\.batch_size 2; ") as caught:
        measure_training("demo", with_term(OutOfMemory), {}, CPU, 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^out of memory on cpu: worse with "):
        measure_training("demo", demo_config(), {"worse": with_term(OutOfMemory)}, CPU, 1)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_training("demo", with_term(OtherFailure), {}, CPU, 1)
