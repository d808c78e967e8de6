"""A probe from latents to report: training, resumed where it was interrupted, and what is then measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dc_ssdae.data.encode_latents import LatentSettings, encode_latents
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import ImageSource, ImageSources
from dc_ssdae.distributed import Processes
from dc_ssdae.evaluation.candidates import Candidate, CandidateSpec
from dc_ssdae.presets import dump_yaml, read_yaml
from dc_ssdae.probe.config import LatentsConfig, ProbeConfig
from dc_ssdae.probe.features import FeatureNetwork
from dc_ssdae.probe.latents import LatentSources, open_latents
from dc_ssdae.probe.measure import ProbeMeasurement, encoder_of, matching_places, thinned
from dc_ssdae.probe.report import ProbeReport
from dc_ssdae.probe.sampling import samplings
from dc_ssdae.probe.trainer import ProbeTask, build_step
from dc_ssdae.training.checkpoint import read_state
from dc_ssdae.training.config import check_changes
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.run import CONFIG_FILE, WEIGHTS_FILE, RunFolder, is_finished
from dc_ssdae.training.start import start_task
from dc_ssdae.weights import read_safetensors


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How a trained probe is measured.

    Args:
        samples: number of samples of each sampler, and of training images; at most half of these.
        sampling_steps: numbers of steps of the samplers; samples are shown of the largest.
        guidance: w of classifier-free guidance; 1 leaves it out.
        batch_size: samples at a time.
        size: side of the images in pixels.
        seed: of the samples' noise and of the bootstrap.
    """

    samples: int = 1000
    sampling_steps: Sequence[int] = (32,)
    guidance: float = 1.0
    batch_size: int = 50
    size: int = 256
    seed: int = 0


def encode_for_probe(
    candidate: Candidate,
    spec: CandidateSpec,
    images: ImageSources,
    folder: Path,
    device: torch.device,
    settings: ProbeSettings,
    processes: Processes,
    report: Any = print,
) -> LatentsConfig:
    """Encode images and their mirror images into shards of latents, or go on where that was interrupted.

    Raises:
        InputError: the candidate has no latents to train on, or as `encode_latents`.
    """
    encoder = encoder_of(candidate, spec, settings.size, device)
    parts = {"train": images.train} | ({"validation": images.validation} if images.validation is not None else {})
    stored = LatentSettings(settings.size, flip=True)
    encode_latents(parts, folder, encoder, stored, batch_size=settings.batch_size, processes=processes, report=report)
    return find_latents(folder)


def find_latents(folder: Path) -> LatentsConfig:
    """Name the parts of a folder of latents: train/ and validation/, or the folder itself."""
    if not (folder / "train").is_dir():
        return LatentsConfig(str(folder))
    validation = folder / "validation"
    return LatentsConfig(str(folder / "train"), str(validation) if validation.is_dir() else None)


def check_images(data: LatentsConfig, images: ImageSource, size: int) -> None:
    """Refuse images that latents were not encoded from, before the time that training takes.

    Raises:
        InputError: as `matching_places`.
    """
    matching_places(ValidationImages(images, size, len(images)), open_latents(data).train, [0])


def train_probe(config: ProbeConfig, path: Path, cpu: bool = False) -> str | None:
    """Train a probe in a new folder, or go on with one exactly where it was interrupted.

    Args:
        config: of the run.
        path: of its folder.
        cpu: use no GPU.

    Returns:
        The signal that ended it; None where its budget did.

    Raises:
        InputError: as `start_task`; or the run in the folder is another one.
    """
    text, run = dump_yaml(config.to_mapping()), RunFolder(path)
    if (path / CONFIG_FILE).is_file():
        before = ProbeConfig.from_mapping(read_yaml(path / CONFIG_FILE))
        check_changes(before.fixed_settings(), config.fixed_settings(), path)
        if is_finished(run, config.training):
            return None
    return start_task(ProbeTask(config, text), text, path, cpu).stopped_by


def report_probe(
    config: ProbeConfig,
    path: Path,
    label: str,
    settings: ProbeSettings,
    device: torch.device,
    about: Mapping[str, Any],
    command: str,
    candidate: Candidate | None = None,
    images: ImageSource | None = None,
    features: Mapping[str, FeatureNetwork] | None = None,
) -> ProbeReport:
    """Measure a trained probe.

    Args:
        config: of its run.
        path: of its folder.
        label: of the autoencoder.
        settings: how to measure.
        device: of the network.
        about: what else the report tells of its making.
        command: that makes it.
        candidate: decodes samples, on `device`; None leaves out whatever needs pictures.
        images: real ones that samples are compared with.
        features: as `load_features` gives them.
    """
    run, sources = RunFolder(path), open_latents(config.data)
    step = build_step(config, sources)
    step.model.load_state_dict(read_safetensors(run.model / WEIGHTS_FILE))
    measurement = ProbeMeasurement(step.eval().to(device), sources, device, settings.batch_size, settings.seed)
    found = measurement.losses() | {"latent_spectrum": measurement.spectrum(settings.samples)}
    if candidate is not None:
        shown = None if images is None else ValidationImages(images, settings.size, len(images))
        ways = samplings(step, [*settings.sampling_steps], settings.guidance)
        found |= measurement.pictures(candidate, shown, features or {}, ways, settings.samples)
    last = run.checkpoints.last()
    state = {} if last is None else read_state(last)
    curve = [(line["step"], line["loss/dynamics"]) for line in read_lines(run.metrics) if line["loss/dynamics"]]
    return ProbeReport(
        label=label,
        about={**_about(config, sources, step.model), "steps": state["step"], "seconds": state["seconds"], **about},
        training_curve=thinned(curve),
        validation_curve=[(line["step"], line["loss"]) for line in read_lines(run.evaluations)],
        command=command,
        **found,
    )


def _about(config: ProbeConfig, sources: LatentSources, network: Any) -> dict[str, Any]:
    dataset, training = sources.train.dataset, config.training
    return {
        "latent_shape": dataset.latent_shape,
        "training_latents": len(sources.train),
        "validation_latents": len(sources.validation),
        "classes": len(sources.train.classes),
        "network": config.network.size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "patch": config.network.patch,
        "class_dropout": config.network.class_dropout,
        "levels": config.network.levels,
        "dynamics": config.network.dynamics,
        "batch_size": training.batch_size,
        "learning_rate": training.lr,
        "ema_decay": training.ema_decay,
        "precision": training.precision,
        "seed": training.seed,
    }
