"""Autoencoders that diffusers has saved: finding them, reading their config.json, loading them safely and strictly."""

import inspect
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dc_ssdae.errors import InputError, shown
from dc_ssdae.hub import fetch_model
from dc_ssdae.model_folder import weight_files
from dc_ssdae.weights import PICKLE_SUFFIXES, WEIGHTS, pickle_refused, shard_files

SINGLE = f"{WEIGHTS}.safetensors"
INDEX = f"{WEIGHTS}.safetensors.index.json"
"""What diffusers calls weights without a variant, in one file and in several."""


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
    def is_on_the_hub(self) -> bool:
        """Whether the name is a hub id."""
        return not os.path.isdir(self.name)


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
        raise InputError(f"{label}: the hub cannot be reached, and no copy was downloaded before") from problem
    raise InputError(f"{label}: {message_of(problem)}") from problem


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
    return source.is_on_the_hub or any(
        any(source.folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".index.json", *PICKLE_SUFFIXES)
    )


def load_diffusers_model(
    source: DiffusersSource, kind: Any, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """Load a model onto the CPU, in eval mode; strict where diffusers is lenient, and never from a pickle.

    diffusers' own loading knows about the names that old files have for attention. It picks the reader of a file by the
    file's name, and would unpickle what an index of safetensors calls otherwise; so it is shown safetensors alone.

    Args:
        source: as `find_diffusers_model` gives it.
        kind: the class, as `autoencoder_class` gives it.
        dtype: of the weights.
        variant: which of several files, such as "fp16"; None takes the one without.

    Raises:
        InputError: there are no safetensors, or they are damaged or do not fit the config; names the tensor.
    """
    name = kind.__name__
    folder = _fetch(source, variant) if source.is_on_the_hub else source.folder
    files = _weight_files(source, folder, variant)
    with tempfile.TemporaryDirectory() as vetted:
        Path(vetted, "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        for called, file in files.items():
            Path(vetted, called).symlink_to(file.absolute())
        try:
            with _silent_diffusers():
                model, told = kind.from_pretrained(
                    vetted, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
                )
        except Exception as error:  # what diffusers raises for files that do not fit has no common base
            line = message_of(error).replace(vetted, str(folder)).rstrip(".")
            raise InputError(f"{source.label} cannot be loaded as {name}: {line}") from error
    model.register_to_config(_name_or_path=source.name)
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


def message_of(error: BaseException) -> str:
    """An exception's message without line breaks; its class where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def _fetch(source: DiffusersSource, variant: str | None) -> Path:
    """Get config.json and the safetensors of a model on the hub, and nothing else; gives the folder."""
    try:
        return fetch_model(source.name, source.subfolder, variant)
    except InputError as error:
        raise InputError(str(error).replace(source.name, source.label, 1)) from None
    except Exception as error:  # the hub's and the network's errors have no common base
        raise InputError(f"{source.label}: no download of its weights: {message_of(error).rstrip('.')}") from error


def _weight_files(source: DiffusersSource, folder: Path, variant: str | None) -> dict[str, Path]:
    """Find a variant's safetensors, and their index if there is one, by the names that they have without a variant."""
    end = f".{variant}" if variant else ""
    # The second is how diffusers once called it.
    for index in (folder / f"{SINGLE}.index{end}.json", folder / f"{SINGLE}{end}.index.json"):
        if index.is_file():
            return {INDEX: index, **{file.name: file for file in _shards(source, index)}}
    single = folder / f"{WEIGHTS}{end}.safetensors"
    if single.is_file():
        return {SINGLE: single}
    has_safetensors = any(folder.glob("*.safetensors"))
    pickles = [file for suffix in PICKLE_SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    meant = [file for file in pickles if file.stem == single.stem or not has_safetensors]
    if source.is_on_the_hub:
        raise _not_on_the_hub(source, single.name, [file.name for file in meant])
    if meant:
        raise pickle_refused(min(meant, key=lambda file: file.stem != single.stem), single)
    others = [repr(other) for other in weight_files(folder) if other and other != variant]
    there = f"; there is the variant {' and '.join(others)}" if others else ""
    raise InputError(f"{source.label}: there is no {single.name}{there}")


def _shards(source: DiffusersSource, index: Path) -> list[Path]:
    try:
        files = shard_files(index)
    except InputError as error:
        if not source.is_on_the_hub:
            raise
        # A command with paths in the cache, where no pickle ever arrives, would not help.
        raise InputError(f"{source.label}: {index.name} is no index of safetensors that lie beside it") from error
    for file in files:
        if not file.is_file():
            raise InputError(f"{source.label}: {index.name} names {shown(file.name)}, which is missing")
    return files


def _not_on_the_hub(source: DiffusersSource, wanted: str, pickles: list[str]) -> InputError:
    """What to say of a model on the hub without the wanted safetensors."""
    from huggingface_hub import list_repo_files

    reached = True
    try:
        place = PurePosixPath(source.subfolder or "")
        files = [file for file in map(PurePosixPath, list_repo_files(source.name)) if file.parent == place]
        has_safetensors = any(file.suffix == ".safetensors" for file in files)
        pickles = [file.name for file in files if file.suffix in PICKLE_SUFFIXES and not has_safetensors]
    except Exception:  # out of reach: what was kept from it is all that is known
        reached = False
    if pickles:
        command = shlex.join(["hf", "download", source.name, "--local-dir", source.name.rpartition("/")[2]])
        return InputError(
            f"{source.label}: its weights are a pickle alone, {pickles[0]}, which could run code when loaded; download "
            f"it, {command}, and name that folder instead: what to convert it with is said there"
        )
    where = "on the hub" if reached else "in what was kept from the hub, which is out of reach"
    return InputError(f"{source.label}: there is no {wanted} {where}")


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
