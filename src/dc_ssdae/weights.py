"""Reading safetensors files with errors that name the tensor; nothing here ever unpickles."""

import json
import shlex
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dc_ssdae.errors import InputError, MissingInputError
from dc_ssdae.files import check_file

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

LARGEST_HEADER = 100_000_000
"""Bytes of a header that safetensors reads."""

FLOATS = ("F64", "F32", "BF16", "F16")
"""safetensors' names of the types that a floating-point tensor is loaded from."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file onto the CPU.

    Raises:
        InputError: the file is missing, no safetensors file, or truncated; names the first tensor cut off.
    """
    tensor_shapes(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a file's tensors from its header alone.

    Raises:
        InputError: the file is missing, no safetensors file, or truncated; names the first tensor cut off.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_refused(path)
    if not path.exists():
        raise MissingInputError(f"{path}: no such file")
    check_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header_bytes = file.read(length) if 0 < length <= min(size - 8, LARGEST_HEADER) else b""
    try:
        header = json.loads(header_bytes)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = {name: 8 + length + int(entry["data_offsets"][1]) for name, entry in entries.items()}
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{path} is not a safetensors file, or its header is cut off") from None
    cut_off = [name for name in sorted(ends, key=lambda name: ends[name]) if ends[name] > size]
    if cut_off:
        raise InputError(
            f"{path} is truncated: tensor {cut_off[0]!r} is cut off ({len(cut_off)} of {len(ends)} tensors incomplete)"
        )
    try:
        with safe_open(path, framework="pt"):  # checks types and offsets, reads no tensor
            return shapes
    except SafetensorError as error:
        raise _unreadable(path, error) from None


def pickle_refused(path: Path, converted: Path | None = None) -> InputError:
    """What to say of a pickle file in place of loading it, which could run code.

    Args:
        path: of the pickle.
        converted: what its tensors are to be saved as; by default beside it, as safetensors.
    """
    command = converting_command(path, converted or path.with_suffix(".safetensors"))
    return InputError(f"{path} is a pickle file, which could run code when loaded; convert it: {command}")


def converting_command(pickle: Path, converted: Path) -> str:
    """The shell command that turns a pickled state dict into safetensors."""
    source, target = (json.dumps(str(file)) for file in (pickle, converted))
    code = (
        "import torch, safetensors.torch as st; "
        f'st.save_file(torch.load({source}, map_location="cpu", weights_only=True), {target})'
    )
    return f"python -c {shlex.quote(code)}"


def check_tensors(files: Iterable[Path], expected: Mapping[str, Tensor]) -> None:
    """Check that the files together hold exactly the expected tensors.

    Raises:
        InputError: lists every tensor that is missing, left over, or of another shape or kind of numbers.
    """
    found: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    files = list(files)
    for file in files:
        found.update(tensor_shapes(file))
        with safe_open(file, framework="pt") as opened:
            types.update({name: opened.get_slice(name).get_dtype() for name in opened.keys()})  # noqa: SIM118
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing: {', '.join(missing)}")
    if left_over := sorted(set(found) - set(expected)):
        problems.append(f"left over: {', '.join(left_over)}")
    problems += [
        f"{name} has shape {found[name]}, not {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if found[name] != tuple(expected[name].shape)
    ]
    problems += [
        f"{name} is of type {types[name]}, not of {' or '.join(wanted)}"
        for name in sorted(set(expected) & set(found))
        if types[name] not in (wanted := FLOATS if expected[name].is_floating_point() else ("I64",))
    ]
    if problems:
        where = files[0] if len(files) == 1 else files[0].parent
        raise InputError(f"{where} does not fit its config.json; {'; '.join(problems)}")


def shard_files(index: Path) -> list[Path]:
    """Read which files an index of sharded weights names; all lie beside it.

    Raises:
        InputError: it is no such index, or names a file elsewhere.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        dict(content["metadata"])  # which diffusers reads
        names = set(content["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise InputError(f"{index} is no index of sharded weights") from None
    for file in files:
        if file.parent != index.parent or file.name in ("", ".."):
            raise InputError(f"{index} names {str(file)!r}; shards lie beside their index")
    if not files:
        raise InputError(f"{index} names no shards")
    for file in files:
        if file.suffix in PICKLE_SUFFIXES:
            raise pickle_refused(file)
        if file.suffix != ".safetensors":
            raise InputError(f"{index} names {file.name!r}; shards are safetensors files")
    return files


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable safetensors file: {' '.join(str(error).split())}")
