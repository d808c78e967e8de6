"""The autoencoders that can be measured: ours, diffusers', a Python object, image codecs and plain resizing."""

import inspect
import io
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dc_ssdae.autoencoder import DCSSDAE, may_be_on_the_hub, model_folder
from dc_ssdae.classes import find_imported, import_module, importing_from
from dc_ssdae.data.images import to_model_range, to_pillow, to_uint8
from dc_ssdae.decoding import plan_decoding
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.presets import list_presets

RANDOM_WEIGHTS = "random weights"
"""Remark on a candidate that was never trained."""

ZERO_TO_ONE = ("AutoencoderRAE",)
"""Classes of diffusers that take and give images in [0, 1] instead of [-1, 1]."""


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
        names = ("sampler", "num_steps", "step_size", "momentum", "tolerance")
        settings: dict[str, Any] = {name: self.decoding.get(name) for name in names}
        plan_decoding(model.dynamics, **settings)

    def module(self) -> nn.Module:
        return self.model

    def encode(self, x: Tensor) -> Encoded:
        return Encoded(self.model.encode(x).latent_dist)

    def decode(self, latent: Tensor) -> Decoded:
        output = self.model.decode(latent, **self.decoding)
        return Decoded(output.sample, output.num_evaluations)


class DiffusersCandidate(Candidate):
    """An image autoencoder of diffusers: with a posterior (KL), or with latents (DC, Tiny, VQ, RAE).

    Args:
        model: in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._zero_to_one = type(model).__name__ in ZERO_TO_ONE

    def module(self) -> nn.Module:
        return self.model

    def encode(self, x: Tensor) -> Encoded:
        x = 0.5 * x + 0.5 if self._zero_to_one else x
        return Encoded(_posterior(self.model.encode(x.to(self.model.dtype)), type(self.model).__name__))

    def decode(self, latent: Tensor) -> Decoded:
        images = _sample(self.model.decode(latent.to(self.model.dtype)))
        return Decoded(2.0 * images - 1.0 if self._zero_to_one else images)


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
        return Encoded(_posterior(self.value.encode(x), self.name)) if self.splits else Encoded(None, x)

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
        return tvf.resize(x, size, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def count_parameters(self) -> int:
        return 0


@dataclass(frozen=True)
class CandidateSpec:
    """What a user names on the command line; see `parse_candidate`.

    Args:
        label: what the reports call it.
        kind: "ours", "preset", "diffusers", "python", "jpeg", "webp" or "bicubic".
        value: what comes after the kind.
    """

    label: str
    kind: str
    value: str


FORMS = (
    "the folder or hub id of a model of this package, preset:NAME, diffusers:FOLDER_OR_HUB_ID, python:MODULE.NAME, "
    "jpeg:QUALITY, webp:QUALITY or bicubic:FACTOR; LABEL= before any of them names it in the reports"
)


def parse_candidate(text: str) -> CandidateSpec:
    """Read what names a candidate, and check all of it that can be checked without loading anything.

    Args:
        text: one of `FORMS`.

    Raises:
        InputError: it names nothing; says what would be right.
    """
    label, equals, rest = text.partition("=")
    # A label has none of the signs that paths and kinds have, so that "=" in a path stays there.
    if not equals or not label.strip() or re.search(r"[/\\:]", label) or os.path.exists(text):
        label, rest = "", text
    rest = rest.strip()
    kind, colon, value = rest.partition(":")
    if not colon or kind not in ("preset", "diffusers", "python", "jpeg", "webp", "bicubic"):
        if colon and not os.path.exists(rest):
            raise InputError(f"{text!r} names no model; it is {FORMS}")
        kind, value = "ours", rest
    value = value.strip()
    if not value:
        raise InputError(f"{text!r} names no model; it is {FORMS}")
    _check_value(text, kind, value)
    return CandidateSpec(label.strip() or _default_label(kind, value), kind, value)


def name_apart(specs: Sequence[CandidateSpec]) -> list[CandidateSpec]:
    """Check that no two candidates have the same label; folders of the same name get more of their paths.

    Raises:
        InputError: two candidates are the same.
    """
    labels = [spec.label for spec in specs]
    renamed = [
        CandidateSpec(spec.value, spec.kind, spec.value)
        if labels.count(spec.label) > 1
        and spec.kind in ("ours", "diffusers")
        and spec.label == _default_label(spec.kind, spec.value)
        else spec
        for spec in specs
    ]
    seen: set[str] = set()
    for spec in renamed:
        if spec.label in seen:
            raise InputError(f"two models are called {spec.label!r}; name them apart with LABEL=…")
        seen.add(spec.label)
    return renamed


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
    if spec.kind in ("jpeg", "webp"):
        return CodecCandidate(spec.kind, int(spec.value))
    if spec.kind == "bicubic":
        return BicubicCandidate(float(spec.value))
    if spec.kind == "python":
        candidate = PythonCandidate(_find_python(spec.value), spec.value)
        module = candidate.module()
        if module is not None:
            module.to(dtype)
        return candidate
    if spec.kind == "preset":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            ours = OurCandidate(DCSSDAE.from_preset(spec.value).to(dtype), decoding)
        ours.remarks.append(RANDOM_WEIGHTS)
        return ours
    if spec.kind == "ours":
        return OurCandidate(_load_ours(spec.value, dtype, classes), decoding)
    return _load_diffusers(spec.value, dtype, classes, decoding)


def _check_value(text: str, kind: str, value: str) -> None:
    if kind in ("jpeg", "webp"):
        if not re.fullmatch(r"[0-9]{1,3}", value) or not 1 <= int(value) <= 100:
            raise InputError(f"{text!r}: the quality is a whole number from 1 to 100, as in {kind}:75")
    elif kind == "bicubic":
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if not 1 <= factor < math.inf:
            raise InputError(f"{text!r}: the factor is a number from 1 on, as in bicubic:8")
    elif kind == "preset":
        if value not in list_presets():
            raise unknown_name("preset", value, list_presets())
    elif kind == "python":
        if not re.fullmatch(r"\w+(\.\w+)+", value):
            raise InputError(f"{text!r}: write python:MODULE.NAME, as in python:my_package.my_module.my_autoencoder")
    elif not os.path.isdir(value) and not (may_be_on_the_hub(value) and value.isprintable()):
        raise InputError(f"{text!r}: there is no folder {value!r}; a model is named by {FORMS}")


def _default_label(kind: str, value: str) -> str:
    if kind in ("ours", "diffusers") and os.path.isdir(value):
        folder = Path(value).resolve()
        return (folder.parent.name if folder.name in ("model", "vae") else folder.name) or str(folder)
    if kind in ("ours", "diffusers"):
        return value
    return value.rpartition(".")[2] if kind == "python" else f"{kind}:{value}"


def _load_ours(value: str, dtype: torch.dtype, classes: Sequence[type]) -> DCSSDAE:
    name = model_folder(value) if os.path.isdir(value) else value
    try:
        return DCSSDAE.from_pretrained(name, classes=classes, torch_dtype=dtype)
    except OSError as error:
        if os.path.isdir(value):
            raise
        raise InputError(f"{value}: no such folder, and not to be had from the hub: {_line(error)}") from error


def _load_diffusers(
    value: str, dtype: torch.dtype, classes: Sequence[type], decoding: Mapping[str, Any] | None
) -> Candidate:
    """A saved model, or the `vae` of a saved pipeline; with random weights where a folder has a config alone."""
    import diffusers

    config, place = _diffusers_config(value)
    name = config.get("_class_name")
    if name == DCSSDAE.__name__:
        return OurCandidate(_load_ours(str(Path(value, *place.values())), dtype, classes), decoding)
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_model = inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)
    if not (is_model and hasattr(kind, "encode")):
        raise InputError(f"diffusers:{value}: its config.json names {name!r}, which is no autoencoder of diffusers")
    folder = Path(value, *place.values())
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            try:
                model = kind.from_config(config).eval()
            except Exception as error:  # settings that fit no model
                raise InputError(f"diffusers:{value}: its config.json makes no {name}: {_line(error)}") from error
        candidate = DiffusersCandidate(model if dtype == torch.float32 else model.to(dtype))
        candidate.remarks.append(RANDOM_WEIGHTS)
        return candidate
    try:
        model, told = kind.from_pretrained(value, torch_dtype=dtype, output_loading_info=True, **place)
    except Exception as error:  # what diffusers raises for files that do not fit has no common base
        raise InputError(f"diffusers:{value} cannot be loaded as {name}: {_line(error)}") from error
    for key, word in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has left over"),
        ("mismatched_keys", "misshapes"),
    ):
        if told.get(key):
            first, more = sorted(map(str, told[key]))[0], len(told[key]) - 1
            others = f" and {more} more" if more else ""
            raise InputError(f"diffusers:{value}: its file {word} the tensor {first}{others} of {name}")
    return DiffusersCandidate(model.eval())


def _diffusers_config(value: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The config, and the sub-folder as an argument where it is a pipeline's."""
    from diffusers import AutoencoderKL

    problem: Exception | None = None
    for place in ({}, {"subfolder": "vae"}):
        if os.path.isdir(value) and not (Path(value, *place.values()) / "config.json").is_file():
            continue
        try:
            return dict(AutoencoderKL.load_config(value, **place)), place  # reads that of any class
        except Exception as error:  # missing, damaged, or the network
            problem = problem or error
    if problem is None:
        raise InputError(f"diffusers:{value}: there is no config.json, neither there nor in vae/")
    raise InputError(f"diffusers:{value}: {_line(problem)}") from problem


def _find_python(path: str) -> Any:
    """Import what module.name, or module.Class.name, stands for; a class is called without arguments."""
    with importing_from(Path.cwd()):
        module_name, _, name = path.rpartition(".")
        owner: Any
        try:
            owner = import_module(module_name)
        except InputError as error:
            # What looks like a module may be a class that holds the name; the modules before it are imported by now.
            owner = find_imported(module_name)
            if error.__cause__ is not None or owner is None:
                raise
        if not hasattr(owner, name):
            raise unknown_name(f"object of {module_name}", name, [key for key in dir(owner) if not key.startswith("_")])
        value = getattr(owner, name)
        if not isinstance(value, type):
            return value
        try:
            return value()
        except Exception as error:  # a user's code may raise anything
            raise InputError(
                f"python:{path}: making the class without arguments failed with {type(error).__name__}: "
                f"{_line(error)}; name an object or a function instead"
            ) from error


def _posterior(output: Any, name: str) -> DiagonalGaussian:
    """Find the latent in what `encode` gave."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    distribution = getattr(output, "latent_dist", output)
    if isinstance(getattr(distribution, "mean", None), Tensor):
        logvar = getattr(distribution, "logvar", None)
        return DiagonalGaussian(distribution.mean, logvar if isinstance(logvar, Tensor) else None)
    for field in ("latents", "latent"):
        if isinstance(getattr(output, field, None), Tensor):
            return DiagonalGaussian(getattr(output, field))
    if isinstance(output, Tensor):
        return DiagonalGaussian(output)
    raise InputError(f"encode of {name} gives {type(output).__name__}, not a latent: a tensor, latent_dist or latents")


def _sample(output: Any) -> Tensor:
    if isinstance(output, tuple) and output and not hasattr(output, "sample"):
        output = output[0]
    images = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(images, Tensor):
        raise InputError(f"images (B, 3, H, W) are expected from a decoder, not {type(output).__name__}")
    return images


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
