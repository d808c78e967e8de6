"""The training of a probe, by the loop that trains autoencoders: it resumes to the bit, averages and skips alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from torch import Tensor

from dc_ssdae.components import resolve_part
from dc_ssdae.distributed import Processes
from dc_ssdae.dynamics import Dynamics
from dc_ssdae.probe.config import NetworkConfig, ProbeConfig
from dc_ssdae.probe.latents import LatentBatch, LatentSamples, LatentSources, open_latents
from dc_ssdae.probe.network import build_network
from dc_ssdae.probe.step import FieldStep, draw_levels, field_losses
from dc_ssdae.randomness import noise_generator
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.logging import Loggers
from dc_ssdae.training.loop import TrainingLoop
from dc_ssdae.training.run import RunFolder, create_run
from dc_ssdae.training.start import Task
from dc_ssdae.weights import check_same_tensors

MOST_IN_TRAINING = 256
"""Validation latents of an evaluation within a run."""


def build_dynamics(config: NetworkConfig) -> Dynamics:
    """Build the dynamics that a configuration names.

    Raises:
        InputError: the class or a setting does not fit.
    """
    return resolve_part("dynamics", config.dynamics).build()


def build_step(config: ProbeConfig, sources: LatentSources) -> FieldStep:
    """Build what a probe trains, with fresh weights of the run's seed.

    Raises:
        InputError: the latents do not fit the network.
    """
    torch.manual_seed(config.training.seed)
    shape, classes = sources.train.dataset.latent_shape, len(sources.train.classes)
    network = build_network(shape, classes, config.network.size, config.network.patch or 1)
    return FieldStep(network, build_dynamics(config.network), config.training.precision)


@dataclass(eq=False)
class ProbeMeasurements:
    """The validation loss within a run.

    Args:
        run: whose averaged network to measure.
    """

    run: "ProbeTrainer"
    best: dict[str, Any] | None = None
    evaluated_at: int | None = None

    def due(self) -> list[Callable[[Loggers], None]]:
        run = self.run
        is_its_time = run.is_finished() or run.step % run.config.training.evaluate_every == 0
        return [self._evaluate] if is_its_time and self.evaluated_at != run.step else []

    def measure(self, loggers: Loggers) -> bool:
        """Measure the averaged network; says whether it is the best so far."""
        self._evaluate(loggers)
        return self.best is not None and self.best["step"] == self.run.step

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_at": self.evaluated_at, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.evaluated_at, self.best = state["evaluated_at"], state["best"]

    def _evaluate(self, loggers: Loggers) -> None:
        run = self.run
        run.module.eval()
        with run.ema.applied_to(run.module.model):
            size = run.config.training.batch_size
            losses = field_losses(run.module, run.sources.validation, MOST_IN_TRAINING, size, run.processes)
        run.module.train()
        value = float(losses.per_latent.mean())
        self.evaluated_at = run.step
        loggers.evaluation({"step": run.step, "loss": value, "images": len(losses.per_latent)})
        if self.best is None or value < self.best["value"]:
            self.best = {"metric": "loss", "value": value, "step": run.step}


@dataclass(eq=False)
class ProbeTrainer(TrainingLoop):
    """The training of a probe in one of its processes."""

    config: ProbeConfig
    sources: LatentSources
    measurements: ProbeMeasurements = field(init=False)
    forward_methods: ClassVar[tuple[str, ...]] = ("predict",)

    def build(self, checkpoint: Checkpoint | None, sharded: bool) -> FieldStep:
        step = build_step(self.config, self.sources)
        if checkpoint is not None:
            weights = checkpoint.tensors["model"]
            check_same_tensors(f"{self.run_folder.path}", step.state_dict(), weights)
            step.load_state_dict(dict(weights))
        if self.config.training.compile:
            step.model.compile()
        return step.to(self.accelerator.device).train()

    def prepare(self) -> ProbeMeasurements:
        return ProbeMeasurements(self)

    def own_state(self) -> dict[str, Any]:
        return {"keeps_latent": True}  # no statistics of it are to be written into the network's config.json

    def samples(self) -> LatentSamples:
        training = self.config.training
        return LatentSamples(self.sources.train, training.seed, training.batch_size)

    def arguments(self, batch: LatentBatch) -> Sequence[Tensor]:
        training, network, device = self.config.training, self.config.network, self.accelerator.device
        # Of the whole global batch, by one generator: a latent's own noise is that of its place, however it is split.
        size, draw = training.batch_size, batch.draw.to(device)
        generator = noise_generator(training.seed, int(batch.draw[0]) // size, 0, device)
        levels = draw_levels(network.levels, size, generator, self.module.dynamics)
        kept = torch.rand(size, generator=generator, device=device) >= network.class_dropout
        noise = torch.randn(size, *batch.latents.shape[1:], generator=generator, device=device)
        labels = torch.where(kept[draw % size], batch.labels.to(device), -1)
        return batch.latents.to(device, non_blocking=True), labels, noise[draw % size], levels[draw % size]


@dataclass
class ProbeTask(Task):
    """The training of a probe, by its configuration and the same as YAML."""

    config: ProbeConfig
    config_text: str
    _model_config: str = ""

    @property
    def training(self) -> TrainingConfig:  # type: ignore[override]
        return self.config.training

    def check(self, run: RunFolder, processes: Processes, distribution: Any) -> LatentSources:
        self.training.check_processes(processes.count)
        sources = open_latents(self.config.data)
        with init_empty_weights():
            self._model_config = build_step(self.config, sources).model.to_json_string()
        return sources

    def create(self, path: Path) -> None:
        create_run(path, self.config_text, self._model_config)

    def loop(self, run: RunFolder, accelerator: Any, processes: Processes, sources: Any, stop: Any) -> ProbeTrainer:
        return ProbeTrainer(self.config, run, accelerator, processes, sources, stop)
