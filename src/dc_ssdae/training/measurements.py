"""What a run measures beside its steps: its averaged model on validation images, its latent over training images."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.data.images import to_uint8
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.candidates import PythonCandidate
from dc_ssdae.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate, reconstruct_places
from dc_ssdae.evaluation.metric_networks import load_metrics
from dc_ssdae.evaluation.protocol import TRAINING
from dc_ssdae.evaluation.statistics import latent_statistics
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.provenance import IN_TRAINING
from dc_ssdae.training.config import METRICS
from dc_ssdae.training.logging import Loggers
from dc_ssdae.training.origin import data_name
from dc_ssdae.training.stopping import Stopped

if TYPE_CHECKING:
    from dc_ssdae.training.trainer import Trainer

PIXEL_METRICS = ("psnr", "ssim")
"""What an evaluation within a run takes besides the squared error: what needs no network."""


@dataclass(eq=False)
class Measurements:
    """When a run measures, how, and what came out.

    Args:
        run: whose averaged model to measure.
        wants_latent: whether to measure the latent's statistics at the end.
        best: metric, value and step of the best evaluation.
        latent: `LatentStatistics` as a mapping, None where they are not measured.
        evaluations: the last evaluation, as the model's provenance has it.
        evaluated_at: step of the last evaluation.
        measured_at: step at which the latent was measured.
    """

    run: "Trainer"
    wants_latent: bool
    best: dict[str, Any] | None = None
    latent: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    evaluated_at: int | None = None
    measured_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, besides the provenance."""
        return {
            "evaluated_at": self.evaluated_at,
            "measured_at": self.measured_at,
            "incomplete": bool(self.due()),
            "best": self.best,
            "latent_statistics": self.latent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the checkpoint that the run has taken over."""
        self.best = state["best"]
        self.evaluated_at = state["evaluated_at"]
        self.evaluations = (state.get("provenance") or {}).get("evaluations", [])
        # A longer budget changes the weights again, if not the encoder's.
        still_true = self.run.is_finished() or self.run.module.keeps_latent
        self.latent = state.get("latent_statistics") if still_true else None
        self.measured_at = state.get("measured_at", None if self.latent is None else state["step"])

    def due(self) -> list[Callable[[Loggers], bool]]:
        """List what `measure` does before the next step."""
        run, training, is_finished = self.run, self.run.config.training, self.run.is_finished()
        due: list[Callable[[Loggers], bool]] = []
        if self.wants_latent and is_finished and self.measured_at != run.step:
            due.append(self._measure_latent)
        is_its_time = is_finished or run.step % training.evaluate_every == 0
        if is_its_time and run.sources.validation is not None and self.evaluated_at != run.step:
            due.append(self._evaluate)
        return due

    def measure(self, loggers: Loggers) -> bool:
        """Measure what is due, with the averaged weights; says whether the model is the best so far.

        Raises:
            Stopped: a signal asks for the end.
        """
        self.run.module.eval()
        with self.run.ema.applied_to(self.run.module.model):
            found_best = [work(loggers) for work in self.due()]
        self.run.module.train()
        return any(found_best)

    def _measure_latent(self, loggers: Loggers) -> bool:
        """Find the mean and standard deviation of the averaged model's latent over training images."""
        run, config, processes = self.run, self.run.config, self.run.processes
        images = self._images(run.sources.train, config.training.latent_statistics)

        def encode(pixels: Tensor) -> DiagonalGaussian:
            return run.module.posterior(pixels.to(processes.device))

        settings = config.model.latent_channels, self._batch_size(), run.workers, processes
        moments, broken, _ = latent_statistics(encode, images, *settings, self._check_stop)
        loggers.broken(list(broken.values()), run.step, "train")
        self.latent, self.measured_at = None, run.step
        try:
            self.latent = asdict(moments.statistics())
        except InputError as error:
            loggers.say(f"step {run.step}: the latent's statistics cannot be measured: {error}")
        return False

    def _evaluate(self, loggers: Loggers) -> bool:
        """Measure the averaged model on validation images; says whether it is the best so far."""
        run, data, step = self.run, self.run.config.data, self.run.step
        assert run.sources.validation is not None
        images = self._images(run.sources.validation, data.validation_images)
        device = torch.device(run.processes.device)
        model = PythonCandidate(lambda x: run.module.reconstruct(to_uint8(x)), "the model")
        settings = EvaluationSettings(TRAINING, data.image_size, self._batch_size(), run.workers, in_training=True)
        suite = load_metrics(TRAINING, device, PIXEL_METRICS)
        found = evaluate(model, images, suite, settings, device, run.processes, self._check_stop)
        values = means(found, METRICS)
        # In every process, because sharded networks need them all.
        pictured = range(min(run.config.training.sample_images, len(images)))
        shown = reconstruct_places(model, images, pictured, settings, device)
        if shown:
            originals, outputs = (torch.stack(side) for side in zip(*(image[2:] for image in shown), strict=True))
            loggers.pictures(originals, outputs, step)
        loggers.broken(found.broken, step, "validation")
        self.evaluated_at = step
        metrics = {name: {"value": value} for name, value in values.items() if math.isfinite(value)}
        entry = {
            "protocol": IN_TRAINING,
            "data": data_name(data, validation=True) or "validation images",
            "images": found.images,
            "image_size": data.image_size,
            "step": step,
            "metrics": metrics,
        }
        self.evaluations = [entry] if metrics else []
        loggers.evaluation({"step": step, **values, "images": found.images, **run.remarks})
        name = run.config.training.best_metric
        value, sign = values[name], METRICS[name]
        is_best = math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"])
        if is_best:
            self.best = {"metric": name, "value": value, "step": step}
        return is_best

    def _batch_size(self) -> int:
        return min(16, self.run.config.training.batch_size // self.run.processes.count)

    def _images(self, source: ImageSource, limit: int) -> ValidationImages:
        return ValidationImages(source, self.run.config.data.image_size, limit, workers_option="data.workers")

    def _check_stop(self, _: int) -> None:
        """Raise `Stopped` in all processes where some process has been asked to stop."""
        if self.run.processes.sum(torch.tensor(float(self.run.stop.name is not None))) > 0.0:
            raise Stopped


def means(found: Evaluation, names: Iterable[str]) -> dict[str, float]:
    """Average metrics over the images that could be read; NaN where one is not finite."""
    return {name: float(np.delete(found.values[name], found.broken_places).mean()) for name in names}
