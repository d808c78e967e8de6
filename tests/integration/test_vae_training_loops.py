"""The loops in which generative models are trained on a frozen autoencoder, as diffusers' scripts use their `vae`."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from generators import WIDTH, flux_transformer, sana_transformer, unet
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae import DCSSDAE
from dc_ssdae.latent import LatentMoments

STEPS = 3
BATCH = 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(factor: int = 8) -> list[Tensor]:
    """Two batches of smooth pictures in [-1, 1], in one of which nothing is as high as wide."""
    coarse = [torch.randn(BATCH, 3, 4, 4, generator=seeded(seed)) for seed in (1, 2)]
    sizes = [(4 * factor, 4 * factor), (2 * factor, 4 * factor)]
    return [
        F.interpolate(map_, size=size, mode="bicubic").clamp(-1, 1) for map_, size in zip(coarse, sizes, strict=True)
    ]


def make_vae(factor: int = 8, encoder: str = "KLEncoder") -> DCSSDAE:
    """Frozen, and with the statistics of its latents measured on the pictures."""
    torch.manual_seed(1)
    vae = tiny(factor, encoder)
    vae.requires_grad_(False)
    moments = LatentMoments(4)
    for pixels in batches(factor):
        moments.add(vae.encode(pixels).latent_dist)
    vae.register_to_config(**moments.statistics().settings())
    return vae


def prompts() -> Tensor:
    return torch.randn(BATCH, 3, WIDTH, generator=seeded(3))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Its state is the process's, which other tests set up otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(
    network: nn.Module, accelerator: Accelerator, latents: Callable[[int], Tensor], loss_of: Callable[..., Tensor]
) -> list[float]:
    """Some optimiser steps on the first of two batches' latents; noise and times are the same in every step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network, optimizer = accelerator.prepare(network.train(), optimizer)
    losses = []
    for _ in range(STEPS):
        with accelerator.accumulate(network):
            z = latents(0)
            assert not z.requires_grad
            noise = torch.randn(z.shape, generator=seeded(4))
            loss = loss_of(network, z, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite()), losses
    assert losses[-1] < 0.9 * losses[0], losses
    return losses


def denoising(network: nn.Module, z: Tensor, noise: Tensor) -> Tensor:
    """DDPM's loss of a U-Net that is told the prompt."""
    scheduler = DDPMScheduler()
    times = torch.tensor([100, 700])
    noisy = scheduler.add_noise(z, noise, times)
    return F.mse_loss(network(noisy, times, prompts(), return_dict=False)[0].float(), noise)


class Untouched:
    """Fails where training has changed the vae, or left gradients on it."""

    def __init__(self, vae: DCSSDAE) -> None:
        self.vae, self.before = vae, copy.deepcopy(vae.state_dict())

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        assert not self.vae.training
        assert all(parameter.grad is None for parameter in self.vae.parameters())
        for name, tensor in self.vae.state_dict().items():
            assert torch.equal(tensor, self.before[name]), name


def test_text_to_image(accelerator: Accelerator) -> None:
    """Stable Diffusion's: samples of each batch's latents, times scaling_factor, in the type of mixed precision."""
    vae, weight_dtype = make_vae(), torch.bfloat16
    vae.to(accelerator.device, dtype=weight_dtype)
    pixels = batches()

    def latents(index: int) -> Tensor:
        sample = vae.encode(pixels[index].to(weight_dtype)).latent_dist.sample(seeded(5))
        assert sample.dtype == weight_dtype
        return (sample * vae.config.scaling_factor).float()

    with Untouched(vae):
        train(unet(), accelerator, latents, denoising)


def packed(z: Tensor) -> Tensor:
    """2×2 latents in a token, as Flux has them."""
    batch, channels, height, width = z.shape
    cells = z.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height * width // 4, 4 * channels)


def test_flux_with_cached_posteriors(accelerator: Accelerator) -> None:
    """Each batch is encoded once and kept as a distribution, from which every step samples; then shift and scale."""
    vae = make_vae(16, "DCEncoder")
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 16
    with torch.no_grad():
        cache = [vae.encode(pixels.to(vae.device, dtype=vae.dtype)).latent_dist for pixels in batches(16)]

    def latents(index: int) -> Tensor:
        return (cache[index].sample(seeded(5)) - shift) * scale

    torch.manual_seed(2)

    def matching(network: nn.Module, z: Tensor, noise: Tensor) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler()
        times = scheduler.timesteps[torch.tensor([200, 600])]
        sigmas = (times / 1000.0)[:, None, None, None]
        noisy = (1.0 - sigmas) * z + sigmas * noise
        predicted = network(
            hidden_states=packed(noisy),
            timestep=times / 1000.0,
            encoder_hidden_states=prompts(),
            pooled_projections=prompts()[:, 0],
            txt_ids=torch.zeros(3, 3),
            img_ids=torch.zeros(noisy.shape[2] * noisy.shape[3] // 4, 3),
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, packed(noise - z))

    with Untouched(vae):
        train(flux_transformer(), accelerator, latents, matching)


def test_sana_takes_latent(accelerator: Accelerator) -> None:
    """Its autoencoders know no distribution: `.latent`, times scaling_factor."""
    vae = make_vae(32, "DCEncoder")
    with torch.no_grad():
        cache = [vae.encode(pixels).latent for pixels in batches(32)]
        assert torch.equal(cache[0], vae.encode(batches(32)[0]).latent_dist.mode())
    torch.manual_seed(2)

    def matching(network: nn.Module, z: Tensor, noise: Tensor) -> Tensor:
        noisy = 0.5 * z + 0.5 * noise
        predicted = network(
            noisy,
            encoder_hidden_states=prompts(),
            timestep=torch.tensor([500.0, 500.0]),
            encoder_attention_mask=torch.ones(BATCH, 3),
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, noise - z)

    with Untouched(vae):
        train(sana_transformer(), accelerator, lambda index: cache[index] * vae.config.scaling_factor, matching)


def test_stable_diffusion_xl_with_latents_encoded_before_training(accelerator: Accelerator) -> None:
    """Channel by channel, and scaling_factor besides, where the config has the channels' mean and deviation."""
    vae = make_vae()
    mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        cache = [vae.encode(pixels.to(vae.device, dtype=vae.dtype)).latent_dist.sample() for pixels in batches()]
    normalised = torch.cat([((z - mean) / std).flatten(2) for z in cache], dim=2)
    assert normalised.mean(dim=(0, 2)).abs().max() < 0.2
    assert (normalised.std(dim=(0, 2)) - 1.0).abs().max() < 0.2

    def latents(index: int) -> Tensor:
        return (cache[index] - mean) * vae.config.scaling_factor / std

    with Untouched(vae):
        train(unet(), accelerator, latents, denoising)


def test_the_autoencoder_itself_is_trained(accelerator: Accelerator) -> None:
    """As diffusers' script for fine-tuning a vae does: reconstruction and KL, through the prepared model."""
    torch.manual_seed(1)
    vae = tiny().train().requires_grad_(True)
    before = vae.decoder.conv_out.weight.detach().clone()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    vae, optimizer = accelerator.prepare(vae, optimizer)
    targets, losses = batches()[0], []
    for _ in range(STEPS):
        posterior = accelerator.unwrap_model(vae).encode(targets).latent_dist
        z = posterior.sample(seeded(6))
        pred = accelerator.unwrap_model(vae).decode(z).sample
        loss = F.mse_loss(pred, targets) + 1e-6 * posterior.kl().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(accelerator.unwrap_model(vae).decoder.conv_out.weight, before)


@torch.no_grad()
def test_cached_posteriors_survive_a_copy() -> None:
    """And go on giving the samples that a generator stands for; they do not hold the vae."""
    vae = make_vae()
    cache = [vae.encode(pixels).latent_dist for pixels in batches()]
    expected = [posterior.sample(seeded(index)) for index, posterior in enumerate(cache)]
    again = pickle.loads(pickle.dumps(cache))
    del vae, cache
    for index, posterior in enumerate(again):
        assert torch.equal(posterior.sample(seeded(index)), expected[index])
        first, second = posterior.sample(), posterior.sample()
        assert not torch.equal(first, second)
        assert (first - posterior.mode()).abs().max() < 6.0 * posterior.std.max()
