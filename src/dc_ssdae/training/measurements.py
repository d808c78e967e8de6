"""What a run measures beside its steps: its averaged model on validation images, its latent over training images."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from dc_ssdae.data.images import to_uint8
from dc_ssdae.data.loader import ValidationImages, enlarged_caveat
from dc_ssdae.data.sources import ImageSource, ImageSources
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.evaluation import evaluate, measure_latent
from dc_ssdae.training.logging import Loggers
from dc_ssdae.training.origin import evaluation_entry
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.training.stopping import Stopped, StopRequest

T = TypeVar("T")

EVALUATION_BATCH = 16


@dataclass
class Measurements:
    """When a run measures, how, and what came out.

    Args:
        config: of the run.
        sources: the images.
        processes: of the run.
        workers: that read images.
        module: whose model to measure.
        average: of that model.
        latent_is_known: whether the latent's statistics need no measuring.
        stop: asked to end the run.
        best: metric, value and step of the best evaluation.
        latent: the statistics of the latent, None where they are not measured.
        evaluations: the last evaluation, as the model's provenance has it.
        evaluated_at: step of the last evaluation.
        measured_at: step at which the latent was measured.
    """

    config: RunConfig
    sources: ImageSources
    processes: Processes
    workers: int
    module: TrainingStep
    average: ExponentialMovingAverage
    latent_is_known: bool
    stop: StopRequest
    best: dict[str, Any] | None = None
    latent: LatentStatistics | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    evaluated_at: int | None = None
    measured_at: int | None = None

    def state_dict(self, step: int, is_finished: bool) -> dict[str, Any]:
        """What a checkpoint of a step keeps, besides the provenance."""
        return {
            "evaluated_at": self.evaluated_at,
            "measured_at": self.measured_at,
            "incomplete": bool(self.due(step, is_finished)),
            "best": self.best,
            "latent_statistics": None if self.latent is None else asdict(self.latent),
        }

    def load_state_dict(self, state: Mapping[str, Any], is_finished: bool) -> None:
        """Go on from a checkpoint's state."""
        self.best = state["best"]
        self.evaluated_at = state["evaluated_at"]
        self.evaluations = (state.get("provenance") or {}).get("evaluations", [])
        # A longer budget changes the weights again, if not the encoder's.
        still_true = is_finished or self.config.training.keeps_latent
        measured = state.get("latent_statistics") if still_true else None
        self.latent = None if measured is None else LatentStatistics(**measured)
        self.measured_at = state.get("measured_at", None if measured is None else state["step"])

    def due(self, step: int, is_finished: bool) -> list[Callable[[int, Loggers], bool]]:
        """List what is to be measured before the next step.

        Each is called with the step and the loggers, says whether it found the model the best so far, and raises
        `Stopped` where a signal asks for the end.
        """
        training = self.config.training
        due: list[Callable[[int, Loggers], bool]] = []
        wants_latent = training.latent_statistics > 0 and not self.latent_is_known
        if wants_latent and is_finished and self.measured_at != step:
            due.append(self._measure_latent)
        is_its_time = is_finished or step % training.evaluate_every == 0
        if is_its_time and self.sources.validation is not None and self.evaluated_at != step:
            due.append(self._evaluate)
        return due

    def _measure_latent(self, step: int, loggers: Loggers) -> bool:
        """Find the mean and standard deviation of the averaged model's latent over training images."""
        images = self._images(self.sources.train, self.config.training.latent_statistics)
        with self._averaged():
            encode = self._unless_stopped(self.module.posterior)
            survey = measure_latent(
                encode, images, self.config.model.latent_channels, self.processes, self._batch_size(), self.workers
            )
        loggers.broken(survey.broken, step, "train")
        self.latent, self.measured_at = None, step
        try:
            self.latent = survey.moments.statistics()
        except InputError as error:
            loggers.say(f"step {step}: the latent's statistics cannot be measured: {error}")
        return False

    def _evaluate(self, step: int, loggers: Loggers) -> bool:
        """Measure the averaged model on validation images; says whether it is the best so far."""
        assert self.sources.validation is not None
        data = self.config.data
        images = self._images(self.sources.validation, data.validation_images)
        with self._averaged():
            reconstruct = self._unless_stopped(self.module.reconstruct)
            result = evaluate(reconstruct, images, self.processes, self._batch_size(), self.workers)
            if self.config.training.sample_images:
                self._log_pictures(images, step, loggers)
        loggers.broken(result.broken, step, "validation")
        if not self.evaluations:
            for line in enlarged_caveat(result.enlarged, result.images, data.image_size):
                loggers.say(f"step {step}: validation: {line}")
        self.evaluated_at = step
        entry = evaluation_entry(result, data, step)
        self.evaluations = [] if entry is None else [entry]
        random = self.module.objective.random_backbones
        remark = {"random_backbones": random} if random else {}
        loggers.evaluation({"step": step, **result.values, "images": result.images, **remark})
        if not result.images:
            loggers.say(f"step {step}: no validation image can be read; nothing is the best")
        return self._is_best(result.values, step)

    def _is_best(self, values: Mapping[str, float], step: int) -> bool:
        name, direction = self.config.training.best
        value, sign = values[name], 1.0 if direction == "max" else -1.0
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best["value"]):
            return False
        self.best = {"metric": name, "value": value, "step": step}
        return True

    def _log_pictures(self, images: ValidationImages, step: int, loggers: Loggers) -> None:
        shown = [images[place] for place in range(min(self.config.training.sample_images, len(images)))]
        originals = torch.stack([image.pixels for image in shown])
        # In every process, because sharded networks need them all.
        output = self.module.reconstruct(originals.to(self.processes.device)).cpu()
        loggers.pictures(originals, to_uint8(output.nan_to_num()), step)

    def _batch_size(self) -> int:
        return min(EVALUATION_BATCH, self.config.training.batch_size // self.processes.count)

    def _images(self, source: ImageSource, limit: int) -> ValidationImages:
        return ValidationImages(source, self.config.data.image_size, limit, workers_option="data.workers")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Lend the module the averaged weights, in evaluation mode."""
        self.module.eval()
        try:
            with self.average.swapped_into(self.module.model):
                yield
        finally:
            self.module.train()

    def _unless_stopped(self, work: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
        """Make a function of a batch that raises `Stopped` where some process has been asked to stop.

        All processes call it equally often.
        """

        def run(pixels: Tensor) -> T:
            if self.processes.sum(torch.tensor(float(self.stop.name is not None))) > 0.0:
                raise Stopped
            return work(pixels)

        return run
