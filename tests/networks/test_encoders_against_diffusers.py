"""The encoders against diffusers' independent ones, with random weights copied across by explicit name maps."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

from dc_ssdae.networks import DCEncoder, KLEncoder

TOLERANCE = 1e-4

Rules = tuple[tuple[str, str], ...]

EFFICIENT_VIT: Rules = (
    (r"^project_in\.conv\.", r"conv_in.conv."),
    (r"^project_in\.", r"conv_in."),
    (r"^latent_head\.", r"conv_out."),
    (r"^stages\.", r"down_blocks."),
    (r"\.attention\.scales\.(\d+)\.0\.", r".attn.to_qkv_multiscale.\1.proj_in."),
    (r"\.attention\.scales\.(\d+)\.1\.", r".attn.to_qkv_multiscale.\1.proj_out."),
    (r"\.attention\.out\.", r".attn.to_out."),
    (r"\.attention\.norm\.", r".attn.norm_out."),
    (r"\.bottleneck\.expand\.", r".conv_out.conv_inverted."),
    (r"\.bottleneck\.depthwise\.", r".conv_out.conv_depth."),
    (r"\.bottleneck\.project\.", r".conv_out.conv_point."),
    (r"\.bottleneck\.norm\.", r".conv_out.norm."),
)
"""Ours to diffusers'; our query_key_value is, besides, the concatenation of its to_q, to_k and to_v."""

KL: Rules = (
    (r"^conv_in\.", r"encoder.conv_in."),
    (r"^down\.(\d+)\.\d+\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^down\.(\d+)\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"\.shortcut\.", r".conv_shortcut."),
    (r"^middle\.0\.", r"encoder.mid_block.resnets.0."),
    (r"^middle\.2\.", r"encoder.mid_block.resnets.1."),
    (r"^middle\.1\.norm\.", r"encoder.mid_block.attentions.0.group_norm."),
    (r"^middle\.1\.query\.", r"encoder.mid_block.attentions.0.to_q."),
    (r"^middle\.1\.key\.", r"encoder.mid_block.attentions.0.to_k."),
    (r"^middle\.1\.value\.", r"encoder.mid_block.attentions.0.to_v."),
    (r"^middle\.1\.out\.", r"encoder.mid_block.attentions.0.to_out.0."),
    (r"^latent_head\.0\.", r"encoder.conv_norm_out."),
    (r"^latent_head\.2\.", r"encoder.conv_out."),
    (r"^latent_head\.3\.", r"quant_conv."),
)


def theirs(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def sources(name: str, rules: Rules) -> list[str]:
    """Names of diffusers' tensors that make up one of ours."""
    if ".attention.query_key_value." in name:
        return [theirs(name, rules).replace("attention.query_key_value", f"attn.to_{part}") for part in "qkv"]
    return [theirs(name, rules)]


def copy_across(ours: nn.Module, reference: nn.Module, rules: Rules, wanted: Callable[[str], bool]) -> None:
    """Load the reference's weights into ours; every wanted tensor of the reference is used exactly once."""
    state = {name: value for name, value in reference.state_dict().items() if wanted(name)}
    used = [source for name in ours.state_dict() for source in sources(name, rules)]
    assert sorted(used) == sorted(state)
    ours.load_state_dict(
        {
            # Linear layers of the reference are 1×1 convolutions of ours.
            name: torch.cat([state[source] for source in sources(name, rules)]).view_as(value)
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
    ).encoder.eval()
    perturb(reference)
    encoder = DCEncoder(
        16, 32, architecture=architecture, widths=widths, depths=depths, variational=False, out_shortcut=True
    ).eval()
    copy_across(encoder, reference, EFFICIENT_VIT, lambda name: True)
    x = 2.0 * torch.rand(2, 3, height, width) - 1.0
    posterior = encoder(x)
    expected = reference(x)
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
    copy_across(encoder, reference, KL, lambda name: name.startswith(("encoder.", "quant_conv.")))
    x = 2.0 * torch.rand(2, 3, height, width) - 1.0
    posterior = encoder(x)
    expected = reference.encode(x).latent_dist
    assert posterior.mean.shape == (2, 4, height >> halvings, width >> halvings)
    assert expected.mean.std() > 0.05
    torch.testing.assert_close(posterior.mean, expected.mean, atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(posterior.kl(), expected.kl(), atol=0.0, rtol=1e-5)
