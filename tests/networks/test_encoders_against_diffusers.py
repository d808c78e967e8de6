"""The encoders against diffusers' independent ones, with random weights copied across by the converter's name maps."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

from dc_ssdae.interop.diffusers import diffusers_names
from dc_ssdae.networks import DCEncoder, KLEncoder

TOLERANCE = 1e-4


def copy_across(ours: nn.Module, reference: nn.Module) -> None:
    """Load the reference's weights into ours; every tensor of its encoder is used exactly once."""
    names = diffusers_names(ours)
    state = {
        name: value for name, value in reference.state_dict().items() if name.startswith(("encoder.", "quant_conv."))
    }
    assert sorted(source for sources in names.values() for source in sources) == sorted(state)
    ours.load_state_dict(
        {
            # Linear layers of the reference are 1×1 convolutions of ours.
            name: torch.cat([state[source] for source in names[name]]).view_as(value)
            for name, value in ours.state_dict().items()
        }
    )


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Move every parameter off its start, the ones and zeros of norms too, keeping activations of a sane size."""
    for parameter in module.parameters():
        spread = parameter.std() if parameter.ndim > 1 else 0.5
        parameter.add_(0.5 * spread * torch.randn_like(parameter))


@torch.no_grad()
@pytest.mark.parametrize(
    # Linear attention takes its quadratic form up to 32 tokens: here 16 and 20 at the last stage, but then 56.
    ("height", "width"),
    [(128, 128), (128, 160), (256, 224)],
    ids=["square", "non-square", "many tokens"],
)
@pytest.mark.parametrize("architecture", ["dc_ae", "dc_ae_sana"])
def test_efficient_vit_encoder(architecture: str, height: int, width: int) -> None:
    sana = architecture == "dc_ae_sana"
    widths = [32, 64, 64, 64, 128, 128]
    depths = [1, 1, 1, 2, 1, 2] if sana else [0, 1, 2, 1, 2, 1]
    scales: tuple[int, ...] = (5,) if sana else ()
    block_types = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    common: dict[str, Any] = {"latent_channels": 16, "decoder_block_out_channels": (32, 64)}
    reference = AutoencoderDC(
        encoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        encoder_block_types=block_types,
        encoder_qkv_multiscales=[(), (), (), scales, scales, scales],
        downsample_block_type="conv" if sana else "pixel_unshuffle",
        decoder_layers_per_block=(1, 1),
        decoder_block_types=["ResBlock"] * 2,
        decoder_qkv_multiscales=[(), ()],
        **common,
    ).eval()
    perturb(reference.encoder)
    encoder = DCEncoder(
        16, 32, architecture=architecture, widths=widths, depths=depths, variational=False, out_shortcut=True
    ).eval()
    copy_across(encoder, reference)
    x = 2.0 * torch.rand(2, 3, height, width) - 1.0
    posterior = encoder(x)
    expected = reference.encode(x).latent
    assert posterior.mean.shape == (2, 16, height // 32, width // 32)
    assert posterior.logvar is None
    assert expected.std() > 0.1
    torch.testing.assert_close(posterior.mean, expected, atol=TOLERANCE, rtol=0.0)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)], ids=["square", "non-square"])
@pytest.mark.parametrize("halvings", [3, 4])
def test_kl_encoder(halvings: int, height: int, width: int) -> None:
    multipliers = [1, 2] + [4] * (halvings - 1)
    reference = AutoencoderKL(
        block_out_channels=[16 * multiplier for multiplier in multipliers],
        down_block_types=["DownEncoderBlock2D"] * (halvings + 1),
        up_block_types=["UpDecoderBlock2D"] * (halvings + 1),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    perturb(reference)
    encoder = KLEncoder(4, 2**halvings, channels=16, norm_groups=8).eval()
    copy_across(encoder, reference)
    x = 2.0 * torch.rand(2, 3, height, width) - 1.0
    posterior = encoder(x)
    expected = reference.encode(x).latent_dist
    assert posterior.mean.shape == (2, 4, height >> halvings, width >> halvings)
    assert expected.mean.std() > 0.05
    torch.testing.assert_close(posterior.mean, expected.mean, atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(posterior.kl(), expected.kl(), atol=0.0, rtol=1e-5)
