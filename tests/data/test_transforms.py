"""Padding and cropping back for every small size, resizing against Pillow, the random crop's distribution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dc_ssdae.data.loader import resize_and_crop
from dc_ssdae.data.transforms import (
    center_crop,
    crop_to,
    pad_to_multiple,
    random_scaled_crop,
    resize_shorter_side,
)
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.protocol import PROTOCOLS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded_by_numpy(array: np.ndarray, multiple: int) -> np.ndarray:
    for axis in (-2, -1):
        side = array.shape[axis]
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, -side % multiple)
        array = np.pad(array, pad, mode="reflect" if -side % multiple < side else "edge")
    return array


# --- padding ---


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 16, 17, 40])
def test_pad_and_crop_back(side: int, multiple: int) -> None:
    for height, width in ((side, side), (side, 41 - side), (3, side)):
        x = torch.randn(2, 3, height, width, generator=seeded(side))
        padded, size = pad_to_multiple(x, multiple)
        assert size == (height, width)
        np.testing.assert_array_equal(padded.numpy(), padded_by_numpy(x.numpy(), multiple))
        assert torch.equal(crop_to(padded, size), x)


# --- resizing and cropping ---


@pytest.mark.parametrize(("height", "width", "size"), [(60, 97, 20), (97, 60, 33), (40, 40, 64), (31, 50, 31)])
def test_resizing_is_pillows_bicubic(height: int, width: int, size: int) -> None:
    pixels = torch.randint(0, 256, (3, height, width), generator=seeded(), dtype=torch.uint8)
    resized = resize_shorter_side(pixels, size)
    assert resized.dtype == torch.uint8
    assert resized.shape[0] == 3
    assert min(resized.shape[1:]) == size
    assert max(resized.shape[1:]) == int(size * max(height, width) / min(height, width))
    by_pillow = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(
        (resized.shape[2], resized.shape[1]), Image.Resampling.BICUBIC
    )
    difference = resized.permute(1, 2, 0).numpy().astype(int) - np.array(by_pillow).astype(int)
    assert np.abs(difference).max() <= 1


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that a tensor had."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


@pytest.mark.parametrize("shape", [(1, 3000), (2000, 5)])
@pytest.mark.parametrize("prepare", [resize_and_crop, *(protocol.prepare for protocol in PROTOCOLS.values())])
def test_thin_images_are_cut_before_they_are_enlarged(
    shape: tuple[int, int], prepare: Callable[[torch.Tensor, int], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, resized = Image.Image.resize, [0]

    def resize_and_remember(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        resized.append(3 * size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", resize_and_remember)
    middle = (torch.arange(max(shape)) // (max(shape) // 2)).mul(200).to(torch.uint8)  # dark, then bright
    pixels = middle.reshape(1, *(-1 if side > 5 else 1 for side in shape)).expand(3, *shape)
    with LargestTensor() as largest:
        square = prepare(pixels, 32)
    assert square.shape == (3, 32, 32)
    assert max(largest.values, *resized) <= 3 * 32 * 32 * 10
    assert square.amin() <= 4
    assert square.amax() >= 196


# --- the random crop ---


def test_half_of_the_crops_are_mirrored_and_without_flip_the_rest_stays() -> None:
    pixels = torch.randint(0, 256, (3, 30, 40), generator=seeded(), dtype=torch.uint8)
    mirrored = 0
    for seed in range(400):
        crop, plain = (random_scaled_crop(pixels, 12, 2.0, seeded(seed), flip) for flip in (True, False))
        assert torch.equal(crop, plain) or torch.equal(crop, plain.flip(-1))
        assert (crop.shape, crop.dtype) == ((3, 12, 12), torch.uint8)
        mirrored += not torch.equal(crop, plain)
    assert 160 <= mirrored <= 240  # four standard deviations


def test_every_place_is_equally_likely() -> None:
    """At scale 1 a square of the shorter side is cut, and only its place along the longer side is drawn."""
    columns = torch.arange(32, dtype=torch.uint8).expand(3, 8, 32).contiguous()
    lefts, tops = np.zeros(25), np.zeros(25)
    for pixels, counts, generator in ((columns, lefts, seeded(7)), (columns.transpose(1, 2), tops, seeded(8))):
        for _ in range(2000):
            crop = random_scaled_crop(pixels.contiguous(), 8, 1.0, generator)  # not resized
            place = int(crop[0].min())
            expected = columns[:, :, place : place + 8]
            expected = expected if counts is lefts else expected.transpose(1, 2)
            assert torch.equal(crop, expected) or torch.equal(crop, expected.flip(-1))
            counts[place] += 1
    for counts in (tops, lefts):
        mean = 2000 / len(counts)
        chi_squared = float(((counts - mean) ** 2 / mean).sum())
        assert chi_squared < len(counts) - 1 + 4 * (2 * (len(counts) - 1)) ** 0.5


def test_the_scale_is_uniform() -> None:
    """The shorter side is enlarged to s times the result's, s uniform in [1, aug_scale]."""
    ramp = torch.arange(300, dtype=torch.float32).expand(3, 200, 300).contiguous()
    generator = seeded(11)
    scales = []
    for _ in range(600):
        crop = random_scaled_crop(ramp, 16, 5.0, generator)
        slope = (crop[0, 8, 11] - crop[0, 8, 4]) / 7  # source pixels per result pixel, away from the borders
        scales.append(200 / (abs(float(slope)) * 16))
    assert 0.99 < min(scales) < 1.04
    assert 4.95 < max(scales) < 5.1
    assert abs(np.mean(scales) - 3.0) < 0.2
    assert abs(np.std(scales) - 4 / 12**0.5) < 0.1


@pytest.mark.parametrize(
    ("function", "shape", "arguments"),
    [
        *((pad_to_multiple, shape, (multiple,)) for shape, multiple in (((3, 8, 8), 0), ((3, 0, 8), 8), ((8, 8), 8))),
        *((crop_to, (3, 8, 8), (size,)) for size in ((9, 8), (8, 9), (0, 8))),
        *((center_crop, (3, 8, 12), (size,)) for size in (9, 0)),
        *((resize_shorter_side, shape, (size,)) for shape, size in (((3, 8, 12), 0), ((3, 0, 4), 8))),
        *((random_scaled_crop, (3, 8, 8), (4, scale)) for scale in (0.99, -2.0, float("inf"), float("nan"))),
        *((random_scaled_crop, shape, (4, 2.0)) for shape in ((8, 8), (1, 8, 8), (2, 3, 8, 8))),
        (random_scaled_crop, (3, 8, 8), (0, 2.0)),
    ],
)
def test_what_cannot_be_done_is_refused(
    function: Callable[..., object], shape: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    generator = {"generator": seeded()} if function is random_scaled_crop else {}
    with pytest.raises(InputError, match=r"not|at least one pixel|cannot crop"):
        function(torch.zeros(shape), *arguments, **generator)
