"""The autoencoders that can be measured: ours, diffusers', a Python object, image codecs and plain resizing."""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_pillow, to_uint8
from dc_ssdae.decoding import plan_decoding
from dc_ssdae.errors import InputError
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.networks.diffusers_encoder import as_posterior, encode_images, has_frames, takes_zero_to_one

RANDOM_WEIGHTS = "random weights"
"""Remark on a candidate that was never trained."""

DECODING = ("sampler", "num_steps", "step_size", "momentum", "tolerance")
"""Settings of `DCSSDAE.decode` with which a model can be measured."""


class Encoded(NamedTuple):
    """What a candidate encodes images to.

    Args:
        posterior: the Gaussian over the latents (B, c, h, w); None for a candidate without one.
        code: what a codec writes, for `Candidate.decode`; None for a candidate with a posterior.
        bits: of each image, where there are files; else None.
    """

    posterior: DiagonalGaussian | None
    code: Any = None
    bits: list[int] | None = None


class Decoded(NamedTuple):
    """Images (B, 3, H, W) about [-1, 1], and the evaluations (B,) of a decoder that counts them."""

    images: Tensor
    num_evaluations: Tensor | None = None


class Candidate(ABC):
    """Something that reconstructs images.

    Attributes:
        remarks: what to know about it, each a few words.
        splits: whether it can encode and decode apart from each other.
        is_baseline: whether it is there to compare with, and not to train a generative model on.
    """

    splits: bool = True
    is_baseline: bool = False

    def __init__(self) -> None:
        self.remarks: list[str] = []

    @abstractmethod
    def encode(self, x: Tensor) -> Encoded:
        """Encode images (B, 3, H, W), float32 in [-1, 1]."""

    @abstractmethod
    def decode(self, latent: Any) -> Decoded:
        """Decode what `latent` chose of what `encode` gave."""

    def latent(self, encoded: Encoded, generators: Sequence[torch.Generator] | None) -> Any:
        """What to decode: the posterior's mean, or a sample with one generator an image; or the code."""
        if encoded.posterior is None:
            return encoded.code
        return encoded.posterior.mode() if generators is None else encoded.posterior.sample(list(generators))

    def reconstruct(self, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> tuple[Encoded, Decoded]:
        """Encode and decode images (B, 3, H, W) in [-1, 1]; the latent is a sample where there are generators."""
        encoded = self.encode(x)
        return encoded, self.decode(self.latent(encoded, generators))

    def to(self, device: torch.device) -> "Candidate":
        """Move its networks, if it has any."""
        module = self.module()
        if module is not None:
            module.to(device)
        return self

    def module(self) -> nn.Module | None:
        """Its network; None where it has none."""
        return None

    def count_parameters(self) -> int | None:
        """Parameters of all its networks; None where that is not known."""
        module = self.module()
        return None if module is None else sum(parameter.numel() for parameter in module.parameters())


class OurCandidate(Candidate):
    """A model of this package.

    Args:
        model: in eval mode.
        decoding: what `DCSSDAE.decode` takes besides the latent.

    Raises:
        InputError: the model cannot be decoded so.
    """

    def __init__(self, model: DCSSDAE, decoding: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.decoding = dict(decoding or {})
        settings: dict[str, Any] = {name: self.decoding.get(name) for name in DECODING}
        plan_decoding(model.dynamics, **settings)

    def module(self) -> nn.Module:
        return self.model

    def encode(self, x: Tensor) -> Encoded:
        size, factor = x.shape[-1], self.model.config.downsample_factor
        if size % factor:
            fitting = -(-size // factor) * factor
            raise InputError(f"--size is {size}; this model needs a multiple of {factor}, such as {fitting}")
        return Encoded(self.model.encode(x).latent_dist)

    def decode(self, latent: Tensor) -> Decoded:
        output = self.model.decode(latent, **self.decoding)
        return Decoded(output.sample, output.num_evaluations)


class DiffusersCandidate(Candidate):
    """An autoencoder of diffusers: of images, or of video, which it takes images for one frame of.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._has_frames = has_frames(model)

    def module(self) -> nn.Module:
        return self.model

    def encode(self, x: Tensor) -> Encoded:
        return Encoded(encode_images(self.model, x.to(self.model.dtype), self._has_frames))

    def decode(self, latent: Tensor) -> Decoded:
        latent = latent.to(self.model.dtype)
        images = _sample(self.model.decode(latent.unsqueeze(2) if self._has_frames else latent))[:, :3]
        images = images[:, :, 0] if self._has_frames else images
        return Decoded(2.0 * images - 1.0 if takes_zero_to_one(self.model) else images)


class PythonCandidate(Candidate):
    """A user's own autoencoder: an object with `encode` and `decode`, or a function from images to images.

    Args:
        value: the object or function; images are (B, 3, H, W) in [-1, 1]. `encode` gives the latent, or an output with
            it as diffusers' have (`latent_dist`, `latents`, `latent`); `decode` the images, or an output with `sample`.
        name: of it, for messages.
    """

    def __init__(self, value: Any, name: str) -> None:
        super().__init__()
        self.value = value
        self.name = name
        self.splits = all(callable(getattr(value, method, None)) for method in ("encode", "decode"))
        if not (self.splits or callable(value)):
            raise InputError(
                f"{name} is neither a function from images to images nor an object with encode and decode, but "
                f"{type(value).__name__}"
            )
        if not self.splits:
            self.remarks.append("a function, timed as a whole")
        if isinstance(value, nn.Module):
            value.eval()

    def module(self) -> nn.Module | None:
        return self.value if isinstance(self.value, nn.Module) else None

    def encode(self, x: Tensor) -> Encoded:
        module = self.module()
        weights = None if module is None else next(module.parameters(), None)
        if weights is not None and weights.is_floating_point():
            x = x.to(weights.dtype)
        # A function does all of its work in `decode`.
        return Encoded(as_posterior(self.value.encode(x), self.name)) if self.splits else Encoded(None, x)

    def decode(self, latent: Tensor) -> Decoded:
        return Decoded(_sample(self.value.decode(latent) if self.splits else self.value(latent)))


class CodecCandidate(Candidate):
    """An image codec of Pillow's, on the CPU, file by file.

    Args:
        kind: "jpeg" (colours at half resolution, Pillow's default) or "webp".
        quality: from 1 to 100.
    """

    is_baseline = True

    def __init__(self, kind: str, quality: int) -> None:
        super().__init__()
        self.kind = kind
        self.quality = quality
        self.remarks.append("codec, on one core of the CPU")

    def encode(self, x: Tensor) -> Encoded:
        files = []
        for pixels in to_uint8(x):
            buffer = io.BytesIO()
            to_pillow(pixels).save(buffer, format=self.kind.upper(), quality=self.quality)
            files.append(buffer.getvalue())
        return Encoded(None, (files, x.device), [8 * len(file) for file in files])

    def decode(self, latent: tuple[list[bytes], torch.device]) -> Decoded:
        from torchvision.transforms.v2 import functional as tvf

        files, device = latent
        images = [tvf.pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return Decoded(to_model_range(torch.stack(images)).to(device))


class BicubicCandidate(Candidate):
    """Shrinks each side by a factor and enlarges it again: bicubic, antialiased, unrounded in between.

    Args:
        factor: at least 1.
    """

    is_baseline = True

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.remarks.append("resizing")
        self._size = (1, 1)

    def encode(self, x: Tensor) -> Encoded:
        self._size = (x.shape[-2], x.shape[-1])
        small = [max(1, round(side / self.factor)) for side in self._size]
        return Encoded(DiagonalGaussian(self._resize(x, small)))

    def decode(self, latent: Tensor) -> Decoded:
        return Decoded(self._resize(latent, list(self._size)))

    def _resize(self, x: Tensor, size: list[int]) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tvf

        return tvf.resize(x, size, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def count_parameters(self) -> int:
        return 0


def _sample(output: Any) -> Tensor:
    if isinstance(output, tuple) and output and not hasattr(output, "sample"):
        output = output[0]
    images = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(images, Tensor):
        raise InputError(f"images (B, 3, H, W) are expected from a decoder, not {type(output).__name__}")
    return images
