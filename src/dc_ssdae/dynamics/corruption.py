"""What every dynamics shares: the record of a corrupted image, and the interface that loop and losses rely on."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dc_ssdae.errors import InputError

PREDICTIONS = ("field", "image")
"""What the answer of a network may be: the field (flow matching's velocity), or an estimate of the image."""


class Corruption(NamedTuple):
    """An image corrupted to a level, and what the network should answer; all of x's shape but `level`, (B,)."""

    x: Tensor
    noise: Tensor
    level: Tensor
    x_level: Tensor
    target: Tensor


class Dynamics(Protocol):
    """How an image is corrupted, what the network learns from it, and how its answer gives the image back.

    Two more methods are optional. `predict(network, x)` gives the prediction that the methods below take, from a
    function `network` of x (B, …); where it is None, or missing, the network's answer is the prediction.
    `field_of(x_level, prediction, level)` gives what samplers follow, where it is not simply the prediction.
    """

    conditions_on_time: bool
    """Whether the network is told the level."""

    noise_level: float
    """The level of pure noise, from which a decode starts."""

    def sample_level(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw training levels: (B,) float32 in [0, 1]."""

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        """Corrupt x (B, …) with noise of x's shape to level (B,) and give the network's target."""

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """Estimate the clean image, of x_level's shape, from the network's prediction."""

    def loss(self, record: Corruption, prediction: Tensor) -> Tensor:
        """L_dynamics of each image: (B,) float32."""


def predict(dynamics: Dynamics, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The prediction of any dynamics at x (B, …): its own `predict` of the network, where it has one, or the answer."""
    own = getattr(dynamics, "predict", None)
    return network(x) if own is None else own(network, x)


def field_of(dynamics: Dynamics, x_level: Tensor, prediction: Tensor, level: Tensor | None) -> Tensor:
    """The field of any dynamics at x_level (B, …): its own `field_of`, where it has one, or the prediction itself.

    `level` (B,) is None for a dynamics that does not condition on it.
    """
    own = getattr(dynamics, "field_of", None)
    return prediction if own is None else own(x_level, prediction, level)


def expand_level(level: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) levels so that they broadcast against (B, …).

    Raises:
        InputError: level is not one number per image.
    """
    if level.shape != like.shape[:1]:
        raise InputError(f"level has shape {tuple(level.shape)}; one number per image is ({like.shape[0]},)")
    return level.view(-1, *[1] * (like.ndim - 1))


def check_same_shape(x: Tensor, other: Tensor, name: str) -> None:
    """Refuse a tensor that is not of x's shape.

    Raises:
        InputError: names the tensor and both shapes.
    """
    if other.shape != x.shape:
        raise InputError(f"{name} has shape {tuple(other.shape)}, not the image's {tuple(x.shape)}")


def draw_on(device: torch.device | str, generator: torch.Generator | None) -> torch.device:
    """Where to draw random numbers: on the generator's device where there is one, else on the wanted device."""
    return torch.device(device) if generator is None else generator.device
