"""How fast the descents converge, against closed forms: every curvature h of a quadratic is a mode of its own.

With η the step size and μ the momentum a mode obeys x_{k+1} = (1 − ηh) ((1 + μ) x_k − μ x_{k−1}) in Nesterov's method
and x_{k+1} = (1 − ηh (1 + μ)) x_k + ηhμ x_{k−1} in its variant "eqm", from x_{−1} = x_0.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dc_ssdae.samplers import gradient_descent, nesterov

VARIANTS = ("standard", "eqm")
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_momentum = pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def companion(product: float, momentum: float, variant: str) -> Tensor:
    """A of (x_{k+1}, x_k) = A (x_k, x_{k−1}) for product = ηh."""
    if variant == "standard":
        first = [(1.0 - product) * (1.0 + momentum), -(1.0 - product) * momentum]
    else:
        first = [1.0 - product * (1.0 + momentum), product * momentum]
    return torch.tensor([first, [1.0, 0.0]], dtype=torch.float64)


def amplitude(product: float, momentum: float, variant: str, step: int) -> float:
    """x_step / x_0."""
    return torch.linalg.matrix_power(companion(product, momentum, variant), step)[0].sum().item()


def spectral_radius(product: float, momentum: float, variant: str) -> float:
    return torch.linalg.eigvals(companion(product, momentum, variant)).abs().max().item()


def limit(momentum: float, variant: str) -> float:
    """Of ηL, from which on the descent is unstable."""
    return 2.0 * (1.0 + momentum if variant == "standard" else 1.0) / (1.0 + 2.0 * momentum)


def path(method: Callable[..., object], slopes: Tensor, num_steps: int, step_size: float, **settings: object) -> Tensor:
    """All states (steps + 1, modes) of a descent of f = h x from 1 in every mode."""
    result = method(
        lambda x: slopes * x, torch.ones_like(slopes)[None], num_steps, step_size, return_trajectory=True, **settings
    )
    assert not result.diverged.any()
    return result.trajectory[:, 0]


@each_variant
@each_momentum
def test_nesterov_follows_the_power_of_its_companion_matrix(momentum: float, variant: str) -> None:
    products = [share * limit(momentum, variant) for share in (0.01, 0.2, 0.5, 0.8, 0.97)]
    slopes = torch.tensor(products, dtype=torch.float64)
    states = path(nesterov, slopes, 30, 1.0, momentum=momentum, variant=variant)
    expected = [[amplitude(product, momentum, variant, step) for product in products] for step in range(31)]
    torch.testing.assert_close(states, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-10)


@each_variant
def test_changing_momenta_follow_the_product_of_their_companion_matrices(variant: str) -> None:
    products = [0.02, 0.3, 0.7]
    momenta = [0.0, 0.5, 0.1, 0.3, 0.0, 0.8, 0.2]
    slopes = torch.tensor(products, dtype=torch.float64)
    states = path(nesterov, slopes, 7, 1.0, momentum=momenta, variant=variant)
    for mode, product in enumerate(products):
        pair = torch.ones(2, dtype=torch.float64)
        for step, momentum in enumerate(momenta):
            pair = companion(product, momentum, variant) @ pair
            assert states[step + 1, mode].item() == pytest.approx(pair[0].item(), rel=1e-12)


@each_variant
@each_momentum
@pytest.mark.parametrize("share", [0.97, 1.03])
def test_nesterov_is_stable_below_its_limit_and_given_up_above(momentum: float, variant: str, share: float) -> None:
    """ηL < 2 (1 + μ)/(1 + 2μ), for the variant 2/(1 + 2μ); above, as soon as theory has grown to 10 times the first."""
    product = share * limit(momentum, variant)
    radius = spectral_radius(product, momentum, variant)
    assert (radius < 1.0) == (share < 1.0)
    num_steps = math.ceil(math.log(100.0) / abs(math.log(radius)))
    states = [1.0, *(amplitude(product, momentum, variant, step) for step in range(num_steps))]
    looked_at = [abs((1.0 + momentum) * x - momentum * before) for before, x in itertools.pairwise(states)]
    start = double(2, 3)
    result = nesterov(lambda x: 4.0 * x, start, num_steps, product / 4.0, momentum, variant=variant)
    assert result.diverged.tolist() == [share > 1.0] * 2
    if share < 1.0:
        assert (result.sample.abs() < 0.05 * start.abs()).all()
        assert result.num_evaluations.tolist() == [num_steps] * 2
    else:
        grown = next(step for step, size in enumerate(looked_at) if size > 10.0)
        assert result.num_evaluations.tolist() == [grown + 1] * 2


@each_variant
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_without_momentum_nesterov_is_gradient_descent_bit_for_bit(variant: str, tolerance: float | None) -> None:
    start = torch.randn(5, 3, 7) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0])[:, None, None]

    def field(x: Tensor) -> Tensor:
        return 1.3 * x + 0.3 * x.sin()

    plain = gradient_descent(field, start, 12, 0.4, tolerance, return_trajectory=True)
    released = nesterov(field, start, 12, 0.4, 0.0, tolerance, variant=variant, return_trajectory=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, released, strict=True))
    moved = nesterov(field, start, 12, 0.4, 0.2, tolerance, variant=variant)
    assert not torch.equal(moved.sample, plain.sample)
