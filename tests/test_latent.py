"""The diagonal Gaussian against torch.distributions, and the noise that does not depend on the batch."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.latent import draw_noise


def test_kl_equals_torch_distributions() -> None:
    mean, logvar = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    expected = kl_divergence(Normal(mean.double(), (0.5 * logvar.double()).exp()), Normal(0.0, 1.0))
    kl = DiagonalGaussian(mean, logvar).kl()
    assert kl.shape == (3,)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected.flatten(1).sum(dim=1), atol=0.0, rtol=1e-5)


def test_kl_of_a_standard_normal_is_zero() -> None:
    assert DiagonalGaussian(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)).kl().tolist() == [0.0, 0.0]


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


def test_moments_are_mean_then_logvar() -> None:
    moments = torch.randn(2, 6, 3, 4)
    posterior = DiagonalGaussian.from_moments(moments)
    assert torch.equal(posterior.mean, moments[:, :3])
    assert torch.equal(posterior.logvar, moments[:, 3:])
    assert torch.equal(posterior.mode(), moments[:, :3])


def test_samples_have_the_gaussians_mean_and_spread() -> None:
    count = 20_000
    mean = torch.tensor([-2.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, count, 1)
    std = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1).expand_as(mean)
    sample = DiagonalGaussian(mean, 2.0 * std.log()).sample(torch.Generator().manual_seed(3))
    error = 5.0 / math.sqrt(count)
    assert ((sample.mean(dim=2) - mean.mean(dim=2)).abs() < error * std.mean(dim=2)).all()
    assert ((sample.std(dim=2) / std.mean(dim=2) - 1.0).abs() < error).all()


def test_samples_pass_gradients_to_mean_and_logvar() -> None:
    """Of s = μ + σ ε they are 1 and σ ε / 2."""
    mean = torch.randn(2, 3, 2, 2, requires_grad=True)
    logvar = torch.randn(2, 3, 2, 2, requires_grad=True)
    sample = DiagonalGaussian(mean, logvar).sample()
    sample.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(logvar.grad, 0.5 * (sample - mean).detach())


def test_sample_keeps_the_dtype() -> None:
    mean = torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)
    assert DiagonalGaussian(mean, mean).sample().dtype == torch.bfloat16


def test_a_point_is_its_own_sample_and_has_no_kl() -> None:
    mean = torch.randn(3, 2, 2, 2)
    point = DiagonalGaussian(mean)
    assert point.logvar is None
    assert torch.equal(point.sample(), mean)
    assert torch.equal(point.mode(), mean)
    assert point.kl().tolist() == [0.0, 0.0, 0.0]


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(InputError, match=r"\(1, 2, 2, 2\) and \(1, 2, 2, 3\)"):
        DiagonalGaussian(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 3))


def test_one_generator_for_the_batch_equals_images_drawn_one_by_one() -> None:
    together = draw_noise((4, 3, 5, 7), torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    alone = torch.cat([draw_noise((1, 3, 5, 7), generator) for _ in range(4)])
    assert together.dtype == torch.float32
    assert torch.equal(together, alone)
    assert torch.equal(together[:2], draw_noise((2, 3, 5, 7), torch.Generator().manual_seed(5)))
    assert not torch.equal(together[0], together[1])


def test_a_list_of_generators_serves_image_by_image() -> None:
    noise = draw_noise((3, 2, 4), [torch.Generator().manual_seed(seed) for seed in (7, 8, 7)])
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], draw_noise((1, 2, 4), torch.Generator().manual_seed(8)))


def test_sample_takes_a_list_of_generators() -> None:
    posterior = DiagonalGaussian(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3))
    sample = posterior.sample([torch.Generator().manual_seed(seed) for seed in (1, 1)])
    assert torch.equal(sample[0], sample[1])


def test_without_a_generator_the_default_one_is_used() -> None:
    torch.manual_seed(9)
    first = draw_noise((2, 3), None)
    torch.manual_seed(9)
    assert torch.equal(draw_noise((2, 3), None), first)
    assert not torch.equal(draw_noise((2, 3), None), first)


def test_too_few_generators_are_refused() -> None:
    with pytest.raises(InputError, match="1 generators for a batch of 2 images"):
        draw_noise((2, 3), [torch.Generator()])


def test_an_empty_batch_is_empty() -> None:
    assert draw_noise((0, 3, 4), None).shape == (0, 3, 4)


def test_noise_is_standard_normal() -> None:
    noise = draw_noise((4, 3, 100, 100), torch.Generator().manual_seed(0))
    assert abs(noise.mean().item()) < 5.0 / math.sqrt(noise.numel())
    assert abs(noise.var().item() - 1.0) < 5.0 * math.sqrt(2.0 / noise.numel())


def test_sample_takes_noise() -> None:
    mean, logvar, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    posterior = DiagonalGaussian(mean, logvar)
    sample = posterior.sample(noise=noise)
    torch.testing.assert_close(sample, mean + (0.5 * logvar).exp() * noise, atol=1e-6, rtol=0.0)
    drawn = draw_noise((2, 3, 4, 5), torch.Generator().manual_seed(3))
    assert torch.equal(posterior.sample(noise=drawn), posterior.sample(torch.Generator().manual_seed(3)))


def test_noise_keeps_its_precision_beside_a_half_precision_mean() -> None:
    mean, noise = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), torch.randn(1, 1, 8, 8)
    sample = DiagonalGaussian(mean, mean).sample(noise=noise)
    assert sample.dtype == torch.bfloat16
    assert torch.equal(sample, noise.bfloat16())


@pytest.mark.parametrize("logvar", [torch.zeros(2, 3, 4, 5), None], ids=["variance", "point"])
def test_noise_that_does_not_fit_is_refused(logvar: torch.Tensor | None) -> None:
    posterior = DiagonalGaussian(torch.zeros(2, 3, 4, 5), logvar)
    with pytest.raises(InputError, match=r"noise has shape \(1, 3, 4, 5\); this latent needs \(2, 3, 4, 5\)"):
        posterior.sample(noise=torch.zeros(1, 3, 4, 5))
    with pytest.raises(InputError, match="noise or generator, not both"):
        posterior.sample(torch.Generator(), noise=torch.zeros(2, 3, 4, 5))
