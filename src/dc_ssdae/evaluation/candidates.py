"""The autoencoders that can be measured: how they are named and opened, and what they give."""

import io
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.classes import import_object, importing_from
from dc_ssdae.data.images import to_model_range, to_pillow, to_uint8
from dc_ssdae.decoding import plan_decoding
from dc_ssdae.errors import InputError, check_names
from dc_ssdae.interop.diffusers import (
    build_autoencoder,
    find_diffusers_model,
    has_weights,
    load_diffusers_model,
    message_of,
)
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.model_folder import model_folder, weight_files
from dc_ssdae.networks.diffusers_encoder import (
    as_posterior,
    encode_images,
    find_autoencoder,
    has_frames,
    takes_zero_to_one,
)

RANDOM_WEIGHTS = "random weights"
"""Remark on a candidate that was never trained."""

DECODING = ("sampler", "num_steps", "step_size", "momentum", "tolerance")
"""Settings of `DCSSDAE.decode` with which a model can be measured."""

_SANA_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    },
    "AutoencoderDC": {
        "encoder_block_types": _SANA_BLOCKS,
        "decoder_block_types": _SANA_BLOCKS,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "decoder_conv_act_fn": "silu",
    },
    "AutoencoderTiny": {},
}
"""Classes of diffusers, with the settings of Stable Diffusion's f8c4, SANA's f32c32 and TAESD that are not defaults."""

KINDS: Mapping[str, tuple[str, str]] = {
    "ours": (".+", "the folder or hub id of a model"),
    "preset": (".+", "preset:NAME"),
    "diffusers": (".+", "diffusers:FOLDER, diffusers:HUB_ID or diffusers:CLASS"),
    "python": (r"\w+(\.\w+)+", "python:MODULE.NAME"),
    "jpeg": ("[1-9][0-9]?|100", "jpeg:QUALITY, from 1 to 100"),
    "webp": ("[1-9][0-9]?|100", "webp:QUALITY, from 1 to 100"),
    "pixels": ("[1-9][0-9]?", "pixels:PATCH"),
    "bicubic": (r"[1-9][0-9]{0,3}(\.[0-9]+)?", "bicubic:FACTOR, at least 1"),
}
"""By what a candidate's name begins with: a pattern for the rest, and how to write it. "ours" is what has no prefix."""


class Encoded(NamedTuple):
    """What a candidate encodes images to.

    Args:
        posterior: the Gaussian over the latents (B, c, h, w); None for a candidate without one.
        code: what a codec writes, for `Candidate.decode`; None for a candidate with a posterior.
        bits: per image, where there are files; else None.
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

    Args:
        module: its network, which is put into eval mode; by default an empty one.
        remarks: what to know about it, each a few words.

    Attributes:
        splits: whether it can encode and decode apart from each other.
        is_baseline: whether it is there to compare with, and not to train a generative model on.
    """

    splits = True
    is_baseline = False

    def __init__(self, module: nn.Module | None = None, remarks: Sequence[str] = ()) -> None:
        self.module = (module or nn.Module()).eval()
        self.remarks = list(remarks)

    @abstractmethod
    def encode(self, x: Tensor) -> Encoded:
        """Encode images (B, 3, H, W), float32 in [-1, 1]."""

    @abstractmethod
    def decode(self, latent: Any) -> Decoded:
        """Decode what `latent` chose of what `encode` gave."""

    def latent(self, encoded: Encoded, generators: Sequence[torch.Generator] | None) -> Any:
        """Choose what to decode: the posterior's mean, or a sample with one generator per image; or the code."""
        if encoded.posterior is None:
            return encoded.code
        return encoded.posterior.mode() if generators is None else encoded.posterior.sample(list(generators))

    def reconstruct(self, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> tuple[Encoded, Decoded]:
        """Encode and decode images (B, 3, H, W) in [-1, 1]; the latent is a sample where there are generators."""
        encoded = self.encode(x)
        return encoded, self.decode(self.latent(encoded, generators))

    def to(self, device: torch.device) -> "Candidate":
        """Move its network."""
        self.module.to(device)
        return self

    def count_parameters(self) -> int | None:
        """Count the parameters of its network; None where it has none, or they are not known."""
        return sum(parameter.numel() for parameter in self.module.parameters()) or None


class PythonCandidate(Candidate):
    """An autoencoder in Python: an object with `encode` and `decode`, or a function from images to images.

    Args:
        value: the object or function; images are (B, 3, H, W) in [-1, 1]. `encode` gives the latent, or an output with
            it as diffusers' have (`latent_dist`, `latents`, `latent`); `decode` the images, or an output with `sample`.
        name: of it, for messages.

    Raises:
        InputError: it is neither.
    """

    def __init__(self, value: Any, name: str) -> None:
        super().__init__(value if isinstance(value, nn.Module) else None)
        self.value, self.name = value, name
        self.splits = all(callable(getattr(value, method, None)) for method in ("encode", "decode"))
        if not (self.splits or callable(value)):
            raise InputError(f"{name} is {type(value).__name__}, not an object with encode and decode, nor a function")
        if not self.splits:
            self.remarks.append("a function, timed as a whole")

    def encode(self, x: Tensor) -> Encoded:
        # A function does all of its work in `decode`.
        return Encoded(as_posterior(self.value.encode(self._cast(x)), self.name)) if self.splits else Encoded(None, x)

    def decode(self, latent: Tensor) -> Decoded:
        output = (self.value.decode if self.splits else self.value)(self._cast(latent))
        images = getattr(output, "sample", output)
        images = images[0] if isinstance(images, tuple) and images else images
        if not isinstance(images, Tensor):
            raise InputError(f"images (B, 3, H, W) are expected from a decoder, not {type(output).__name__}")
        return Decoded(images)

    def _cast(self, x: Tensor) -> Tensor:
        """Cast to the dtype of the network's weights, if it has any."""
        weights = next(self.module.parameters(), x)
        return x.to(weights.dtype) if weights.is_floating_point() else x


class DiffusersCandidate(PythonCandidate):
    """An autoencoder of diffusers: of images, or of video, for which an image is one frame."""

    def encode(self, x: Tensor) -> Encoded:
        return Encoded(encode_images(self.value, self._cast(x), has_frames(self.value)))

    def decode(self, latent: Tensor) -> Decoded:
        with_frames = has_frames(self.value)
        images = super().decode(latent.unsqueeze(2) if with_frames else latent).images
        images = images[:, :3, 0] if with_frames else images[:, :3]  # without alpha
        return Decoded(2.0 * images - 1.0 if takes_zero_to_one(self.value) else images)


class OurCandidate(PythonCandidate):
    """A model of this package.

    Args:
        model: any.
        decoding: what `DCSSDAE.decode` takes besides the latent.

    Raises:
        InputError: the model cannot be decoded so.
    """

    def __init__(self, model: DCSSDAE, decoding: Mapping[str, Any] | None = None) -> None:
        super().__init__(model, "the model")
        self.decoding = dict(decoding or {})
        plan_decoding(model.dynamics, **self.decoding)

    def decode(self, latent: Tensor) -> Decoded:
        output = self.value.decode(latent, **self.decoding)
        return Decoded(output.sample, output.num_evaluations)


class CodecCandidate(Candidate):
    """An image codec of Pillow's, on the CPU, file by file.

    Args:
        kind: "jpeg" (colours at half resolution, Pillow's default) or "webp".
        quality: from 1 to 100.
    """

    is_baseline = True

    def __init__(self, kind: str, quality: int) -> None:
        super().__init__(remarks=["codec, on one core of the CPU"])
        self.kind, self.quality = kind, quality

    def encode(self, x: Tensor) -> Encoded:
        files = []
        for pixels in to_uint8(x):
            buffer = io.BytesIO()
            to_pillow(pixels).save(buffer, format=self.kind, quality=self.quality)
            files.append(buffer.getvalue())
        return Encoded(None, (files, x.device), [8 * len(file) for file in files])

    def decode(self, latent: tuple[list[bytes], torch.device]) -> Decoded:
        from torchvision.transforms.v2.functional import pil_to_tensor

        files, device = latent
        images = [pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return Decoded(to_model_range(torch.stack(images)).to(device))


class BicubicCandidate(Candidate):
    """Shrinks each side by a factor and enlarges it again: bicubic, antialiased, unrounded in between.

    Args:
        factor: at least 1.
    """

    is_baseline = True
    _resize = staticmethod(partial(F.interpolate, mode="bicubic", antialias=True))

    def __init__(self, factor: float) -> None:
        super().__init__(remarks=["resizing"])
        self.factor = factor

    def encode(self, x: Tensor) -> Encoded:
        self._size = x.shape[-2:]
        return Encoded(DiagonalGaussian(self._resize(x, [max(1, round(side / self.factor)) for side in self._size])))

    def decode(self, latent: Tensor) -> Decoded:
        return Decoded(self._resize(latent, self._size))


class PixelCandidate(Candidate):
    """The pixels themselves, as a latent: each square of them becomes a position with as many channels as values.

    Args:
        patch: side of a square in pixels.
    """

    is_baseline = True

    def __init__(self, patch: int) -> None:
        super().__init__(remarks=["pixels in squares, nothing is compressed"])
        self.patch = patch

    def encode(self, x: Tensor) -> Encoded:
        return Encoded(DiagonalGaussian(F.pixel_unshuffle(x, self.patch)))

    def decode(self, latent: Tensor) -> Decoded:
        return Decoded(F.pixel_shuffle(latent, self.patch))


class CandidateSpec(NamedTuple):
    """What a user names on the command line; see `parse_candidate`.

    Args:
        label: what the reports call it.
        kind: one of `KINDS`.
        value: what comes after the kind.
    """

    label: str
    kind: str
    value: str


def parse_candidate(text: str) -> CandidateSpec:
    """Read what names a candidate, without loading anything.

    Args:
        text: the folder or hub id of a model of this package, "photos_f8c16" (comes with it), or one of `KINDS`; LABEL=
            before it names it in the reports.

    Raises:
        InputError: it names nothing; says what would be right.
    """
    # A label has none of the signs that paths and kinds have, so that "=" in a path stays there.
    labelled = None if os.path.exists(text) else re.fullmatch(r"([^=/\\:]+)=(.*)", text, re.DOTALL)
    label, named = labelled.groups() if labelled else ("", text)
    kind, colon, value = (part.strip() for part in named.partition(":"))
    if not colon or os.path.exists(named):
        kind, value = "ours", named.strip()
    check_names("kind of model", [kind], KINDS)
    pattern, form = KINDS[kind]
    if not re.fullmatch(pattern, value):
        raise InputError(f"{text!r} names no model; write {form}")
    if kind in ("ours", "diffusers") and os.path.isdir(value):
        folder = Path(value).resolve()
        default = (folder.parent if folder.name in ("model", "vae") else folder).name
    else:
        default = {"ours": value, "diffusers": value, "python": value.rpartition(".")[2]}.get(kind, f"{kind}:{value}")
    return CandidateSpec(label.strip() or default, kind, value)


def parse_candidates(texts: Sequence[str]) -> list[CandidateSpec]:
    """Read what names candidates.

    Raises:
        InputError: a text names nothing, or two candidates have the same label.
    """
    specs = [parse_candidate(text) for text in texts]
    label, count = Counter(spec.label for spec in specs).most_common(1)[0]
    if count > 1:
        raise InputError(f"two models have the name {label!r}; give one another name with LABEL=…")
    return specs


def open_candidate(
    spec: CandidateSpec,
    dtype: torch.dtype = torch.float32,
    classes: Sequence[type] = (),
    decoding: Mapping[str, Any] | None = None,
) -> Candidate:
    """Load what a spec names, onto the CPU.

    Args:
        spec: as `parse_candidate` gives it.
        dtype: of the networks.
        classes: of the user's own that a saved model of this package names.
        decoding: what `DCSSDAE.decode` takes besides the latent, for models of this package.

    Raises:
        InputError: there is no such model, or its files are damaged or do not fit together.
    """
    kind, value = spec.kind, spec.value
    if kind in ("jpeg", "webp"):
        return CodecCandidate(kind, int(value))
    if kind == "pixels":
        return PixelCandidate(int(value))
    if kind == "bicubic":
        return BicubicCandidate(float(value))
    if kind == "python":
        return _python_candidate(value, dtype)
    if kind == "ours":
        return OurCandidate(load_saved_model(value, dtype, classes), decoding)
    candidate: PythonCandidate
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if kind == "preset":
            candidate = OurCandidate(DCSSDAE.from_preset(value), decoding)
        elif value in PUBLISHED and not os.path.isdir(value):
            candidate = DiffusersCandidate(find_autoencoder(value).from_config(PUBLISHED[value]), value)
        else:
            source = find_diffusers_model(value)
            if source.config.get("_class_name") == DCSSDAE.__name__:
                return OurCandidate(load_saved_model(str(source.folder), dtype, classes), decoding)
            if has_weights(source):
                return DiffusersCandidate(load_diffusers_model(source, dtype), value)
            candidate = DiffusersCandidate(build_autoencoder(source), value)
    candidate.value.to(dtype)
    candidate.remarks.append(RANDOM_WEIGHTS)
    return candidate


def load_saved_model(value: str, dtype: torch.dtype, classes: Sequence[type]) -> DCSSDAE:
    """Load a model of this package, from the folder of a saved model or of a run, or from the hub, onto the CPU.

    Args:
        value: the folder, or the id on the hub.
        dtype: of the networks.
        classes: of the user's own that the model names.

    Raises:
        InputError: there is no such model, or its files are damaged or do not fit together.
    """
    folder = model_folder(value)  # of what is on the hub its id
    variants = list(weight_files(folder))
    # A model that was saved as a variant alone leaves no choice.
    variant = variants[0] if len(variants) == 1 else None
    return DCSSDAE.from_pretrained(str(folder), classes=classes, torch_dtype=dtype, variant=variant)


def _python_candidate(path: str, dtype: torch.dtype) -> Candidate:
    """Import what module.name, or module.Class.name, stands for; a class is called without arguments."""
    with importing_from(Path.cwd()):
        found = import_object(path)
        try:
            found = found() if isinstance(found, type) else found
        except Exception as error:  # a user's code may raise anything
            raise InputError(f"python:{path}: {type(error).__name__}: {message_of(error)}") from error
    return PythonCandidate(found.to(dtype) if isinstance(found, nn.Module) else found, path)
