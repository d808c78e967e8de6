"""`dc-ssdae probe`: trains a small diffusion transformer on latents, to see how good they are to generate from."""

import shlex
import sys
from dataclasses import dataclass, replace
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
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from dc_ssdae.cli.compare import Options as CompareOptions
    from dc_ssdae.data.sources import ImageSources
    from dc_ssdae.evaluation.candidates import Candidate, CandidateSpec
    from dc_ssdae.probe.config import ProbeConfig
    from dc_ssdae.probe.features import FeatureNetwork
    from dc_ssdae.probe.report import ProbeReport

FILES = ("index.html", "probe.json", "table.md", "samples.png")


@dataclass(kw_only=True)
class ProbeOptions(CommandOptions):
    """What is trained on latents, and how it is sampled.

    Args:
        network: diffusion transformer to train: nano (4 blocks of 128 channels), tiny (6 of 192), S (12 of 384) or B
            (12 of 768).
        patch: side of the squares of latent values that make a token.
        dynamics: flow_matching; or equilibrium_matching, with its authors' truncated decay and gradient scale 4.
        levels: how training draws the share of noise: uniform, or logit_normal.
        steps: number of training steps; by default --minutes decide.
        minutes: training time in minutes; by default 10 where --steps is not given.
        train_batch: latents per training step.
        lr: learning rate, from which a cosine leads to 0; by default 2e-3 for nano and tiny, 1e-4 for S and B.
        ema: decay of the averaged weights per step; by default 0.99, for short runs.
        samples: number of samples that are drawn and compared with as many training images; at most half of these.
        sampling_steps: numbers of steps to sample with; each is measured, samples are shown of the largest.
        guidance: strength of classifier-free guidance; 1 is none.
    """

    network: Literal["nano", "tiny", "S", "B"] = "nano"
    patch: int = setting(1, at_least=1, metavar="P")
    dynamics: Literal["flow_matching", "equilibrium_matching"] = "flow_matching"
    levels: Literal["uniform", "logit_normal"] = "uniform"
    steps: int | None = setting(None, at_least=1, metavar="N")
    minutes: float | None = setting(None, above=0.0, metavar="M")
    train_batch: int = setting(32, at_least=1, name="--train-batch", metavar="B")
    lr: float | None = setting(None, above=0.0, metavar="X")
    ema: float = setting(0.99, at_least=0.0, below=1.0, metavar="X")
    samples: int = setting(1000, at_least=2, metavar="N")
    sampling_steps: list[int] = setting([32], at_least=1, name="--sampling-steps", metavar="N,...")
    guidance: float = setting(1.0, at_least=0.0, metavar="X")

    def config(self, data: Any, seed: int) -> "ProbeConfig":
        """The configuration of the training, on latents `data`."""
        from dc_ssdae.probe.config import DYNAMICS, LEARNING_RATES, NetworkConfig, ProbeConfig, probe_training

        network = NetworkConfig(self.network, self.patch, levels=self.levels, dynamics=dict(DYNAMICS[self.dynamics]))
        budget = {name: value for name, value in (("steps", self.steps), ("minutes", self.minutes)) if value}
        lr = self.lr or LEARNING_RATES[self.network]
        training = probe_training(batch_size=self.train_batch, lr=lr, ema_decay=self.ema, seed=seed, **budget)
        return ProbeConfig(data, network, training)


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
        size: side of the images in pixels; they are resized by the shorter side and cropped to the central square.
        batch: images, latents and samples per batch, except in training.
        workers: number of processes that read latents for training; by default one per core except one, at most 8.
        download: download weights of Inception and DINOv2, if they are missing on this machine, for the distances.
        seed: seed of everything random.
        dtype: precision in which the autoencoder computes; the probe itself is float32.
    """

    latents: Path | None = setting(None, metavar="DIR")
    model: str | None = setting(None, metavar="MODEL")
    data: str | None = setting(None, metavar="ROOT")
    size: int = setting(256, at_least=1, metavar="S")
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

    images = None if options.data is None else open_sources(options.data, None, None, None)
    candidate = spec = None
    if options.model is not None:
        spec = parse_candidate(options.model)
        candidate = open_candidate(spec, getattr(torch, options.dtype), import_classes(options.modules))
    features = {} if images is None else load_features(device, options.download)
    report = probe_latent(
        options, options, options.size, device, options.out, options.latents, spec, candidate, images, features
    )
    if report is not None:
        text = report.as_markdown()
        say(text)
        contents: dict[str, str | bytes] = {
            "index.html": report.as_page(),
            "probe.json": report.as_json(),
            "table.md": text,
        }
        if report.samples is not None:
            contents["samples.png"] = report.as_picture()
        write_outputs(options, contents)


def probe_latent(
    options: "Options | CompareOptions",
    probe: ProbeOptions,
    size: int,
    device: "torch.device",
    folder: Path,
    latents: Path | None,
    spec: "CandidateSpec | None",
    candidate: "Candidate | None",
    images: "ImageSources | None",
    features: "Mapping[str, FeatureNetwork]",
) -> "ProbeReport | None":
    """Encode images where there are no latents yet, train on these, and measure; go on where that was interrupted.

    Args:
        options: of the command, for the sizes of batches, the workers and the seed.
        probe: what is trained, and how it is sampled.
        size: side of the images in pixels.
        device: of all networks.
        folder: for latents/ and run/.
        latents: folder of latents; None encodes the images.
        spec: names the candidate.
        candidate: encodes and decodes; None measures without pictures.
        images: to encode, and to compare samples with.
        features: that they are compared by.

    Returns:
        The report, in the main process; None where a signal ended the training, which is told.
    """
    import torch

    from dc_ssdae.distributed import Processes
    from dc_ssdae.probe.run import (
        ProbeSettings,
        check_images,
        encode_for_probe,
        find_latents,
        report_probe,
        train_probe,
    )
    from dc_ssdae.provenance import name_of_path
    from dc_ssdae.timing import describe_machine

    chosen = probe.given("samples", "sampling_steps", "guidance")
    settings = ProbeSettings(batch_size=options.batch, size=size, seed=options.seed, **chosen)
    if latents is not None:
        data = find_latents(latents)
        if images is not None:
            check_images(data, images.train, size)
    else:
        assert candidate is not None
        assert spec is not None
        assert images is not None
        processes = Processes.join(device)
        device, told = torch.device(processes.device), partial(complain, options.program)
        candidate.to(device)
        data = encode_for_probe(candidate, spec, images, folder / "latents", device, settings, processes, told)
        candidate.to(torch.device("cpu"))
    config = probe.config(replace(data, workers=options.workers), options.seed)
    stopped_by = train_probe(config, folder / "run", cpu=device.type == "cpu")
    if not is_main_process():
        return None
    if stopped_by is not None:
        complain(options.program, f"stopped by {stopped_by}; go on with the same command")
        return None
    label = spec.label if spec is not None else name_of_path(str(latents)) or "latents"
    about: dict[str, Any] = {"image_size": size if images is not None else None, "machine": describe_machine(device)}
    command = shlex.join(["dc-ssdae", *sys.argv[1:]])
    work: dict[str, Any] = {} if images is None else {"images": images.train, "features": features}
    if candidate is not None:
        work |= {"candidate": candidate.to(device)}
    return report_probe(config, folder / "run", label, settings, device, about, command, **work)
