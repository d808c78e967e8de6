"""Autoencoders that diffusers has saved: finding them, reading their config.json, loading them safely and strictly."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dc_ssdae.errors import InputError, shown
from dc_ssdae.model_folder import WEIGHTS
from dc_ssdae.weights import PICKLE_SUFFIXES

FROM_PICKLE = (
    "a pickle can run code when it is loaded, and never is; turn it into safetensors: safetensors.torch.save_file("
    f"torch.load(FILE, weights_only=True), '{WEIGHTS}.safetensors')"
)
"""What to do with weights that are not in the safetensors format."""


@dataclass(frozen=True)
class DiffusersSource:
    """A model that diffusers' `save_pretrained` has written, in a folder or on the hub.

    Args:
        name: the folder or hub id.
        subfolder: where in it the model lies; None for the top.
        config: its config.json.
        label: what messages call it.
    """

    name: str
    subfolder: str | None
    config: Mapping[str, Any]
    label: str

    @property
    def folder(self) -> Path:
        """Where the model lies, if it is no hub id."""
        return Path(self.name, self.subfolder or "")

    @property
    def place(self) -> dict[str, str]:
        """The sub-folder, as an argument of diffusers' functions."""
        return {} if self.subfolder is None else {"subfolder": self.subfolder}


def find_diffusers_model(name: str, label: str, subfolder: str | None = None) -> DiffusersSource:
    """Read a model's config.json, which imports nothing that it names.

    Args:
        name: a model's folder, a pipeline's, whose `vae/` is meant, or the id of either on the hub.
        label: what messages call it.
        subfolder: where in it the model lies; None looks at the top, then in `vae/`.

    Raises:
        InputError: there is no config.json, or it is no JSON object, or of quantised weights.
    """
    from diffusers import AutoencoderKL
    from huggingface_hub.errors import LocalEntryNotFoundError

    problem: Exception | None = None
    for place in (None, "vae") if subfolder is None else (subfolder,):
        if os.path.isdir(name) and not Path(name, place or "", "config.json").is_file():
            continue
        try:
            with _silent_diffusers():  # reads the config of any class
                config = dict(AutoencoderKL.load_config(name, subfolder=place))
        except Exception as error:  # missing, damaged, or the network
            problem = problem or error
            continue
        if "quantization_config" in config:
            raise InputError(f"{label}: its weights are quantised; take those in float32, float16 or bfloat16")
        return DiffusersSource(name, place, config, label)
    if problem is None:
        where = "neither there nor in vae/" if subfolder is None else f"in {subfolder}/"
        raise InputError(f"{label}: there is no config.json, {where}")
    if isinstance(problem.__context__, LocalEntryNotFoundError):  # of which diffusers says that there is no such file
        raise InputError(f"{label}: the hub is out of reach, and nothing of this name was kept from it") from problem
    raise InputError(f"{label}: {in_one_line(problem)}") from problem


def autoencoder_class(source: DiffusersSource) -> Any:
    """Find the class of diffusers that a config.json names.

    Raises:
        InputError: it names something else.
    """
    import diffusers

    name = source.config.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_model = inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)
    if not (is_model and hasattr(kind, "encode")):
        raise InputError(f"{source.label}: its config.json names {shown(name)}, which is no autoencoder of diffusers")
    return kind


def has_weights(source: DiffusersSource) -> bool:
    """Whether there are weights beside the config, of whatever format; a model on the hub is taken to have some."""
    return not source.folder.is_dir() or any(
        any(source.folder.glob(f"*{suffix}")) for suffix in (".safetensors", *PICKLE_SUFFIXES)
    )


def load_diffusers_model(
    source: DiffusersSource, kind: Any, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """Load a model onto the CPU, in eval mode; strict where diffusers is lenient, and never from a pickle.

    diffusers' own loading knows about shards, variants, the hub, and the names that old files have for attention.

    Args:
        source: as `find_diffusers_model` gives it.
        kind: the class, as `autoencoder_class` gives it.
        dtype: of the weights.
        variant: which of several files, such as "fp16"; None takes the one without.

    Raises:
        InputError: there are no safetensors, or they are damaged or do not fit the config; names the tensor.
    """
    _refuse_pickles(source)
    name = kind.__name__
    try:
        with _silent_diffusers():
            model, told = kind.from_pretrained(
                source.name,
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=True,
                output_loading_info=True,
                **source.place,
            )
    except Exception as error:  # what diffusers raises for files that do not fit has no common base
        line = in_one_line(error)
        hint = f"; {FROM_PICKLE}" if "safetensors" in line and not source.folder.is_dir() else ""
        raise InputError(f"{source.label} cannot be loaded as {name}: {line.rstrip('.')}{hint}") from error
    for key, word in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has left over"),
        ("mismatched_keys", "misshapes"),
    ):
        if told.get(key):
            first, more = sorted(map(str, told[key]))[0], len(told[key]) - 1
            others = f" and {more} more" if more else ""
            raise InputError(f"{source.label}: its file {word} the tensor {first}{others} of {name}")
    return model.eval()


def in_one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its class where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def _refuse_pickles(source: DiffusersSource) -> None:
    if not source.folder.is_dir() or any(source.folder.glob("*.safetensors")):
        return
    for suffix in PICKLE_SUFFIXES:
        for file in sorted(source.folder.glob(f"*{suffix}")):
            raise InputError(f"{source.label}: its weights are in {file.name}; {FROM_PICKLE}")


@contextmanager
def _silent_diffusers() -> Iterator[None]:
    """Keep diffusers from logging what becomes an InputError."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
