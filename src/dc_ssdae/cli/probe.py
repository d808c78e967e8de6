"""`dc-ssdae probe`: trains a small diffusion transformer on latents, to see how good they are to generate from."""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dc_ssdae.cli.common import (
    check_outputs,
    complain,
    import_classes,
    is_main_process,
    say,
    select_device,
    write_outputs,
)
from dc_ssdae.cli.options import DeviceOptions, ImportOptions, OutputOptions, SeedOptions
from dc_ssdae.cli.parser import Options as CommandOptions
from dc_ssdae.errors import InputError
from dc_ssdae.probe.config import Levels, Size
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    import torch

    from dc_ssdae.probe.report import ProbeReport

FILES = ("index.html", "probe.json", "table.md", "samples.png")


@dataclass(kw_only=True)
class ProbeOptions(CommandOptions):
    """What is trained on latents, and how it is sampled.

    Args:
        network: diffusion transformer to train: nano (4 blocks of 128 channels), tiny (6 of 192), S (12 of 384) or B
            (12 of 768). A token with more values than channels cannot be generated well.
        patch: patch size; each square of P x P latent positions is one token. By default 1, or as much as makes at most
            1,024 tokens.
        dynamics: flow_matching; or equilibrium_matching, with its authors' truncated decay and gradient scale 4.
        levels: how training draws the share of noise: uniform, or logit_normal.
        steps: number of training steps; by default --minutes decide.
        minutes: training time in minutes; by default 10 where --steps is not given.
        train_batch: latents per training step.
        lr: peak learning rate; it rises over the first 5 % of the budget, and then decays to 0 along a cosine. By
            default 2e-3 for nano and tiny, 1e-4 for S and B.
        ema: decay of the averaged weights per step; by default 0.99 for nano and tiny, 0.999 for S and B.
        precision: float32, or autocast to bfloat16 or float16 for the probe; by default bfloat16 on a GPU.
        samples: number of latents to sample; they are compared with as many training images, so it is at most half of
            the training set.
        sampling_steps: numbers of steps to sample with, each of which is measured; samples are shown of the largest.
            Adaptive stopping takes at most the largest.
        guidance: strength of classifier-free guidance; 1 is none.
    """

    network: Size = "nano"
    patch: int | None = setting(None, at_least=1, metavar="P")
    dynamics: Literal["flow_matching", "equilibrium_matching"] = "flow_matching"
    levels: Levels = "uniform"
    steps: int | None = setting(None, at_least=1, metavar="N")
    minutes: float | None = setting(None, above=0.0, metavar="M")
    train_batch: int = setting(32, at_least=1, name="--train-batch", metavar="B")
    lr: float | None = setting(None, above=0.0, metavar="X")
    ema: float | None = setting(None, at_least=0.0, below=1.0, metavar="X")
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    samples: int = setting(1000, at_least=2, metavar="N")
    sampling_steps: list[int] = setting([32], at_least=1, name="--sampling-steps", metavar="N,...")
    guidance: float = setting(1.0, at_least=0.0, metavar="X")


@dataclass(kw_only=True)
class Options(ProbeOptions, DeviceOptions, ImportOptions, SeedOptions, OutputOptions):
    """Train a small diffusion transformer on latents, to see how good they are to generate from.

    Give --model and --data to encode the images first, or --latents, a folder that dc-ssdae latents wrote; with
    --latents, --model decodes the samples, and --data has the images to compare them with. Writes DIR/index.html,
    probe.json, table.md and samples.png; DIR/latents; and DIR/run, a training run. If interrupted, the same command
    continues exactly where it stopped. Requires pip install 'dc-ssdae[eval]'.

    Args:
        latents: folder of latents, which may have subfolders train/ and validation/. Without validation/, every tenth
            latent is held out.
        model: which autoencoder: all that dc-ssdae compare takes.
        data: images: a folder of images or shards, which may have subfolders train/ and validation/, or a pattern of
            shards. Class folders give the classes.
        size: side of the images in pixels; they are resized by the shorter side and cropped to the central square. By
            default that of --latents, or 256.
        images: largest number of images per part to encode, spread evenly over it; by default all.
        batch: images, latents and samples per batch, except in training.
        workers: number of processes that read images and latents; by default one per core except one, at most 8.
        download: download weights of Inception and DINOv2, if they are missing on this machine, for the distances.
        seed: seed of everything random.
        dtype: precision in which the autoencoder computes, and in which --data are stored as latents.
    """

    latents: Path | None = setting(None, metavar="DIR")
    model: str | None = setting(None, metavar="MODEL")
    data: str | None = setting(None, metavar="ROOT")
    size: int | None = setting(None, at_least=1, metavar="S")
    images: int | None = setting(None, at_least=1, metavar="N")
    batch: int = setting(50, at_least=1, metavar="B")
    workers: int | None = setting(None, at_least=0, metavar="N")
    download: bool = False


def run(options: Options) -> None:
    """Encode, train, measure and write."""
    if options.latents is None and (options.model is None or options.data is None):
        raise InputError("give --latents, or --model and --data to encode images first")
    if options.data is not None and options.model is None:
        raise InputError("--data is for comparing decoded samples with images: give --model too")
    check_outputs(options, [options.out / name for name in FILES])
    device = select_device(options.device)
    import torch

    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.evaluation.candidates import open_candidate, parse_candidate
    from dc_ssdae.probe.features import load_features

    work = options.given("latents", "size", "workers", "seed")
    if options.model is not None:
        work["spec"] = parse_candidate(options.model)
        classes = import_classes(options.modules)
        work["candidate"] = open_candidate(work["spec"], getattr(torch, options.dtype), classes)
    if options.data is not None:
        work["images"] = open_sources(options.data, None, None, None)
    work |= {"limit": options.images, "batch_size": options.batch, "dtype": options.dtype}
    features = partial(load_features, download=options.download)
    report = probe_latent(options, options.program, device, folder=options.out, features=features, **work)
    if report is not None:
        text = report.as_markdown()
        say(text)
        contents: dict[str, str | bytes] = {"index.html": report.as_page(), "probe.json": report.as_json()}
        contents["table.md"] = text
        if report.samples is not None:
            contents["samples.png"] = report.as_picture()
        write_outputs(options, contents)


def probe_latent(options: ProbeOptions, program: str, device: "torch.device", **work: Any) -> "ProbeReport | None":
    """Encode images where there are no latents yet, train on these, and measure; go on where that was interrupted.

    Args:
        options: what is trained, and how it is sampled.
        program: name of the command, for messages.
        device: of all networks.
        work: further settings of `dc_ssdae.probe.run.Probe`.

    Returns:
        The report, in the main process; None in others, and where a signal ended the training, which is told.
    """
    import torch

    from dc_ssdae.probe.config import DYNAMICS, NetworkConfig, probe_training
    from dc_ssdae.probe.run import Probe

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dynamics = dict(DYNAMICS[options.dynamics])
    given = options.given("steps", "minutes", "lr", "precision")
    given |= {"ema_decay": options.ema} if options.ema is not None else {}
    precision = {"precision": "bfloat16" if device.type == "cuda" else "float32"}
    training = {"seed": work.get("seed", 0), "batch_size": options.train_batch, **precision, **given}
    probe = Probe(
        device=device,
        network=NetworkConfig(options.network, options.patch, levels=options.levels, dynamics=dynamics),
        training=probe_training(options.network, **training),
        tell=partial(complain, program),
        **options.given("samples", "sampling_steps", "guidance"),
        **work,
    )
    config = probe.prepare()
    stopped_by = probe.train(config)
    if not is_main_process():
        return None
    if stopped_by is not None:
        complain(program, f"stopped by {stopped_by}; go on with the same command")
        return None
    return probe.report(config, shlex.join(["dc-ssdae", *sys.argv[1:]]))
