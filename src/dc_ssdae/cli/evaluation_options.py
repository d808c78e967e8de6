"""What `eval` and `compare` share: the options of an evaluation, and what is made of them.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from dc_ssdae.cli.common import (
    add_batch_option,
    add_data_option,
    add_device_option,
    add_dtype_option,
    add_import_option,
    add_seed_option,
    add_workers_option,
)
from dc_ssdae.cli.parser import CommandParser, number, numbers, whole_number
from dc_ssdae.errors import unknown_name
from dc_ssdae.presets import SHIPPED_MODEL

if TYPE_CHECKING:
    from argparse import Namespace

    import torch

    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.evaluation.candidate_names import CandidateSpec
    from dc_ssdae.evaluation.evaluate import EvaluationSettings
    from dc_ssdae.evaluation.metric_networks import MetricSuite

MODELS = (
    f"a model: the folder or hub id of a saved model or a run of this package; {SHIPPED_MODEL}, which comes with it; "
    "preset:NAME (random weights); "
    "diffusers:FOLDER_OR_HUB_ID; python:MODULE.NAME, an object with encode and decode or a function from images to "
    "images, (B, 3, H, W) in [-1, 1]; jpeg:QUALITY; webp:QUALITY; bicubic:FACTOR. LABEL=MODEL names it in the reports"
)


def add_evaluation_options(parser: CommandParser) -> None:
    """Add what `open_evaluation` reads, but for the models."""
    add_data_option(parser)
    parser.add_argument(
        "--protocol",
        default="dcae",
        metavar="NAME",
        help="how images are prepared and measured: dcae (default), lightningdit, rae or original; docs/evaluation.md",
    )
    parser.add_argument(
        "--size", type=whole_number(1), metavar="S", help="side of the images in pixels (default: the protocol's)"
    )
    parser.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="images at most, evenly spread (default: all)"
    )
    add_batch_option(parser)
    add_workers_option(parser)
    parser.add_argument(
        "--metrics",
        type=_names,
        metavar="NAME,...",
        help="of psnr, ssim, lpips, dreamsim, rfid and rfdd (default: all whose weights are on this machine)",
    )
    parser.add_argument(
        "--lpips", metavar="NETWORK", help="network of LPIPS: alex, vgg or squeeze (default: the protocol's)"
    )
    parser.add_argument(
        "--random_backbones",
        action="store_true",
        help="take networks with random weights for metrics whose weights are missing, to try things out",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch weights that metrics need and this machine lacks"
    )
    parser.add_argument(
        "--replicates",
        type=whole_number(0),
        default=20,
        metavar="R",
        help="of the bootstrap of rFID and rFDD; 0 gives no intervals (default 20)",
    )
    add_seed_option(parser, "of sampled latents and of the bootstrap")
    decoding = parser.add_argument_group("how models of this package decode (default: in one step)")
    decoding.add_argument("--sampler", metavar="NAME", help="as dc-ssdae decode takes it, like the others")
    decoding.add_argument("--steps", "--num_steps", dest="num_steps", type=whole_number(1), metavar="N")
    decoding.add_argument("--step_size", type=numbers, metavar="X[,X...]")
    decoding.add_argument("--momentum", type=number, metavar="X")
    decoding.add_argument("--tolerance", type=number, metavar="X")
    add_import_option(parser)
    add_device_option(parser)
    add_dtype_option(parser, "what the models compute in; metrics are always float32 or float64")


class OpenEvaluation(NamedTuple):
    """What the options ask for: images, their data set and how many it has, settings, device, precision, decoding."""

    data: str
    images: "ValidationImages"
    total: int
    settings: "EvaluationSettings"
    device: "torch.device"
    dtype: "torch.dtype"
    decoding: dict[str, Any]


def open_evaluation(args: "Namespace") -> OpenEvaluation:
    """Find mistakes in the options, and open the data set.

    Raises:
        InputError: an option is unknown or out of range, or there are no such images.
    """
    from dc_ssdae.cli.common import select_device
    from dc_ssdae.evaluation.estimates import METRICS
    from dc_ssdae.evaluation.protocol import LPIPSNetwork, find_protocol

    device = select_device(args.device)
    protocol = find_protocol(args.protocol)
    if args.lpips is not None:
        if args.lpips not in get_args(LPIPSNetwork):
            raise unknown_name("network of LPIPS", args.lpips, get_args(LPIPSNetwork))
        if args.lpips != protocol.lpips:
            # Another name too: its figures may not be taken for the protocol's own.
            protocol = replace(protocol, name=f"{protocol.name}, LPIPS of {args.lpips}", lpips=args.lpips)
    for name in args.metrics or ():
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    import torch

    from dc_ssdae.data.loader import default_workers
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.evaluation.candidates import DECODING
    from dc_ssdae.evaluation.evaluate import EvaluationSettings

    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise unknown_name("sampler", args.sampler, SAMPLERS)
    workers = default_workers(1) if args.workers is None else args.workers
    settings = EvaluationSettings(protocol, args.size or protocol.size, args.batch, workers, args.seed)
    sources = open_sources(args.data, None, None, None)
    source = sources.validation or sources.train
    decoding = {name: getattr(args, name) for name in DECODING if getattr(args, name) is not None}
    dtype = getattr(torch, args.dtype)
    data = data_name(args.data) + ("/validation" if sources.validation else "")
    images = settings.images(source, args.limit)
    return OpenEvaluation(data, images, len(source), settings, device, dtype, decoding)


def report_settings(args: "Namespace", opened: OpenEvaluation, suite: "MetricSuite") -> dict[str, Any]:
    """What `dc_ssdae.evaluation.caveats.Report` takes."""
    from dc_ssdae.timing import describe_machine

    return {
        **{name: getattr(opened, name) for name in ("settings", "data", "total", "decoding")},
        "suite": suite,
        "machine": describe_machine(opened.device),
        "command": shlex.join(["dc-ssdae", *sys.argv[1:]]),
        "dtype": args.dtype,
    }


def load_suite(args: "Namespace", opened: OpenEvaluation) -> "MetricSuite":
    """Load the metrics that the options ask for.

    Raises:
        InputError: a file of weights is damaged, or could not be downloaded.
    """
    from dc_ssdae.evaluation.metric_networks import load_metrics

    return load_metrics(
        opened.settings.protocol,
        opened.device,
        args.metrics,
        args.random_backbones,
        args.download,
        args.replicates,
        args.seed,
        size=opened.settings.size,
    )


def data_name(root: str) -> str:
    """What reports call a data set: its last folder, not where it lies; of a folder like any other's, two."""
    from dc_ssdae.provenance import name_of_path

    return root if "://" in root or "{" in root else name_of_path(Path(root).expanduser().resolve()) or root


def parse_models(texts: Sequence[str]) -> "list[CandidateSpec]":
    """Read the words that name models.

    Raises:
        InputError: one of them names nothing, or two have the same name.
    """
    from dc_ssdae.evaluation.candidate_names import name_apart, parse_candidate

    return name_apart([parse_candidate(text) for text in texts])


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
