"""A probe from an autoencoder or its latents to a report: encoding, training, each resumed, and measuring."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dc_ssdae.data.encode_latents import LatentSettings, encode_latents
from dc_ssdae.data.loader import ValidationImages, default_workers
from dc_ssdae.data.sources import ImageSources
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.candidates import Candidate, CandidateSpec
from dc_ssdae.presets import dump_yaml, read_yaml
from dc_ssdae.probe.config import MOST_TOKENS, LatentsConfig, NetworkConfig, ProbeConfig, probe_training
from dc_ssdae.probe.features import FeatureNetwork
from dc_ssdae.probe.latents import LatentSources, open_latents
from dc_ssdae.probe.measure import ProbeMeasurement, encoder_of, matching_places, thinned
from dc_ssdae.probe.network import SIZES
from dc_ssdae.probe.report import ProbeReport
from dc_ssdae.probe.sampling import samplings
from dc_ssdae.probe.trainer import ProbeTask, build_step
from dc_ssdae.provenance import name_of_path
from dc_ssdae.timing import describe_machine
from dc_ssdae.training.checkpoint import read_state
from dc_ssdae.training.config import TrainingConfig, check_changes
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.run import CONFIG_FILE, WEIGHTS_FILE, RunFolder, is_finished
from dc_ssdae.training.start import start_task
from dc_ssdae.weights import read_safetensors

DEFAULT_SIZE = 256
"""Side in pixels of the images that are encoded, where none is asked for."""

LOOKED_AT = 2000
"""Of so many latents, evenly spread, the images are looked for before the training."""


@dataclass(kw_only=True)
class Probe:
    """What is probed, and how.

    Args:
        folder: for latents/, where images are encoded, and for run/.
        device: of all networks.
        network: what is trained on the latents; a patch of None is chosen.
        training: how.
        latents: folder of latents; None encodes the images.
        spec: names the candidate; None where there is none.
        candidate: encodes and decodes, on the CPU; None measures without pictures.
        images: to encode, and to compare samples with.
        features: loads the networks by whose features they are compared.
        size: side of the images in pixels; None is that of the latents, or `DEFAULT_SIZE`.
        limit: images per part to encode, at most.
        dtype: of the latents that are stored.
        batch_size: images, latents and samples at a time, except in training.
        workers: processes that read images; None chooses by the number of cores.
        samples: number of samples, and of training images they are compared with; at most half of these.
        sampling_steps: numbers of steps of the samplers.
        guidance: w of classifier-free guidance; 1 leaves it out.
        seed: of the samples' noise and of the bootstrap.
        tell: gets a line for what is to be known of the images.
    """

    folder: Path
    device: torch.device
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=probe_training)
    latents: Path | None = None
    spec: CandidateSpec | None = None
    candidate: Candidate | None = None
    images: ImageSources | None = None
    features: Callable[[torch.device], Mapping[str, FeatureNetwork]] = lambda _: {}
    size: int | None = None
    limit: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 50
    workers: int | None = None
    samples: int = 1000
    sampling_steps: Sequence[int] = (32,)
    guidance: float = 1.0
    seed: int = 0
    tell: Callable[[str], None] = print

    def prepare(self) -> ProbeConfig:
        """Encode the images where there are no latents yet, and find what does not fit before the training.

        Returns:
            The configuration of the training.

        Raises:
            InputError: the candidate has no latents to train on, or they are of another one, or of other images.
        """
        data = self._encode() if self.latents is None else find_latents(self.latents)
        data = replace(data, workers=self.workers)
        sources = open_latents(data)
        dataset = sources.train.dataset
        size = dataset.manifest["settings"]["size"]
        if self.size not in (None, size):
            raise InputError(f"{self.latents} was encoded from images of {size} pixels, not {self.size}", "size")
        self.size = size
        if self.guidance != 1.0 and not sources.train.classes:
            raise InputError("guidance needs classes of at least ten training images; leave it at 1", "guidance")
        if self.candidate is not None and self.latents is not None:
            with torch.inference_mode():
                latent = dataset.denormalise(sources.train.read(0).latent)[None].to(self.device)
                shape = tuple(self.candidate.to(self.device).decode(latent).images.shape)
                self.candidate.to(torch.device("cpu"))
            if shape != (1, 3, size, size):
                raise InputError(f"the model decodes these latents to {shape}; name the one that encoded them", "model")
        if self.images is not None:
            some = range(0, len(sources.train), -(-len(sources.train) // LOOKED_AT))
            matching_places(self._all_images(), sources.train, some)
        network = self.network
        if network.patch is None:
            sides = [side for side in range(1, dataset.latent_shape[1] + 1) if dataset.latent_shape[1] % side == 0]
            fits = (side for side in sides if (dataset.latent_shape[1] // side) ** 2 <= MOST_TOKENS)
            network = replace(network, patch=next(fits))
        return ProbeConfig(data, network, self.training)

    def train(self, config: ProbeConfig) -> str | None:
        """Train in a new folder, or go on with one exactly where it was interrupted.

        Returns:
            The signal that ended it; None where its budget did.

        Raises:
            InputError: as `start_task`; or the run in the folder is another one.
        """
        path, text = self.folder / "run", dump_yaml(config.to_mapping())
        if (path / CONFIG_FILE).is_file():
            before = ProbeConfig.from_mapping(read_yaml(path / CONFIG_FILE))
            check_changes(before.fixed_settings(), config.fixed_settings(), path, "choose another --out")
            if is_finished(RunFolder(path), config.training):
                return None
        return start_task(ProbeTask(config, text), text, path, self.device.type == "cpu").stopped_by

    def report(self, config: ProbeConfig, command: str) -> ProbeReport:
        """Measure the network that was trained.

        Args:
            config: of its run.
            command: that made the report.
        """
        run, sources = RunFolder(self.folder / "run"), open_latents(config.data)
        step = build_step(config, sources)
        step.model.load_state_dict(read_safetensors(run.model / WEIGHTS_FILE))
        step = step.eval().to(self.device)
        measurement = ProbeMeasurement(step, sources, self.device, self.batch_size, self.seed)
        found = measurement.losses() | {"latent_spectrum": measurement.spectrum(self.samples)}
        if self.candidate is not None:
            images = None if self.images is None else self._all_images()
            ways, features = samplings(step, self.sampling_steps, self.guidance), self.features(self.device)
            candidate = self.candidate.to(self.device)
            found |= measurement.pictures(candidate, images, features, ways, self.samples)
            self.candidate.to(torch.device("cpu"))
        last = run.checkpoints.last()
        assert last is not None
        state = read_state(last)
        curve = [(line["step"], line["loss/dynamics"]) for line in read_lines(run.metrics) if line["loss/dynamics"]]
        about = {**_about(config, sources, step.model), "steps": state["step"], "seconds": state["seconds"]}
        about |= {"guidance": self.guidance, "image_size": self.size, "machine": describe_machine(self.device)}
        return ProbeReport(
            label=self.spec.label if self.spec is not None else name_of_path(str(self.latents)) or "latents",
            about=about,
            training_curve=thinned(curve),
            validation_curve=[(line["step"], line["loss"]) for line in read_lines(run.evaluations)],
            command=command,
            caveats=_caveats(config, sources),
            **found,
        )

    def _encode(self) -> LatentsConfig:
        """Encode images and their mirror images into shards of latents, or go on where that was interrupted."""
        assert self.candidate is not None
        assert self.spec is not None
        assert self.images is not None
        processes = Processes.join(self.device)
        self.device = torch.device(processes.device)
        self.size = self.size or DEFAULT_SIZE
        encoder = encoder_of(self.candidate.to(self.device), self.spec, self.size, self.device)
        stored = LatentSettings(self.size, flip=True, store_dtype=self.dtype)
        work: dict[str, Any] = {"limit": self.limit, "batch_size": self.batch_size, "report": self.tell}
        work["workers"] = default_workers(processes.count) if self.workers is None else self.workers
        parts = {name: source for name, source in self.images._asdict().items() if source is not None}
        encode_latents(parts, self.folder / "latents", encoder, stored, processes=processes, **work)
        self.candidate.to(torch.device("cpu"))
        return find_latents(self.folder / "latents")

    def _all_images(self) -> ValidationImages:
        """The training images."""
        assert self.images is not None
        assert self.size is not None
        return ValidationImages(self.images.train, self.size, len(self.images.train))


def find_latents(folder: Path) -> LatentsConfig:
    """Name the parts of a folder of latents: train/ and validation/, or the folder itself."""
    if not (folder / "train").is_dir():
        return LatentsConfig(str(folder))
    validation = folder / "validation"
    return LatentsConfig(str(folder / "train"), str(validation) if validation.is_dir() else None)


def _about(config: ProbeConfig, sources: LatentSources, network: Any) -> dict[str, Any]:
    training = config.training
    return {
        "latent_shape": sources.train.dataset.latent_shape,
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


def _caveats(config: ProbeConfig, sources: LatentSources) -> list[str]:
    """What must be known of this network on these latents."""
    width, channels = SIZES[config.network.size][1], sources.train.dataset.latent_shape[0]
    values = channels * (config.network.patch or 1) ** 2
    if values <= width:
        return []
    return [
        f"A token has {values} values, the network {width} channels: its field cannot have all of the noise, and its "
        f"loss cannot fall far below {1 - width / values:.2f}. Compare with a wider --network."
    ]
