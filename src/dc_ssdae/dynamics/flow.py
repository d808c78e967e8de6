"""Flow matching, the baseline: a velocity along straight lines between data and noise (SPEC section 2).

Lipman et al. 2023, "Flow matching for generative modeling"; the logit-normal times of Esser et al. 2024.
"""

import torch
from torch import Tensor

from dc_ssdae.dynamics.corruption import Corruption, check_same_shape, draw_on, expand_level


class FlowMatching:
    """x_t = (1 − t) x + t ε; the network is told t and learns v = x − ε (SPEC section 2)."""

    conditions_on_time = True
    noise_level = 1.0

    def sample_level(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw t = sigmoid(N(0, 1)): (B,) float32 on `device`."""
        return torch.randn(batch_size, generator=generator, device=draw_on(device, generator)).sigmoid().to(device)

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        """Mix image and noise; the target is x − ε.

        Args:
            x: (B, …) images in [-1, 1].
            noise: ε ~ N(0, I), of x's shape.
            level: t in [0, 1], (B,); 1 is pure noise.

        Raises:
            InputError: the shapes do not fit together.
        """
        check_same_shape(x, noise, "noise")
        time = expand_level(level, x)
        return Corruption(x, noise, level, (1.0 - time) * x + time * noise, x - noise)

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """x̂ = x_t + t v, exact for the true velocity at every t."""
        check_same_shape(x_level, prediction, "prediction")
        return x_level + expand_level(level, x_level) * prediction

    def loss(self, record: Corruption, prediction: Tensor) -> Tensor:
        """Mean squared error of the velocity, per image: (B,) float32."""
        check_same_shape(record.target, prediction, "prediction")
        return (prediction.float() - record.target.float()).square().flatten(1).mean(dim=1)
