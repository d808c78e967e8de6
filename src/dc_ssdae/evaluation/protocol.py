"""Evaluation protocols: from an image file to what a model sees, and from what it gives to what metrics see.

Published figures differ by these choices more than by models, so a protocol has a name and is printed with its results.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.data.images import to_pillow, to_uint8
from dc_ssdae.data.loader import resize_and_crop
from dc_ssdae.data.transforms import center_crop, central_part
from dc_ssdae.provenance import IN_TRAINING


def adm_crop(pixels: Tensor, size: int) -> Tensor:
    """Halve by 2×2 boxes while the shorter side is at least 2 · size, resize it to size bicubically, cut the centre.

    With Pillow's filters, which are antialiased, and rounded to uint8 at each step, as ADM prepares ImageNet
    (Dhariwal and Nichol 2021, the released code); an odd pixel over goes to the right and the bottom.

    Args:
        pixels: uint8 (3, H, W).
        size: in pixels, at least 1.

    Returns:
        uint8 (3, size, size).
    """
    image = to_pillow(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return tvf.pil_to_tensor(image.crop((left, top, left + size, top + size)))


def bilinear_on_tensors(pixels: Tensor, size: int) -> Tensor:
    """As `adm_crop`, but bilinearly with antialiasing in floating point: float32 in [0, 255], not rounded."""
    return center_crop(tvf.resize(pixels.float(), [size], InterpolationMode.BILINEAR, antialias=True), size)


def bilinear_by_pillow(pixels: Tensor, size: int) -> Tensor:
    """As `adm_crop`, but with Pillow's bilinear filter alone, which is antialiased."""
    image = tvf.resize(to_pillow(pixels), [size], InterpolationMode.BILINEAR)
    return tvf.pil_to_tensor(tvf.center_crop(image, [size]))


RESIZES: Mapping[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "adm": (adm_crop, "in halves by boxes, then bicubically (Pillow, antialiased; the ADM crop)"),
    "bilinear_tensor": (bilinear_on_tensors, "bilinearly on tensors, without rounding (torchvision, antialiased)"),
    "bilinear_pil": (bilinear_by_pillow, "bilinearly (Pillow, antialiased)"),
    "bicubic": (resize_and_crop, "bicubically (torchvision, antialiased)"),
}
"""Ways to bring an image to a square, and how its shorter side is resized, in words: from (uint8 (3, H, W), size) to
(3, size, size), uint8 or, where nothing was rounded, float32, both in [0, 255]."""


@dataclass(frozen=True)
class Protocol:
    """How images are prepared, what is decoded, and which metrics are taken of it.

    Args:
        name: of the protocol.
        resize: one of `RESIZES`.
        size: side of the square in pixels, where the user names no other.
        rounding: of the output to uint8, before every metric that is not in `unrounded`.
        psnr: "per_image" is the mean of the images' PSNRs; "pooled" the PSNR of the mean of their squared errors.
        ssim: "torchmetrics" (Gaussian window of 11 pixels, σ 1.5), or "scikit-image" (uniform window of 7 pixels,
            unbiased covariances); both are means over images.
        lpips: network of LPIPS v0.1, "alex", "vgg" or "squeeze".
        latent: that is decoded, the posterior's "mean" or a "sample" of it.
        inception: what Inception sees: "tensorflow", pixels resized as TensorFlow 1 does it, less 128, by 128; or
            "pytorch-fid", pixels mapped to [-1, 1] and resized by PyTorch's bilinear interpolation without
            antialiasing.
        unrounded: metrics, of "ssim" and "lpips", that see the model's input and output as they are, in [-1, 1], where
            SSIM clamps and LPIPS does not.
        highest_psnr: of an image, in dB, so that one without an error does not make the mean infinite; None is no
            limit.
    """

    name: str
    resize: str = "adm"
    size: int = 256
    rounding: Literal["round", "truncate"] = "round"
    psnr: Literal["per_image", "pooled"] = "per_image"
    ssim: Literal["torchmetrics", "scikit-image"] = "torchmetrics"
    lpips: Literal["alex", "vgg", "squeeze"] = "alex"
    latent: Literal["mean", "sample"] = "mean"
    inception: Literal["tensorflow", "pytorch-fid"] = "pytorch-fid"
    unrounded: tuple[str, ...] = ()
    highest_psnr: float | None = None

    def prepare(self, pixels: Tensor, size: int) -> Tensor:
        """Bring an image, uint8 (3, H, W), to (3, size, size), uint8 or float32, both in [0, 255]."""
        return RESIZES[self.resize][0](central_part(pixels), size)

    def model_input(self, prepared: Tensor) -> Tensor:
        """Map prepared images of any shape to the model's range: float32 in [-1, 1]."""
        return prepared.float() / 127.5 - 1

    def reference(self, prepared: Tensor) -> Tensor:
        """The uint8 images that metrics compare with: the prepared ones, rounded to nearest where they are not yet."""
        return prepared.float().round().clamp(0, 255).to(torch.uint8)

    def to_uint8(self, output: Tensor) -> Tensor:
        """Turn a model's output, about [-1, 1], into uint8: clamped, then rounded or truncated.

        Raises:
            InputError: it is not finite.
        """
        # Truncating is rounding half a level lower, less a hair, so that what stands for a whole number stays one.
        lower = (0.5 - 1e-4) / 127.5 if self.rounding == "truncate" else 0.0
        return to_uint8(output.float() - lower)

    def sentences(self, size: int) -> list[str]:
        """Say it in words.

        Args:
            size: side of the images in pixels.
        """
        psnr = "mean over images" if self.psnr == "per_image" else "of the squared error pooled over all images"
        window = "Gaussian window of 11 pixels" if self.ssim == "torchmetrics" else "uniform window of 7 pixels"
        rounded = "rounded" if self.rounding == "round" else "truncated"
        titles = " and ".join(name.upper() for name in self.unrounded)
        apart = f"every metric but {titles}, taken of unrounded images in [-1, 1]" if titles else "every metric"
        limit = "" if self.highest_psnr is None else f", at most {self.highest_psnr:g} dB per image"
        return [
            f"Images: {size}×{size} px, the shorter side resized {RESIZES[self.resize][1]}, centre crop.",
            f"Decoded: the posterior's {self.latent}. Output clamped to [-1, 1] and {rounded} to uint8 before {apart}.",
            f"PSNR: {psnr}{limit} (torchmetrics). SSIM: mean over images, {window} ({self.ssim}). LPIPS: {self.lpips}, "
            "v0.1 (lpips), mean over images.",
        ]


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("dcae"),
        Protocol("lightningdit", "bilinear_tensor", lpips="vgg", latent="sample", unrounded=("ssim", "lpips")),
        Protocol("rae", rounding="truncate", lpips="vgg", inception="tensorflow", highest_psnr=100.0),
        Protocol("original", "bilinear_pil", 128, psnr="pooled", ssim="scikit-image", inception="tensorflow"),
    )
}
"""The protocols by name; `docs/evaluation.md` says whose each of them is."""

TRAINING = Protocol(IN_TRAINING, "bicubic")
"""Of evaluations within a training run, which are for watching it."""
