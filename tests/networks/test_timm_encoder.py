"""The encoder that is a vision transformer of timm, against RAE's definition of it by the code of other libraries."""

from typing import Any

import diffusers
import pytest
import torch
from tiny_models import image, refusal
from torch import Tensor, nn

from dc_ssdae.networks import TimmEncoder

DINOV2_S = "vit_small_patch14_reg4_dinov2.lvd142m"
RAE: dict[str, Any] = {
    "encoder_hidden_size": 384,
    "encoder_input_size": 112,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


@pytest.fixture(scope="module")
@torch.no_grad()
def dinov2() -> TimmEncoder:
    torch.manual_seed(0)
    encoder = TimmEncoder(384, 16, DINOV2_S)
    for name, parameter in encoder.named_parameters():
        # Every tensor has a part in the answer, the layer scales too, which start at 1e-5.
        parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter) if ".ls" in name else parameter)
        parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder


def copy_across(ours: TimmEncoder, theirs: nn.Module) -> None:
    """Load our weights into DINOv2 of transformers, whose layers have the same tensors in the same order."""
    tensors, state = iter(theirs.encoder.layer.state_dict().items()), ours.tokens.transformer.state_dict()
    given: dict[str, Tensor] = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.register_tokens": state["reg_token"],
        "embeddings.position_embeddings": torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1),
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
    }
    for name, value in state.items():
        if name.endswith("qkv.weight"):
            bias = state[name.replace("weight", "bias")]
            for part in zip(value.chunk(3), bias.chunk(3), strict=True):
                given |= {f"encoder.layer.{next(tensors)[0]}": tensor for tensor in part}
        elif name.startswith("blocks.") and not name.endswith("qkv.bias"):
            given[f"encoder.layer.{next(tensors)[0]}"] = value
    assert next(tensors, None) is None
    missing, left_over = theirs.load_state_dict(given, strict=False)
    assert (missing, left_over) == (["embeddings.mask_token"], [])


@torch.no_grad()
def test_it_is_raes_encoder_in_diffusers(dinov2: TimmEncoder) -> None:
    """Resized, normalised, without class and register tokens, and with a last norm without scale and shift."""
    if not hasattr(diffusers, "AutoencoderRAE"):
        pytest.skip("this diffusers has no AutoencoderRAE")
    reference = diffusers.AutoencoderRAE(**RAE).eval()
    copy_across(dinov2, reference.encoder)
    x = image(2, 128, 128)
    posterior = dinov2(x)
    assert posterior.logvar is None
    assert posterior.mean.shape == (2, 384, 8, 8)
    torch.testing.assert_close(posterior.mean, reference.encode(0.5 * x + 0.5).latent, atol=2e-4, rtol=0.0)
    # An image of another shape, as the transformer itself takes it.
    x = image(1, 64, 112)
    resized = nn.functional.interpolate(0.5 * x + 0.5, (56, 98), mode="bicubic")
    tokens = reference.encoder((resized - reference.encoder_mean) / reference.encoder_std).last_hidden_state[:, 5:]
    torch.testing.assert_close(dinov2(x).mean, tokens.mT.reshape(1, 384, 4, 7), atol=2e-4, rtol=0.0)


@pytest.mark.parametrize("layer", [-2, 3])
@torch.no_grad()
def test_a_middle_layer(layer: int) -> None:
    """The features that timm gives for it, and no later layer is built."""
    torch.manual_seed(2)
    whole, x = TimmEncoder(64, 16, "test_vit"), image(1, 32, 48)
    encoder = TimmEncoder(64, 16, "test_vit", layer=layer)
    blocks = range(6)
    encoder.load_state_dict({name: whole.state_dict()[name] for name in encoder.state_dict()})
    assert len(encoder.tokens.transformer.blocks) == blocks[layer] + 1
    (features,) = whole.tokens.transformer.forward_intermediates(x, [layer], intermediates_only=True)
    expected = (features - features.mean(1, keepdim=True)) / (features.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(encoder(x).mean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_512.v2_webli", "vit_small_patch16_dinov3.lvd1689m"])
def test_other_transformers_fit(name: str) -> None:
    with torch.device("meta"):
        encoder = TimmEncoder(32, 16, name)
        assert encoder(torch.empty(1, 3, 64, 96)).mean.shape == (1, 32, 4, 6)
    names = [name for name in encoder.state_dict() if "head" in name or "attn_pool" in name]
    assert names == [], "a classifier's weights are kept for nothing"


@pytest.mark.parametrize("factor", [8, 16, 32])
def test_only_the_projection_trains(factor: int) -> None:
    encoder, x = TimmEncoder(4, factor, "test_vit"), image(2, 64, 32)
    mean = encoder(x).mean
    assert mean.shape == (2, 4, 64 // factor, 32 // factor)
    mean.square().mean().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == {"projection.weight", "projection.bias"}
    assert not TimmEncoder(64, factor, "test_vit")(x).mean.requires_grad, "a graph that nobody needs"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_base_patch14_dinov4"}, "did you mean 'vit_base_patch14_dinov2'"),
        ({"name": "test_vit.none"}, "timm has no 'test_vit.none'"),
        ({"name": "hf-hub:timm/test_vit.r160_in1k"}, "timm has no"),  # timm would ask the hub
        ({"name": "resnet18"}, "resnet18 of timm is not a vision transformer"),
        ({"layer": 6}, "layer is 6; it must be from -6 to 5"),
        ({"latent_channels": 65}, "latent_channels is 65; it must be at most 64"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(TimmEncoder, **{"latent_channels": 64, "name": "test_vit", **settings})
