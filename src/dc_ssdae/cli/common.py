"""What the commands share: options, messages, outputs, the model, and going through files one by one.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dc_ssdae.errors import InputError, ToldElsewhere, is_out_of_memory

if TYPE_CHECKING:
    from argparse import Namespace

    import torch
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.latent import DiagonalGaussian


class Job(NamedTuple):
    """One file to read and the file to write from it."""

    source: Path
    target: Path


class Done(NamedTuple):
    """What became of a file: a `line` for standard output, and `notes` on what was converted on the way."""

    line: str
    notes: Sequence[str] = ()


def say(line: str) -> None:
    """Print a line to standard output, above a progress bar; what its encoding lacks is escaped."""
    from tqdm import tqdm

    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)


def complain(program: str, message: str) -> None:
    """Print `program: message` to standard error, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"{program}: {message}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        other = f" -> {error.filename2}" if error.filename2 not in (None, error.filename) else ""
        return f"{error.filename}{other}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def check_outputs(args: "Namespace", files: Sequence[Path]) -> None:
    """Refuse to replace files, before the work that makes them, unless `--overwrite` is given.

    Args:
        args: with `overwrite`.
        files: to be written.

    Raises:
        InputError: names the first file that is there already, or a folder that is a file.
    """
    for file in files:
        if file.parent.exists() and not file.parent.is_dir():
            raise InputError(f"--out {file.parent} is a file, not a folder")
        if os.path.lexists(file) and (not args.overwrite or file.is_dir()):
            raise InputError(f"{file} exists already; choose another --out, or replace files with --overwrite")


def check_output_folder(args: "Namespace") -> None:
    """Refuse an `--out` that holds something, before the work that fills it, unless `--overwrite` is given.

    Raises:
        InputError: names it.
    """
    out: Path = args.out
    if out.exists() and not (out.is_dir() and (args.overwrite or not any(out.iterdir()))):
        raise InputError(f"--out {out} is not an empty folder; name a new one, or replace its files with --overwrite")


def plan_outputs(args: "Namespace", sources: Sequence[Path], suffix: str, *others: str) -> list[Job]:
    """Decide which file is written from which, `--out`/STEM.suffix, and make the folder.

    Args:
        args: with `out` and `overwrite`.
        sources: the inputs.
        suffix: of the files that are written.
        others: of further files that are written beside them.

    Raises:
        InputError: two files would be written to the same place, or one over an input or another file; `--out` is no
            folder.
    """
    inputs = {os.path.realpath(source) for source in sources}
    writers: dict[str, Path] = {}
    jobs = []
    for source in sources:
        targets = [args.out / f"{source.stem}{ending}" for ending in (suffix, *others)]
        for target in targets:
            key = target.name.casefold()  # not every file system tells A from a
            if key in writers:
                raise InputError(f"{writers[key]} and {source} would both be written to {target}; rename one of them")
            if os.path.realpath(target) in inputs:
                raise InputError(f"{target} is one of the inputs and would be overwritten; choose another --out")
            writers[key] = source
        check_outputs(args, targets)
        jobs.append(Job(source, targets[0]))
    args.out.mkdir(parents=True, exist_ok=True)
    return jobs


def write_outputs(args: "Namespace", contents: Mapping[str, bytes]) -> None:
    """Write files, by their names, into `--out`, and say where they are."""
    from dc_ssdae.files import write_whole

    for name, content in contents.items():
        write_whole(args.out / name, content)
    say(f"-> {', '.join(str(args.out / name) for name in contents)}")


def told_by_one_process(run: "Callable[[Namespace], int]") -> "Callable[[Namespace], int]":
    """Let an error that all processes of a command meet be told by one of them."""

    @wraps(run)
    def run_and_tell(args: "Namespace") -> int:
        try:
            return run(args)
        except (InputError, OSError) as error:
            if os.environ.get("RANK", "0") == "0":
                raise
            raise ToldElsewhere(describe(error)) from error

    return run_and_tell


def for_each_file(args: "Namespace", jobs: Sequence[Job], process: Callable[[Job], Done]) -> int:
    """Process files one by one; one that fails is reported in a line, and the others are still done.

    Args:
        args: with `program`, and `debug` for tracebacks.
        jobs: the files. Several of them get a progress bar, on a terminal.
        process: reads, computes and writes one file; its InputError or OSError, and running out of memory, are
            the file's failure, anything else a bug.

    Returns:
        The exit code: 0, or 2 where a file failed.
    """
    from tqdm import tqdm

    debug = getattr(args, "debug", False)
    failed = False
    for job in tqdm(jobs, unit="file", leave=False, disable=True if len(jobs) == 1 else None):
        try:
            done = process(job)
        except Exception as error:
            if is_out_of_memory(error):
                message = "out of memory; try a smaller image, --tile_size 512, --dtype bfloat16 or another --device"
            elif isinstance(error, (InputError, OSError)):
                message = describe(error)
            else:
                raise
            if debug:
                traceback.print_exception(error)
            named = str(job.source) in message
            complain(args.program, message if named else f"{job.source}: {message}")
            failed = True
        else:
            if done.notes:
                complain(args.program, f"{job.source}: {'; '.join(done.notes)}")
            say(done.line)
    return 2 if failed else 0


def shape_line(job: Job, size: tuple[int, int], latent: "Tensor") -> str:
    """Tell an image's size, its latent's shape (1, c, h, w) and where the outcome went."""
    shape = "x".join(map(str, latent.shape[1:]))
    return f"{job.source.name}: height {size[0]}, width {size[1]}, latent {shape} -> {job.target}"


def select_device(name: str) -> "torch.device":
    """Choose the device that `--device` names.

    Args:
        name: "auto" (CUDA, else Apple's GPU, else the CPU), "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        InputError: this machine, or this build of PyTorch, has no such device.
    """
    import torch

    count, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if count else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda" and (device.index or 0) >= count:
        present = f"it has cuda:0 to cuda:{count - 1}" if count else "PyTorch finds no CUDA device here"
        raise InputError(f"no device {name!r} on this machine: {present}; --device auto takes what there is")
    if device.type == "mps" and not has_mps:
        raise InputError("no device 'mps' on this machine; --device auto takes what there is")
    return device


def import_classes(modules: Sequence[str]) -> list[type]:
    """Import what `--import` names, and list the classes in there, for a model to be loaded with.

    Raises:
        InputError: a module is not to be found, or raised an exception.
    """
    from dc_ssdae.classes import import_module, importing_from

    with importing_from(Path.cwd()):
        imported = [import_module(name) for name in modules]
    return [value for module in imported for value in vars(module).values() if isinstance(value, type)]


def load_model(args: "Namespace") -> "DCSSDAE":
    """Load `--model` in `--dtype` onto `--device`, in eval mode.

    Raises:
        InputError: there is no such device, no such module to import, or no such model, or its files are damaged or
            do not fit together, or `--tile_size` does not fit it.
    """
    device = select_device(args.device)  # before the seconds that loading takes
    classes = import_classes(args.modules)
    import torch

    from dc_ssdae.evaluation.candidate_names import load_saved_model
    from dc_ssdae.machine import slow_dtype_note

    if note := slow_dtype_note(device, args.dtype):
        complain(args.program, f"{note}: try --dtype float32")
    model = load_saved_model(args.model, getattr(torch, args.dtype), classes)
    tile_size = getattr(args, "tile_size", None)
    if tile_size is not None:
        model.enable_tiling(tile_size)
    return model.to(device)


def encode_pixels(model: "DCSSDAE", pixels: "Tensor") -> "tuple[DiagonalGaussian, tuple[int, int]]":
    """Encode one image of any size, padded to a multiple of the model's f.

    Args:
        model: in eval mode.
        pixels: uint8 (3, H, W).

    Returns:
        The Gaussian over the latent (1, c, h, w), and the image's (H, W) for `decode_latent`.
    """
    import torch

    from dc_ssdae.data.images import to_model_range
    from dc_ssdae.data.transforms import pad_to_multiple

    x, size = pad_to_multiple(to_model_range(pixels)[None], model.config.downsample_factor)
    with torch.inference_mode():
        return model.encode(x.to(model.device)).latent_dist, size
