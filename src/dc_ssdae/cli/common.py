"""What the commands share: messages, checks of outputs, loading the model, and processing files one by one.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dc_ssdae.errors import InputError, advising_on_memory, counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.cli.options import BatchOptions, FileOptions, ModelOptions, OutputOptions
    from dc_ssdae.cli.parser import Options
    from dc_ssdae.data.loader import BrokenImage
    from dc_ssdae.distributed import Processes
    from dc_ssdae.latent import DiagonalGaussian


T = TypeVar("T")


def say(line: str) -> None:
    """Print a line to standard output, above a progress bar; characters that its encoding lacks are escaped."""
    from tqdm import tqdm

    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)


def show(found: Any, as_json: bool, as_text: Callable[[], str]) -> None:
    """Print what a command has found, as JSON or as text for people."""
    say(json.dumps(found, indent=2, default=asdict) if as_json else as_text())


def cells(figures: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Format figures, which may be nested, by their dotted names, without those that are None or empty.

    A spread is told by its median and quartiles.
    """
    found: dict[str, str] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping) and "median" in value:
            parts = [value["median"], value["low"], value["high"]]
            texts = [f"{part:,.0f}" if part >= 1000 else f"{part:.3g}" for part in parts]
            found[f"{prefix}{name}"] = "{} ({}..{})".format(*texts)
        elif isinstance(value, Mapping):
            found |= cells(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            found[f"{prefix}{name}"] = " ".join(cells(dict(enumerate(value))).values())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = f"{value:,.5g}" if isinstance(value, float) else f"{value:,}"
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return {name: text for name, text in found.items() if text}


def side_by_side(entries: Sequence[Mapping[str, Any]]) -> str:
    """Make a table with a column for each of some figures with the same names."""
    columns = [cells(entry) for entry in entries]
    names = dict.fromkeys(name for column in columns for name in column)
    return table([(name, *(column.get(name, "-") for column in columns)) for name in names], "l" * (1 + len(columns)))


def table(rows: Sequence[Sequence[str]], columns: str, width: int | None = None) -> str:
    """Align cells in columns, with neither colours nor lines, so that the text can be piped.

    Args:
        rows: of cells, the header first, if there is one.
        columns: "l" (text, aligned to the left, which takes several lines where it is too long, except in the first
            column) or "r" (a number, to the right) for each.
        width: in characters; by default the terminal's, or 100 in a pipe.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for kind in columns:
        is_whole = kind == "r" or not grid.columns  # numbers, and labels in the first column
        grid.add_column(justify="left" if kind == "l" else "right", no_wrap=is_whole, overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(width=width or shutil.get_terminal_size((100, 24)).columns, color_system=None)
    lines = console.render_lines(grid, pad=False)
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)


def say_part(name: str, folder: Path, manifest: Mapping[str, Any], remark: str) -> None:
    """Report a part of a data set that was made into shards."""
    label, broken = f"{name}: " if name else "", len(manifest["broken"])
    left_out = f"; {broken} broken, left out, listed in manifest.json" if broken else ""
    size = f"{counted(manifest['images'], 'image')} in {counted(len(manifest['shards']), 'shard')}"
    say(f"{label}{size} -> {folder}{remark}{left_out}")


def complain(program: str, message: str) -> None:
    """Print `program: message` to standard error, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"{program}: {message}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def check_outputs(options: "OutputOptions", files: Sequence[Path]) -> None:
    """Refuse to replace existing files, before the work that makes them, unless `--overwrite` is given.

    Args:
        options: of the command.
        files: to be written.

    Raises:
        InputError: names the first file that is there already, or a folder that is a file.
    """
    for file in files:
        if file.parent.exists() and not file.parent.is_dir():
            raise InputError(f"--out {file.parent} is a file, not a folder")
        if os.path.lexists(file) and (not options.overwrite or file.is_dir()):
            raise InputError(f"{file} exists already; choose another --out, or replace files with --overwrite")


def check_output_folder(options: "OutputOptions") -> None:
    """Refuse an `--out` that is not empty, before the work that fills it, unless `--overwrite` is given.

    Raises:
        InputError: names it.
    """
    out = options.out
    if out.exists() and not (out.is_dir() and (options.overwrite or not any(out.iterdir()))):
        raise InputError(f"--out {out} is not an empty folder; name a new one, or replace its files with --overwrite")


def plan_outputs(options: "OutputOptions", sources: Sequence[Path], suffix: str, *others: str) -> dict[Path, Path]:
    """Choose the output of each input, `--out`/STEM.suffix, and make the folder.

    Args:
        options: of the command.
        sources: the inputs.
        suffix: of the files that are written.
        others: of further files that are written beside them.

    Raises:
        InputError: two files would be written to the same place, or one over an input or another file; `--out` is no
            folder.
    """
    inputs = {source.resolve() for source in sources}
    writers: dict[Path, Path] = {}
    for source in sources:
        for ending in (suffix, *others):
            target = options.out / f"{source.stem}{ending}"
            if target in writers:
                raise InputError(f"{writers[target]} and {source} would both be written to {target}; rename one")
            if target.resolve() in inputs:
                raise InputError(f"{target} is one of the inputs and would be overwritten; choose another --out")
            writers[target] = source
    check_outputs(options, list(writers))
    options.out.mkdir(parents=True, exist_ok=True)
    return {source: options.out / f"{source.stem}{suffix}" for source in sources}


def write_outputs(options: "OutputOptions", contents: Mapping[str, str | bytes]) -> None:
    """Write files, by their names, into `--out`, and say where they are."""
    from dc_ssdae.files import write_whole

    for name, content in contents.items():
        content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        write_whole(options.out / name, content)
    say(f"-> {', '.join(str(options.out / name) for name in contents)}")


def advising_on_batches(options: "BatchOptions") -> AbstractContextManager[None]:
    """Turn running out of memory into a line that names `--batch`."""
    return advising_on_memory(f" with --batch {options.batch}; try a smaller one, or --dtype bfloat16")


def tell_of_images(program: str, size: int, broken: "Sequence[BrokenImage]", enlarged: int, total: int) -> None:
    """Report images that cannot be read, and how many were enlarged.

    Args:
        program: name of the command.
        size: side of the images in pixels.
        broken: those that cannot be read, which are left out.
        enlarged: how many were smaller than that.
        total: all of them, the broken ones too.

    Raises:
        InputError: all are broken.
    """
    from dc_ssdae.data.loader import enlarged_caveat

    if len(broken) == total:
        raise InputError(f"none of {counted(total, 'image')} can be read; the first: {broken[0].reason}")
    left_out = [f"left out: {image.reason}" for image in broken]
    for line in (*left_out, *enlarged_caveat(enlarged, total - len(broken), size)):
        complain(program, line)


def writable_model(model: str, instead: str) -> Path:
    """Find a model's folder, and check that it can be written to before the time that measuring takes.

    Args:
        model: a saved model or a run of this package.
        instead: what to do where it cannot be written to.

    Raises:
        InputError: it is no folder, or nothing can be written there.
    """
    from dc_ssdae.model_folder import model_folder

    folder = model_folder(model)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{model} is no folder of a model or run that can be written to; {instead}")
    return folder


def is_main_process() -> bool:
    """Whether this is the main process, which prints messages."""
    return os.environ.get("RANK", "0") == "0"


def main_first(processes: "Processes", load: Callable[[], T]) -> T:
    """Load in the main process, which downloads what is missing, and then in the others, which find it.

    Raises:
        InputError: as `load`, in all processes.
    """
    first = processes.together(lambda: load() if processes.is_main else None)
    return processes.together(lambda: first or load())


def for_each_file(
    options: "Options", targets: Mapping[Path, Path], process: Callable[[Path, Path], tuple[str, Sequence[str]]]
) -> int:
    """Process files one by one; one that fails is reported in a line, and the others are still done.

    Args:
        options: of the command, for its name and whether it shows tracebacks.
        targets: the files to read, with the file to write from each. Several get a progress bar, on a terminal.
        process: reads, computes and writes one file; gives a line about it, and notes on what was converted on the way.
            Its InputError or OSError, and running out of memory, are the file's failure, anything else a bug.

    Returns:
        The exit code: 0, or 2 where a file failed.
    """
    from tqdm import tqdm

    code = 0
    for source, target in tqdm(targets.items(), unit="file", leave=False, disable=True if len(targets) == 1 else None):
        try:
            with advising_on_memory("; try a smaller image, --tile_size 512, --dtype bfloat16 or another --device"):
                line, notes = process(source, target)
        except (InputError, OSError) as error:
            if options.debug:
                traceback.print_exception(error)
            message = describe(error)
            complain(options.program, message if str(source) in message else f"{source}: {message}")
            code = 2
        else:
            for note in notes:
                complain(options.program, f"{source}: {note}")
            say(f"{source.name}: {line} -> {target}")
    return code


def shape_line(size: tuple[int, int], latent: "Tensor") -> str:
    """Describe an image's size, and the shape of its latent (1, c, h, w)."""
    return f"height {size[0]}, width {size[1]}, latent {'x'.join(map(str, latent.shape[1:]))}"


def select_device(name: str) -> "torch.device":
    """Choose the device that `--device` names.

    Args:
        name: "auto" (CUDA, else Apple's GPU, else the CPU), "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        InputError: this machine, or this build of PyTorch, has no such device.
    """
    import torch

    present = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    present += [*(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    chosen = {"auto": present[0], "cuda": "cuda:0"}.get(name, name)
    if chosen not in present:
        raise InputError(f"no device {name!r} on this machine: PyTorch finds {', '.join(present)}")
    return torch.device(chosen)


def import_classes(modules: Sequence[str]) -> list[type]:
    """Import the modules named by `--import`, and list their classes, to load a model with.

    Raises:
        InputError: a module is not to be found, or raised an exception.
    """
    from dc_ssdae.classes import import_module, importing_from

    with importing_from(Path.cwd()):
        imported = [import_module(name) for name in modules]
    return [value for module in imported for value in vars(module).values() if isinstance(value, type)]


def load_model(options: "ModelOptions | FileOptions") -> "DCSSDAE":
    """Load `--model` in `--dtype` onto `--device`, in eval mode.

    Raises:
        InputError: there is no such device, no such module to import, or no such model, or its files are damaged or
            do not fit together, or `--tile_size` does not fit it.
    """
    device = select_device(options.device)  # before the seconds that loading takes
    classes = import_classes(options.modules)
    import torch

    from dc_ssdae.evaluation.candidate_names import load_saved_model
    from dc_ssdae.machine import slow_dtype_note

    if note := slow_dtype_note(device, options.dtype):
        complain(options.program, f"{note}: try --dtype float32")
    model = load_saved_model(options.model, getattr(torch, options.dtype), classes)
    if tile_size := getattr(options, "tile_size", None):
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
