"""The U-ViT decoder: time embedding, features, shapes and errors, initialisation, gradients, precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.networks.uvit_decoder import TimeEmbedding

LATENT_CHANNELS = 6


def tiny_decoder(**settings: Any) -> UViTDecoder:
    defaults: dict[str, Any] = {
        "latent_channels": LATENT_CHANNELS,
        "downsample_factor": 16,
        "channels": 8,
        "multipliers": (1, 1, 2, 2),
        "middle_layers": 3,
        "blocks_per_level": 1,
        "window_radius": 3,
        "norm_groups": 8,
    }
    return UViTDecoder(**{**defaults, **settings})


def inputs(height: int = 2, width: int = 3, batch: int = 2, factor: int = 16) -> tuple[Tensor, Tensor]:
    """x and z that fit together."""
    return torch.randn(batch, 3, factor * height, factor * width), torch.randn(batch, LATENT_CHANNELS, height, width)


def shake(module: nn.Module) -> None:
    """Move every parameter, so that layers which start at zero take part too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def test_time_embedding_formula() -> None:
    embedding = TimeEmbedding(8).double()
    time = torch.tensor([0.0, 0.1234, 0.5, 1.0], dtype=torch.float64)
    features = torch.stack(
        [
            torch.tensor(
                [math.cos(1000.0 * t * 10000.0 ** (-i / 4)) for i in range(4)]
                + [math.sin(1000.0 * t * 10000.0 ** (-i / 4)) for i in range(4)],
                dtype=torch.float64,
            )
            for t in time.tolist()
        ]
    )
    expected = embedding.linear2(F.silu(embedding.linear1(features)))
    assert expected.shape == (4, 32)
    torch.testing.assert_close(embedding(time, torch.float64), expected, atol=1e-4, rtol=0.0)


@torch.no_grad()
def test_time_embedding_computes_angles_in_float32() -> None:
    """Near 1000 radians a half-precision angle would be off by whole turns."""
    embedding = TimeEmbedding(64)
    time = torch.tensor([0.99, 0.991])
    expected = embedding(time, torch.float32)
    actual = embedding.bfloat16()(time, torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0.0)
    assert (expected[0] - expected[1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("layers", "default"), [(1, 0), (3, 1), (10, 4)])
def test_features_are_the_output_of_repas_block(layers: int, default: int) -> None:
    """Of n middle blocks it is the one with index min(4, ⌊n/2⌋), counted from 0."""
    decoder = tiny_decoder(middle_layers=layers).eval()
    shake(decoder)
    x, z = inputs()
    seen: list[Tensor] = []
    decoder.middle.blocks[default].register_forward_hook(lambda module, given, output: seen.append(output))
    output, features = decoder.forward_with_features(x, z)
    assert features.shape == (2, 16, 4, 6)
    assert torch.equal(features.flatten(2).transpose(1, 2), seen[0])
    assert torch.equal(output, decoder(x, z))
    for layer in range(layers):
        chosen = decoder.forward_with_features(x, z, layer=layer)
        assert torch.equal(chosen.output, output)
        assert torch.equal(chosen.features, features) == (layer == default)
    for missing in (-1, layers):
        with pytest.raises(InputError, match=f"middle blocks 0 to {layers - 1}"):
            decoder.forward_with_features(x, z, layer=missing)


@torch.no_grad()
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("factor", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 1)])
def test_shapes(factor: int, height: int, width: int, timed: bool) -> None:
    decoder = tiny_decoder(downsample_factor=factor, time_conditioning=timed).eval()
    shake(decoder)
    x, z = inputs(height, width, factor=factor)
    y = decoder(x, z, torch.rand(2) if timed else None)
    assert y.shape == x.shape
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("x_shape", "z_shape", "named"),
    [
        ((2, 3, 32, 48), (2, 6, 2, 2), ["(2, 3, 32, 48)", "(2, 3, 32, 32)"]),
        ((1, 3, 32, 32), (2, 6, 2, 2), ["(1, 3, 32, 32)", "(2, 3, 32, 32)"]),
        ((2, 4, 32, 32), (2, 6, 2, 2), ["(2, 4, 32, 32)", "(2, 3, 32, 32)"]),
        ((2, 3, 32, 32), (2, 5, 2, 2), ["(2, 5, 2, 2)", "(B, 6, h, w)"]),
        ((2, 3, 32, 32), (6, 2, 2), ["(6, 2, 2)", "(B, 6, h, w)"]),
    ],
)
def test_shapes_that_do_not_fit_are_named(x_shape: tuple[int, ...], z_shape: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(InputError) as error:
        tiny_decoder()(torch.zeros(x_shape), torch.zeros(z_shape))
    assert all(shape in str(error.value) for shape in named), error.value


@pytest.mark.parametrize(
    ("timed", "time"), [(True, None), (True, torch.zeros(3)), (True, torch.zeros(2, 1)), (False, torch.zeros(2))]
)
def test_a_time_that_does_not_fit_is_refused(timed: bool, time: Tensor | None) -> None:
    x, z = inputs()
    with pytest.raises(InputError, match="time"):
        tiny_decoder(time_conditioning=timed)(x, z, time)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": "Xs"}, "'Xs'"),
        ({"downsample_factor": 24}, "downsample_factor is 24"),
        ({"multipliers": (1, 2, 3)}, "multipliers"),
        ({"heads": 3}, "heads = 3"),
        ({"patch": 3}, "patch is 3"),
        ({"patch": 2}, "patch 2 needs 3 of them"),
        ({"window_radius": -1}, "window_radius"),
        ({"middle_layers": 0}, "middle_layers"),
        ({"blocks_per_level": 0}, "blocks_per_level"),
        ({"norm_groups": 0}, "norm_groups"),
        ({"channels": 0}, "channels"),
        ({"latent_channels": 0}, "latent_channels"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        tiny_decoder(**settings)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("timed", [False, True])
def test_every_parameter_learns(timed: bool) -> None:
    """Behind a layer that starts at zero nothing has a gradient at first; after one step everything has."""
    decoder = tiny_decoder(time_conditioning=timed, downsample_factor=8)
    x, z = inputs(4, 5, factor=8)
    goal = torch.randn_like(x)
    time = torch.tensor([0.2, 0.7]) if timed else None
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (decoder(x, z, time) - goal).square().mean().backward()
        optimizer.step()
    without = [
        name for name, parameter in decoder.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@torch.no_grad()
def test_the_latent_is_normalised_in_float32_under_autocast() -> None:
    decoder = tiny_decoder()
    seen: list[Tensor] = []
    decoder.latent_norm.register_forward_hook(lambda module, given, output: seen.append(output))
    x, z = inputs()
    z = 0.1 * z + 50.0
    with torch.autocast("cpu", torch.bfloat16):
        y = decoder(x, z)
    assert y.isfinite().all()
    assert seen[0].dtype == torch.float32
    expected = F.batch_norm(z.double(), None, None, training=True, eps=1e-5)
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-3, rtol=0.0)
    torch.testing.assert_close(decoder.latent_norm.running_mean, 0.1 * z.mean(dim=(0, 2, 3)))


@torch.no_grad()
def test_everything_sees_the_normalised_latent() -> None:
    """In eval mode, scaling z and the running statistics together changes nothing."""
    decoder = tiny_decoder().eval()
    shake(decoder)
    x, z = inputs()
    expected = decoder(x, z)
    decoder.latent_norm.running_mean.fill_(3.0)
    decoder.latent_norm.running_var.copy_(16.0 * (decoder.latent_norm.running_var + 1e-5) - 1e-5)
    torch.testing.assert_close(decoder(x, 4.0 * z + 3.0), expected, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_a_batchs_images_do_not_mix_in_eval_mode() -> None:
    decoder = tiny_decoder(time_conditioning=True).eval()
    shake(decoder)
    x, z = inputs(batch=3)
    time = torch.tensor([0.1, 0.5, 0.9])
    together = decoder(x, z, time)
    for image in range(3):
        alone = decoder(x[image : image + 1], z[image : image + 1], time[image : image + 1])
        torch.testing.assert_close(alone, together[image : image + 1], atol=1e-5, rtol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("factor", [8, 32])
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_squares_of_pixels_go_in_and_come_out_as_one(patch: int, factor: int, timed: bool) -> None:
    """The outer levels fall away, the middle stays on squares of 8 pixels; channels count (colour, row, column)."""
    multipliers = (1, 1, 2, 2)[int(math.log2(patch)) :]
    decoder = tiny_decoder(patch=patch, multipliers=multipliers, downsample_factor=factor, time_conditioning=timed)
    shake(decoder.eval())
    x, z = inputs(2, 3, factor=factor)
    seen: dict[str, Tensor] = {}
    decoder.image_in.register_forward_hook(lambda module, given, output: seen.update(image=given[0]))
    decoder.conv_out.register_forward_hook(lambda module, given, output: seen.update(answer=output))
    y, features = decoder.forward_with_features(x, z, torch.rand(2) if timed else None)
    batch, _, height, width = x.shape
    squares = x.view(batch, 3, height // patch, patch, width // patch, patch).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    assert torch.equal(seen["image"], squares)
    answer = seen["answer"].view(batch, 3, patch, patch, height // patch, width // patch).permute(0, 1, 4, 2, 5, 3)
    assert torch.equal(y, answer.reshape(x.shape))
    assert features.shape == (2, 16, height // 8, width // 8)
    levels = 4 - int(math.log2(patch))
    assert len(decoder.down) == len(decoder.up) == levels
    groups = decoder.parameter_groups()
    assert groups["head"] == [f"up.{levels - 1}", "norm_out", "conv_out"]
    named = {name for members in groups.values() for name in members}
    assert all(any(key.startswith(name) for name in named) for key in decoder.state_dict())


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("patch", [1, 4])
def test_without_gradients_it_answers_the_same(patch: int, timed: bool) -> None:
    """In place, in channels-last order, 1×1 convolutions as matrix products; the inputs stay as they are."""
    multipliers = (1, 1, 2, 2)[int(math.log2(patch)) :]
    decoder = tiny_decoder(patch=patch, multipliers=multipliers, time_conditioning=timed).eval()
    shake(decoder)
    x, z = inputs(batch=1)
    time = torch.rand(1) if timed else None
    given = x.clone(), z.clone()
    expected = decoder(x, z, time)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(decoder(x, z, time), expected.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, given[0])
    assert torch.equal(z, given[1])
