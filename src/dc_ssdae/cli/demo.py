"""`dc-ssdae demo`: reconstruct photos with the shipped model, train a small one on others, write a report."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    add_device_option,
    add_dtype_option,
    add_overwrite_option,
    add_seed_option,
    check_outputs,
    say,
    select_device,
)
from dc_ssdae.cli.parser import CommandParser, number_between, whole_number
from dc_ssdae.errors import counted
from dc_ssdae.presets import SHIPPED_MODEL

if TYPE_CHECKING:
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.report import PhotoResult
    from dc_ssdae.training.config import RunConfig

PRESET = "demo"
SAMPLE_PHOTOS = "dc_ssdae.data.sample_photos.SamplePhotos"
EVALUATION_SIDE = 256
"""Shorter side, in pixels, of the photos in the report."""


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae demo",
        description="Reconstruct photos with the model that comes with this package; then train a small "
        "equilibrium-matching autoencoder on others, which come with scikit-image, and write a report of both. Needs "
        "no GPU and downloads nothing.",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=number_between(0.001), default=3.0, metavar="M", help="training time in minutes (default 3)"
    )
    budget.add_argument(
        "--steps", type=whole_number(1), metavar="N", help="train this many steps instead, which is reproducible"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write to (default runs/demo)"
    )
    add_overwrite_option(parser)
    add_seed_option(parser, "of all that is random")
    add_device_option(parser)
    add_dtype_option(parser, "what the networks compute in while they train", ("float32", "bfloat16"))
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, save and report; gives the exit code."""
    device = select_device(args.device)
    if _is_demo(args.out):
        check_outputs(args, [args.out / "config.yaml"])
    import torch

    threads = torch.get_num_threads()
    try:
        return _run(args, device)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace, device: "torch.device") -> int:
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.cli.run_config import config_yaml
    from dc_ssdae.data.sample_photos import sample_photos
    from dc_ssdae.training.logging import read_lines
    from dc_ssdae.training.start import start_run

    config = _configuration(args)
    held_out = sample_photos("held_out")
    names = [photo.name for photo in sample_photos("train")]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    say(f"Reconstructing {counted(len(held_out), 'photo')} with {SHIPPED_MODEL}, which comes with this package")
    shipped = _evaluate(DCSSDAE.from_pretrained(), held_out, device)
    _say_results(shipped)
    if args.steps is None:  # a run of steps is reproducible, but only with the same number of threads
        _choose_threads(config, device)
    say(f"Training preset {PRESET!r} on {_device_name(device)}, {_budget(config)}, on {counted(len(names), 'photo')}")
    start_run(config, config_yaml(config), args.out, cpu=device.type == "cpu", replace=_is_demo(args.out))
    history = read_lines(args.out / "metrics.jsonl")
    model = DCSSDAE.from_pretrained(args.out / "model")
    say("Reconstructing the same photos, which the new model has not seen")
    results = _evaluate(model, held_out, device)
    report = args.out / "report.html"
    _report(report, shipped, results, history, config, model, names)
    _say_results(results)
    say(f"Model:  {args.out / 'model'}\nReport: {report}")
    return 0


def _configuration(args: argparse.Namespace) -> "RunConfig":
    from dc_ssdae.presets import load_preset
    from dc_ssdae.training.config import RunConfig

    preset = load_preset(PRESET)
    budget = {"minutes": None, "steps": args.steps} if args.steps else {"minutes": args.minutes, "steps": None}
    given = {**budget, "preset": PRESET, "seed": args.seed, "precision": args.dtype, "output": str(args.out)}
    # Nothing to save on the way of a few minutes; the end is always saved.
    training = {**preset.get("training", {}), **given, "checkpoint_every": 10**9, "evaluate_every": 10**9}
    photos = {"class_path": SAMPLE_PHOTOS, "init_args": {"split": "train"}}
    data = {**preset.get("data", {}), "dataset": photos, "workers": 0}
    return RunConfig.from_mapping({**preset, "data": data, "training": training})


def _is_demo(path: Path) -> bool:
    """Tell an earlier demo, which --overwrite replaces, from a run that somebody needs."""
    config = path / "config.yaml"
    return config.is_file() and SAMPLE_PHOTOS in config.read_text(encoding="utf-8", errors="replace")


def _choose_threads(config: "RunConfig", device: "torch.device") -> None:
    """Use one thread on a CPU that other work keeps busy: threads that wait for each other there slow down manyfold."""
    import statistics
    import time

    import torch

    from dc_ssdae.training.build import build_step
    from dc_ssdae.training.step import draw_noise

    every = torch.get_num_threads()
    if device.type != "cpu" or every == 1:
        return
    step = build_step(config).train()
    batch, size = config.training.batch_size, config.data.image_size
    pixels = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
    noise = draw_noise(step.model, size, 0, batch, range(batch), device)
    seconds: dict[int, list[float]] = {every: [], 1: []}
    for _ in range(4):
        for threads, times in seconds.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            step(pixels, *noise).total.backward()
            times.append(time.perf_counter() - start)
    # The first round warms up.
    torch.set_num_threads(min(seconds, key=lambda threads: statistics.median(seconds[threads][1:])))


def _evaluate(model: "DCSSDAE", photos: list[Any], device: "torch.device") -> "list[PhotoResult]":
    import torch
    from tqdm import tqdm

    from dc_ssdae.data.transforms import resize_shorter_side
    from dc_ssdae.evaluation.reconstruction import measure_photo

    model.to(device=device, memory_format=torch.channels_last)
    return [
        measure_photo(model, photo.name, resize_shorter_side(photo.pixels, EVALUATION_SIDE))
        for photo in tqdm(photos, desc="reconstruct", unit="photo")
    ]


def _say_results(results: "list[PhotoResult]") -> None:
    for result in results:
        say(f"  {result.name}: {result.psnr:.2f} dB (bicubic of as many values {result.baseline_psnr:.2f} dB)")


def _report(
    path: Path,
    shipped: "list[PhotoResult]",
    results: "list[PhotoResult]",
    history: list[dict[str, Any]],
    config: "RunConfig",
    model: "DCSSDAE",
    trained_on: list[str],
) -> None:
    import platform

    import torch

    from dc_ssdae import __version__
    from dc_ssdae.evaluation.report import write_demo_report

    latent = model.config
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    training = config.training
    seconds = history[-1]["seconds"]
    images = len(history) * training.batch_size
    curves = {
        "error of the image, L_dynamics": [record["loss/dynamics"] for record in history],
        "KL of the latent, summed per image": [record["loss/kl"] for record in history],
    }
    facts = {
        "model": f"preset {PRESET!r}: f{latent.downsample_factor}c{latent.latent_channels}, equilibrium matching; "
        f"parameters: {sizes}",
        "trained on": f"{config.data.image_size} px random crops of {', '.join(trained_on)}, colours also exchanged",
        "training": f"{counted(len(history), 'step')} of {counted(training.batch_size, 'crop')} in "
        f"{seconds / 60:.1f} minutes, {images / seconds:.1f} images/s, {training.precision}, seed {training.seed}",
        "objective": " + ".join(f"{loss.weight:g} · L_{name}" for name, loss in config.losses.items()) + "; "
        "no perceptual loss, no GAN",
        "evaluated on": f"photos resized to a shorter side of {EVALUATION_SIDE} px (bicubic, antialiased), one step",
        "hardware": f"{_device_name(next(model.parameters()).device)}, {counted(torch.get_num_threads(), 'thread')}, "
        f"{platform.system()} {platform.machine()}",
        "versions": f"dc-ssdae {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    write_demo_report(path, shipped, results, curves, facts)


def _budget(config: "RunConfig") -> str:
    training = config.training
    return counted(training.steps, "step") if training.steps is not None else f"{training.minutes:g} minutes"


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
