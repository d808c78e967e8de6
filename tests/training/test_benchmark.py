"""The benchmark of training steps: what its figures mean, by loss terms that take a known time."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.losses import StepOutputs
from dc_ssdae.presets import load_preset
from dc_ssdae.training.benchmark import measure_training
from dc_ssdae.training.config import RunConfig

CPU = torch.device("cpu")


class Sleeps(nn.Module):
    """A loss term whose forward pass takes 0.1 seconds, and whose backward pass takes twice as many."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        time.sleep(0.1)
        value = outputs.prediction.square().mean()
        value.register_hook(lambda _: time.sleep(0.2))
        return value


class OutOfMemory(nn.Module):
    """A loss term for which memory is never enough."""

    def forward(self, _: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")


def config_with(term: type | None = None, **training: Any) -> RunConfig:
    given = {"batch_size": 2, "precision": "float32", "optimizer": "adamw", **training}
    losses: dict[str, Any] = {"lpips": 0.0, "repa": 0.0, "kl": 0.0}
    if term is not None:
        losses["own"] = {"weight": 1.0, "class_path": f"{__name__}.{term.__name__}"}
    model = load_preset("demo")["model"]
    return RunConfig.from_mapping({"model": model, "data": {"image_size": 16}, "training": given, "losses": losses})


def test_a_slower_configuration_has_its_ratio_and_its_phases() -> None:
    slow = config_with(Sleeps, batch_size=4, accumulation_steps=2)
    plain, compared = measure_training({"demo": config_with(), "slow": slow}, CPU, 2)
    assert (plain["name"], plain["ratio"], compared["name"], compared["batch_size"]) == ("demo", None, "slow", 4)
    forward, backward, update = (compared["phases"][name].median for name in ("forward", "backward", "update"))
    assert forward >= 0.2
    assert backward >= 0.4
    assert update < forward < backward
    assert compared["seconds"].median >= 0.6
    rates = [figures["images_per_second"] for figures in (compared, plain)]
    assert rates[0].low / rates[1].high <= compared["ratio"].median <= rates[0].high / rates[1].low
    assert compared["flops"] == 2 * plain["flops"]
    assert compared["peak_memory_bytes"] is None
    assert plain["peak_memory_bytes"] > 2**20


def test_out_of_memory_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"^out of memory on cpu: worse with training\.batch_size 2; ") as caught:
        measure_training({"demo": config_with(), "worse": config_with(OutOfMemory)}, CPU, 1)
    assert "\n" not in str(caught.value)
