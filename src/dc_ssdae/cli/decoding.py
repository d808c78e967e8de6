"""What the commands that decode share: the check of their options, and decoding each file.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import for_each_file, load_model, plan_outputs, shape_line
from dc_ssdae.cli.options import DecodingOptions
from dc_ssdae.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE

TRAJECTORY = "-trajectory.png"
"""Ending of the file that `--return_trajectory` writes."""


def decode_files(
    options: DecodingOptions,
    files: Sequence[Path],
    read: "Callable[[Path, DCSSDAE], tuple[Tensor, tuple[int, int], Sequence[str]]]",
) -> int:
    """Decode the latent of each file, and write images and trajectories; gives the exit code.

    Args:
        options: of the command.
        files: to read.
        read: gives a file's latent (1, c, h, w), the image's (H, W) in pixels, and notes on conversions.

    Raises:
        InputError: an option is out of range, or does not fit the model or the others; or as `plan_outputs` and
            `load_model`. What is wrong with one file is reported.
    """
    targets = plan_outputs(options, files, ".png", *([TRAJECTORY] if options.return_trajectory else []))
    if (options.draft is None) != (options.start is None):
        raise InputError("--draft and --start need each other: --start is the share of the draft in the starting point")
    model = load_model(options)
    import torch

    from dc_ssdae.data.images import to_uint8, write_png
    from dc_ssdae.data.transforms import crop_to
    from dc_ssdae.decoding import Divergence, plan_decoding

    settings = options.given("sampler", "num_steps", "step_size", "momentum", "tolerance", "start")
    plan_decoding(model.dynamics, **settings)

    def decode(source: Path, target: Path) -> tuple[str, Sequence[str]]:
        latent, size, notes = read(source, model)
        draft = None if options.draft is None else _read_draft(options.draft, source.stem, size, model)
        with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Divergence)
            # Drawn on the CPU, so that a seed means the same noise on every device.
            drawn = {"generator": torch.Generator().manual_seed(options.seed), "draft": draft}
            traced = options.return_trajectory
            output = model.decode(latent.to(model.device), return_trajectory=traced, **drawn, **settings)
        write_png(to_uint8(crop_to(output.sample[0], size)), target)
        if traced:
            states = [to_uint8(crop_to(state[0].nan_to_num(), size)) for state in output.trajectory]
            write_png(torch.cat(states, dim=2), target.with_name(f"{target.stem}{TRAJECTORY}"))
        if any(issubclass(warning.category, Divergence) for warning in caught):
            notes = [*notes, "diverged; this is the best state it had: try a smaller --step_size"]
        line, count = shape_line(size, latent), int(output.num_evaluations[0])
        if count > 1:
            line += f", {count} evaluations, field RMS {float(output.residual_rms[0]):.4g}"
        return line, notes

    return for_each_file(options, targets, decode)


def _read_draft(path: Path, stem: str, size: tuple[int, int], model: "DCSSDAE") -> "Tensor":
    """Read a draft as (1, 3, h·f, w·f) in [-1, 1], padded as the image itself was."""
    from dc_ssdae.data.images import read_image, to_model_range
    from dc_ssdae.data.transforms import pad_to_multiple

    file = path / f"{stem}.png" if path.is_dir() else path
    pixels = read_image(file).pixels
    if (found := tuple(pixels.shape[1:])) != tuple(size):
        raise InputError(f"draft {file} has height and width {found}; the image has {tuple(size)}")
    return pad_to_multiple(to_model_range(pixels)[None], model.config.downsample_factor)[0].to(model.device)
