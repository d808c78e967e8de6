"""What names a candidate on the command line, and loading what it names."""

import importlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.classes import import_object, importing_from
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.evaluation.candidates import (
    RANDOM_WEIGHTS,
    BicubicCandidate,
    Candidate,
    CodecCandidate,
    DiffusersCandidate,
    OurCandidate,
    PythonCandidate,
)
from dc_ssdae.interop.diffusers import (
    autoencoder_class,
    find_diffusers_model,
    has_weights,
    load_diffusers_model,
    message_of,
)
from dc_ssdae.model_folder import may_be_on_the_hub, model_folder, weight_files
from dc_ssdae.presets import SHIPPED_MODEL, list_presets

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
"""Of diffusers' classes: the settings of Stable Diffusion's f8c4, SANA's f32c32 and TAESD, where not the default."""


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
    f"the folder or hub id of a model of this package, {SHIPPED_MODEL} (comes with it), preset:NAME, "
    "diffusers:FOLDER_OR_HUB_ID, "
    f"diffusers:CLASS ({', '.join(PUBLISHED)}: as published, with random weights), python:MODULE.NAME, jpeg:QUALITY, "
    "webp:QUALITY or bicubic:FACTOR; LABEL= before any of them names it in the reports"
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
            raise InputError(f"two models have the name {spec.label!r}; give one another name with LABEL=…")
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
            model = DCSSDAE.from_preset(spec.value)
            ours = OurCandidate(model if dtype == torch.float32 else model.to(dtype), decoding)
        ours.remarks.append(RANDOM_WEIGHTS)
        return ours
    if spec.kind == "ours":
        return OurCandidate(load_saved_model(spec.value, dtype, classes), decoding)
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
    elif value == SHIPPED_MODEL or (kind == "diffusers" and value in PUBLISHED):
        return
    elif not os.path.isdir(value) and not (may_be_on_the_hub(value) and value.isprintable()):
        raise InputError(f"{text!r}: there is no folder {value!r}; a model is named by {FORMS}")


def _default_label(kind: str, value: str) -> str:
    if kind in ("ours", "diffusers") and os.path.isdir(value):
        folder = Path(value).resolve()
        return (folder.parent.name if folder.name in ("model", "vae") else folder.name) or str(folder)
    if kind in ("ours", "diffusers"):
        return value
    return value.rpartition(".")[2] if kind == "python" else f"{kind}:{value}"


def load_saved_model(value: str, dtype: torch.dtype, classes: Sequence[type]) -> DCSSDAE:
    """Load a model of this package, from the folder of a saved model or of a run, or from the hub, onto the CPU.

    Args:
        value: the folder, or the id on the hub.
        dtype: of the networks.
        classes: of the user's own that the model names.

    Raises:
        InputError: there is no such model, or its files are damaged or do not fit together.
    """
    is_folder = os.path.isdir(value) or value == SHIPPED_MODEL
    name = model_folder(value) if is_folder else value
    variants = list(weight_files(Path(name))) if is_folder else []
    # A model that was saved as a variant alone leaves no choice.
    variant = variants[0] if len(variants) == 1 else None
    return DCSSDAE.from_pretrained(name, classes=classes, torch_dtype=dtype, variant=variant)


def _load_diffusers(
    value: str, dtype: torch.dtype, classes: Sequence[type], decoding: Mapping[str, Any] | None
) -> Candidate:
    """A saved model, or the `vae` of a saved pipeline; with random weights where a folder has a config alone."""
    if value in PUBLISHED and not os.path.isdir(value):
        return _untrained(getattr(importlib.import_module("diffusers"), value), PUBLISHED[value], dtype, value)
    source = find_diffusers_model(value, f"diffusers:{value}")
    if source.config.get("_class_name") == DCSSDAE.__name__:
        return OurCandidate(load_saved_model(str(source.folder), dtype, classes), decoding)
    kind = autoencoder_class(source)
    if has_weights(source):
        return DiffusersCandidate(load_diffusers_model(source, kind, dtype))
    return _untrained(kind, source.config, dtype, source.label)


def _untrained(kind: Any, config: Mapping[str, Any], dtype: torch.dtype, label: str) -> Candidate:
    """A class of diffusers with random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = kind.from_config(config).eval()
        except Exception as error:  # settings that fit no model
            raise InputError(f"{label}: its config.json makes no {kind.__name__}: {message_of(error)}") from error
    candidate = DiffusersCandidate(model if dtype == torch.float32 else model.to(dtype))
    candidate.remarks.append(RANDOM_WEIGHTS)
    return candidate


def _find_python(path: str) -> Any:
    """Import what module.name, or module.Class.name, stands for; a class is called without arguments."""
    with importing_from(Path.cwd()):
        value = import_object(path)
        if not isinstance(value, type):
            return value
        try:
            return value()
        except Exception as error:  # a user's code may raise anything
            raise InputError(
                f"python:{path}: making the class without arguments failed with {type(error).__name__}: "
                f"{message_of(error)}; name an object or a function instead"
            ) from error
