"""`dc-ssdae bench`: how fast models encode and decode, images are read, and steps are done; a sub-command each."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import add_device_option, add_dtype_option, complain, say, select_device, table, wrapped
from dc_ssdae.cli.parser import CommandParser, filled, number_between, whole_number
from dc_ssdae.errors import InputError, counted, unknown_name

if TYPE_CHECKING:
    from dc_ssdae.timing import Spread

PROGRAM = "dc-ssdae bench"

_BENCHMARKS = ("encode", "decode", "train", "data")
_WITH_VALUE, _WITHOUT_VALUE = ("--steps", "--device", "--compare"), ("--json", "--debug", "--help", "-h")
_STAGES = {"read": "read+decode", "crop": "crop+flip", "sample": "whole sample"}


class BenchParser(CommandParser):
    """A parser of the command's words; those of `bench train` that are not its own are a run's configuration."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Read and check everything that needs no torch.

        Raises:
            InputError: something is wrong; one line.
            SystemExit: after --help and --print_config.
        """
        words = list(sys.argv[1:] if args is None else args)
        place = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
        if place == len(words):
            super().parse_args(words)
            raise InputError(f"which benchmark of {', '.join(_BENCHMARKS)}? {PROGRAM} --help describes them")
        if words[place] not in _BENCHMARKS:
            raise unknown_name("benchmark", words[place], _BENCHMARKS)
        if words[place] != "train":
            return super().parse_args(words, namespace)
        own, settings = _own_words(words[place + 1 :])
        parsed = super().parse_args([*words[:place], "train", *own], namespace)
        from dc_ssdae.cli.run_config import parse_run_config

        parsed.config, parsed.name = parse_run_config(settings)
        parsed.compared = {
            text: parse_run_config([*settings, f"--{text}"]).config for text in map(_checked_setting, parsed.compare)
        }
        return parsed


def build_parser() -> BenchParser:
    """Build the command's parser, with one below it for each benchmark."""
    parser = BenchParser(
        prog=PROGRAM,
        description="Measure how fast models encode or decode, training steps are done, or images are read.",
    )
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", parser_class=CommandParser)
    _add_model(benchmarks, "encode")
    _add_model(benchmarks, "decode")
    _add_data(benchmarks)
    _add_train(benchmarks)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print; gives the exit code."""
    args.measure(args)
    return 0


def _add_model(benchmarks: Any, work: str) -> None:
    model = benchmarks.add_parser(
        work,
        help=f"{work[:-1]}ing with one or several models",
        description=f"Time how long models take to {work} random images, in rounds that alternate between them, in "
        "one process. Times on a CPU are processor time, which other work on the machine changes little.",
    )
    model.add_argument(
        "model",
        type=filled,
        metavar="MODEL",
        help="as dc-ssdae compare takes it: a folder or hub id, preset:NAME, diffusers:FOLDER_OR_ID, or "
        "diffusers:CLASS as published, with random weights",
    )
    model.add_argument(
        "--against", action="append", default=[], type=filled, metavar="MODEL", help="another one; may be repeated"
    )
    model.add_argument(
        "--size",
        type=_numbers_of(8, 2**14),
        default=(256,),
        metavar="S[,S]",
        help="sides of the images in pixels (default 256)",
    )
    model.add_argument("--batch_size", type=whole_number(1), default=1, metavar="B", help="images at once (default 1)")
    model.add_argument(
        "--rounds", type=whole_number(1), default=5, metavar="N", help="in which all alternate (default 5)"
    )
    model.add_argument("--threads", type=whole_number(1), default=1, metavar="N", help="of the CPU (default 1)")
    model.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    add_device_option(model)
    add_dtype_option(model, "what to compute in")
    _add_json(model)
    model.set_defaults(measure=_measure_model, work=work)


def _add_data(benchmarks: Any) -> None:
    data = benchmarks.add_parser(
        "data",
        help="the input pipeline alone, of one or several data sets",
        description="Time the input pipeline of data sets, in one process with one thread: its stages and all "
        "together, on the same positions of each, in rounds that alternate between them.",
    )
    data.add_argument(
        "sources",
        nargs="+",
        type=filled,
        metavar="SOURCE",
        help="folder of images or shards, or a shard or pattern of shards; of one with train/, that. Ratios are to "
        "the first",
    )
    data.add_argument(
        "--image-size", type=whole_number(8, 2**16), default=256, metavar="N", help="of the crops (default 256)"
    )
    data.add_argument(
        "--aug-scale", type=number_between(1), default=2.0, metavar="X", help="largest random enlargement (default 2)"
    )
    data.add_argument(
        "--seconds",
        type=number_between(0.001),
        default=10.0,
        metavar="S",
        help="time for each source, and for each number of workers (default 10)",
    )
    data.add_argument(
        "--workers",
        type=_worker_counts,
        default=(),
        metavar="N[,N]",
        help="also time the loader with N worker processes; 0 does not (default 0)",
    )
    data.add_argument(
        "--packed",
        action="store_true",
        help="also pack the first SOURCE, a folder, into temporary shards, in the system's folder for such files or "
        "in $TMPDIR, and measure those",
    )
    _add_json(data)
    data.set_defaults(measure=_measure_data)


def _add_train(benchmarks: Any) -> None:
    train = benchmarks.add_parser(
        "train",
        usage=f"{PROGRAM} train --config PRESET [--config FILE] [--section.name VALUE] [options]",
        help="training steps alone, on random images",
        description="Time training steps in one process, on random images that are on the device already: networks, "
        "losses, optimiser and average. Configurations are given as to dc-ssdae train, whose --help lists the "
        "settings; training.batch_size is this process's.",
    )
    train.add_argument("--steps", type=whole_number(1), default=20, metavar="N", help="timed steps (default 20)")
    add_device_option(train)
    train.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="also measure the same with this setting, as training.compile=true, in alternation with the plain "
        "configuration; may be given several times",
    )
    _add_json(train)
    train.set_defaults(measure=_measure_training)


def _add_json(parser: CommandParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same figures as JSON")


def _own_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words of `bench train` from those of a run's configuration."""
    own: list[str] = []
    settings: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        takes_value = name.startswith("--") and name not in _WITHOUT_VALUE and not equals
        if name in (*_WITH_VALUE, *_WITHOUT_VALUE):
            part = own
        elif not name.startswith("--") or "." in name or name in ("--config", "--print_config"):
            part = settings
            takes_value = takes_value and name != "--print_config"
        else:
            accepted = (*_WITH_VALUE, *_WITHOUT_VALUE[:-1], "--config", "--print_config")
            raise InputError(f"{unknown_name('option', name, accepted)}; settings are --section.name")
        part += [word, *([after] if takes_value and (after := next(rest, None)) is not None else [])]
    return own, settings


def _checked_setting(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not equals or "." not in name or name.startswith("-"):
        raise InputError(f"--compare {text!r} is no setting with a value; write it as training.compile=true")
    return text


def _worker_counts(text: str) -> tuple[int, ...]:
    return tuple(count for count in _numbers_of(0, 1024)(text) if count)


def _numbers_of(low: int, high: int) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(dict.fromkeys(map(whole_number(low, high), text.split(","))))


def _measure_model(args: argparse.Namespace) -> None:
    import torch

    # PyTorch's timer imports it; it warns where CUDA is installed and there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from dc_ssdae.evaluation.candidate_names import name_apart, open_candidate, parse_candidate
    from dc_ssdae.evaluation.speed import measure_speed
    from dc_ssdae.timing import describe_machine

    specs = name_apart([parse_candidate(text) for text in (args.model, *args.against)])
    device, dtype = select_device(args.device), getattr(torch, args.dtype)
    candidates = {}
    for spec in specs:
        candidates[spec.label] = candidate = open_candidate(spec, dtype).to(device)
        if candidate.module() is None or not candidate.splits:
            raise InputError(f"{spec.label} has no networks that encode and decode apart")
        if args.compile:
            for part in ("encoder", "decoder"):
                getattr(candidate.module(), part).compile()
    settings = (args.batch_size, device, dtype, args.rounds, args.threads)
    figures = [entry for size in args.size for entry in measure_speed(args.work, candidates, size, *settings)]
    rows: list[Sequence[str]] = [
        ("model", "px", "ms", "quartiles", "times as fast", "GFLOPs", "of peak", "peak GiB"),
    ]
    for entry in figures:
        ratio = "-" if entry.ratio is None else f"{entry.ratio.median:.3g}"
        costs = (f"{entry.flops / 1e9:,.1f}", f"{entry.share_of_peak:.0%}", _gibibytes(entry.peak_memory_bytes))
        rows.append((entry.label, str(entry.size), *_spread(entry.seconds.times(1000.0), ",.1f"), ratio, *costs))
    clock = "processor time of all threads" if device.type == "cpu" else "time that passes"
    note = (
        f"{args.work} of {counted(args.batch_size, 'image')} in {args.dtype}: medians of "
        f"{counted(args.rounds, 'round')} in alternation, {clock}. Times as fast: as {specs[0].label}. Of peak: FLOPs "
        "per second against this machine's fastest 3×3 convolution. Peak: memory in use, weights included."
    )
    plain = {"dtype": args.dtype, "compile": args.compile, "rounds": args.rounds}
    plain["figures"] = [asdict(entry) for entry in figures]
    machine = {**describe_machine(device), "threads": args.threads}
    _show(args, {"benchmark": args.work, **plain, "machine": machine}, [table(rows, "lrrrrrrr")], [note])


def _measure_data(args: argparse.Namespace) -> None:
    from dc_ssdae.data.benchmark import measure_data, packed, training_images
    from dc_ssdae.data.sources import open_path
    from dc_ssdae.timing import describe_machine

    paths = [training_images(name) for name in args.sources]
    sources = [(name, open_path(path, None)) for name, path in zip(args.sources, paths, strict=True)]
    with ExitStack() as stack:
        if args.packed:
            shards = stack.enter_context(packed(paths[0], lambda line: complain(args.program, line)))
            sources.append((f"{args.sources[0]} (packed)", shards))
        figures = measure_data(sources, args.image_size, args.aug_scale, args.seconds, args.workers)
    rows: list[Sequence[str]] = [("source", "stage", "images/s", "quartiles", "ratio", "quartiles")]
    for source in figures.sources:
        named = [(_STAGES[stage], rate) for stage, rate in source.stages.items()]
        named += [(counted(int(count), "worker"), rate) for count, rate in source.loader.items()]
        rows += [
            (source.name, label, *_spread(rate.images_per_second, ",.1f"), *_spread(rate.ratio, ".3f"))
            for label, rate in named
        ]
    notes = [
        f"Images per second of one process with one thread: medians of {counted(figures.rounds, 'round')} of "
        f"{figures.images} images in alternation, and their ratios to the first source's.",
        f"Crops of {args.image_size} px, aug_scale {args.aug_scale:g}.",
    ]
    if args.workers:
        notes.append("Lines of workers: the loader with so many processes, which share the cores.")
    counts = [source.images for source in figures.sources]
    if len(set(counts)) > 1:
        told = ", ".join(f"{source.name} {source.images:,}" for source in figures.sources)
        notes.append(f"The sources differ in their number of images ({told}): the first {min(counts):,} were used.")
    notes += [
        f"{source.name}: {len(source.broken)} broken among the images measured, replaced by others as in training; the "
        f"first: {source.broken[0]['reason']}"
        for source in figures.sources
        if source.broken
    ]
    settings = {"image_size": args.image_size, "aug_scale": args.aug_scale}
    plain = {"benchmark": "data", **settings, **asdict(figures), "machine": {**describe_machine(), "threads": 1}}
    _show(args, plain, [table(rows, "llrrrr")], notes)


def _measure_training(args: argparse.Namespace) -> None:
    device, config = select_device(args.device), args.config
    import torch

    from dc_ssdae.classes import importing_from
    from dc_ssdae.timing import describe_machine
    from dc_ssdae.training.benchmark import frozen_backbones, measure_training

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with importing_from(Path.cwd()):
        figures = measure_training(args.name, config, args.compared, device, args.steps)
        frozen = frozen_backbones(config)
    speeds: list[Sequence[str]] = [("configuration", "images/s", "ms/step", "quartiles", "ratio", "quartiles")]
    costs: list[Sequence[str]] = [
        ("configuration", "forward ms", "backward ms", "update ms", "peak GiB", "TFLOP/s"),
    ]
    for entry in figures:
        ratio = ("1", "-") if entry.ratio is None else _spread(entry.ratio, ".3f")
        rate = f"{entry.images_per_second.median:,.2f}"
        speeds.append((entry.name, rate, *_spread(entry.seconds.times(1000.0), ",.2f"), *ratio))
        spent = [f"{1000.0 * spread.median:,.2f}" for spread in (entry.phases or {}).values()] or ["-"] * 3
        throughput = "-" if entry.tflops_per_second is None else f"{entry.tflops_per_second:.3f}"
        costs.append((entry.name, *spent, _gibibytes(entry.peak_memory_bytes), throughput))
    compared = ", compared in alternation with the first; ratios are of images/s" if args.compared else ""
    notes = [
        f"{counted(args.steps, 'step')} of {counted(config.training.batch_size, 'random image')} of "
        f"{config.data.image_size} px, {config.training.precision}, {config.training.optimizer}; medians{compared}.",
        f"Memory: {'allocated on the device' if device.type == 'cuda' else 'resident set of this process'}.",
    ]
    if figures[0].flops is not None:
        notes.append(f"{figures[0].flops / 1e12:.4g} TFLOPs per step: 3 times the forward pass's.")
    if frozen:
        names = ", ".join(f"losses.{name}" for name in frozen)
        notes.append(f"{names}: random weights in the backbone, which take as long as real ones; values mean nothing.")
    notes += [
        f"{entry.name}: {entry.not_finite} of the steps were not finite, and may have cost less."
        for entry in figures
        if entry.not_finite
    ]
    plain = {"benchmark": "train", "steps": args.steps, "config": config.to_mapping(), "random_backbones": frozen}
    plain |= {"configurations": [asdict(entry) for entry in figures], "machine": describe_machine(device)}
    _show(args, plain, [table(speeds, "lrrrrr"), table(costs, "lrrrrr")], notes)


def _show(args: argparse.Namespace, figures: dict[str, Any], tables: Sequence[str], notes: Sequence[str]) -> None:
    """Print the figures as JSON, or as tables with notes below."""
    from dc_ssdae.timing import machine_line

    if args.json:
        say(json.dumps(figures, indent=2))
    else:
        say("\n\n".join([*tables, "\n".join(map(wrapped, [*notes, machine_line(figures["machine"])]))]))


def _spread(spread: "Spread", form: str) -> tuple[str, str]:
    """Two cells: the median, and the quartiles."""
    return f"{spread.median:{form}}", f"{spread.low:{form}}..{spread.high:{form}}"


def _gibibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f}"
