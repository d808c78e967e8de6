"""Preparation of images against Pillow and torchvision, rounding, and what each protocol is."""

from collections.abc import Callable, Iterator
from pathlib import Path
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
from dc_ssdae.data.images import read_image
from dc_ssdae.evaluation.protocol import (
    PROTOCOLS,
    RESIZES,
    Protocol,
    Resize,
    adm_crop,
    bilinear_by_pillow,
    bilinear_on_tensors,
    find_protocol,
)

SHAPES = [
    pytest.param(211, 97, 32, id="portrait"),
    pytest.param(75, 143, 32, id="landscape"),
    pytest.param(63, 64, 32, id="just under twice the size"),
    pytest.param(64, 65, 32, id="just twice the size"),
    pytest.param(32, 32, 32, id="exactly the size"),
    pytest.param(32, 51, 32, id="the shorter side the size"),
    pytest.param(19, 13, 32, id="smaller than the size"),
    pytest.param(20, 41, 32, id="one side smaller"),
    pytest.param(517, 1033, 32, id="many times larger"),
    pytest.param(7, 400, 16, id="a strip"),
    pytest.param(9, 5, 1, id="to one pixel"),
]


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    """Waves, an edge and noise: (3, height, width) uint8, unlike itself mirrored or turned."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 7.0
    waves = np.stack([np.sin(x * (1 + k / 3) + y * y / 40) + np.cos(y + k) for k in range(3)])
    waves[:, : height // 3, : width // 2] += 1.0
    pixels = 128 + 45 * waves + rng.normal(0.0, 20.0, waves.shape)
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


def image_of(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)), "RGB")


# --- the same, written down once more ---


def adm_by_pooling(pixels: Tensor, halvings: int, size: int) -> Tensor:
    """(3, size, size), by PyTorch's pooling and antialiased bicubic filter, which share nothing with Pillow's."""
    for _ in range(halvings):
        pixels = F.avg_pool2d(pixels.float(), 2).add(0.5).floor()
    smaller = tvf.resize(pixels.float(), [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tvf.center_crop(smaller.round().clamp(0, 255), [size, size])


def lightningdit_reference(pixels: Tensor, size: int) -> Tensor:
    """(3, size, size) in [0, 1], by torchvision's first transforms, which share no code path with the second's."""
    prepare = transforms.Compose(
        [transforms.ToTensor(), transforms.Resize(size, antialias=True), transforms.CenterCrop(size)]
    )
    return prepare(image_of(pixels))


def original_reference(pixels: Tensor, size: int) -> np.ndarray:
    """(size, size, 3) uint8, by torchvision's first transforms on a Pillow image."""
    return np.asarray(transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])(image_of(pixels)))


def original_by_pillow(pixels: Tensor, size: int) -> np.ndarray:
    """The same without torchvision: the longer side is cut down to whole pixels, half a pixel goes to the even side."""
    image = image_of(pixels)
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    array = np.asarray(image.resize((width, height), resample=Image.BILINEAR))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return array[top : top + size, left : left + size]


def assert_prepared_as_by_others(pixels: Tensor, size: int) -> None:
    """All three ways at once."""
    channels_last = {
        "bilinear_pil": (bilinear_by_pillow(pixels, size), original_reference(pixels, size)),
        "bilinear_pil without torchvision": (bilinear_by_pillow(pixels, size), original_by_pillow(pixels, size)),
    }
    for name, (ours, theirs) in channels_last.items():
        assert ours.dtype == torch.uint8, name
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), theirs, err_msg=name)
    ours = bilinear_on_tensors(pixels, size)
    assert ours.dtype == torch.float32
    assert 0.0 <= float(ours.min()) <= float(ours.max()) <= 255.0 + 1e-3
    torch.testing.assert_close(ours, 255.0 * lightningdit_reference(pixels, size), atol=1e-3, rtol=0)


# --- preparation ---


@pytest.mark.parametrize(
    ("height", "width", "halvings"),
    [(128, 192, 2), (160, 128, 2), (96, 120, 1), (64, 64, 1), (63, 126, 0), (40, 32, 0), (20, 30, 0), (512, 1024, 4)],
)
def test_adm_halves_while_it_can_and_then_resizes(height: int, width: int, halvings: int) -> None:
    pixels = photo(height, width)
    found = adm_crop(pixels, 32).float()
    away = {
        number: (found - adm_by_pooling(pixels, number, 32)).abs() for number in range(6) if height >= 32 * 2**number
    }
    away.setdefault(0, (found - adm_by_pooling(pixels, 0, 32)).abs())
    assert away[halvings].max() <= 5.0  # Pillow rounds after each direction
    assert away[halvings].mean() == min(each.mean() for each in away.values()) < 1.6


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_images_are_prepared_as_the_others_do(height: int, width: int, size: int) -> None:
    assert_prepared_as_by_others(photo(height, width), size)


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 24))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_images_of_any_shape_are_prepared_as_the_others_do(height: int, width: int, size: int) -> None:
    assert_prepared_as_by_others(photo(height, width), size)


@pytest.fixture
def photos(data_dir: Path) -> Iterator[Tensor]:
    files = sorted(path for path in data_dir.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return (read_image(file).pixels for file in files[:: max(1, len(files) // 6)][:6])


def test_photos_are_prepared_as_the_others_do(photos: Iterator[Tensor]) -> None:
    for pixels in photos:
        for size in (48, 256):
            assert_prepared_as_by_others(pixels, size)


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
def test_what_has_the_size_already_is_left_alone(resize: Resize) -> None:
    pixels = photo(33, 33)
    prepared = resize.apply(pixels, 33)
    torch.testing.assert_close(prepared.float(), pixels.float(), atol=1e-3, rtol=0)


def test_an_odd_pixel_over_is_cut_at_the_right_and_the_bottom() -> None:
    columns = torch.arange(0, 210, 10, dtype=torch.uint8).expand(3, 16, 21).contiguous()
    assert adm_crop(columns, 16)[0, 0].tolist() == list(range(20, 180, 10))
    rows = columns.transpose(1, 2).contiguous()
    assert adm_crop(rows, 16)[0, :, 0].tolist() == list(range(20, 180, 10))


def test_the_three_ways_differ() -> None:
    """Else a protocol could name the wrong one unnoticed."""
    pixels = photo(211, 97)
    adm, tensors, pillow = (resize.apply(pixels, 32).float() for resize in RESIZES.values())
    assert (adm - pillow).abs().mean() > 1.0
    assert (tensors - adm).abs().mean() > 1.0
    # The last two are the same filter, but for Pillow's rounding of each of the two directions.
    assert 0.1 < (tensors - pillow).abs().max() <= 1.5


@pytest.mark.parametrize("prepare", [adm_crop, bilinear_on_tensors, bilinear_by_pillow])
@pytest.mark.parametrize("size", [0, -3])
def test_a_size_without_pixels_is_refused(prepare: Callable[[Tensor, int], Tensor], size: int) -> None:
    with pytest.raises(InputError, match=f"^size is {size}; it must be at least 1$"):
        prepare(photo(8, 8), size)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_protocol_prepares_by_its_own_resize(protocol: Protocol) -> None:
    pixels = photo(61, 47)
    expected = RESIZES[protocol.resize].apply(pixels, 24)
    prepared = protocol.prepare(pixels, 24)
    assert prepared.dtype == expected.dtype
    assert torch.equal(prepared, expected)


# --- the model's range and back ---


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("prepared_as", [torch.uint8, torch.float32])
def test_an_identity_gives_back_every_value(protocol: Protocol, prepared_as: torch.dtype) -> None:
    values = torch.arange(256).expand(3, 2, 256).to(prepared_as)
    reference = protocol.reference(values)
    assert reference.dtype == torch.uint8
    assert torch.equal(reference.long(), values.long())
    model_input = protocol.model_input(values)
    assert model_input.dtype == torch.float32
    assert (float(model_input.min()), float(model_input.max())) == (-1.0, 1.0)
    assert torch.equal(protocol.to_uint8(model_input), reference)
    assert torch.equal(protocol.to_uint8(model_input.double()), reference)
    # As a model computes them that works on [0, 1], or by a mean and deviation of one half.
    assert torch.equal(protocol.to_uint8(values.float() / 255.0 * 2.0 - 1.0), reference)
    assert torch.equal(protocol.to_uint8((values.float() / 255.0 - 0.5) / 0.5), reference)


def test_an_identity_of_unrounded_images_is_rounded_as_their_reference() -> None:
    protocol = PROTOCOLS["lightningdit"]
    prepared = protocol.prepare(photo(91, 67), 32)
    fraction = prepared - prepared.floor()
    assert float(fraction.min()) < 0.01 < 0.99 < float(fraction.max()), "nothing here needs to be rounded"
    away_from_half = (fraction - 0.5).abs() > 1e-3
    assert away_from_half.float().mean() > 0.95
    given_back, reference = protocol.to_uint8(protocol.model_input(prepared)), protocol.reference(prepared)
    assert torch.equal(given_back[away_from_half], reference[away_from_half])
    np.testing.assert_array_equal(reference.numpy(), np.rint(prepared.numpy()).astype(np.uint8))


def test_a_reference_is_clamped() -> None:
    values = torch.tensor([-0.6, -0.4, 0.4, 0.6, 254.6, 255.4, 255.6, 300.0])
    assert PROTOCOLS["lightningdit"].reference(values).tolist() == [0, 0, 0, 1, 255, 255, 255, 255]


@pytest.mark.parametrize(
    ("value", "rounded", "truncated"),
    [
        (0.0, 0, 0),
        (0.4, 0, 0),
        (0.6, 1, 0),
        (10.3, 10, 10),
        (10.49, 10, 10),
        (10.51, 11, 10),
        (10.99, 11, 10),
        (127.5 + 0.01, 128, 127),
        (254.4, 254, 254),
        (254.9, 255, 254),
        (255.0, 255, 255),
    ],
)
def test_outputs_are_rounded_or_truncated(value: float, rounded: int, truncated: int) -> None:
    output = torch.full((1, 3, 2, 2), value) / 127.5 - 1.0
    assert PROTOCOLS["dcae"].to_uint8(output).unique().tolist() == [rounded]
    assert PROTOCOLS["rae"].to_uint8(output).unique().tolist() == [truncated]


def test_rounding_is_numpys_and_truncating_a_cast() -> None:
    output = 2.4 * torch.rand(3, 64, 64) - 1.2
    values = (output.double().numpy().clip(-1.0, 1.0) + 1.0) / 2.0 * 255.0
    by_rounding, by_truncating = (PROTOCOLS[name].to_uint8(output).numpy() for name in ("dcae", "rae"))
    fraction = values - np.floor(values)
    clear = (np.abs(fraction - 0.5) > 1e-4) & (np.minimum(fraction, 1.0 - fraction) > 2e-4)
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(by_rounding[clear], np.rint(values)[clear].astype(np.uint8))
    np.testing.assert_array_equal(by_truncating[clear], values[clear].astype(np.uint8))
    assert 0.4 < (by_rounding != by_truncating)[clear].mean() < 0.6


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_outputs_are_clamped(name: str, dtype: torch.dtype) -> None:
    output = torch.tensor([-50.0, -1.5, -1.0, 1.0, 1.5, 50.0], dtype=dtype)
    assert PROTOCOLS[name].to_uint8(output).tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_outputs_that_are_not_finite_are_refused(name: str, value: float) -> None:
    output = torch.zeros(1, 3, 4, 4)
    output[0, 1, 2, 3] = value
    with pytest.raises(InputError, match="finite") as caught:
        PROTOCOLS[name].to_uint8(output)
    assert "\n" not in str(caught.value)


class NoFloat64(TorchDispatchMode):
    """As on Apple's GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_outputs_are_rounded_on_devices_without_float64(protocol: Protocol) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    model_input = protocol.model_input(values)
    with NoFloat64():
        assert torch.equal(protocol.to_uint8(model_input), values)


# --- which protocols there are ---

WORDS = {
    "dcae": ("64×64", "boxes", "bicubic", "antialiased", "centre crop", "ADM", "mean", " rounded to uint8", "AlexNet"),
    "lightningdit": (
        "bilinearly",
        "antialiasing",
        "tensors",
        "centre crop",
        "sample",
        " rounded to uint8",
        "VGG-16",
        "SSIM and LPIPS",
    ),
    "rae": (
        "100 dB",
        "boxes",
        "bicubic",
        "antialiased",
        "centre crop",
        "posterior's mean",
        " truncated to uint8",
        "VGG-16",
    ),
    "original": ("bilinearly", "Pillow", "antialiased", "centre crop", "pooled over all images", "7 pixels", "AlexNet"),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_its_sentences_say_what_it_does(name: str) -> None:
    text = " ".join(PROTOCOLS[name].sentences(64))
    for word in (*WORDS[name], "64×64 px", "[-1, 1]", "LPIPS", "v0.1"):
        assert word in text
    if name != "original":
        assert "mean over images" in text
        assert "11 pixels" in text
        assert "pooled" not in text


@pytest.mark.parametrize("name", ["dc-ae", "DCAE", "", "rae\nx"])
def test_an_unknown_protocol_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(InputError, match="unknown protocol") as caught:
        find_protocol(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("accepted: dcae, lightningdit, original, rae")
