"""Flow matching, the baseline: a velocity along straight lines between data and noise.

Lipman et al. 2023, "Flow matching for generative modeling"; the logit-normal times of Esser et al. 2024.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dc_ssdae.dynamics.corruption import PREDICTIONS, Corruption, check_same_shape, draw_on, expand_level
from dc_ssdae.errors import check_names

SMALLEST_TRAINING_TIME = 0.05
"""Below it the loss of prediction "image" weighs no more: a velocity's error is the image's, divided by t."""

SMALLEST_TIME = 1e-12
"""Of a velocity from a prediction of the image: at t = 0 the two say nothing of each other."""


class FlowMatching:
    """x_t = (1 − t) x + t ε; the network is told t and learns v = x − ε.

    Args:
        prediction: what the network's answer is: "field", the velocity v; or "image", an estimate D of x, from which
            v = (D − x_t)/t follows (Li & He 2025, "Back to basics: let denoising generative models denoise").

    Raises:
        InputError: the prediction is unknown.
    """

    conditions_on_time = True
    noise_level = 1.0

    def __init__(self, prediction: str = "field") -> None:
        check_names("prediction", [prediction], PREDICTIONS)
        self.prediction = prediction

    def field_of(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """The velocity at x_t (B, …), t being `level` (B,): the prediction, or (D − x_t)/t where that is the image."""
        if self.prediction == "field":
            return prediction
        return (prediction - x_level) / expand_level(level, x_level).clamp(min=SMALLEST_TIME)

    def field(self, network: Callable[[Tensor], Tensor], x: Tensor, level: Tensor) -> Tensor:
        """The velocity at x (B, …), at times (B,), of a network, whatever its answer stands for."""
        return self.field_of(x, network(x), level)

    def sample_level(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw t = sigmoid(N(0, 1)): (B,) float32 on `device`."""
        return torch.randn(batch_size, generator=generator, device=draw_on(device, generator)).sigmoid().to(device)

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        """Mix image and noise; the target is x − ε, or x for prediction "image".

        Args:
            x: (B, …) images in [-1, 1].
            noise: ε ~ N(0, I), of x's shape.
            level: t in [0, 1], (B,); 1 is pure noise.

        Raises:
            InputError: the shapes do not fit together.
        """
        check_same_shape(x, noise, "noise")
        time = expand_level(level, x)
        target = x if self.prediction == "image" else x - noise
        return Corruption(x, noise, level, (1.0 - time) * x + time * noise, target)

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """x̂ = x_t + t v, exact for the true velocity at every t; or the prediction, where that is the image."""
        check_same_shape(x_level, prediction, "prediction")
        if self.prediction == "image":
            return prediction
        return x_level + expand_level(level, x_level) * prediction

    def loss(self, record: Corruption, prediction: Tensor) -> Tensor:
        """Mean squared error of the velocity, per image: (B,) float32; of the image it is divided by max(t, 0.05)²."""
        check_same_shape(record.target, prediction, "prediction")
        loss = (prediction.float() - record.target.float()).square().flatten(1).mean(dim=1)
        if self.prediction == "image":
            loss = loss / record.level.float().clamp(min=SMALLEST_TRAINING_TIME).square()
        return loss
