"""`dc-ssdae demo`: train a small model on real photos, evaluate it on others, write a report."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import add_device_option, add_dtype_option, say, select_device
from dc_ssdae.cli.parser import LARGEST_SEED, CommandParser, whole_number

if TYPE_CHECKING:
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.report import PhotoResult
    from dc_ssdae.training.config import TrainingConfig
    from dc_ssdae.training.trainer import StepRecord

PRESET = "demo"
EVALUATION_SIDE = 256
"""Shorter side, in pixels, of the photos in the report."""


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae demo",
        description="Train a small equilibrium-matching autoencoder on the photos that come with scikit-image, "
        "reconstruct others, and write a report. Needs no GPU and downloads nothing.",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=_positive_number, default=3.0, metavar="M", help="training time in minutes (default 3)"
    )
    budget.add_argument(
        "--steps", type=whole_number(1), metavar="N", help="train this many steps instead, which is reproducible"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write to (default runs/demo)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), default=0, metavar="S", help="of all that is random (default 0)"
    )
    add_device_option(parser)
    add_dtype_option(parser, "what the networks compute in while they train", ("float32", "bfloat16"))
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, save and report; gives the exit code."""
    device = select_device(args.device)
    import torch

    threads = torch.get_num_threads()
    try:
        return _run(args, device)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace, device: "torch.device") -> int:
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.data.sample_photos import sample_photos
    from dc_ssdae.presets import load_preset
    from dc_ssdae.training.config import TrainingConfig

    budget = {"minutes": None, "steps": args.steps} if args.steps else {"minutes": args.minutes, "steps": None}
    given = {**budget, "seed": args.seed, "precision": args.dtype}
    config = TrainingConfig.from_mapping({**load_preset(PRESET).get("training", {}), **given})
    photos, held_out = sample_photos("train"), sample_photos("held_out")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = DCSSDAE.from_preset(PRESET).to(device=device, memory_format=torch.channels_last)
    if config.steps is None:  # a run of steps is reproducible, but only with the same number of threads
        _choose_threads(model, [photo.pixels for photo in photos], config)
    say(f"Training preset {PRESET!r} on {_device_name(device)}, {_budget(config)}, on {len(photos)} photos")
    history = _train(model, [photo.pixels for photo in photos], config)
    say(f"Reconstructing {len(held_out)} photos that the model has not seen")
    results = _evaluate(model, held_out)
    model.save_pretrained(args.out / "model")
    _write_metrics(args.out / "metrics.jsonl", history, config)
    report = args.out / "report.html"
    _report(report, results, history, config, model, [photo.name for photo in photos])
    for result in results:
        say(f"  {result.name}: {result.psnr:.2f} dB (bicubic of as many values {result.baseline_psnr:.2f} dB)")
    say(f"Model:  {args.out / 'model'}\nReport: {report}")
    return 0


def _choose_threads(model: "DCSSDAE", photos: "list[torch.Tensor]", config: "TrainingConfig") -> None:
    """Use one thread on a CPU that other work keeps busy: threads that wait for each other there slow down manyfold."""
    import statistics
    import time

    import torch

    from dc_ssdae.training.trainer import compute_losses, draw_batch

    every = torch.get_num_threads()
    if next(model.parameters()).device.type != "cpu" or every == 1:
        return
    batch = draw_batch(photos, model, config, 0)
    seconds: dict[int, list[float]] = {every: [], 1: []}
    for _ in range(4):
        for threads, times in seconds.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            compute_losses(model, batch, config).total.backward()
            times.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    # The first round warms up.
    torch.set_num_threads(min(seconds, key=lambda threads: statistics.median(seconds[threads][1:])))


def _train(model: "DCSSDAE", photos: "list[torch.Tensor]", config: "TrainingConfig") -> "list[StepRecord]":
    from tqdm import tqdm

    from dc_ssdae.training.trainer import train

    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
    with tqdm(total=100.0, desc="train", bar_format=shape, mininterval=0.5) as bar:

        def show(record: "StepRecord") -> None:
            speed = (record.step + 1) * config.batch_size / record.seconds
            bar.set_postfix_str(
                f"step {record.step + 1}, {speed:.0f} images/s, loss {record.losses['dynamics']:.4f}", refresh=False
            )
            bar.update(min(100.0 * record.progress, 100.0) - bar.n)

        history = train(model, photos, config, show)
        bar.update(100.0 - bar.n)
    return history


def _evaluate(model: "DCSSDAE", photos: list[Any]) -> "list[PhotoResult]":
    from tqdm import tqdm

    from dc_ssdae.data.transforms import resize_shorter_side
    from dc_ssdae.evaluation.reconstruction import measure_photo

    return [
        measure_photo(model, photo.name, resize_shorter_side(photo.pixels, EVALUATION_SIDE))
        for photo in tqdm(photos, desc="reconstruct", unit="photo")
    ]


def _write_metrics(path: Path, history: "list[StepRecord]", config: "TrainingConfig") -> None:
    import json

    with path.open("w", encoding="utf-8") as file:
        for record in history:
            line = {
                "step": record.step,
                **{f"loss/{name}": value for name, value in record.losses.items()},
                "gradient_norm": record.gradient_norm,
                "lr": record.lr,
                "images_per_second": (record.step + 1) * config.batch_size / record.seconds,
                "seconds": record.seconds,
            }
            file.write(json.dumps(line) + "\n")


def _report(
    path: Path,
    results: "list[PhotoResult]",
    history: "list[StepRecord]",
    config: "TrainingConfig",
    model: "DCSSDAE",
    trained_on: list[str],
) -> None:
    import platform

    import torch

    from dc_ssdae import __version__
    from dc_ssdae.evaluation.report import LossCurve, write_demo_report

    latent = model.config
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    seconds = history[-1].seconds
    images = len(history) * config.batch_size
    curves = [
        LossCurve("field error, L_dynamics", [record.losses["dynamics"] for record in history]),
        LossCurve("KL of the latent, summed per image", [record.losses["kl"] for record in history]),
    ]
    facts = {
        "model": f"preset {PRESET!r}: f{latent.downsample_factor}c{latent.latent_channels}, equilibrium matching; "
        f"parameters: {sizes}",
        "trained on": f"{config.image_size} px random crops of {', '.join(trained_on)}",
        "training": f"{len(history):,} steps of {config.batch_size} crops in {seconds / 60:.1f} minutes, "
        f"{images / seconds:.1f} images/s, {config.precision}, seed {config.seed}",
        "objective": f"{config.loss_weights.dynamics:g} · L_dynamics + {config.loss_weights.kl:g} · L_KL; "
        "no perceptual loss, no GAN",
        "evaluated on": f"photos resized to a shorter side of {EVALUATION_SIDE} px (bicubic, antialiased), one step",
        "hardware": f"{_device_name(next(model.parameters()).device)}, {torch.get_num_threads()} threads, "
        f"{platform.system()} {platform.machine()}",
        "versions": f"dc-ssdae {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    write_demo_report(path, results, curves, facts)


def _budget(config: "TrainingConfig") -> str:
    return f"{config.steps} steps" if config.steps is not None else f"{config.minutes:g} minutes"


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
