"""`dc-ssdae stats`: mean and standard deviation of a model's latents, into its config.json."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    add_batch_option,
    add_model_options,
    add_size_option,
    add_workers_option,
    complain,
    load_model,
    say,
)
from dc_ssdae.cli.parser import CommandParser, filled, whole_number
from dc_ssdae.errors import InputError, counted

if TYPE_CHECKING:
    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.latent import DiagonalGaussian, LatentStatistics


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae stats",
        description="Measure mean and standard deviation of a model's latents, channel by channel, and write them "
        "into its config.json, where latent diffusion finds them: latents_mean and latents_std, for "
        "(z - latents_mean) / latents_std, and shift_factor and scaling_factor, for (z - shift_factor) * "
        "scaling_factor. They are those of samples of the encoder's Gaussian, from its moments.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=filled,
        metavar="ROOT",
        help="images, as data.root of a training run: a folder, perhaps with train/, of images or shards; or a "
        "pattern of shards",
    )
    parser.add_argument(
        "--images",
        type=whole_number(1),
        default=10_000,
        metavar="N",
        help="how many to measure, at most, evenly spread over the data set (default 10000)",
    )
    add_size_option(parser)
    add_batch_option(parser)
    add_workers_option(parser)
    parser.add_argument("--no-write", action="store_true", help="leave config.json as it is")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    return parser


def run(args: Namespace) -> int:
    """Measure, print and write the statistics; gives the exit code."""
    is_folder = Path(args.model).is_dir()
    if not (is_folder or args.no_write):
        raise InputError(
            f"{args.model} is no folder whose config.json could be written: name one with --model, or only print, with "
            "--no-write"
        )
    model = load_model(args)
    from dc_ssdae.card import write_model_card
    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.model_folder import model_folder, write_latent_statistics

    folder = None if args.no_write else model_folder(args.model)
    if folder is not None and not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to; --no-write only prints")
    factor = model.config.downsample_factor
    if args.size % factor:
        larger = args.size + -args.size % factor
        raise InputError(f"--size {args.size} is no multiple of this model's f = {factor}; {larger} is")
    images = ValidationImages(open_sources(args.data, None, None, None).train, args.size, args.images)
    statistics, broken = _measure(args, model, images)
    written = None
    try:
        if folder is not None:
            write_latent_statistics(folder, statistics)
            written = str(folder / "config.json")
            write_model_card(folder)
    finally:  # also where they cannot be written: long work may have gone into them
        if args.json:
            measured: dict[str, Any] = {"images": statistics.count, "broken": broken, "size": args.size}
            say(json.dumps({**measured, **statistics.settings(), "written": written}, indent=2))
        else:
            say(_as_text(statistics, args.size, written))
    return 0


def _measure(args: Namespace, model: "DCSSDAE", images: "ValidationImages") -> "tuple[LatentStatistics, list[str]]":
    """The statistics, and the names of the images that cannot be read."""
    import torch
    from tqdm import tqdm

    from dc_ssdae.data.images import to_model_range
    from dc_ssdae.data.loader import default_workers, enlarged_caveat
    from dc_ssdae.evaluation.latent_statistics import latent_statistics

    def encode(pixels: "Tensor") -> "DiagonalGaussian":
        with torch.inference_mode():
            return model.encode(to_model_range(pixels.to(model.device))).latent_dist

    workers = default_workers(1) if args.workers is None else args.workers
    try:
        with tqdm(total=len(images), unit="image", leave=False, disable=None) as bar:
            moments, broken, enlarged = latent_statistics(
                encode, images, model.config.latent_channels, args.batch, workers, advance=bar.update
            )
    except torch.OutOfMemoryError:
        raise InputError(f"out of memory with --batch {args.batch}; try a smaller one, or --dtype bfloat16") from None
    if len(broken) == len(images):
        raise InputError(f"none of {counted(len(images), 'image')} can be read; the first: {broken[0].reason}")
    for image in broken:
        complain(args.program, f"left out: {image.reason}")
    for line in enlarged_caveat(enlarged, len(images) - len(broken), args.size):
        complain(args.program, line)
    return moments.statistics(), [image.name for image in broken]


def _as_text(statistics: "LatentStatistics", size: int, written: str | None) -> str:
    lines = [f"{'channel':>7}  {'mean':>11}  {'std':>11}"]
    rows = enumerate(zip(statistics.mean, statistics.std, strict=True))
    lines += [f"{channel:>7}  {mean:>11.5g}  {std:>11.5g}" for channel, (mean, std) in rows]
    where = "not written" if written is None else f"-> {written}"
    return "\n".join(
        [
            *lines,
            "",
            f"shift_factor    {statistics.shift_factor:>11.5g}",
            f"scaling_factor  {statistics.scaling_factor:>11.5g}",
            f"{counted(statistics.count, 'image')} of {size} x {size} pixels {where}",
        ]
    )
