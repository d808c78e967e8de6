"""Descents against closed forms: every curvature h of a quadratic is a mode of its own.

With η the step size and μ the momentum a mode obeys x_{k+1} = (1 − ηh) ((1 + μ) x_k − μ x_{k−1}) in Nesterov's method
and x_{k+1} = (1 − ηh (1 + μ)) x_k + ηhμ x_{k−1} in its variant "eqm", from x_{−1} = x_0.
"""

import pytest
import torch
from torch import Tensor

from dc_ssdae.samplers import gradient_descent, nesterov


def by_hand(slope: float, step_sizes: list[float], momenta: list[float], variant: str) -> list[float]:
    """All states of a mode from 1."""
    states = [1.0, 1.0]
    for eta, mu in zip(step_sizes, momenta, strict=True):
        product = eta * slope
        if variant == "standard":
            of_last, of_one_before = (1.0 - product) * (1.0 + mu), -(1.0 - product) * mu
        else:
            of_last, of_one_before = 1.0 - product * (1.0 + mu), product * mu
        states.append(of_last * states[-1] + of_one_before * states[-2])
    return states[1:]


@pytest.mark.parametrize("variant", ["standard", "eqm"])
@pytest.mark.parametrize(
    ("step_sizes", "momenta"),
    [([1.0] * 30, [0.0] * 30), ([1.0] * 30, [0.9] * 30), ([1.0, 0.5, 2.0, 1.0, 0.1], [0.0, 0.5, 0.1, 0.8, 0.2])],
)
def test_nesterov_follows_the_recurrence(variant: str, step_sizes: list[float], momenta: list[float]) -> None:
    # Up to 97 % of the products of step size and curvature from which on it is unstable.
    limit = 2.0 * (1.0 + momenta[-1] if variant == "standard" else 1.0) / (1.0 + 2.0 * momenta[-1])
    slopes = [share * limit / max(step_sizes) for share in (0.01, 0.2, 0.5, 0.8, 0.97)]
    curvature = torch.tensor(slopes, dtype=torch.float64)

    def field(x: Tensor) -> Tensor:
        return curvature * x

    start, num_steps = torch.ones_like(curvature)[None], len(momenta)
    settings = {"momentum": momenta, "variant": variant, "return_trajectory": True}
    result = nesterov(field, start, num_steps, step_sizes.__getitem__, **settings)
    expected = torch.tensor([by_hand(slope, step_sizes, momenta, variant) for slope in slopes], dtype=torch.float64)
    torch.testing.assert_close(result.trajectory[:, 0].T, expected, atol=1e-12, rtol=1e-10)
    assert not result.diverged.any()
    if not any(momenta):
        assert torch.equal(gradient_descent(field, start, num_steps, step_sizes).sample, result.sample)
