"""What the commands share: options, messages, outputs, the model, and going through files one by one.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import os
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dc_ssdae.cli.parser import (
    LARGEST_SEED,
    CommandParser,
    device_name,
    file_path,
    filled,
    number,
    numbers,
    whole_number,
)
from dc_ssdae.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace

    import torch
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.latent import DiagonalGaussian

DTYPES = ("float32", "bfloat16", "float16")


class Job(NamedTuple):
    """One file to read and the file to write from it."""

    source: Path
    target: Path


class Done(NamedTuple):
    """What became of a file: a `line` for standard output, and `notes` on what was converted on the way."""

    line: str
    notes: Sequence[str] = ()


def add_device_option(parser: CommandParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        type=device_name,
        default="auto",
        help="auto, cpu, cuda, cuda:N or mps; auto (the default) takes a GPU where there is one",
    )


def add_dtype_option(parser: CommandParser, purpose: str, choices: Sequence[str] = DTYPES) -> None:
    """Add `--dtype`; `purpose` is what its help says it is for."""
    parser.add_argument("--dtype", choices=choices, default="float32", help=f"{purpose} (default float32)")


def add_model_options(parser: CommandParser) -> None:
    """Add `--model`, `--import`, `--device` and `--dtype`, which `load_model` reads."""
    parser.add_argument(
        "--model",
        required=True,
        type=filled,
        metavar="DIR",
        help="the folder of a saved model or of a training run, or a model's id on the hub",
    )
    add_import_option(parser)
    add_device_option(parser)
    add_dtype_option(parser, "what to compute in")


def add_import_option(parser: CommandParser) -> None:
    """Add `--import`, which `import_classes` takes as `args.modules`."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        type=filled,
        metavar="MODULE",
        help="import a Python module with classes of your own that the model names, from the current folder or where "
        "it is installed; may be given several times",
    )


def add_output_option(parser: CommandParser) -> None:
    """Add `--out`."""
    parser.add_argument(
        "--out", required=True, type=file_path, metavar="DIR", help="folder to write to; made if need be"
    )


def add_decoding_options(parser: CommandParser) -> None:
    """Add what `decode_latent` takes: the settings of `DCSSDAE.decode`, under their names."""
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="one_step; for equilibrium matching gradient_descent, nesterov or nesterov_eqm (the variant of its "
        "authors' code); for flow matching euler. Default: one_step, and where other options ask for several steps "
        "gradient_descent or euler",
    )
    parser.add_argument(
        "--steps",
        "--num_steps",
        dest="num_steps",
        type=whole_number(1),
        metavar="N",
        help="evaluations of the decoder, with --tolerance at most (default 1; 4 for a sampler of several "
        "steps; 16 with --tolerance)",
    )
    parser.add_argument(
        "--step_size",
        type=numbers,
        metavar="X[,X...]",
        help="of a descent, one for all steps or one for each (default: from the decay)",
    )
    parser.add_argument(
        "--momentum", type=number, metavar="X", help="of nesterov, at least 0 and below 1 (default 0.3)"
    )
    parser.add_argument(
        "--tolerance",
        type=number,
        metavar="X",
        help="of a descent: an image is done when the root mean square of its field falls below it, for a gradient "
        "scale of 1",
    )
    parser.add_argument(
        "--draft",
        type=file_path,
        metavar="PATH",
        help="start from this image, noised, in place of pure noise; or from DIR/STEM.png of each input",
    )
    parser.add_argument(
        "--start", type=number, metavar="X", help="share of --draft in the start, from 0 to 1; the rest is noise"
    )
    parser.add_argument(
        "--return_trajectory", action="store_true", help="also write DIR/STEM-trajectory.png, all states side by side"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, LARGEST_SEED),
        default=0,
        metavar="S",
        help="of the noise each image starts from (default 0, which is also what DCSSDAE.decode takes by default)",
    )


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
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def plan_outputs(sources: Sequence[Path], out: Path, suffix: str, *others: str) -> list[Job]:
    """Decide which file is written from which, `out/STEM.suffix`, and make the folder.

    Args:
        sources: the inputs.
        out: the folder.
        suffix: of the files that are written.
        others: of further files that are written beside them.

    Raises:
        InputError: two files would be written to the same place, or one over an input; `out` is no folder.
    """
    inputs = {file for source in sources if (file := _identity(source))}
    writers: dict[str, Path] = {}
    jobs = []
    for source in sources:
        targets = [out / f"{source.stem}{ending}" for ending in (suffix, *others)]
        for target in targets:
            key = target.name.casefold()  # not every file system tells A from a
            if key in writers:
                raise InputError(f"{writers[key]} and {source} would both be written to {target}; rename one of them")
            if _identity(target) in inputs:
                raise InputError(f"{target} is one of the inputs and would be overwritten; choose another --out")
            writers[key] = source
        jobs.append(Job(source, targets[0]))
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    return jobs


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
            if _is_out_of_memory(error):
                message = "out of memory; try a smaller image, --dtype bfloat16 or another --device"
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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place first, then renamed; its folder is made if need be.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def shape_line(job: Job, size: tuple[int, int], latent: "Tensor") -> str:
    """Tell an image's size, its latent's shape (1, c, h, w) and where the outcome went."""
    shape = "x".join(map(str, latent.shape[1:]))
    return f"{job.source.name}: height {size[0]}, width {size[1]}, latent {shape} -> {job.target}"


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from all others, whatever name it goes by; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # On the CPU and on Apple's GPUs it is a plain RuntimeError.
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


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
    device = torch.device(name)
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
            do not fit together.
    """
    device = select_device(args.device)  # before the seconds that loading takes
    classes = import_classes(args.modules)
    import torch

    from dc_ssdae.autoencoder import DCSSDAE, model_folder

    name = model_folder(args.model) if Path(args.model).is_dir() else args.model
    try:
        model = DCSSDAE.from_pretrained(name, classes=classes, torch_dtype=getattr(torch, args.dtype))
    except OSError as error:
        if Path(args.model).is_dir():
            raise
        raise InputError(f"{args.model}: no such folder, and not to be had from the hub: {describe(error)}") from error
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


class Decoded(NamedTuple):
    """A decoded image, uint8 (3, H, W); its states side by side or None; a remark on the decode, and a warning."""

    image: "Tensor"
    trajectory: "Tensor | None"
    remark: str
    notes: Sequence[str]


def check_decoding(args: "Namespace", model: "DCSSDAE") -> None:
    """Find mistakes in the decoding options once, before any file is read.

    Raises:
        InputError: an option is unknown, out of range, or does not fit the model or the others.
    """
    from dc_ssdae.decoding import plan_decoding
    from dc_ssdae.samplers.result import check_share

    if (args.draft is None) != (args.start is None):
        raise InputError("--draft and --start go together: start is the share of the draft in what is decoded from")
    start = 0.0 if args.start is None else check_share("--start", args.start)
    plan_decoding(model.dynamics, args.sampler, args.num_steps, args.step_size, args.momentum, args.tolerance, start)


def decode_latent(
    args: "Namespace", model: "DCSSDAE", latent: "Tensor", size: tuple[int, int], stem: str = ""
) -> Decoded:
    """Decode one latent as the options say, and cut the image to its original size.

    Args:
        args: with what `add_decoding_options` adds.
        model: in eval mode.
        latent: (1, c, h, w), on any device.
        size: the image's (H, W) in pixels, at most (h·f, w·f).
        stem: of the input's name, by which a folder of drafts has its draft.

    Raises:
        InputError: the result is not finite, or there is no such draft.
    """
    import warnings

    import torch

    from dc_ssdae.data.images import to_uint8
    from dc_ssdae.data.transforms import crop_to
    from dc_ssdae.decoding import Divergence

    # Drawn on the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator().manual_seed(args.seed)
    draft = None if args.draft is None else _read_draft(args.draft, stem, size, model)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Divergence)
        output = model.decode(
            latent.to(model.device),
            generator=generator,
            num_steps=args.num_steps,
            step_size=args.step_size,
            sampler=args.sampler,
            momentum=args.momentum,
            tolerance=args.tolerance,
            draft=draft,
            start=args.start,
            return_trajectory=args.return_trajectory,
        )
        image = to_uint8(crop_to(output.sample[0], size))
        states = None
        if args.return_trajectory:
            states = torch.cat([to_uint8(crop_to(state[0].nan_to_num(), size)) for state in output.trajectory], dim=2)
    count = int(output.num_evaluations[0])
    remark = "" if count == 1 else f", {count} evaluations, field RMS {float(output.residual_rms[0]):.4g}"
    diverged = any(issubclass(warning.category, Divergence) for warning in caught)
    notes = ["diverged; this is the best state it had: try a smaller --step_size"] if diverged else []
    return Decoded(image, states, remark, notes)


TRAJECTORY = "-trajectory.png"
"""Ending of the file that `--return_trajectory` writes."""


def plan_decoded(args: "Namespace", sources: Sequence[Path]) -> list[Job]:
    """As `plan_outputs`, for what `write_decoded` writes."""
    return plan_outputs(sources, args.out, ".png", *([TRAJECTORY] if args.return_trajectory else []))


def write_decoded(decoded: Decoded, job: Job) -> None:
    """Write the image, and the trajectory beside it."""
    from dc_ssdae.data.images import write_png

    write_png(decoded.image, job.target)
    if decoded.trajectory is not None:
        write_png(decoded.trajectory, job.target.with_name(f"{job.target.stem}{TRAJECTORY}"))


def _read_draft(path: Path, stem: str, size: tuple[int, int], model: "DCSSDAE") -> "Tensor":
    """Read a draft as (1, 3, h·f, w·f) in [-1, 1], padded as the image itself was."""
    from dc_ssdae.data.images import read_image, to_model_range
    from dc_ssdae.data.transforms import pad_to_multiple

    file = path / f"{stem}.png" if path.is_dir() else path
    pixels = read_image(file).pixels
    if tuple(pixels.shape[1:]) != tuple(size):
        height, width = pixels.shape[1:]
        raise InputError(f"draft {file} has height {height}, width {width}; the image has {size[0]} and {size[1]}")
    return pad_to_multiple(to_model_range(pixels)[None], model.config.downsample_factor)[0].to(model.device)
