"""The loops in which generative models are trained on a frozen autoencoder, as diffusers' scripts use their `vae`."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler, UNet2DModel
from tiny_models import tiny
from torch import Tensor
from torch.nn import functional as F

from dc_ssdae import DCSSDAE
from dc_ssdae.latent import LatentMoments

STEPS = 3
BATCH = 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures() -> Tensor:
    """Smooth, in [-1, 1], and wider than high."""
    return F.interpolate(torch.randn(BATCH, 3, 4, 4, generator=seeded(1)), size=(64, 128), mode="bicubic").clamp(-1, 1)


@pytest.fixture
def vae() -> DCSSDAE:
    """Frozen, and with the statistics of its latents measured on the pictures."""
    torch.manual_seed(1)
    vae = tiny(16, "DCEncoder").requires_grad_(False)
    moments = LatentMoments(4)
    moments.add(vae.encode(pictures()).latent_dist)
    vae.register_to_config(**moments.statistics().settings())
    return vae


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Its state is the process's, which other tests set up otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


Way = Callable[[DCSSDAE], Callable[[], Tensor]]


def encoded_in_every_step(vae: DCSSDAE) -> Callable[[], Tensor]:
    """Stable Diffusion's script: samples times scaling_factor, in the type of mixed precision."""
    dtype = torch.bfloat16
    vae.to(dtype=dtype)

    def latents() -> Tensor:
        sample = vae.encode(pictures().to(dtype)).latent_dist.sample(seeded(5))
        assert sample.dtype == dtype
        return (sample * vae.config.scaling_factor).float()

    return latents


def with_cached_posteriors(vae: DCSSDAE) -> Callable[[], Tensor]:
    """Flux's: pictures are encoded once and kept as distributions, from which every step samples; shift and scale."""
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 16
    posterior = vae.encode(pictures().to(vae.device, dtype=vae.dtype)).latent_dist
    return lambda: (posterior.sample(seeded(5)) - vae.config.shift_factor) * vae.config.scaling_factor


def with_the_latent(vae: DCSSDAE) -> Callable[[], Tensor]:
    """Sana's, whose autoencoders know no distribution."""
    z = vae.encode(pictures()).latent
    assert torch.equal(z, vae.encode(pictures()).latent_dist.mode())
    return lambda: z * vae.config.scaling_factor


def normalised_by_channel(vae: DCSSDAE) -> Callable[[], Tensor]:
    """Stable Diffusion XL's, where the config has the channels' mean and deviation: scaling_factor comes besides."""
    mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    z = vae.encode(pictures()).latent_dist.sample()
    normalised = (z - mean) / std
    assert normalised.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (normalised.std(dim=(0, 2, 3)) - 1.0).abs().max() < 0.3
    return lambda: (z - mean) * vae.config.scaling_factor / std


WAYS = [encoded_in_every_step, with_cached_posteriors, with_the_latent, normalised_by_channel]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_generator_trains_on_latents(way: Way, vae: DCSSDAE, accelerator: Accelerator) -> None:
    """By DDPM's loss; noise and times are the same in every step."""
    latents = way(vae)
    before = copy.deepcopy(vae.state_dict())
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    network = UNet2DModel(in_channels=4, out_channels=4, block_out_channels=[8, 16], norm_num_groups=4, **blocks)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-2)
    network, optimizer = accelerator.prepare(network, optimizer)
    times, losses = torch.linspace(100, 700, BATCH).long(), []
    for _ in range(STEPS):
        with accelerator.accumulate(network):
            z = latents()
            assert not z.requires_grad
            noise = torch.randn(z.shape, generator=seeded(4))
            noisy = DDPMScheduler().add_noise(z, noise, times)
            loss = F.mse_loss(network(noisy, times).sample, noise)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert not vae.training
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_the_autoencoder_itself_is_trained(vae: DCSSDAE, accelerator: Accelerator) -> None:
    """As diffusers' script for fine-tuning a vae does: reconstruction and KL, through the prepared model."""
    before = vae.decoder.conv_out.weight.clone()
    vae.train().requires_grad_(True)
    prepared, optimizer = accelerator.prepare(vae, torch.optim.AdamW(vae.parameters(), lr=1e-3))
    posterior = accelerator.unwrap_model(prepared).encode(pictures()).latent_dist
    y = accelerator.unwrap_model(prepared).decode(posterior.sample(seeded(6))).sample
    accelerator.backward(F.mse_loss(y, pictures()) + 1e-6 * posterior.kl().mean())
    optimizer.step()
    assert all(parameter.grad is not None for parameter in vae.encoder.parameters())
    assert not torch.equal(vae.decoder.conv_out.weight, before)


def test_cached_posteriors_survive_a_copy(vae: DCSSDAE) -> None:
    """And go on giving the samples that a generator stands for; they do not hold the vae."""
    posterior = vae.encode(pictures()).latent_dist
    content = pickle.dumps(posterior)
    assert len(content) < 20_000
    again = pickle.loads(content)
    assert torch.equal(again.sample(seeded(1)), posterior.sample(seeded(1)))
    first, second = again.sample(), again.sample()
    assert not torch.equal(first, second)
    assert (first - again.mode()).abs().max() < 6.0 * again.std.max()
