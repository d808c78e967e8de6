"""What a run measures beside its steps: its averaged model on validation images, its latent over training images."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dc_ssdae.data.images import to_uint8
from dc_ssdae.data.loader import BrokenImage, ValidationImages, validation_loader
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.latent_statistics import latent_statistics
from dc_ssdae.evaluation.metrics import mse, psnr, ssim
from dc_ssdae.latent import LatentMoments
from dc_ssdae.provenance import IN_TRAINING
from dc_ssdae.training.config import METRICS, keeps_latent
from dc_ssdae.training.logging import Loggers
from dc_ssdae.training.origin import data_name
from dc_ssdae.training.stopping import Stopped

if TYPE_CHECKING:
    from dc_ssdae.training.trainer import Trainer

T = TypeVar("T")
Reconstruct = Callable[[Tensor], Tensor]

MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {"psnr": psnr, "ssim": ssim, "mse": mse}


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
        still_true = self.run.is_finished() or keeps_latent(self.run.config.training.train)
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
        encode, channels = partial(self._run, run.module.posterior), config.model.latent_channels
        settings = self._batch_size(), run.workers, processes.index, processes.count
        survey = latent_statistics(encode, images, channels, *settings)
        for broken in processes.gather(survey.broken):
            loggers.broken(broken, run.step, "train")
        moments = LatentMoments.from_states(torch.stack(processes.gather(survey.moments.state())))
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
        pictured = range(min(run.config.training.sample_images, len(images)))
        reconstruct = partial(self._run, run.module.reconstruct)
        result = evaluate(reconstruct, images, run.processes, self._batch_size(), run.workers)
        if pictured:
            originals = torch.stack([images[place].pixels for place in pictured])
            # In every process, because sharded networks need them all.
            output = run.module.reconstruct(originals.to(run.processes.device)).cpu()
            loggers.pictures(originals, to_uint8(output.nan_to_num()), step)
        loggers.broken(result.broken, step, "validation")
        self.evaluated_at = step
        metrics = {name: {"value": value} for name, value in result.values.items() if math.isfinite(value)}
        entry = {
            "protocol": IN_TRAINING,
            "data": data_name(data, validation=True) or "validation images",
            "images": result.images,
            "image_size": data.image_size,
            "step": step,
            "metrics": metrics,
        }
        self.evaluations = [entry] if metrics else []
        loggers.evaluation({"step": step, **result.values, "images": result.images, **run.remarks})
        name = run.config.training.best_metric
        value, sign = result.values[name], METRICS[name]
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best["value"]):
            return False
        self.best = {"metric": name, "value": value, "step": step}
        return True

    def _batch_size(self) -> int:
        return min(16, self.run.config.training.batch_size // self.run.processes.count)

    def _images(self, source: ImageSource, limit: int) -> ValidationImages:
        return ValidationImages(source, self.run.config.data.image_size, limit, workers_option="data.workers")

    def _run(self, work: Callable[[Tensor], T], pixels: Tensor) -> T:
        """Call a function of a batch, unless some process has been asked to stop: then all of them raise `Stopped`."""
        processes = self.run.processes
        if processes.sum(torch.tensor(float(self.run.stop.name is not None))) > 0.0:
            raise Stopped
        return work(pixels.to(processes.device))


class Evaluation(NamedTuple):
    """Means over the images, how many there were, and what could not be read."""

    values: dict[str, float]
    images: int
    broken: list[BrokenImage]


def evaluate(
    reconstruct: Reconstruct, images: ValidationImages, processes: Processes, batch_size: int, workers: int
) -> Evaluation:
    """Measure reconstructions; every process does its share, and all get the same result.

    Args:
        reconstruct: uint8 (B, 3, S, S) on the CPU to (B, 3, S, S) in [-1, 1], on any device.
        images: what to measure.
        processes: of the run.
        batch_size: images at a time in each process.
        workers: that read images.
    """
    count, own = len(images), processes.share(len(images))
    # Sharded networks need every process to call them equally often: the last image fills up, and does not count.
    places = range(processes.index, processes.count * -(-count // processes.count), processes.count)
    # Each value at its image's place: the sum over processes then adds zeros, and rounds nothing.
    results = torch.zeros(count, len(MEASURES) + 1, dtype=torch.float64)
    broken: list[BrokenImage] = []
    for batch in validation_loader(images, [min(place, count - 1) for place in places], batch_size, workers):
        reconstructed = reconstruct(torch.stack([image.pixels for image in batch])).cpu()
        for image, output in zip(batch, reconstructed, strict=True):
            if image.place in own and image.broken is not None:
                broken.append(image.broken)
            elif image.place in own:
                results[image.place] = results.new_tensor([*measure(image.pixels, output), 1.0])
    total = processes.sum(results).sum(dim=0)
    means = (total[:-1] / total[-1]).tolist()
    broken = [image for part in processes.gather(broken) for image in part]
    return Evaluation(dict(zip(MEASURES, means, strict=True)), int(total[-1]), broken)


def measure(pixels: Tensor, output: Tensor) -> list[float]:
    """Compute `MEASURES` of an image.

    Args:
        pixels: the original, uint8 (3, S, S).
        output: its reconstruction (3, S, S), about [-1, 1]; one that is not finite has no values but NaN.
    """
    if not output.isfinite().all():
        return [float("nan")] * len(MEASURES)
    image = to_uint8(output)
    return [metric(pixels, image) for metric in MEASURES.values()]
