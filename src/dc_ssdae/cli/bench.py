"""`dc-ssdae bench`: times encoding, decoding, reading images and training steps, with a sub-command for each."""

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dc_ssdae.cli.common import complain, select_device, show, side_by_side
from dc_ssdae.cli.options import DeviceOptions, JsonOptions
from dc_ssdae.cli.run_config import RunOptions, read_run_config
from dc_ssdae.errors import InputError
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class EncodeOptions(DeviceOptions, JsonOptions):
    """Time how long models take to encode random images; several models take turns in one process.

    Prints medians and quartiles over the rounds; ratios are to the first model. On a CPU, processor time is measured,
    which depends little on other work on the machine. share_of_peak compares FLOPs per second with this machine's
    fastest 3 x 3 convolution; the memory includes the weights.

    Args:
        model: model to time, named as in dc-ssdae compare: a folder or hub id, preset:NAME, diffusers:FOLDER_OR_ID, or
            diffusers:CLASS for a published architecture with random weights.
        against: another model to compare with; may be given several times.
        size: side of the images in pixels, or several sides; by default 256.
        batch_size: images per batch.
        rounds: number of rounds; in each, every model is timed once.
        threads: number of CPU threads.
        compile: compile the networks with torch.compile.
    """

    model: str = setting(positional=True, metavar="MODEL")
    against: list[str] = setting([], repeated=True, metavar="MODEL")
    size: list[int] = setting([256], at_least=8, at_most=2**14, metavar="S[,S]")
    batch_size: int = setting(1, at_least=1, metavar="B")
    rounds: int = setting(5, at_least=1, metavar="N")
    threads: int = setting(1, at_least=1, metavar="N")
    compile: bool = False


@dataclass(kw_only=True)
class DecodeOptions(EncodeOptions):
    """Time how long models take to decode random images; several models take turns in one process.

    Prints medians and quartiles over the rounds; ratios are to the first model. On a CPU, processor time is measured,
    which depends little on other work on the machine. share_of_peak compares FLOPs per second with this machine's
    fastest 3 x 3 convolution; the memory includes the weights.
    """


@dataclass(kw_only=True)
class DataOptions(JsonOptions):
    """Time how fast images are read, and read and cropped, for training, in one thread.

    Several data sets take turns, and the same positions are read from each. Prints medians and quartiles.

    Args:
        sources: folder of images or shards, a shard, or a pattern of shards; if a folder has a subfolder train/, its
            images are read. Ratios are relative to the first SOURCE.
        image_size: side of the crops in pixels.
        aug_scale: largest random enlargement before the crop.
        seconds: time to measure each SOURCE, and again for each number of workers.
        workers: also time the data loader with these numbers of worker processes.
        packed: also pack the first SOURCE, a folder of images, into temporary shards in $TMPDIR, and measure those.
    """

    sources: list[str] = setting(positional=True, metavar="SOURCE")
    image_size: int = setting(256, at_least=8, at_most=2**16, name="--image-size", metavar="N")
    aug_scale: float = setting(2.0, at_least=1.0, name="--aug-scale", metavar="X")
    seconds: float = setting(10.0, at_least=0.001, metavar="S")
    workers: list[int] = setting([], at_least=0, at_most=1024, metavar="N[,N]")
    packed: bool = False


@dataclass(kw_only=True)
class TrainOptions(RunOptions, JsonOptions):
    """Time training steps in one process, on random images that are already on the device.

    A step covers the networks, the losses, the optimiser and the weight average, not the reading of images; backbones
    of losses have random weights. Prints medians and quartiles; ratios are to the first configuration. The
    configuration is given as for dc-ssdae train; training.batch_size is the batch of this one process.

    Args:
        steps: number of timed steps.
        device: auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one.
        compare: also time the configuration with this setting changed, such as training.compile=true. All
            configurations take turns, and are in memory together. May be given several times.
    """

    steps: int = setting(20, at_least=1, metavar="N")
    device: str = setting("auto", metavar="DEVICE")
    compare: list[str] = setting([], repeated=True, metavar="SETTING=VALUE")


def run_encode(options: EncodeOptions, work: str = "encode") -> None:
    """Time encoding, or decoding, and print."""
    import torch

    # PyTorch's timer imports it; it warns where CUDA is installed and there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from dc_ssdae.evaluation.candidates import open_candidate, parse_candidates
    from dc_ssdae.evaluation.speed import measure_speed
    from dc_ssdae.timing import describe_machine

    device, dtype, threads = select_device(options.device), getattr(torch, options.dtype), options.threads
    candidates = {}
    for spec in parse_candidates([options.model, *options.against]):
        candidates[spec.label] = candidate = open_candidate(spec, dtype).to(device)
        module = candidate.module
        if candidate.count_parameters() is None or not candidate.splits:
            raise InputError(f"{spec.label} has no separate networks for encoding and decoding")
        for part in ("encoder", "decoder") if options.compile else ():
            getattr(module, part).compile()
    figures = []
    for size in options.size:
        random = torch.Generator(device).manual_seed(0)
        x = 2 * torch.rand(options.batch_size, 3, size, size, device=device, generator=random) - 1
        figures += measure_speed(work, candidates, x, dtype, options.rounds, threads)
    settings = options.given("dtype", "compile", "rounds")
    machine = {**describe_machine(device), "threads": threads}
    _print(options, {"benchmark": work, **settings, "figures": figures, "machine": machine}, "figures")


def run_decode(options: DecodeOptions) -> None:
    """Time decoding, and print."""
    run_encode(options, "decode")


def run_data(options: DataOptions) -> None:
    """Time the input pipeline, and print."""
    import torch

    from dc_ssdae.data.benchmark import measure_data, packed
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.timing import describe_machine

    sources = [(name, open_sources(name, None, None, None).train) for name in options.sources]
    workers = [count for count in options.workers if count]
    with ExitStack() as stack:
        if options.packed:
            name, first = sources[0]
            shards = stack.enter_context(packed(first, partial(complain, options.program)))
            sources.append((f"{name} (packed)", shards))
        torch.set_num_threads(1)
        figures = measure_data(sources, options.image_size, options.aug_scale, options.seconds, workers)
    settings = options.given("image_size", "aug_scale")
    machine = {**describe_machine(), "threads": 1}
    _print(options, {"benchmark": "data", **settings, **figures, "machine": machine}, "sources")


def run_train(options: TrainOptions) -> None:
    """Time training steps, and print."""
    config, name = read_run_config(options)
    configs = {name: config}
    for text in options.compare:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--compare is {text!r}; it must be SETTING=VALUE, such as training.compile=true")
        configs[text], _ = read_run_config(replace(options, settings=[*options.settings, (key, value)]))
    device = select_device(options.device)
    import torch

    from dc_ssdae.classes import importing_from
    from dc_ssdae.timing import describe_machine
    from dc_ssdae.training.benchmark import measure_training, random_backbones

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with importing_from(Path.cwd()):
        figures = measure_training(configs, device, options.steps)
    found = {"benchmark": "train", "steps": options.steps, "config": config.to_mapping(), "configurations": figures}
    found |= {"random_backbones": random_backbones(config), "machine": describe_machine(device)}
    _print(options, found, "configurations")


def _print(options: JsonOptions, found: dict[str, Any], entries: str) -> None:
    """Print what was found as JSON, or its `entries` side by side."""
    from dc_ssdae.timing import machine_line

    figures = json.loads(json.dumps(found[entries], default=asdict))
    show(found, options.json, lambda: f"{side_by_side(figures)}\n\n{machine_line(found['machine'])}")
