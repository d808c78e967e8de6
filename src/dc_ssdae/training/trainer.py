"""The training loop: what happens in which order, and what a run is made of."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from dc_ssdae.data.images import to_uint8
from dc_ssdae.data.loader import (
    Batch,
    BrokenImage,
    Drawing,
    Places,
    TrainingSamples,
    ValidationImages,
    default_workers,
    enlarged_caveat,
    training_loader,
)
from dc_ssdae.data.sources import ImageSource, ImageSources
from dc_ssdae.distributed import sum_over_processes
from dc_ssdae.errors import InputError
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.model_folder import read_config
from dc_ssdae.randomness import seed_ambient
from dc_ssdae.timing import resident_set
from dc_ssdae.training.build import build_step, place_step
from dc_ssdae.training.checkpoint import Checkpoint, read_checkpoint, refused_as_damaged
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.config_checks import shown
from dc_ssdae.training.distillation import DistillationStep, TeacherCache
from dc_ssdae.training.distributed import on_main_process, processes_of, together
from dc_ssdae.training.ema import ExponentialMovingAverage, check_same_tensors
from dc_ssdae.training.evaluation import evaluate, measure_latent
from dc_ssdae.training.initial import check_terms_are_trained, load_initial_weights
from dc_ssdae.training.logging import Loggers, read_lines
from dc_ssdae.training.optimizer import (
    OptimizerState,
    build_optimizer,
    evaluated_weights,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from dc_ssdae.training.origin import evaluation_entry, origin
from dc_ssdae.training.run import RunFolder, publish_model
from dc_ssdae.training.step import TrainingStep, draw_noise
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.tensors import gathered, whole

T = TypeVar("T")

EVALUATION_BATCH = 16

NOISE_FROM = "the step's device"
"""Where levels and noise are drawn; before this was written into checkpoints, they came with the images."""


class TrainingFailed(InputError):
    """A run that cannot go on; the message names what is left of it."""


class Stopped(Exception):
    """Some process was asked to end the run."""


class Outcome(NamedTuple):
    """How a start of a run ended: steps done, and the signal that asked for the end, None where the budget did."""

    step: int
    stopped_by: str | None


class Trainer:
    """A run in one of its processes.

    Args:
        config: of the run.
        run: its folder, which exists.
        accelerator: the process group.
        sources: the images.
        stop: asked to end.

    Raises:
        InputError: the last checkpoint does not fit the configuration or the data.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        accelerator: Accelerator,
        sources: ImageSources,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.run_folder = run
        self.accelerator = accelerator
        self.sources = sources
        self.stop = stop
        self.step = 0
        self.seconds = 0.0
        self.skipped_steps = 0
        self.best: dict[str, Any] | None = None
        self._skipped_in_a_row = 0
        self._saved_at: int | None = None
        self._evaluated_at: int | None = None
        self._measured_at: int | None = None
        self._batches: Iterator[Batch] = iter(())
        self._upcoming: list[Batch] = []
        self._unreadable: InputError | None = None
        self._latent_statistics: LatentStatistics | None = None
        self._latent_is_known = config.training.keeps_latent and run.latent_is_known()
        self._broken = {str(line.get("name")) for line in read_lines(run.broken_images) if line.get("split") == "train"}

        training = config.training
        torch.manual_seed(training.seed)
        module = build_step(config, run.teacher if run.teacher.is_dir() else None)
        if config.distillation is not None and config.distillation.cache_steps is not None:
            assert isinstance(module, DistillationStep)
            module.cache = TeacherCache(run.teacher_cache, config.distillation.cache_steps * training.batch_size)
        folder = run.checkpoints.last()
        checkpoint = None if folder is None else read_checkpoint(folder)
        if checkpoint is not None:
            check_same_tensors(f"{folder}/model.safetensors", module.state_dict(), checkpoint.tensors["model"])
            module.load_state_dict(dict(checkpoint.tensors["model"]))
        else:
            source = training.init_from if config.distillation is None else str(run.teacher)
            loaded = set() if source is None else load_initial_weights(module, source)
            check_terms_are_trained(module, loaded)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)  # an earlier phase's is not this run's
        sharded = accelerator.distributed_type == DistributedType.FSDP
        place_step(module, config, accelerator.device, sharded)
        self.optimizer = build_optimizer(module, training)
        # Accelerate returns wrappers; sharding also exchanges the parameters inside module and optimiser.
        self.wrapped, _ = accelerator.prepare(module, self.optimizer)
        self.module: TrainingStep = accelerator.unwrap_model(self.wrapped)
        if sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self.module, "reconstruct")
            register_fsdp_forward_method(self.module, "posterior")
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=training.precision == "float16")
        self.ema = ExponentialMovingAverage(self.module.model, training.ema_decay, training.ema_start)
        self._evaluated = evaluated_weights(self.optimizer, self.module.model)
        trained = {name for name, _ in self.module.named_parameters()}
        # What a step that is thrown away must not leave behind: statistics of its batch.
        self._buffers = [tensor for name, tensor in self.module.state_dict().items() if name not in trained]
        self._loss_names = ("total", *self.module.objective.terms)
        self._random_backbones = self.module.objective.random_backbones
        self._remark = {"random_backbones": self._random_backbones} if self._random_backbones else {}
        workers = config.data.workers
        self._workers = default_workers(_processes_here(accelerator)) if workers is None else workers
        self._mark = time.monotonic()
        self._first = True
        before = read_config(run.model).get("provenance") if (run.model / "config.json").is_file() else None
        self._draws_other_noise = False
        self._origin = origin(config, before, len(sources.train), self._random_backbones)
        self._evaluations: list[dict[str, Any]] = []
        if checkpoint is not None:
            assert folder is not None
            with refused_as_damaged(folder):
                self.load_state_dict(checkpoint)

    def state_dict(self, with_tensors: bool = True) -> Checkpoint:
        """The whole state; every process must take part in gathering it, and the main one alone has the tensors."""
        is_main = self.accelerator.is_main_process
        optimizer = optimizer_state(self.optimizer, self.module)
        groups = {
            "model": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer.tensors,
        }
        length = len(self.sources.train)
        drawn = self.step * self.config.training.batch_size
        state = {
            "step": self.step,
            "images_drawn": drawn,
            "epoch": drawn // length,
            "place_in_epoch": drawn % length,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "evaluated_at": self._evaluated_at,
            "measured_at": self._measured_at,
            "incomplete": self._is_incomplete(),
            "best": self.best,
            "latent_statistics": None if self._latent_statistics is None else asdict(self._latent_statistics),
            "provenance": self._provenance(),
            "settings": self.config.fixed_settings(),
            "images_in_data_set": length,
            "names_sha256": self._names_sha256(),
            "noise_from": NOISE_FROM,
            "processes": self.accelerator.num_processes,
            "optimizer": {
                "class": type(self.optimizer).__name__,
                "groups": optimizer.groups,
                "tensors": optimizer.names,
            },
            "gradient_scaler": self.scaler.state_dict(),
        }
        # Every process gathers what is sharded; eight whole copies would be too much for many a node.
        tensors = {
            file: {name: full for name, tensor in group.items() if (full := whole(tensor, is_main)) is not None}
            for file, group in groups.items()
            if with_tensors
        }
        return Checkpoint(tensors, state)

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Go on from a state, whatever number of processes it comes from; the module's weights are loaded before.

        Raises:
            InputError: it does not fit the configuration or the data.
        """
        state = checkpoint.state
        for name, value in self.config.fixed_settings().items():
            if name in state["settings"] and state["settings"][name] != value:
                raise InputError(
                    f"{name} was {shown(state['settings'][name])} when the run was saved and is {shown(value)} in its "
                    "configuration now; put it back, or start a new run with --training.init_from"
                )
            if name.startswith("losses.") and name not in state["settings"] and value["weight"]:
                raise InputError(f"{name} was no term when the run was saved; set it to 0, or start a new run")
        length = len(self.sources.train)
        if state["images_in_data_set"] != length:
            raise InputError(
                f"the run began with {state['images_in_data_set']} training images and the data set now has {length}; "
                "its order would be another"
            )
        names = self._names_sha256()
        if None not in (names, state.get("names_sha256")) and names != state["names_sha256"]:
            raise InputError(f"the {length} training images have other names than when the run began; put those back")
        self._draws_other_noise = state.get("noise_from") != NOISE_FROM
        self.ema.load_state_dict(checkpoint.tensors["ema"])
        tensors, saved = dict(checkpoint.tensors["optimizer"]), state["optimizer"]
        optimizer = OptimizerState(tensors, saved["groups"], saved.get("tensors"))
        load_optimizer_state(self.optimizer, self.module, optimizer)
        if self.scaler.is_enabled():
            scale = float(state["gradient_scaler"]["scale"])
            self.scaler.load_state_dict({**state["gradient_scaler"], "scale": scale})
        self.step = self._saved_at = state["step"]
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.best = state["best"]
        self._evaluated_at = state["evaluated_at"]
        self._evaluations = (state.get("provenance") or {}).get("evaluations", [])
        # A longer budget changes the weights again, if not the encoder's.
        still_true = self.is_finished() or self.config.training.keeps_latent
        measured = state.get("latent_statistics") if still_true else None
        self._latent_statistics = None if measured is None else LatentStatistics(**measured)
        self._measured_at = state.get("measured_at", None if measured is None else self.step)

    def _names_sha256(self) -> str | None:
        """What tells the images' names; of a data set that has none of its own, nothing."""
        names_sha256 = getattr(self.sources.train, "names_sha256", None)
        return names_sha256() if callable(names_sha256) else None

    def _provenance(self) -> dict[str, Any]:
        """What the model that is saved now says of its origin."""
        evaluations = {"evaluations": self._evaluations} if self._evaluations else {}
        return {**self._origin, "steps": self.step, **evaluations}

    def is_finished(self) -> bool:
        """Whether the budget is spent."""
        return self.config.training.progress(self.step, self.seconds) >= 1.0

    def run(self) -> Outcome:
        """Train until the budget is spent or a signal asks for the end; then the state is saved.

        Raises:
            TrainingFailed: too many steps in a row are not finite, or the last checkpoint cannot be written.
            InputError: too many images cannot be read.
        """
        stopped = False
        is_main = self.accelerator.is_main_process
        evaluated_at = self._evaluated_at or 0
        with closing(Loggers(self.run_folder, self.config, is_main, self.step, self.seconds, evaluated_at)) as loggers:
            if self._random_backbones:
                names = ", ".join(f"losses.{name}" for name in self._random_backbones)
                loggers.say(f"{names}: random weights in the backbone, whose values and whose training mean nothing")
            if self._draws_other_noise and not self.is_finished():
                loggers.say(
                    f"step {self.step}: this run was begun by an earlier version, which drew levels and noise with the "
                    "images; from here on they are drawn in the training step, and are others"
                )
            try:
                self._train(loggers)
            except Stopped:
                stopped = True
            if self.step and self._saved_at != self.step:
                self._save(loggers, must=True)
        if not stopped or (self.is_finished() and not self._is_incomplete()):
            return Outcome(self.step, None)
        return Outcome(self.step, self.stop.name or "a signal to another process")

    def _train(self, loggers: Loggers) -> None:
        """Do steps until the budget is spent.

        Raises:
            Stopped: a signal asked for the end; what was done is saved, or the weights are as they were.
        """
        if self.step and self._is_incomplete():
            self._complete(loggers)  # a signal came before that was done
        self._batches = self._loader()
        self._mark = time.monotonic()
        self._upcoming = self._fetch()
        _, exchanged = self._exchange(torch.zeros(0, device=self.accelerator.device))
        self._check_exchanged(exchanged, loggers)
        while not self.is_finished():
            exchanged = self._train_step(loggers)
            self._check_exchanged(exchanged, loggers)
            # A run of skipped steps may end in failure, which is to name what was before it; at the end it has not.
            if not self._skipped_in_a_row or self.is_finished():
                self._after_step(loggers)

    def _fetch(self) -> list[Batch]:
        """Read the batches of the next step; none where that fails, or a signal comes meanwhile: see `_exchange`."""
        try:
            return list(islice(self._batches, self.config.training.accumulation_steps))
        except InputError as error:
            self._unreadable = error
            return []

    def _check_exchanged(self, exchanged: "Exchanged", loggers: Loggers) -> None:
        """End the run where some process cannot read its next batch, or was asked to stop.

        Raises:
            InputError: what cannot be read; the steps that are done are saved.
            Stopped: a signal.
        """
        if exchanged.unreadable:
            if self.step and self._saved_at != self.step:
                self._save(loggers)
            together(self.accelerator, self._raise_unreadable)
        if exchanged.stop:
            raise Stopped

    def _raise_unreadable(self) -> None:
        if self._unreadable is not None:
            raise self._unreadable

    def _after_step(self, loggers: Loggers) -> None:
        """Save, measure the latent and evaluate where that is due."""
        incomplete = self._is_incomplete()
        if incomplete or self.step % self.config.training.checkpoint_every == 0:
            self._save(loggers)  # first: to evaluate may take longer than a launcher waits after its signal
            if incomplete:
                self._complete(loggers)
            self._mark = time.monotonic()  # the clock is of training alone

    def _complete(self, loggers: Loggers) -> None:
        """Measure the latent and evaluate, where that is due at this step, and save what came out."""
        best, is_best = self.best, False
        if self._measuring_is_due():
            self._latent_statistics = self._measure_latent(loggers)
            self._measured_at = self.step
        if self._evaluation_is_due():
            is_best = self._evaluate(loggers)
        if not self._save(loggers, is_best):
            self.best = best  # there is no checkpoint of it

    def _is_incomplete(self) -> bool:
        """Whether something else than training is to be done before the next step."""
        return self._measuring_is_due() or self._evaluation_is_due()

    def _measuring_is_due(self) -> bool:
        wanted = self.config.training.latent_statistics > 0 and not self._latent_is_known
        return wanted and self.is_finished() and self._measured_at != self.step

    def _evaluation_is_due(self) -> bool:
        if self.sources.validation is None or self._evaluated_at == self.step:
            return False
        return self.step % self.config.training.evaluate_every == 0 or self.is_finished()

    def _unless_stopped(self, work: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
        """Make a function of a batch that raises `Stopped` where some process has been asked to stop.

        All processes call it equally often.
        """

        def run(pixels: Tensor) -> T:
            asked = torch.tensor(float(self.stop.name is not None), device=self.accelerator.device)
            if sum_over_processes(asked).item() > 0.0:
                raise Stopped
            return work(pixels)

        return run

    def _images(self, source: ImageSource, limit: int) -> ValidationImages:
        return ValidationImages(source, self.config.data.image_size, limit, workers_option="data.workers")

    def _train_step(self, loggers: Loggers) -> "Exchanged":
        """Do one step, of the batches that were read before, and log it."""
        step, training = self.step, self.config.training
        seed_ambient(training.seed, step, self.accelerator.process_index)
        lr = training.learning_rate(training.progress(step + 0.5, self.seconds))
        set_learning_rate(self.optimizer, lr)
        statistics = [buffer.clone() for buffer in self._buffers]
        local_losses, norm = self._gradient(self._upcoming)
        broken = [image for batch in self._upcoming for image in batch.broken]
        # Before the processes agree, so that all know where one of them can go no further.
        self._upcoming = self._fetch()
        (*values, gradient_norm), exchanged = self._exchange(torch.cat([local_losses, norm.reshape(1)]), len(broken))
        losses = dict(zip(self._loss_names, values, strict=True))
        not_finite = [f"loss/{name}" for name, value in losses.items() if not math.isfinite(value)]
        if not not_finite and not math.isfinite(gradient_norm):
            not_finite = ["gradient_norm"]
        overflow = self.scaler.is_enabled() and not_finite == ["gradient_norm"] and self.scaler.get_scale() > 1.0
        if not not_finite:
            self.scaler.step(self.optimizer)
            self._skipped_in_a_row = 0
            self.ema.update(self.module.model, step + 1, self._evaluated)
        else:
            for buffer, kept in zip(self._buffers, statistics, strict=True):
                buffer.copy_(kept)
            self.ema.catch_up()
            self.skipped_steps += 1
            # A gradient too large for float16 makes the scaler halve its scale: that is how it finds the scale.
            self._skipped_in_a_row += not overflow
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += exchanged.lap
        entry: dict[str, Any] = {
            "step": self.step,
            **{f"loss/{name}": value for name, value in losses.items()},
            "gradient_norm": gradient_norm,
            "lr": lr,
            **({"skipped": not_finite} if not_finite else {}),
            **self._remark,
            "images_per_second": training.batch_size / max(exchanged.lap, 1e-9),
            "seconds": self.seconds,
            "memory_gib": _memory_gib(self.accelerator.device),
        }
        loggers.step(entry)
        if not_finite:
            self._report_skipped(not_finite, overflow, loggers)
        if exchanged.broken:
            self._report_broken(broken, loggers)
        return exchanged

    def _gradient(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Add up the gradient of this step; gives this process's losses (total, then terms), and the whole norm."""
        device, model, training = self.accelerator.device, self.module.model, self.config.training
        settings = self.config.data.image_size, training.seed, training.batch_size
        sums = torch.zeros(len(self._loss_names), device=device)
        for place, batch in enumerate(batches):
            pixels = batch.pixels.to(device, non_blocking=True)
            noise = draw_noise(model, *settings, batch.draw.tolist(), device)
            is_last = place == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(pixels, *noise, batch.draw)
                if not losses.total.requires_grad:
                    raise TrainingFailed("no loss term depends on anything that trains; see training.train and losses")
                self.accelerator.backward(self.scaler.scale(losses.total / len(batches)))
            if self._first and self.accelerator.num_processes > 1 and is_last:
                self._check_gradients()
            sums += torch.stack([losses.total, *losses.terms.values()]).detach() / len(batches)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        clip = training.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), math.inf if clip is None else clip)
        return sums, gathered(norm)

    def _check_gradients(self) -> None:
        """Refuse a parameter without a gradient, for which the other processes would wait in the next step."""
        self._first = False
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise TrainingFailed(
                    f"{name} gets no gradient; with several processes every parameter must get one: "
                    "leave it out, or switch off its requires_grad"
                )

    def _exchange(self, values: Tensor, broken: int = 0) -> "tuple[list[float], Exchanged]":
        """Take the mean of values (N,) over the processes and agree: one sum, and one wait for the device, per step."""
        now = time.monotonic()
        lap, self._mark = now - self._mark, now
        main_lap = lap if self.accelerator.is_main_process else 0.0
        flags = [self.stop.name is not None, self._unreadable is not None, broken, main_lap]
        *sums, stop, unreadable, broken_everywhere, lap = sum_over_processes(
            torch.cat([values.float(), torch.tensor(flags, dtype=torch.float32, device=values.device)])
        ).tolist()
        means = [value / self.accelerator.num_processes for value in sums]
        return means, Exchanged(stop > 0.0, unreadable > 0.0, broken_everywhere > 0.0, lap)

    def _report_skipped(self, not_finite: Sequence[str], overflow: bool, loggers: Loggers) -> None:
        what, step = ", ".join(not_finite), self.step
        if overflow:
            loggers.say(f"step {step} skipped: {what} overflows float16; the scale is now {self.scaler.get_scale():g}")
            return
        loggers.say(f"step {step} skipped: {what} not finite ({self._skipped_in_a_row} in a row)")
        if self._skipped_in_a_row >= self.config.training.max_skipped_steps:
            raise TrainingFailed(
                f"{self._skipped_in_a_row} steps in a row are not finite, at last {what} at step {step}; "
                f"{self._last_good()}"
            )

    def _report_broken(self, mine: list[BrokenImage], loggers: Loggers) -> None:
        images = [image for part in processes_of(self.accelerator).gather(mine) for image in part]
        loggers.broken(images, self.step, "train")
        self._broken.update(image.name for image in images)
        length, share = len(self.sources.train), self.config.data.max_broken_share
        if len(self._broken) > share * length:
            raise TrainingFailed(
                f"{len(self._broken)} of {length} training images cannot be read, more than data.max_broken_share "
                f"{share:g}; {self.run_folder.broken_images} lists them; {self._last_good()}"
            )

    def _last_good(self) -> str:
        try:
            last = self.run_folder.checkpoints.last()
        except InputError as error:  # somebody has taken it away
            return str(error)
        return f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"

    def _evaluate(self, loggers: Loggers) -> bool:
        """Measure the averaged model on validation images; says whether it is the best so far."""
        assert self.sources.validation is not None
        data, training = self.config.data, self.config.training
        images = self._images(self.sources.validation, data.validation_images)
        model = self.module.model
        self.module.eval()
        try:
            with self.ema.swapped_into(model):
                reconstruct = self._unless_stopped(self.module.reconstruct)
                result = evaluate(reconstruct, images, self.accelerator, self._evaluation_batch(), self._workers)
                if training.sample_images:
                    self._log_pictures(images, loggers)
        finally:
            self.module.train()
        loggers.broken(result.broken, self.step, "validation")
        if not self._evaluations:
            for line in enlarged_caveat(result.enlarged, result.images, data.image_size):
                loggers.say(f"step {self.step}: validation: {line}")
        self._evaluated_at = self.step
        entry = evaluation_entry(result, data, self.step)
        self._evaluations = [] if entry is None else [entry]
        loggers.evaluation({"step": self.step, **result.values, "images": result.images, **self._remark})
        if not result.images:
            loggers.say(f"step {self.step}: no validation image can be read; nothing is the best")
        name, direction = training.best
        value = result.values[name]
        if not math.isfinite(value):
            return False
        sign = 1.0 if direction == "max" else -1.0
        if self.best is not None and sign * value <= sign * self.best["value"]:
            return False
        self.best = {"metric": name, "value": value, "step": self.step}
        return True

    def _measure_latent(self, loggers: Loggers) -> LatentStatistics | None:
        """Mean and standard deviation of the averaged model's latent over training images."""
        images = self._images(self.sources.train, self.config.training.latent_statistics)
        self.module.eval()
        try:
            with self.ema.swapped_into(self.module.model):
                survey = measure_latent(
                    self._unless_stopped(self.module.posterior),
                    images,
                    self.config.model.latent_channels,
                    self.accelerator,
                    self._evaluation_batch(),
                    self._workers,
                )
        finally:
            self.module.train()
        loggers.broken(survey.broken, self.step, "train")
        try:
            return survey.moments.statistics()
        except InputError as error:
            loggers.say(f"step {self.step}: the latent's statistics cannot be measured: {error}")
            return None

    def _evaluation_batch(self) -> int:
        return min(EVALUATION_BATCH, self.config.training.batch_size // self.accelerator.num_processes)

    def _log_pictures(self, images: ValidationImages, loggers: Loggers) -> None:
        shown = [images[place] for place in range(min(self.config.training.sample_images, len(images)))]
        originals = torch.stack([image.pixels for image in shown])
        # In every process, because sharded networks need them all.
        output = self.module.reconstruct(originals.to(self.accelerator.device)).cpu()
        loggers.pictures(originals, to_uint8(output.nan_to_num()), self.step)

    def _save(self, loggers: Loggers, is_best: bool = False, must: bool = False) -> bool:
        """Write a checkpoint and RUN/model; where that fails, the one before stays, and the run goes on.

        Returns:
            Whether it is written.

        Raises:
            TrainingFailed: it must be written and cannot be; the weights are not finite; or all steps were skipped.
        """
        untrained = 0 < self.step == self.skipped_steps
        if untrained and self.is_finished():
            raise TrainingFailed(
                f"all {self.step} steps were skipped, because their losses or gradients are not finite; nothing was "
                f"trained, and no model is written: look at losses, the learning rate and the data; {self._last_good()}"
            )
        checkpoint = self.state_dict(with_tensors=self._saved_at != self.step)

        def write() -> tuple[bool, str | None]:
            for name, tensor in checkpoint.tensors.get("model", {}).items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise TrainingFailed(f"step {self.step}: {name} is not finite; {self._last_good()}")
            try:
                folder = self.run_folder.checkpoints.save(checkpoint, is_best)
            except (OSError, InputError) as error:
                return False, f"the checkpoint cannot be written ({' '.join(str(error).split())})"
            if untrained:
                return True, None
            try:
                publish_model(
                    self.run_folder,
                    folder / "ema.safetensors",
                    self._latent_statistics,
                    self.config.training.keeps_latent,
                    self._provenance(),
                )
            except OSError as error:
                return True, f"{self.run_folder.model} cannot be written ({' '.join(str(error).split())})"
            return True, None

        written, problem = on_main_process(self.accelerator, write)
        if written:
            self._saved_at = self.step
        if problem is not None:
            message = f"step {self.step}: {problem}; {self._last_good()}"
            if must or self.is_finished():
                raise TrainingFailed(message)
            loggers.say(message)
        return written

    def _loader(self) -> Iterator[Batch]:
        config, accelerator = self.config, self.accelerator
        drawing = Drawing(
            seed=config.training.seed,
            batch_size=config.training.batch_size,
            image_size=config.data.image_size,
            aug_scale=config.data.aug_scale,
            flip=config.data.flip,
            repeat_after=None if config.distillation is None else config.distillation.cache_steps,
        )
        places = Places(
            self.step,
            config.training.steps,
            config.training.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.training.accumulation_steps,
        )
        samples = TrainingSamples(self.sources.train, drawing)
        pin_memory = accelerator.device.type == "cuda"
        return training_loader(samples, places, self._workers, pin_memory, lambda: self.stop.name is not None)


class Exchanged(NamedTuple):
    """What the processes agree on after a step.

    That is whether to stop, whether one cannot read its next batch, whether images are broken, and the main one's time.
    """

    stop: bool
    unreadable: bool
    broken: bool
    lap: float


def _processes_here(accelerator: Accelerator) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def _memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on a CUDA device, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_set() / 2**30
