"""Gradient checkpointing: the same bits, running statistics updated once, and less memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dc_ssdae import DCSSDAE, DiagonalGaussian
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder
from dc_ssdae.networks.blocks import CheckpointedModule

WIDTHS = [32, 32, 32, 64]


def kl_encoder() -> KLEncoder:
    return KLEncoder(4, 8, channels=16, norm_groups=8)


def res_block_encoder() -> DCEncoder:
    return DCEncoder(4, 8, widths=WIDTHS, depths=[0, 3, 3, 2], block_types=["ResBlock"] * 4)


def efficient_vit_encoder() -> DCEncoder:
    kinds: Any = ["ResBlock"] + ["EfficientViTBlock"] * 3
    return DCEncoder(4, 8, widths=WIDTHS, depths=[2, 2, 2, 2], block_types=kinds, attention_scales=[5])


def decoder(time_conditioning: bool = False) -> UViTDecoder:
    made = UViTDecoder(
        4, 8, channels=16, multipliers=[1, 2, 2, 2], norm_groups=8, middle_layers=3, time_conditioning=time_conditioning
    )
    with torch.no_grad():  # what starts at zero would hide a wrong gradient
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


ENCODERS = [kl_encoder, res_block_encoder, efficient_vit_encoder]

X = torch.linspace(-1.0, 1.0, 2 * 3 * 32 * 48).sin().view(2, 3, 32, 48)
Z = torch.linspace(0.0, 9.0, 2 * 4 * 4 * 6).cos().view(2, 4, 4, 6)


def encoder_loss(model: nn.Module) -> Tensor:
    posterior = model(X)
    return posterior.mean.square().mean() + posterior.logvar.square().mean()


def decoder_loss(model: UViTDecoder) -> Tensor:
    time = torch.tensor([0.2, 0.9]) if model.time_conditioning else None
    return model(X, Z, time).square().mean()


def feature_loss(model: UViTDecoder) -> Tensor:
    output, features = model.forward_with_features(X, Z, layer=1)
    return output.square().mean() + features.square().mean()


CASES: list[Any] = [
    *(pytest.param(make, encoder_loss, id=make.__name__) for make in ENCODERS),
    pytest.param(decoder, decoder_loss, id="decoder"),
    pytest.param(lambda: decoder(True), decoder_loss, id="decoder with time"),
    pytest.param(decoder, feature_loss, id="decoder with features"),
]


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy of a network with checkpointing on."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, CheckpointedModule):
            module.gradient_checkpointing = True
    return twin


def run(model: nn.Module, loss: Callable[[Any], Tensor], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Forward and backward; gives the loss and the bytes that the forward kept for the backward, each once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def keep_inputs(block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        for value in inputs:  # which the hooks below are not told of
            if isinstance(value, Tensor):
                keep(value)
        return checkpoint(block, *inputs, use_reentrant=False)

    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module._gradient_checkpointing_func = keep_inputs
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        value = loss(model)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in owned)
    value.backward()
    return value.detach(), size


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "loss"), CASES)
def test_the_same_bits_in_less_memory(
    make: Callable[[], nn.Module], loss: Callable[[Any], Tensor], dtype: torch.dtype, training: bool
) -> None:
    """In evaluation mode too: what counts is that gradients are wanted."""
    plain = make().train(training)
    saving = checkpointed(plain)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    expected, before = run(plain, loss, dtype)
    value, after = run(saving, loss, dtype)
    assert torch.equal(value, expected)
    for (name, parameter), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if parameter.grad is None:
            assert other.grad is None, name
        else:
            assert torch.equal(parameter.grad, other.grad), name
    assert list(saving.state_dict()) == list(start)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(saving.state_dict()[name], tensor), name
    if training and isinstance(plain, UViTDecoder):
        assert plain.latent_norm.num_batches_tracked == 1
        assert not torch.equal(plain.latent_norm.running_mean, start["latent_norm.running_mean"])
    assert after < 0.5 * before


class OwnEncoder(nn.Module):
    def __init__(self, latent_channels: int, downsample_factor: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 2 * latent_channels, downsample_factor, downsample_factor)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(self.patch(x))


class OwnDecoder(nn.Module):
    def __init__(self, latent_channels: int, downsample_factor: int, time_conditioning: bool) -> None:
        super().__init__()


class TestAutoencoder:
    def test_gradients_of_encoder_and_decoder_together(self) -> None:
        plain = DCSSDAE.from_preset("demo").train()
        saving = copy.deepcopy(plain)
        saving.enable_gradient_checkpointing()
        for model in (plain, saving):
            model(X).sample.square().mean().backward()
        for (name, parameter), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, other.grad), name
        for (name, buffer), other in zip(plain.named_buffers(), saving.buffers(), strict=True):
            assert torch.equal(buffer, other), name

    def test_it_is_switched_as_diffusers_models_are(self) -> None:
        model = DCSSDAE.from_preset("demo")
        x = torch.rand(1, 3, 32, 32)
        names = list(model.state_dict())
        calls: list[Any] = []

        def spy(block: Callable[..., Tensor], *inputs: Any) -> Tensor:
            calls.append(block)
            return block(*inputs)

        assert not model.is_gradient_checkpointing
        model.enable_gradient_checkpointing(spy)
        assert model.is_gradient_checkpointing
        assert list(model.state_dict()) == names
        model(x)
        assert len(calls) > 10
        with torch.no_grad():  # nothing to save memory for
            count = len(calls)
            model(x)
            assert len(calls) == count
        assert not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for block in calls for module in modules(block)
        )
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
        model(x)
        assert len(calls) == count

    def test_a_users_encoder_that_cannot(self) -> None:
        part = {"class_path": "OwnEncoder"}
        model = DCSSDAE.from_preset("demo", encoder=part, classes=[OwnEncoder])
        model.enable_gradient_checkpointing()
        model(torch.rand(1, 3, 16, 16)).sample.mean().backward()
        assert model.encoder.patch.weight.grad is not None

    def test_parts_that_both_cannot(self) -> None:
        parts = {"encoder": {"class_path": "OwnEncoder"}, "decoder": {"class_path": "OwnDecoder"}}
        model = DCSSDAE(4, 8, **parts, classes=[OwnEncoder, OwnDecoder])
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.enable_gradient_checkpointing()


def modules(block: Any) -> list[nn.Module]:
    return list(block.modules()) if isinstance(block, nn.Module) else []
