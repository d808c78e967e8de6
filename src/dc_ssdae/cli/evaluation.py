"""What `eval` and `compare` share: checking the options, opening the data and loading the metrics.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dc_ssdae.cli.common import complain, say, select_device
from dc_ssdae.cli.options import EvaluationOptions
from dc_ssdae.errors import check_names

if TYPE_CHECKING:
    import torch

    from dc_ssdae.data.loader import BrokenImage, ValidationImages
    from dc_ssdae.evaluation.candidate_names import CandidateSpec
    from dc_ssdae.evaluation.evaluate import EvaluationSettings
    from dc_ssdae.evaluation.metric_networks import MetricSuite


class OpenEvaluation(NamedTuple):
    """What an evaluation works on: images, their data set and its size, settings, device, precision, decoding."""

    data: str
    images: "ValidationImages"
    total: int
    settings: "EvaluationSettings"
    device: "torch.device"
    dtype: "torch.dtype"
    decoding: dict[str, Any]


def open_evaluation(options: EvaluationOptions) -> OpenEvaluation:
    """Find mistakes in the options, and open the data set.

    Raises:
        InputError: an option is unknown or out of range, or there are no such images.
    """
    from dc_ssdae.evaluation.estimates import METRICS
    from dc_ssdae.evaluation.protocol import find_protocol

    device = select_device(options.device)
    protocol = find_protocol(options.protocol)
    if options.lpips not in (None, protocol.lpips):
        # Another name too: its figures may not be taken for the protocol's own.
        protocol = replace(protocol, name=f"{protocol.name}, LPIPS of {options.lpips}", lpips=options.lpips)
    check_names("metric", options.metrics or (), METRICS)
    import torch

    from dc_ssdae.data.loader import default_workers
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.evaluation.candidates import DECODING
    from dc_ssdae.evaluation.evaluate import EvaluationSettings

    check_names("sampler", [options.sampler] if options.sampler is not None else [], SAMPLERS)
    workers = default_workers(1) if options.workers is None else options.workers
    settings = EvaluationSettings(protocol, options.size or protocol.size, options.batch, workers, options.seed)
    sources = open_sources(options.data, None, None, None)
    source = sources.validation or sources.train
    decoding = {name: getattr(options, name) for name in DECODING if getattr(options, name) is not None}
    dtype = getattr(torch, options.dtype)
    data = data_name(options.data) + ("/validation" if sources.validation else "")
    images = settings.images(source, options.limit)
    return OpenEvaluation(data, images, len(source), settings, device, dtype, decoding)


def report_settings(options: EvaluationOptions, opened: OpenEvaluation, suite: "MetricSuite") -> dict[str, Any]:
    """Collect the arguments of `dc_ssdae.evaluation.caveats.Report`."""
    from dc_ssdae.timing import describe_machine

    return {
        **{name: getattr(opened, name) for name in ("settings", "data", "total", "decoding")},
        "suite": suite,
        "machine": describe_machine(opened.device),
        "command": shlex.join(["dc-ssdae", *sys.argv[1:]]),
        "dtype": options.dtype,
    }


def tell_report(options: EvaluationOptions, report: Any, broken: "Sequence[BrokenImage]") -> str:
    """Print a report as Markdown, and the images left out of it; gives the Markdown."""
    for image in broken:
        complain(options.program, f"left out: {image.reason}")
    text: str = report.as_markdown()
    say(text)  # before anything that can fail: hours may have gone into the figures
    return text


def load_suite(options: EvaluationOptions, opened: OpenEvaluation) -> "MetricSuite":
    """Load the chosen metrics.

    Raises:
        InputError: a file of weights is damaged, or could not be downloaded.
    """
    from dc_ssdae.evaluation.metric_networks import load_metrics

    return load_metrics(
        opened.settings.protocol,
        opened.device,
        options.metrics,
        options.random_backbones,
        options.download,
        options.replicates,
        options.seed,
        size=opened.settings.size,
    )


def data_name(root: str) -> str:
    """Name a data set for reports by its last folder, or the last two where that has a common name."""
    from dc_ssdae.provenance import name_of_path

    return root if "://" in root or "{" in root else name_of_path(Path(root).expanduser().resolve()) or root


def parse_models(texts: Sequence[str]) -> "list[CandidateSpec]":
    """Parse the words that name models.

    Raises:
        InputError: one of them names nothing, or two have the same name.
    """
    from dc_ssdae.evaluation.candidate_names import name_apart, parse_candidate

    return name_apart([parse_candidate(text) for text in texts])
