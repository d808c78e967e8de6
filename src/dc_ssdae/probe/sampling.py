"""Latents drawn from a probe: by Euler's method for flow matching, by descents for equilibrium matching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.dynamics.corruption import field_of
from dc_ssdae.probe.step import FieldStep
from dc_ssdae.randomness import named_generator
from dc_ssdae.samplers import SamplerResult, euler, nesterov

TRAVEL = 3.0
"""Total length of a descent in units of 1/λ: that of equilibrium matching's authors, 250 steps of 0.003 with λ = 4.

Up to the decay's kink the field has the size λ‖ε − x‖, so that a length of 1 carries noise to the data; the rest lets a
sample settle.
"""

MOMENTUM = 0.3
"""Of Nesterov's method; that of equilibrium matching's authors (Wang & Du 2025)."""

TOLERANCE = 0.25
"""Root mean square of the field, for λ = 1, below which adaptive stopping ends a descent."""


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn.

    Args:
        sampler: "euler" (flow matching); "gradient_descent", "nesterov" or "adaptive" (equilibrium matching): gradient
            descent that stops each latent where its field is below `TOLERANCE`.
        num_steps: steps; the most per latent for "adaptive".
        guidance: w of classifier-free guidance f + (w - 1) (f - f without class); 1 leaves it out.
    """

    sampler: str
    num_steps: int
    guidance: float = 1.0

    @property
    def title(self) -> str:
        """The sampler in words."""
        return {"euler": "Euler", "adaptive": "adaptive stopping"}.get(self.sampler, self.sampler.replace("_", " "))


def samplings(step: FieldStep, num_steps: Sequence[int], guidance: float) -> list[Sampling]:
    """The samplers that a probe's dynamics has, with each number of steps; the first is what its samples come from."""
    counts = sorted(num_steps, reverse=True)
    if not isinstance(step.dynamics, EquilibriumMatching):
        return [Sampling("euler", steps, guidance) for steps in counts]
    found = [Sampling(name, steps, guidance) for name in ("gradient_descent", "nesterov") for steps in counts]
    return [*found, Sampling("adaptive", counts[0], guidance)]


def starting_latents(shape: tuple[int, ...], places: range, seed: int) -> Tensor:
    """Noise (B, c, h, w), each from its own place and the seed, however many are drawn together."""
    noise = [torch.randn(shape, generator=named_generator(seed, f"sample {place}")) for place in places]
    return torch.stack(noise)


@torch.no_grad()
def draw_latents(step: FieldStep, x: Tensor, labels: Tensor, sampling: Sampling) -> SamplerResult:
    """Draw latents from noise.

    Args:
        step: in evaluation mode, with the weights to sample from.
        x: (B, c, h, w), standard normal.
        labels: int64 (B,); -1 for no class.
        sampling: how.

    Returns:
        The sampler's result; `sample` is normalised as the training's latents are.
    """

    def field(x: Tensor, level: Tensor | None, labels: Tensor) -> Tensor:
        time = torch.zeros(len(x), device=x.device) if level is None else level
        value = field_of(step.dynamics, x, step.predict(x, time, labels).float(), time)
        if sampling.guidance == 1.0:
            return value
        plain = field_of(step.dynamics, x, step.predict(x, time, torch.full_like(labels, -1)).float(), time)
        return plain + sampling.guidance * (value - plain)

    if sampling.sampler == "euler":
        return euler(partial(field, labels=labels), x, sampling.num_steps, power=1.0)
    steps, dynamics = sampling.num_steps, step.dynamics
    assert isinstance(dynamics, EquilibriumMatching)
    momentum = MOMENTUM if sampling.sampler == "nesterov" else 0.0
    # Momentum lengthens every step by 1/(1 - μ). Steps above 1/L would leap over the data.
    length = (1.0 - momentum) * TRAVEL / (steps * dynamics.gradient_scale)
    size = min(length, 1.0 / dynamics.stiffness)

    def descend(x: Tensor, labels: Tensor) -> Tensor:
        return field(x, None, labels)

    tolerance = TOLERANCE * dynamics.gradient_scale if sampling.sampler == "adaptive" else None
    return nesterov(descend, x, steps, size, momentum, tolerance, condition=labels)


def batches(count: int, size: int) -> Iterator[range]:
    """The places of `count` things, at most `size` at a time."""
    return (range(first, min(count, first + size)) for first in range(0, count, size))
