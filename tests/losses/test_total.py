"""The weighted sum of loss terms and what each term is."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.dynamics import Corruption, Dynamics, EquilibriumMatching, FlowMatching
from dc_ssdae.losses import Losses, LossWeights, kl_loss, total_loss


def posterior(batch: int = 3) -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(batch, 4, 2, 3, requires_grad=True), torch.randn(batch, 4, 2, 3))


def record(dynamics: Dynamics, batch: int = 3) -> Corruption:
    x = 2.0 * torch.rand(batch, 3, 8, 8) - 1.0
    return dynamics.corrupt(x, torch.randn_like(x), dynamics.sample_level(batch))


def losses(
    weights: LossWeights, dynamics: Dynamics | None = None
) -> tuple[Losses, Corruption, Tensor, DiagonalGaussian]:
    dynamics = dynamics or EquilibriumMatching()
    corrupted, latent = record(dynamics), posterior()
    prediction = torch.randn(3, 3, 8, 8, requires_grad=True)
    return total_loss(dynamics, corrupted, prediction, latent, weights), corrupted, prediction, latent


def test_default_weights_are_the_specifications() -> None:
    assert LossWeights() == LossWeights(dynamics=1.0, kl=1e-6)


@pytest.mark.parametrize("dynamics", [EquilibriumMatching("truncated", 4.0), FlowMatching()], ids=["eqm", "fm"])
def test_terms_are_unweighted_and_the_total_is_their_weighted_sum(dynamics: Dynamics) -> None:
    weights = LossWeights(dynamics=0.7, kl=0.03)
    result, corrupted, prediction, latent = losses(weights, dynamics)
    assert set(result.terms) == {"dynamics", "kl"}
    scale = 4.0 if isinstance(dynamics, EquilibriumMatching) else 1.0
    error = (prediction - corrupted.target) / scale
    torch.testing.assert_close(result.terms["dynamics"], error.square().mean())
    torch.testing.assert_close(result.terms["kl"], latent.kl().mean())
    torch.testing.assert_close(result.total, 0.7 * result.terms["dynamics"] + 0.03 * result.terms["kl"])


def test_everything_is_a_finite_float32_scalar_with_gradients() -> None:
    result, _, prediction, latent = losses(LossWeights())
    for value in (result.total, *result.terms.values()):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
    result.total.backward()
    assert prediction.grad is not None
    assert prediction.grad.any()
    assert latent.mean.grad is not None
    assert latent.mean.grad.any()


def test_half_precision_predictions_are_summed_in_float32() -> None:
    dynamics = EquilibriumMatching()
    result = total_loss(dynamics, record(dynamics), torch.randn(3, 3, 8, 8).bfloat16(), posterior(), LossWeights())
    assert result.total.dtype == torch.float32


def test_kl_is_summed_over_the_latent_and_averaged_over_the_batch() -> None:
    latent = posterior(5)
    each = kl_divergence(Normal(latent.mean, (0.5 * latent.logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss(latent), each.sum() / 5)


@pytest.mark.parametrize(("weights", "left"), [(LossWeights(kl=0.0), "dynamics"), (LossWeights(dynamics=0.0), "kl")])
def test_a_zero_weight_leaves_its_term_out(weights: LossWeights, left: str) -> None:
    result, *_ = losses(weights)
    assert list(result.terms) == [left]
    torch.testing.assert_close(result.total, getattr(weights, left) * result.terms[left])


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="every loss weight is 0"):
        losses(LossWeights(dynamics=0.0, kl=0.0))


@pytest.mark.parametrize("name", ["dynamics", "kl"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_weights_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"loss weight {name} is {value}"):
        LossWeights(**{name: value})


def test_a_prediction_of_another_shape_is_refused() -> None:
    dynamics = EquilibriumMatching()
    with pytest.raises(InputError, match="prediction has shape"):
        total_loss(dynamics, record(dynamics), torch.zeros(3, 3, 8, 4), posterior(), LossWeights())
