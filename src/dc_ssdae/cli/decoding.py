"""What the commands that decode share: the check of their options, and decoding each file.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dc_ssdae.cli.common import Done, Job, for_each_file, load_model, plan_outputs, shape_line
from dc_ssdae.cli.options import DecodingOptions
from dc_ssdae.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE

TRAJECTORY = "-trajectory.png"
"""Ending of the file that `--return_trajectory` writes."""


class ToDecode(NamedTuple):
    """What is read from a file: a latent (1, c, h, w), the image's (H, W) in pixels, and notes on conversions."""

    latent: "Tensor"
    size: tuple[int, int]
    notes: Sequence[str] = ()


@contextmanager
def naming_options() -> Iterator[None]:
    """Let an error about a setting of `DCSSDAE.decode` name the option instead."""
    try:
        yield
    except InputError as error:
        setting = r"(^|(?<= for ))num_(?=steps )|^(?=(step_size|momentum|tolerance) )"
        raise InputError(re.sub(setting, "--", str(error))) from error


def decode_files(options: DecodingOptions, files: Sequence[Path], read: "Callable[[Path, DCSSDAE], ToDecode]") -> int:
    """Decode the latent that `read` makes of each file, and write images and trajectories; gives the exit code.

    Raises:
        InputError: an option is out of range, or does not fit the model or the others; or as `plan_outputs` and
            `load_model`. What is wrong with one file is reported.
    """
    jobs = plan_outputs(options, files, ".png", *([TRAJECTORY] if options.return_trajectory else []))
    if (options.draft is None) != (options.start is None):
        raise InputError("--draft and --start need each other: --start is the share of the draft in the starting point")
    model = load_model(options)
    import torch

    from dc_ssdae.data.images import to_uint8, write_png
    from dc_ssdae.data.transforms import crop_to
    from dc_ssdae.decoding import Divergence, plan_decoding

    names = ("sampler", "num_steps", "step_size", "momentum", "tolerance")
    settings = {name: getattr(options, name) for name in names}
    with naming_options():
        plan_decoding(model.dynamics, start=options.start or 0.0, **settings)

    def decode(job: Job) -> Done:
        latent, size, notes = read(job.source, model)
        draft = None if options.draft is None else _read_draft(options.draft, job.source.stem, size, model)
        with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Divergence)
            output = model.decode(
                latent.to(model.device),
                # Drawn on the CPU, so that a seed means the same noise on every device.
                generator=torch.Generator().manual_seed(options.seed),
                draft=draft,
                start=options.start,
                return_trajectory=options.return_trajectory,
                **settings,
            )
        write_png(to_uint8(crop_to(output.sample[0], size)), job.target)
        if options.return_trajectory:
            states = [to_uint8(crop_to(state[0].nan_to_num(), size)) for state in output.trajectory]
            write_png(torch.cat(states, dim=2), job.target.with_name(f"{job.target.stem}{TRAJECTORY}"))
        if any(issubclass(warning.category, Divergence) for warning in caught):
            notes = [*notes, "diverged; this is the best state it had: try a smaller --step_size"]
        count, residual = int(output.num_evaluations[0]), float(output.residual_rms[0])
        remark = "" if count == 1 else f", {count} evaluations, field RMS {residual:.4g}"
        return Done(shape_line(job, size, latent) + remark, notes)

    return for_each_file(options, jobs, decode)


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
