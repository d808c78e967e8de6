"""The benchmark of training steps."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dc_ssdae.errors import InputError
from dc_ssdae.losses import StepOutputs
from dc_ssdae.presets import load_preset
from dc_ssdae.timing import Spread
from dc_ssdae.training.benchmark import measure_training
from dc_ssdae.training.build import build_model
from dc_ssdae.training.config import RunConfig

CPU = torch.device("cpu")


def demo_config(**training: Any) -> RunConfig:
    preset = load_preset("demo")
    given = {"batch_size": 2, "precision": "float32", "optimizer": "adamw", **training}
    losses = {"lpips": 0.0, "repa": 0.0}
    data = {"image_size": 16}
    return RunConfig.from_mapping({"model": preset["model"], "data": data, "training": given, "losses": losses})


class Clock:
    """Stands still but for what loss terms and the optimiser say that they take."""

    now = 0.0

    @classmethod
    def take(cls, seconds: float) -> None:
        cls.now += seconds


class Takes(nn.Module):
    """A loss term whose forward pass takes some seconds, and whose backward pass takes twice as many."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, outputs: StepOutputs) -> Tensor:
        Clock.take(self.seconds)
        value = outputs.prediction.square().mean()
        value.register_hook(lambda _: Clock.take(2.0 * self.seconds))
        return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's step takes 3 seconds, and nothing else any but `Takes`."""

    class Slow(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            Clock.take(3.0)
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Slow)
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)


def taking(seconds: float, **training: Any) -> RunConfig:
    term = {"class_path": f"{__name__}.Takes", "init_args": {"seconds": seconds}}
    losses = {"lpips": 0.0, "repa": 0.0, "takes": term}
    return RunConfig.from_mapping({**demo_config(**training).to_mapping(), "losses": losses})


class OutOfMemory(nn.Module):
    """A loss term for which memory is never enough."""

    def forward(self, _: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")


class OtherFailure(nn.Module):
    """A loss term with a bug."""

    def forward(self, _: Any) -> Tensor:
        raise RuntimeError("shapes do not fit")


@pytest.mark.usefixtures("clock")
def test_figures_are_of_the_time_that_the_parts_take() -> None:
    config = taking(5.0, accumulation_steps=2)
    (figures,) = measure_training("demo", config, {}, CPU, 2)
    assert figures.seconds == Spread(33.0, 33.0, 33.0)  # 2 · (5 + 10) + 3
    assert figures.images_per_second.median == pytest.approx(2 / 33.0)
    medians = {name: phase.median for name, phase in (figures.phases or {}).items()}
    assert medians == {"forward": 10.0, "backward": 20.0, "update": 3.0}
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model = build_model(config.model).eval()
        model.decoder(torch.zeros(1, 3, 16, 16), model.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode())
    assert figures.flops == 3 * 2 * counted.get_total_flops()
    assert figures.tflops_per_second == pytest.approx(figures.flops / 33.0 / 1e12)
    assert figures.peak_memory_bytes is not None
    assert figures.peak_memory_bytes > 2**20
    assert (figures.name, figures.batch_size, figures.ratio, figures.not_finite) == ("demo", 2, None, 0)


@pytest.mark.usefixtures("clock")
def test_a_comparison_gives_the_ratio_of_images_a_second() -> None:
    other = taking(9.0, batch_size=1, gradient_checkpointing=True)
    plain, compared = measure_training("demo", taking(4.0, batch_size=1), {"other": other}, CPU, 3)
    assert (plain.name, plain.ratio, compared.name) == ("demo", None, "other")
    assert compared.ratio is not None
    assert compared.ratio.median == pytest.approx(15.0 / 30.0)  # 3 · 4 + 3 and 3 · 9 + 3
    assert compared.flops == plain.flops, "what is computed twice is not counted"
    assert compared.peak_memory_bytes is None


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
