"""Settings of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from dc_ssdae.errors import InputError, check_type, unknown_name
from dc_ssdae.losses import LossWeights

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the loop; a preset's `training` section states what differs from these defaults.

    image_size: side of the training crops in pixels.
    crop_scale: (low, high), the crop's side as a share of the photo's shorter side.
    batch_size: images a step.
    steps: optimiser steps; None where the clock decides.
    minutes: training time in minutes; None where the steps decide. Exactly one of the two is given.
    lr: peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0.
    warmup: share of the budget that the warm-up takes.
    weight_decay: of AdamW.
    gradient_clip: largest norm of the whole gradient.
    precision: "float32", or "bfloat16" for autocast around the networks; losses and weights stay float32.
    seed: of everything random in the run.
    loss_weights: of the objective's terms.
    """

    image_size: int = 256
    crop_scale: tuple[float, float] = (0.5, 1.0)
    batch_size: int = 16
    steps: int | None = None
    minutes: float | None = None
    lr: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 1e-3
    gradient_clip: float = 1.0
    precision: str = "float32"
    seed: int = 0
    loss_weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            check_type(f"training.{entry.name}", getattr(self, entry.name), hints[entry.name])
        if (self.steps is None) == (self.minutes is None):
            raise InputError("give training.steps or training.minutes, one of the two")
        for name in ("image_size", "batch_size", "steps", "minutes", "lr", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"training.{name} is {value}; it must be positive")
        if self.precision not in PRECISIONS:
            raise unknown_name("training precision", self.precision, PRECISIONS)
        if not 0.0 < self.crop_scale[0] <= self.crop_scale[1] <= 1.0:
            raise InputError(f"training.crop_scale is {self.crop_scale}; it is (low, high) with 0 < low <= high <= 1")
        if self.seed < 0:
            raise InputError(f"training.seed is {self.seed}; it must be 0 or more")
        if not 0.0 <= self.warmup < 1.0:
            raise InputError(f"training.warmup is {self.warmup}; it is a share of the budget, from 0 to below 1")
        if self.weight_decay < 0.0:
            raise InputError(f"training.weight_decay is {self.weight_decay}; it must be 0 or more")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "TrainingConfig":
        """Build from plain data, as a YAML file gives it.

        Raises:
            InputError: a setting is unknown or out of range.
        """
        names = [entry.name for entry in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown_name("training setting", name, names)
        values = dict(settings)
        if isinstance(values.get("crop_scale"), list):
            values["crop_scale"] = tuple(values["crop_scale"])
        if isinstance(values.get("loss_weights"), Mapping):
            weights = values["loss_weights"]
            accepted = [entry.name for entry in fields(LossWeights)]
            for name in weights:
                if name not in accepted:
                    raise unknown_name("loss weight", name, accepted)
            values["loss_weights"] = LossWeights(**weights)
        return cls(**values)
