"""`dc-ssdae stats`: mean and standard deviation of a model's latents, into its config.json."""

import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    add_batch_option,
    add_model_options,
    add_size_option,
    add_workers_option,
    advising_on_batches,
    load_model,
    say,
    table,
    tell_of_images,
    writable_model,
)
from dc_ssdae.cli.parser import CommandParser, filled, whole_number
from dc_ssdae.errors import counted

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
    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.model_card import write_model_card
    from dc_ssdae.model_folder import write_latent_statistics

    folder = None if args.no_write else writable_model(args.model, "--no-write only prints")
    model = load_model(args)
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
    from dc_ssdae.data.loader import default_workers
    from dc_ssdae.evaluation.latent_statistics import latent_statistics

    def encode(pixels: "Tensor") -> "DiagonalGaussian":
        with torch.inference_mode():
            return model.encode(to_model_range(pixels.to(model.device))).latent_dist

    workers = default_workers(1) if args.workers is None else args.workers
    channels = model.config.latent_channels
    with advising_on_batches(args), tqdm(total=len(images), unit="image", leave=False, disable=None) as bar:
        survey = latent_statistics(encode, images, channels, args.batch, workers, advance=bar.update)
    tell_of_images(args, survey.broken, survey.enlarged, len(images))
    return survey.moments.statistics(), [image.name for image in survey.broken]


def _as_text(statistics: "LatentStatistics", size: int, written: str | None) -> str:
    rows = [("channel", "mean", "std")]
    for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        rows.append((str(channel), f"{mean:.5g}", f"{std:.5g}"))
    whole = [(name, f"{getattr(statistics, name):.5g}") for name in ("shift_factor", "scaling_factor")]
    where = "not written" if written is None else f"-> {written}"
    images = f"{counted(statistics.count, 'image')} of {size} x {size} pixels {where}"
    return f"{table(rows, 'rrr')}\n\n{table(whole, 'lr')}\n{images}"
