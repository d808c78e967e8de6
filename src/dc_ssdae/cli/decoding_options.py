"""What the commands that decode share: the options, the check of them, one image, and what is written of it.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dc_ssdae.cli.common import Done, Job, add_seed_option, for_each_file, load_model, plan_outputs, shape_line
from dc_ssdae.cli.parser import CommandParser, file_path, number, numbers, whole_number
from dc_ssdae.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE


def add_decoding_options(parser: CommandParser) -> None:
    """Add what `decode_latent` takes: the settings of `DCSSDAE.decode`, under their names."""
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="one_step; for equilibrium matching gradient_descent, nesterov or nesterov_eqm (the variant of its "
        "authors' code); for flow matching euler or midpoint. Default: one_step, and where other options ask for "
        "several steps gradient_descent or euler",
    )
    parser.add_argument(
        "--steps",
        "--num_steps",
        dest="num_steps",
        type=whole_number(1),
        metavar="N",
        help="steps, each an evaluation of the decoder (two with midpoint), with --tolerance at most (default 1; 4 for "
        "a sampler of several steps; 16 with --tolerance)",
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
    default = "default 0, which is also what DCSSDAE.decode takes by default"
    add_seed_option(parser, "of the noise each image starts from", default)


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
    settings = args.sampler, args.num_steps, args.step_size, args.momentum, args.tolerance, start
    with naming_options():
        plan_decoding(model.dynamics, *settings)


@contextmanager
def naming_options() -> Iterator[None]:
    """Let an error about a setting of `DCSSDAE.decode` name the option instead."""
    try:
        yield
    except InputError as error:
        setting = r"(^|(?<= for ))num_(?=steps )|^(?=(step_size|momentum|tolerance) )"
        raise InputError(re.sub(setting, "--", str(error))) from error


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


class ToDecode(NamedTuple):
    """What a file gives: a latent (1, c, h, w), the image's (H, W) in pixels, and notes on what was converted."""

    latent: "Tensor"
    size: tuple[int, int]
    notes: Sequence[str] = ()


def decode_files(args: "Namespace", files: Sequence[Path], read: "Callable[[Path, DCSSDAE], ToDecode]") -> int:
    """Decode what `read` makes of each file, write the images, and the trajectories beside them; gives the exit code.

    Raises:
        InputError: as `plan_outputs`, `load_model` and `check_decoding`; what is wrong with one file is reported.
    """
    jobs = plan_outputs(args, files, ".png", *([TRAJECTORY] if args.return_trajectory else []))
    model = load_model(args)
    check_decoding(args, model)
    from dc_ssdae.data.images import write_png

    def decode(job: Job) -> Done:
        latent, size, notes = read(job.source, model)
        decoded = decode_latent(args, model, latent, size, job.source.stem)
        write_png(decoded.image, job.target)
        if decoded.trajectory is not None:
            write_png(decoded.trajectory, job.target.with_name(f"{job.target.stem}{TRAJECTORY}"))
        return Done(shape_line(job, size, latent) + decoded.remark, [*notes, *decoded.notes])

    return for_each_file(args, jobs, decode)


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
