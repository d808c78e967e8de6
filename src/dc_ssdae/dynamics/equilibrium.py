"""Equilibrium matching: a time-invariant gradient field whose zeros are the data.

Wang & Du 2025, "Equilibrium matching: generative modeling with implicit energy-based models".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dc_ssdae.dynamics.corruption import PREDICTIONS, Corruption, check_same_shape, draw_on, expand_level, predict
from dc_ssdae.dynamics.energy import ENERGIES, energy_gradient
from dc_ssdae.errors import InputError, check_at_least, check_names
from dc_ssdae.settings import check_value


@dataclass(frozen=True)
class LinearDecay:
    """c(γ) = 1 − γ: the EqM paper's.

    A decay is the field's magnitude along the way from noise (γ = 0) to data (γ = 1), where it vanishes.
    """

    stiffness: float = 1.0
    """L of f ≈ L (x − x*) near the data, for λ = 1: minus the slope of c at γ = 1."""

    def __call__(self, level: Tensor) -> Tensor:
        """c(γ)."""
        return 1.0 - level

    def distance_ratio(self, level: Tensor) -> Tensor:
        """(1 − γ)/c(γ), with its finite limit at γ = 1."""
        return torch.ones_like(level)


@dataclass(frozen=True)
class PiecewiseDecay:
    """c(γ) = b − (b − 1) γ/a up to the kink a, then (1 − γ)/(1 − a); with b = 1 it is the truncated decay."""

    kink: float = 0.8
    start: float = 1.4

    def __post_init__(self) -> None:
        check_value("decay_kink", self.kink, float, {"above": 0.0, "below": 1.0})
        check_value("decay_start", self.start, float, {"above": 0.0})

    @property
    def stiffness(self) -> float:
        return 1.0 / (1.0 - self.kink)

    def _before_kink(self, level: Tensor) -> Tensor:
        return self.start - (self.start - 1.0) * level / self.kink

    def __call__(self, level: Tensor) -> Tensor:
        return torch.where(level <= self.kink, self._before_kink(level), (1.0 - level) / (1.0 - self.kink))

    def distance_ratio(self, level: Tensor) -> Tensor:
        # Beyond the kink the ratio is constant, so that 0/0 never arises; the clamp keeps the other branch finite.
        before = (1.0 - level) / self._before_kink(level.clamp(max=self.kink))
        return torch.where(level <= self.kink, before, torch.full_like(level, 1.0 - self.kink))


LANDED_DESCENT = 1.5
"""How far to descend after the first step has landed, in units of 1/L."""

DECAYS: Mapping[str, Mapping[str, float]] = {
    "linear": {},
    "truncated": {"decay_kink": 0.8},
    "piecewise": {"decay_kink": 0.8, "decay_start": 1.4},
}
"""Settings of each decay, and their defaults."""


def make_decay(name: str, kink: float | None = None, start: float | None = None) -> LinearDecay | PiecewiseDecay:
    """Build a decay by name.

    Args:
        name: "linear", "truncated" or "piecewise".
        kink: a of the truncated and piecewise decays, in (0, 1); 0.8 where None.
        start: b of the piecewise decay, c(0); 1.4 where None.

    Raises:
        InputError: the name is unknown, or a value is given that this decay does not have.
    """
    check_names("decay", [name], DECAYS)
    given = {key: value for key, value in (("decay_kink", kink), ("decay_start", start)) if value is not None}
    check_names(f"setting of the {name} decay", given, DECAYS[name])
    settings = {"decay_start": 1.0, **DECAYS[name], **given}
    return LinearDecay() if name == "linear" else PiecewiseDecay(settings["decay_kink"], settings["decay_start"])


class EquilibriumMatching:
    """x_γ = γ x + (1 − γ) ε; the network learns f = λ c(γ) (ε − x) without being told γ.

    f points uphill, from data to noise: descending it reaches the data.

    Args:
        decay: c(γ): "linear", "truncated" or "piecewise".
        gradient_scale: λ > 0.
        decay_kink: a of the truncated and piecewise decays.
        decay_start: b of the piecewise decay.
        explicit_energy: None, and the network's answer is the field; or "dot" or "l2", and the field is the gradient
            of the energy ⟨x, f(x)⟩ or ½‖f(x)‖² of its answer.
        prediction: what the network's answer is: "field", or "image", an estimate D of x, and the field follows from
            it: f = λ (x_γ − D), exact for the linear decay, because (1 − γ)(ε − x) = x_γ − x. A network that answers
            the image need not carry the noise to its output. For the linear decay without an explicit energy.
        pure_noise: share of the images, from 0 to below 1, that training shows at γ = 0, where a decode of one step
            takes place; the others' γ stays uniform.

    Raises:
        InputError: a setting is unknown or out of range, or prediction "image" does not fit the others.
    """

    conditions_on_time = False
    noise_level = 0.0

    def __init__(
        self,
        decay: str = "linear",
        gradient_scale: float = 1.0,
        decay_kink: float | None = None,
        decay_start: float | None = None,
        explicit_energy: str | None = None,
        prediction: str = "field",
        pure_noise: float = 0.0,
    ) -> None:
        check_names("explicit_energy", [explicit_energy] if explicit_energy is not None else [], ENERGIES)
        check_names("prediction", [prediction], PREDICTIONS)
        self.decay = make_decay(decay, decay_kink, decay_start)
        self.gradient_scale = check_value("gradient_scale", gradient_scale, float, {"above": 0.0})
        self.explicit_energy = explicit_energy
        self.pure_noise = check_value("pure_noise", pure_noise, float, {"at_least": 0.0, "below": 1.0})
        self.prediction = prediction
        # The network, which is not told the level, cannot make any other field of the image.
        if prediction == "image" and (decay != "linear" or explicit_energy is not None):
            raise InputError("prediction 'image' is for the linear decay without an explicit_energy")

    @property
    def predict(self) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None:
        """Gives the gradient of the explicit energy of a network at x (B, …); None where there is no such energy."""
        return None if self.explicit_energy is None else partial(energy_gradient, energy=ENERGIES[self.explicit_energy])

    def field_of(self, x_level: Tensor, prediction: Tensor, level: Tensor | None = None) -> Tensor:
        """The field at x_γ (B, …): the prediction, or λ (x_γ − D) where that is the image; no level is needed."""
        return self.gradient_scale * (x_level - prediction) if self.prediction == "image" else prediction

    def field(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The field at x (B, …) of a network, whatever its answer stands for."""
        return self.field_of(x, predict(self, network, x))

    def energy(self, x: Tensor, answer: Tensor) -> Tensor:
        """The explicit energy of x (B, …) and the network's answer there: (B,), of at least float32.

        Raises:
            InputError: there is none.
        """
        if self.explicit_energy is None:
            names = " or ".join(map(repr, ENERGIES))
            raise InputError(f"this field has no explicit energy; train one with explicit_energy {names}")
        check_same_shape(x, answer, "answer")
        return ENERGIES[self.explicit_energy](x, answer)

    @property
    def stiffness(self) -> float:
        """L of f ≈ L (x − x*) near the data: λ for the linear decay, λ/(1 − a) for the others.

        Gradient descent is stable for step sizes below 2/L, Nesterov's below 2 (1 + μ)/((1 + 2 μ) L), and its
        variant of EqM's authors below 2/((1 + 2 μ) L).
        """
        return self.gradient_scale * self.decay.stiffness

    def step_sizes(self, num_steps: int, start_level: float = 0.0, descent: float = LANDED_DESCENT) -> list[float]:
        """Step sizes of a descent that begins at a known level.

        The first is (1 − γ_0)/(λ c(γ_0)), with which the true field of one image lands on it: from noise 1/(λ c(0)),
        for the linear decay 1/λ from anywhere. The others share a way of `descent`/L, L the field's slope near the
        data, in steps of at most 1/L: a learned field's zeros are not quite the images, and descending for ever gives
        worse ones. (Our own; the default was measured, docs/results.md.)

        Args:
            num_steps: at least 1.
            start_level: γ_0 in [0, 1], of the state that the descent starts from; 0 is pure noise.
            descent: sum of the step sizes after the first, in units of 1/L, above 0.

        Raises:
            InputError: a value is out of range.
        """
        check_at_least(1, num_steps=num_steps)
        # Plain comparisons, which torch.compile can follow.
        if not (0.0 <= start_level <= 1.0 and 0.0 < descent < math.inf):
            raise InputError(f"start_level is {start_level} and descent {descent}; they must be in [0, 1] and positive")
        landing = float(self.decay.distance_ratio(torch.tensor(start_level, dtype=torch.float64))) / self.gradient_scale
        others = num_steps - 1
        return [landing, *[min(1.0, descent / max(others, 1)) / self.stiffness] * others]

    def sample_level(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw γ ~ U[0, 1], or 0 for the share `pure_noise`: (B,) float32 on `device`."""
        uniform = torch.rand(batch_size, generator=generator, device=draw_on(device, generator)).to(device)
        return ((uniform - self.pure_noise) / (1.0 - self.pure_noise)).clamp(min=0.0)

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        """Mix image and noise; the target is λ c(γ) (ε − x), or x for prediction "image".

        Args:
            x: (B, …) images in [-1, 1].
            noise: ε ~ N(0, I), of x's shape.
            level: γ in [0, 1], (B,).

        Raises:
            InputError: the shapes do not fit together.
        """
        check_same_shape(x, noise, "noise")
        gamma = expand_level(level, x)
        x_level = gamma * x + (1.0 - gamma) * noise
        target = x if self.prediction == "image" else self.gradient_scale * self.decay(gamma) * (noise - x)
        return Corruption(x, noise, level, x_level, target)

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """x̂ = x_γ − (1 − γ) f / (λ c(γ)), exact for the true field at every γ, also at 1.

        The EqM paper prints a plus sign, which its own definition of the target contradicts. A prediction of the image
        is the estimate already.
        """
        check_same_shape(x_level, prediction, "prediction")
        if self.prediction == "image":
            return prediction
        ratio = self.decay.distance_ratio(expand_level(level, x_level))
        return x_level - ratio / self.gradient_scale * prediction

    def loss(self, record: Corruption, prediction: Tensor) -> Tensor:
        """Mean squared error of the field divided by λ², per image: (B,) float32.

        With the linear decay it is exactly the mean square of x̂ − x.
        """
        check_same_shape(record.target, prediction, "prediction")
        error = prediction.float() - record.target.float()
        if self.prediction == "field":
            error = error / self.gradient_scale
        return error.square().flatten(1).mean(dim=1)
