"""The diagonal Gaussian against torch.distributions, noise that does not depend on the batch, and statistics."""

import itertools
import math

import pytest
import torch
from tiny_models import refusal
from torch.distributions import Normal, kl_divergence

from dc_ssdae import DiagonalGaussian
from dc_ssdae.latent import LatentMoments, LatentStatistics, draw_noise


def test_kl_is_float32_for_half_precision_and_under_autocast() -> None:
    mean, logvar = torch.randn(2, 64, 4, 4).bfloat16(), torch.randn(2, 64, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        kl = DiagonalGaussian(mean, logvar).kl()
    assert kl.dtype == torch.float32
    expected = kl_divergence(Normal(mean.double(), (0.5 * logvar.double()).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl.double(), expected.flatten(1).sum(dim=1), atol=0.0, rtol=1e-5)


def test_logvar_is_clamped() -> None:
    logvar = torch.tensor([-1e9, -30.0, 0.0, 20.0, 1e9]).view(1, 5, 1, 1)
    posterior = DiagonalGaussian(torch.zeros_like(logvar), logvar)
    assert posterior.logvar.flatten().tolist() == [-30.0, -30.0, 0.0, 20.0, 20.0]
    largest = 0.5 * (math.exp(20.0) - 21.0)
    smallest = 0.5 * (math.exp(-30.0) + 29.0)
    torch.testing.assert_close(posterior.kl(), torch.tensor([2.0 * largest + 2.0 * smallest]))


def test_a_bound_for_training_is_exact_and_lets_gradients_bring_back_what_is_above() -> None:
    logvar = torch.tensor([-40.0, -3.0, 1.9, 7.0, 50.0]).view(1, 5, 1, 1).requires_grad_()
    posterior = DiagonalGaussian(torch.zeros(1, 5, 1, 1), logvar).bounded(2.0)
    assert posterior.logvar.flatten().tolist() == [-30.0, -3.0, torch.tensor(1.9).item(), 2.0, 2.0]
    posterior.kl().sum().backward()
    # ½ (e^v − 1) at the value that is computed with.
    expected = [0.5 * (math.exp(v) - 1.0) for v in (-30.0, -3.0, 1.9, 2.0, 2.0)]
    torch.testing.assert_close(logvar.grad.flatten(), torch.tensor(expected))
    assert DiagonalGaussian(logvar).bounded().logvar is None


def test_moments_are_mean_then_logvar_and_a_point_is_its_own_sample_without_kl() -> None:
    moments = torch.randn(2, 6, 3, 4)
    posterior, point = DiagonalGaussian.from_moments(moments), DiagonalGaussian(moments)
    assert torch.equal(torch.cat([posterior.mode(), posterior.logvar], dim=1), moments)
    assert torch.equal(point.sample(), moments)
    assert torch.equal(point.kl(), torch.zeros(2))
    assert point.logvar is None


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_depends_on_neither_the_batch_nor_its_size() -> None:
    together, generator = draw_noise((4, 3, 5, 7), seeded(5)), seeded(5)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([draw_noise((1, 3, 5, 7), generator) for _ in range(4)]))
    assert not torch.equal(together[0], together[1])
    noise = draw_noise((3, 2, 4), [seeded(seed) for seed in (7, 8, 7)])
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1:2], draw_noise((1, 2, 4), seeded(8)))
    assert "1 generator for 2 images" in refusal(draw_noise, (2, 3), [seeded(7)])


def test_sample_takes_noise_and_keeps_its_precision_beside_a_half_precision_mean() -> None:
    mean, logvar, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), draw_noise((2, 3, 4, 5), seeded(3))
    posterior = DiagonalGaussian(mean, logvar)
    sample = posterior.sample(noise=noise)
    torch.testing.assert_close(sample, mean + (0.5 * logvar).exp() * noise, atol=1e-6, rtol=0.0)
    assert torch.equal(sample, posterior.sample(seeded(3)))
    zeros = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    assert torch.equal(DiagonalGaussian(zeros, zeros).sample(noise=noise), noise.bfloat16())


def test_tensors_that_do_not_fit_are_refused() -> None:
    mean = torch.zeros(2, 3, 4, 5)
    assert "(2, 3, 4, 5) and (1, 3, 4, 5)" in refusal(DiagonalGaussian, mean, mean[:1])
    for posterior in (DiagonalGaussian(mean, mean), DiagonalGaussian(mean)):
        assert "of shape (2, 3, 4, 5)" in refusal(posterior.sample, noise=mean[:1])
        assert "not both" in refusal(posterior.sample, torch.Generator(), noise=mean)


def gaussians(batch: int = 12, channels: int = 3, mean: float = 0.0) -> DiagonalGaussian:
    """Gaussians in float64 with another mean and spread in each channel."""
    scale = torch.arange(1, channels + 1, dtype=torch.float64).view(1, -1, 1, 1)
    mu = mean + scale * (1.0 + torch.randn(batch, channels, 4, 4, dtype=torch.float64))
    return DiagonalGaussian(mu, (0.5 * scale).square().log() + 0.3 * torch.randn_like(mu))


def part(posterior: DiagonalGaussian, which: slice) -> DiagonalGaussian:
    return DiagonalGaussian(posterior.mean[which], None if posterior.logvar is None else posterior.logvar[which])


def measured(*posteriors: DiagonalGaussian) -> LatentMoments:
    moments = LatentMoments(posteriors[0].mean.shape[1])
    for posterior in posteriors:
        moments.add(posterior)
    return moments


def assert_same(one: LatentStatistics, other: LatentStatistics) -> None:
    assert one.count == other.count
    for mine, theirs in ((one.mean, other.mean), (one.std, other.std)):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-12, rtol=1e-12)


class TestStatistics:
    def test_closed_form(self) -> None:
        """Means -1 and 1 in half of the places each, and a variance of 3: in all a variance of 1 + 3."""
        mean = torch.tensor([-1.0, 1.0]).repeat(8).view(2, 1, 2, 4) + torch.tensor([0.0, 10.0]).view(1, 2, 1, 1)
        statistics = measured(DiagonalGaussian(mean, torch.full_like(mean, math.log(3.0)))).statistics()
        assert statistics.mean == pytest.approx([0.0, 10.0], abs=1e-12)
        assert statistics.std == pytest.approx([2.0, 2.0], rel=1e-6)
        assert statistics.settings()["shift_factor"] == pytest.approx(5.0)
        assert statistics.settings()["scaling_factor"] == pytest.approx(1.0 / math.sqrt(4.0 + 25.0), rel=1e-6)

    def test_a_large_mean_costs_no_digits_and_what_never_changes_has_no_spread_at_all(self) -> None:
        """With sums of squares, 10^8 a value, nothing would be left of a variance of 10^-12."""
        mu = 1e4 + 1e-6 * torch.randn(20, 3, 5, 5, dtype=torch.float64)
        mu[:, 2] = 12345.1
        statistics = measured(*(DiagonalGaussian(mu[start : start + 3]) for start in range(0, 20, 3))).statistics()
        expected = (mu - 1e4).std(dim=(0, 2, 3), correction=0).tolist()
        assert statistics.std[:2] == pytest.approx(expected[:2], rel=1e-5)
        assert statistics.std[2] == 0.0
        assert statistics.mean == pytest.approx([1e4, 1e4, 12345.1], rel=1e-6)
        assert math.isfinite(statistics.settings()["scaling_factor"])

    def test_depend_on_neither_batches_nor_processes_nor_their_order(self) -> None:
        """Also of a process without an image."""
        posterior = gaussians(mean=1e4)
        whole = measured(posterior).statistics()
        pieces = [part(posterior, slice(start, start + 5)) for start in (0, 5, 10, 15)]
        assert_same(measured(*pieces).statistics(), whole)
        for order in itertools.permutations(map(measured, pieces)):
            total = LatentMoments(3)
            for piece in order:
                total.merge(piece)
            assert_same(total.statistics(), whole)
            states = torch.stack([piece.state() for piece in order])
            assert_same(LatentMoments.from_states(states).statistics(), whole)

    def test_what_weighs_nothing_is_left_out_whatever_it_is(self) -> None:
        posterior = gaussians(batch=4)
        posterior.mean[1] = float("nan")
        moments = LatentMoments(3)
        moments.add(posterior, torch.tensor([1, 0, 1, 0]))
        moments.add(posterior, torch.zeros(4))
        assert_same(moments.statistics(), measured(part(posterior, slice(0, None, 2))).statistics())

    @pytest.mark.parametrize(("where", "value"), [("mean", math.nan), ("mean", -math.inf), ("logvar", math.nan)])
    def test_what_is_not_finite_is_refused(self, where: str, value: float) -> None:
        posterior = gaussians()
        getattr(posterior, where)[3, 1, 0, 0] = value
        moments = measured(part(posterior, slice(0, 2)), posterior)
        assert "not finite" in refusal(LatentMoments.from_states(moments.state()[None]).statistics)

    def test_none_of_no_image_and_of_a_collapsed_encoder(self) -> None:
        assert "no image" in refusal(LatentMoments(3).statistics)
        assert "collapsed" in refusal(measured(DiagonalGaussian(torch.full((4, 2, 3, 3), 0.1))).statistics)
        assert "not finite" in refusal(LatentStatistics, [math.nan], [1.0], 5)
        other = gaussians(channels=2)
        for take_in, given in ((LatentMoments(3).add, other), (LatentMoments(3).merge, measured(other))):
            assert "3 channels; these latents have 2" in refusal(take_in, given)
