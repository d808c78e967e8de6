"""Preparation of images against Pillow and torchvision, rounding, and what each protocol is."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae import InputError
from dc_ssdae.evaluation.protocol import (
    PROTOCOLS,
    RESIZES,
    Protocol,
    adm_crop,
    bilinear_by_pillow,
    bilinear_on_tensors,
)

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def photo(height: int, width: int) -> Tensor:
    """Waves, an edge and noise: (3, height, width) uint8, unlike itself mirrored or turned."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / 7.0
    waves = np.stack([np.sin(x * (1 + k / 3) + y * y / 40) + np.cos(y + k) for k in range(3)])
    waves[:, : height // 3, : width // 2] += 1.0
    pixels = 128 + 45 * waves + rng.normal(0.0, 20.0, waves.shape)
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


def adm_by_pooling(pixels: Tensor, halvings: int, size: int) -> Tensor:
    """(3, size, size), by PyTorch's pooling and antialiased bicubic filter, which share nothing with Pillow's."""
    for _ in range(halvings):
        pixels = F.avg_pool2d(pixels.float(), 2).add(0.5).floor()
    smaller = tvf.resize(pixels.float(), [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tvf.center_crop(smaller.round().clamp(0, 255), [size, size])


def assert_prepared_as_by_others(pixels: Tensor, size: int) -> None:
    """Both bilinear ways, by torchvision's first transforms, which share no code path with the second's; by Pillow."""
    image = Image.fromarray(np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)), "RGB")
    resize, crop = transforms.Resize(size, antialias=True), transforms.CenterCrop(size)
    ours = bilinear_on_tensors(pixels, size)
    assert ours.dtype == torch.float32
    theirs = 255.0 * crop(resize(transforms.ToTensor()(image)))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    ours = bilinear_by_pillow(pixels, size)
    assert ours.dtype == torch.uint8
    # Without torchvision: the longer side is cut down to whole pixels, half a pixel goes to the even side.
    width, height = (int(size * side / min(image.size)) for side in image.size)
    top, left = round((height - size) / 2), round((width - size) / 2)
    by_pillow = np.asarray(image.resize((width, height), resample=Image.BILINEAR))[top : top + size, left : left + size]
    np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), by_pillow)


@pytest.mark.parametrize(
    ("height", "width", "halvings"),
    [(128, 192, 2), (160, 128, 2), (64, 64, 1), (63, 126, 0), (20, 30, 0)],
)
def test_adm_halves_while_it_can_and_then_resizes(height: int, width: int, halvings: int) -> None:
    pixels = photo(height, width)
    found = adm_crop(pixels, 32).float()
    numbers = {0, *(number for number in range(6) if height >= 32 * 2**number)}
    away = {number: (found - adm_by_pooling(pixels, number, 32)).abs() for number in numbers}
    assert away[halvings].max() <= 5.0  # Pillow rounds after each direction
    assert away[halvings].mean() == min(difference.mean() for difference in away.values()) < 1.6


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 24))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_images_of_any_shape_are_prepared_as_the_others_do(height: int, width: int, size: int) -> None:
    assert_prepared_as_by_others(photo(height, width), size)


def test_an_odd_pixel_over_is_cut_at_the_right_and_the_bottom() -> None:
    columns = torch.arange(0, 210, 10, dtype=torch.uint8).expand(3, 16, 21).contiguous()
    assert adm_crop(columns, 16)[0, 0].tolist() == list(range(20, 180, 10))
    assert adm_crop(columns.transpose(1, 2).contiguous(), 16)[0, :, 0].tolist() == list(range(20, 180, 10))


@pytest.mark.parametrize("name", RESIZES)
def test_each_resize_leaves_alone_what_has_the_size_and_is_another_one_else(name: str) -> None:
    pixels, small = photo(211, 97), photo(33, 33)
    torch.testing.assert_close(RESIZES[name][0](small, 33).float(), small.float(), atol=1e-3, rtol=0)
    others = [resize(pixels, 32).float() for other, (resize, _) in RESIZES.items() if other != name]
    prepared = RESIZES[name][0](pixels, 32)
    assert min((prepared.float() - other).abs().max() for other in others) > 0.1
    assert torch.equal(Protocol("mine", resize=name).prepare(pixels, 32), prepared)


# --- the model's range and back ---


class NoFloat64(TorchDispatchMode):
    """As on Apple's GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.dtype != torch.float64
        return result


@each_protocol
@pytest.mark.parametrize("prepared_as", [torch.uint8, torch.float32])
def test_an_identity_gives_back_every_value(protocol: Protocol, prepared_as: torch.dtype) -> None:
    values = torch.arange(256).expand(3, 2, 256).to(prepared_as)
    with NoFloat64():
        reference, x = protocol.reference(values), protocol.model_input(values)
        assert torch.equal(protocol.to_uint8(x), reference)
    assert reference.dtype == torch.uint8
    assert torch.equal(reference.long(), values.long())
    assert (x.dtype, float(x.min()), float(x.max())) == (torch.float32, -1.0, 1.0)
    # As a model computes them that works on [0, 1], or by a mean and deviation of one half.
    assert torch.equal(protocol.to_uint8(values.float() / 255.0 * 2.0 - 1.0), reference)
    assert torch.equal(protocol.to_uint8((values.float() / 255.0 - 0.5) / 0.5), reference)


def test_a_reference_is_rounded_and_clamped() -> None:
    values = torch.tensor([-0.6, -0.4, 0.4, 0.6, 254.6, 255.4, 255.6, 300.0])
    assert PROTOCOLS["lightningdit"].reference(values).tolist() == [0, 0, 0, 1, 255, 255, 255, 255]


def test_outputs_are_rounded_or_truncated() -> None:
    values = torch.tensor([0.0, 0.4, 0.6, 10.49, 10.51, 10.99, 127.51, 254.4, 254.9, 255.0])
    by_rounding, by_truncating = (PROTOCOLS[name].to_uint8(values / 127.5 - 1.0).tolist() for name in ("dcae", "rae"))
    assert by_rounding == [0, 0, 1, 10, 11, 11, 128, 254, 255, 255]
    assert by_truncating == [0, 0, 0, 10, 10, 10, 127, 254, 254, 255]


@each_protocol
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_outputs_are_clamped_and_must_be_finite(protocol: Protocol, dtype: torch.dtype) -> None:
    output = torch.tensor([-50.0, -1.5, -1.0, 1.0, 1.5, 50.0], dtype=dtype)
    assert protocol.to_uint8(output).tolist() == [0, 0, 0, 255, 255, 255]
    for value in ("nan", "inf", "-inf"):
        output[2] = float(value)
        with pytest.raises(InputError):
            protocol.to_uint8(output)


# --- which protocols there are ---


@each_protocol
def test_its_sentences_say_what_it_does(protocol: Protocol) -> None:
    text = " ".join(protocol.sentences(64))
    assert "64×64 px" in text
    assert (" truncated to uint8" in text) == (protocol.rounding == "truncate")
    assert ("pooled" in text, "7 pixels" in text) == (protocol.psnr == "pooled", protocol.ssim == "scikit-image")
    assert ("vgg" in text, "100 dB" in text) == (protocol.lpips == "vgg", protocol.highest_psnr is not None)
    assert ("posterior's sample" in text, "SSIM and LPIPS" in text) == (
        protocol.latent == "sample",
        bool(protocol.unrounded),
    )
