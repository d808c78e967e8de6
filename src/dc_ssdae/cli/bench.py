"""`dc-ssdae bench`: times encoding, decoding, reading images and training steps, with a sub-command for each."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import complain, select_device, show, table, wrapped
from dc_ssdae.cli.options import DeviceOptions, JsonOptions
from dc_ssdae.cli.run_config import RunOptions, read_run_config
from dc_ssdae.errors import InputError, counted
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from dc_ssdae.timing import Spread

_STAGES = {"read": "read+decode", "crop": "crop+flip", "sample": "whole sample"}


@dataclass(kw_only=True)
class ModelBenchOptions(DeviceOptions, JsonOptions):
    """For benchmarks of models.

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
class EncodeOptions(ModelBenchOptions):
    """Time how long models take to encode random images; several models take turns in one process.

    On a CPU, processor time is measured, which depends little on other work on the machine.
    """

    program = "dc-ssdae bench encode"


@dataclass(kw_only=True)
class DecodeOptions(ModelBenchOptions):
    """Time how long models take to decode random images; several models take turns in one process.

    On a CPU, processor time is measured, which depends little on other work on the machine.
    """

    program = "dc-ssdae bench decode"


@dataclass(kw_only=True)
class DataOptions(JsonOptions):
    """Time how fast images are read and cropped for training, stage by stage and as a whole, in one thread.

    Several data sets take turns, and the same positions are read from each.

    Args:
        sources: folder of images or shards, a shard, or a pattern of shards; if a folder has a subfolder train/, its
            images are read. Ratios are relative to the first SOURCE.
        image_size: side of the crops in pixels.
        aug_scale: largest random enlargement before the crop.
        seconds: time to measure each SOURCE, and again for each number of workers.
        workers: also time the data loader with these numbers of worker processes.
        packed: also pack the first SOURCE, a folder of images, into temporary shards in $TMPDIR, and measure those.
    """

    program = "dc-ssdae bench data"
    sources: list[str] = setting(positional=True, metavar="SOURCE")
    image_size: int = setting(256, at_least=8, at_most=2**16, name="--image-size", metavar="N")
    aug_scale: float = setting(2.0, at_least=1.0, name="--aug-scale", metavar="X")
    seconds: float = setting(10.0, at_least=0.001, metavar="S")
    workers: list[int] = setting([], at_least=0, at_most=1024, metavar="N[,N]")
    packed: bool = False


@dataclass(kw_only=True)
class TrainOptions(RunOptions, JsonOptions):
    """Time training steps in one process, on random images that are already on the device.

    A step covers the networks, the losses, the optimiser and the weight average, not the reading of images. The
    configuration is given as for dc-ssdae train; training.batch_size is the batch of this one process.

    Args:
        steps: number of timed steps.
        device: auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one.
        compare: also time the configuration with this setting changed, such as training.compile=true. All
            configurations take turns, and are in memory together. May be given several times.
    """

    program = "dc-ssdae bench train"
    usage = "dc-ssdae bench train --config PRESET [--config FILE] [--section.name VALUE] [options]"
    steps: int = setting(20, at_least=1, metavar="N")
    device: str = setting("auto", metavar="DEVICE")
    compare: list[str] = setting([], repeated=True, metavar="SETTING=VALUE")


def run_models(options: ModelBenchOptions) -> None:
    """Time encoding or decoding, and print."""
    import torch

    # PyTorch's timer imports it; it warns where CUDA is installed and there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from dc_ssdae.evaluation.candidate_names import name_apart, open_candidate, parse_candidate
    from dc_ssdae.evaluation.speed import measure_speed
    from dc_ssdae.timing import describe_machine

    work = options.program.split()[-1]
    specs = name_apart([parse_candidate(text) for text in (options.model, *options.against)])
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    candidates = {}
    for spec in specs:
        candidates[spec.label] = candidate = open_candidate(spec, dtype).to(device)
        module = candidate.module()
        if module is None or not candidate.splits:
            raise InputError(f"{spec.label} has no separate networks for encoding and decoding")
        if options.compile:
            for part in ("encoder", "decoder"):
                getattr(module, part).compile()
    figures = []
    for size in dict.fromkeys(options.size):
        figures += measure_speed(
            work, candidates, size, options.batch_size, device, dtype, options.rounds, options.threads
        )
    rows = [("model", "px", "ms", "quartiles", "times as fast", "GFLOPs", "of peak", "peak GiB")]
    for entry in figures:
        ratio = "-" if entry.ratio is None else f"{entry.ratio.median:.3g}"
        costs = (f"{entry.flops / 1e9:,.1f}", f"{entry.share_of_peak:.0%}", _gibibytes(entry.peak_memory_bytes))
        rows.append((entry.label, str(entry.size), *_spread(entry.seconds, ",.1f", 1000.0), ratio, *costs))
    clock = "processor time of all threads" if device.type == "cpu" else "time that passes"
    note = (
        f"{work} of {counted(options.batch_size, 'image')} in {options.dtype}: medians over "
        f"{counted(options.rounds, 'round')} in alternation, {clock}. Times as fast: as {specs[0].label}. Of peak: "
        "FLOPs per second against this machine's fastest 3×3 convolution. Peak: memory in use, weights included."
    )
    found = {
        "benchmark": work,
        **{name: getattr(options, name) for name in ("dtype", "compile", "rounds")},
        "figures": figures,
        "machine": {**describe_machine(device), "threads": options.threads},
    }
    show(found, options.json, lambda: _as_text(found, [table(rows, "lrrrrrrr")], [note]))


def run_data(options: DataOptions) -> None:
    """Time the input pipeline, and print."""
    from dc_ssdae.data.benchmark import measure_data, packed, training_images
    from dc_ssdae.data.sources import open_path
    from dc_ssdae.timing import describe_machine

    paths = [training_images(name) for name in options.sources]
    sources = [(name, open_path(path, None)) for name, path in zip(options.sources, paths, strict=True)]
    workers = [count for count in dict.fromkeys(options.workers) if count]
    with ExitStack() as stack:
        if options.packed:
            shards = stack.enter_context(packed(paths[0], lambda line: complain(options.program, line)))
            sources.append((f"{options.sources[0]} (packed)", shards))
        figures = measure_data(sources, options.image_size, options.aug_scale, options.seconds, workers)
    found = {
        "benchmark": "data",
        **{name: getattr(options, name) for name in ("image_size", "aug_scale")},
        **vars(figures),
        "machine": {**describe_machine(), "threads": 1},
    }
    rows = [("source", "stage", "images/s", "quartiles", "ratio", "quartiles")]
    notes = [
        f"Images per second of one process with one thread: medians of {counted(figures.rounds, 'round')} of "
        f"{figures.images} images in alternation, and their ratios to the first source's.",
        f"Crops of {options.image_size} px, aug_scale {options.aug_scale:g}.",
    ]
    if workers:
        notes.append("Lines with workers: the data loader with that many processes, which share the cores.")
    shortest = min(source.images for source in figures.sources)
    for source in figures.sources:
        rates = {_STAGES[stage]: rate for stage, rate in source.stages.items()}
        rates |= {counted(int(count), "worker"): rate for count, rate in source.loader.items()}
        for label, rate in rates.items():
            rows.append((source.name, label, *_spread(rate.images_per_second, ",.1f"), *_spread(rate.ratio, ".3f")))
        if source.images > shortest:
            notes.append(f"{source.name} has {source.images:,} images, of which the first {shortest:,} were used.")
        if source.broken:
            notes.append(
                f"{source.name}: {len(source.broken)} broken among the images measured, replaced by others as in "
                f"training; the first: {source.broken[0]['reason']}"
            )
    show(found, options.json, lambda: _as_text(found, [table(rows, "llrrrr")], notes))


def run_train(options: TrainOptions) -> None:
    """Time training steps, and print."""
    config, name = read_run_config(options)
    configs = {name: config}
    for text in options.compare:
        key, _, value = text.partition("=")
        if not value or "." not in key or key.startswith("-"):
            raise InputError(f"--compare {text!r} is not a setting with a value; write it as training.compile=true")
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
        random = random_backbones(config)
    speeds = [("configuration", "images/s", "ms/step", "quartiles", "ratio", "quartiles")]
    costs = [("configuration", "forward ms", "backward ms", "update ms", "peak GiB", "TFLOP/s")]
    alternating = ", in alternation; ratios of images/s are to the first" if options.compare else ""
    notes = [
        f"{counted(options.steps, 'step')} of {counted(config.training.batch_size, 'random image')} of "
        f"{config.data.image_size} px, {config.training.precision}, {config.training.optimizer}; medians{alternating}.",
        f"Memory: {'allocated on the device' if device.type == 'cuda' else 'resident set of this process'}.",
    ]
    if figures[0]["flops"] is not None:
        notes.append(f"{figures[0]['flops'] / 1e12:.4g} TFLOPs per step: 3 times the forward pass's.")
    if random:
        names = ", ".join(f"losses.{name}" for name in random)
        notes.append(f"{names}: random weights in the backbone, which take as long as real ones; values mean nothing.")
    for entry in figures:
        ratio = ("1", "-") if entry["ratio"] is None else _spread(entry["ratio"], ".3f")
        rate = f"{entry['images_per_second'].median:,.2f}"
        speeds.append((entry["name"], rate, *_spread(entry["seconds"], ",.2f", 1000.0), *ratio))
        phases = [f"{1000.0 * spread.median:,.2f}" for spread in (entry["phases"] or {}).values()] or ["-"] * 3
        throughput = "-" if entry["tflops_per_second"] is None else f"{entry['tflops_per_second']:.3f}"
        costs.append((entry["name"], *phases, _gibibytes(entry["peak_memory_bytes"]), throughput))
        if entry["not_finite"]:
            notes.append(
                f"{entry['name']}: {entry['not_finite']} of the steps were not finite, and may have cost less."
            )
    found = {
        "benchmark": "train",
        "steps": options.steps,
        "config": config.to_mapping(),
        "random_backbones": random,
        "configurations": figures,
        "machine": describe_machine(device),
    }
    show(found, options.json, lambda: _as_text(found, [table(speeds, "lrrrrr"), table(costs, "lrrrrr")], notes))


def _as_text(found: dict[str, Any], tables: Sequence[str], notes: Sequence[str]) -> str:
    """Join tables, and notes and the machine below them, to one text."""
    from dc_ssdae.timing import machine_line

    return "\n\n".join([*tables, "\n".join(map(wrapped, [*notes, machine_line(found["machine"])]))])


def _spread(spread: "Spread", form: str, unit: float = 1.0) -> tuple[str, str]:
    """Format a spread, times `unit`, as two cells: the median and the quartiles."""
    return f"{unit * spread.median:{form}}", f"{unit * spread.low:{form}}..{unit * spread.high:{form}}"


def _gibibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f}"
