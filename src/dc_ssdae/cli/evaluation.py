"""What `eval` and `compare` share: checking the options, opening the data and loading the metrics.

Nothing heavy is imported until a function needs it, so that help is quick.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from dc_ssdae.cli.common import complain, import_classes, main_first, say, select_device
from dc_ssdae.cli.options import EvaluationOptions
from dc_ssdae.errors import check_names

if TYPE_CHECKING:
    import torch

    from dc_ssdae.data.loader import BrokenImage, ValidationImages
    from dc_ssdae.distributed import Processes


Opened: TypeAlias = "tuple[ValidationImages, torch.device, Processes, list[type], dict[str, Any]]"
"""Images, device, processes, users' classes, and what a `dc_ssdae.evaluation.report.caveats.Report` is made of."""


def open_evaluation(options: EvaluationOptions) -> "Opened":
    """Find mistakes in the options, open the data set, and load the metrics.

    Raises:
        InputError: an option is unknown or out of range, there are no such images, or a file of weights is damaged.
    """
    import torch

    from dc_ssdae.data.loader import default_workers
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.distributed import Processes
    from dc_ssdae.evaluation.candidates import DECODING
    from dc_ssdae.evaluation.estimates import METRICS
    from dc_ssdae.evaluation.evaluate import EvaluationSettings
    from dc_ssdae.evaluation.metric_networks import load_metrics
    from dc_ssdae.evaluation.protocol import PROTOCOLS
    from dc_ssdae.provenance import name_of_path
    from dc_ssdae.timing import describe_machine

    check_names("protocol", [options.protocol], PROTOCOLS)
    device, protocol = select_device(options.device), PROTOCOLS[options.protocol]
    if options.lpips not in (None, protocol.lpips):
        # Another name too: its figures may not be taken for the protocol's own.
        protocol = replace(protocol, name=f"{protocol.name}, LPIPS of {options.lpips}", lpips=options.lpips)
    check_names("metric", options.metrics or (), METRICS)
    check_names("sampler", options.given("sampler").values(), SAMPLERS)
    workers = default_workers(1) if options.workers is None else options.workers
    settings = EvaluationSettings(protocol, options.size or protocol.size, options.batch, workers, options.seed)
    sources = open_sources(options.data, None, None, None)
    source = sources.validation or sources.train
    name = name_of_path(options.data) or options.data
    images, classes = settings.images(source, options.limit), import_classes(options.modules)
    processes = Processes.join(device)
    device = torch.device(processes.device)
    chosen = options.given("random_backbones", "download", "replicates", "seed")
    load = partial(load_metrics, protocol, device, options.metrics, size=settings.size, **chosen)
    report = {
        "settings": settings,
        "suite": main_first(processes, load),
        "data": name + ("/validation" if sources.validation else ""),
        "total": len(source),
        "machine": describe_machine(device),
        "command": shlex.join(["dc-ssdae", *sys.argv[1:]]),
        "dtype": options.dtype,
        "decoding": options.given(*DECODING),
    }
    return images, device, processes, classes, report


def tell_report(options: EvaluationOptions, report: Any, broken: "Sequence[BrokenImage]") -> str:
    """Print a report as Markdown, and the images left out of it; gives the Markdown."""
    for image in broken:
        complain(options.program, f"left out: {image.reason}")
    text: str = report.as_markdown()
    say(text)  # before anything that can fail: hours may have gone into the figures
    return text
