"""Reading safetensors files, and comparing tensors, with errors that name the tensor; nothing here ever unpickles."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dc_ssdae.errors import InputError, MissingInputError, shown
from dc_ssdae.files import check_file

WEIGHTS = "diffusion_pytorch_model"
"""Stem of the names that diffusers gives weight files."""

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that a floating-point tensor is loaded from."""


def read_safetensors(*paths: Path) -> dict[str, Tensor]:
    """Read all tensors of files onto the CPU; the files are mapped, and bytes are read when they are used.

    Raises:
        InputError: a file is missing, no safetensors file, or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        if path.suffix in PICKLE_SUFFIXES:
            raise pickle_refused(path)
        if not path.exists():
            if pickles := [file for suffix in PICKLE_SUFFIXES if (file := path.with_suffix(suffix)).exists()]:
                raise pickle_refused(pickles[0])
            raise MissingInputError(f"{path}: no such file")
        check_file(path)
        try:
            tensors |= load_file(path)
        except (SafetensorError, TypeError, RuntimeError) as error:
            raise InputError(f"{path} is truncated, or no safetensors file: {str(error).splitlines()[0]}") from None
    return tensors


def pickle_refused(path: Path, converted: Path | None = None) -> InputError:
    """What to say of a pickle file in place of loading it, which could run code.

    Args:
        path: of the pickle.
        converted: what its tensors are to be saved as; by default beside it, as safetensors.
    """
    source, target = (json.dumps(str(file)) for file in (path, converted or path.with_suffix(".safetensors")))
    tensors = f'torch.load({source}, map_location="cpu", weights_only=True)'
    code = shlex.quote(f"import torch, safetensors.torch as st; st.save_file({tensors}, {target})")
    return InputError(f"{path} is a pickle file, which could run code when loaded; convert it: python -c {code}")


def check_same_tensors(what: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the expected ones.

    Args:
        what: holds the given tensors, for the message.
        expected: by name, on any device.
        given: by name, on any device; a floating-point tensor may have another precision than the expected one.

    Raises:
        InputError: names the first tensors that are missing, left over, or of another shape or type.
    """
    problems: list[str] = []
    for name, wanted in expected.items():
        found = given.get(name, wanted)
        if found.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
        elif found.dtype not in (FLOATS if wanted.is_floating_point() else (wanted.dtype,)):
            problems.append(f"{name} is of type {found.dtype}, not {wanted.dtype}")
    problems += [f"missing: {name}" for name in expected if name not in given]
    problems += [f"left over: {name}" for name in given if name not in expected]
    if problems:
        raise InputError(f"{what} does not fit; {'; '.join(problems[:5])} ({len(problems)} in all)")


def shard_files(index: Path) -> list[Path]:
    """Read which files an index of sharded weights names; all lie beside it.

    Raises:
        InputError: it is no such index, or names something else than safetensors files beside it.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        dict(content["metadata"])  # which diffusers reads
        files = [index.parent / name for name in sorted(set(content["weight_map"].values()))]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        files = []
    if not files or any(file.parent != index.parent or file.suffix != ".safetensors" for file in files):
        raise InputError(f"{index} must name safetensors beside it, not {shown([file.name for file in files])}")
    return files
