"""The training loop, whatever is trained: what happens in which order, and what a run's state is made of."""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn

from dc_ssdae.data.loader import BrokenImage, Samples, default_workers, training_loader
from dc_ssdae.distributed import Processes, sum_over_processes
from dc_ssdae.errors import InputError
from dc_ssdae.randomness import seed_ambient
from dc_ssdae.timing import resident_set
from dc_ssdae.training.checkpoint import Checkpoint, read_checkpoint
from dc_ssdae.training.config import check_changes
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.logging import Loggers
from dc_ssdae.training.optimizer import (
    build_optimizer,
    evaluated_weights,
    load_optimizer_state,
    optimizer_state,
)
from dc_ssdae.training.run import RunFolder, publish_model
from dc_ssdae.training.stopping import Stopped, StopRequest
from dc_ssdae.training.tensors import gathered, whole


class TrainingFailed(InputError):
    """A run that cannot go on; the message names what is left of it."""


class Outcome(NamedTuple):
    """How a start of a run ended: steps done, and the signal that asked for the end, None where the budget did."""

    step: int
    stopped_by: str | None


@dataclass(eq=False)
class TrainingLoop(ABC):
    """A run in one of its processes; a subclass says what it trains, on what.

    Args:
        config: of the run: its `training`, `fixed_settings()` and `to_mapping()`.
        run_folder: the run's folder, which exists.
        accelerator: the process group.
        processes: the same, for what is exchanged besides gradients.
        sources: what is trained on.
        stop: asked to end.
        step: steps done.
        seconds: of training.
        skipped_steps: steps that were thrown away.

    Attributes:
        module: computes the losses of a step, whose names are its `loss_terms`; its `model` is averaged and published.
        remarks: entries of every logged line.

    Raises:
        InputError: the last checkpoint does not fit the configuration or the data.
    """

    config: Any
    run_folder: RunFolder
    accelerator: Accelerator
    processes: Processes
    sources: Any
    stop: StopRequest
    step: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    _skipped_in_a_row: int = 0
    _saved_at: int | None = None
    _unreadable: InputError | None = None
    _mark: float = 0.0

    forward_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of the module, besides forward, that read sharded parameters."""

    @abstractmethod
    def build(self, checkpoint: Checkpoint | None, sharded: bool) -> nn.Module:
        """Build the module, on the device, with the weights that the run begins or goes on with.

        Args:
            checkpoint: to go on from; None begins.
            sharded: whether its parameters are then sharded over processes.
        """

    @abstractmethod
    def prepare(self) -> Any:
        """Make ready what a subclass keeps besides; the module and its average are there.

        Returns:
            What the run measures: an object with `due` and `measure` as `measurements.Measurements` has them, `best`
            and `evaluated_at`, which says how to save and load itself.
        """

    @abstractmethod
    def samples(self) -> Samples:
        """The examples in the order in which they are drawn."""

    @abstractmethod
    def arguments(self, batch: Any) -> Sequence[Tensor | None]:
        """What the module's forward takes of a batch, on the device."""

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of a subclass."""
        return {}

    def report_broken(self, mine: list[BrokenImage], loggers: Loggers) -> None:  # noqa: B027
        """Tell what could not be read; called in all processes with what this one has found."""

    def __post_init__(self) -> None:
        config, run, accelerator = self.config, self.run_folder, self.accelerator
        training, device = config.training, accelerator.device
        folder = run.checkpoints.last()
        checkpoint = None if folder is None else read_checkpoint(folder)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # an earlier phase's is not this run's
        sharded = accelerator.distributed_type == DistributedType.FSDP
        module = self.build(checkpoint, sharded)
        self.optimizer = build_optimizer(module, training)
        # Accelerate returns wrappers; sharding also exchanges the parameters inside module and optimiser.
        self.wrapped, _ = accelerator.prepare(module, self.optimizer)
        self.module: Any = accelerator.unwrap_model(self.wrapped)
        if sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            for method in self.forward_methods:
                register_fsdp_forward_method(self.module, method)
        self.scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        self.ema = ExponentialMovingAverage(self.module.model, training.ema_decay, training.ema_start)
        self._evaluated = evaluated_weights(self.optimizer, self.module.model)
        trained = dict(self.module.named_parameters())
        # What a step that is thrown away must not leave behind: statistics of its batch.
        self._buffers = [tensor for name, tensor in self.module.state_dict().items() if name not in trained]
        self._logged = ["loss/total", *map("loss/{}".format, self.module.loss_terms), "gradient_norm"]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes.count))
        workers: int | None = config.data.workers
        self.workers = default_workers(here) if workers is None else workers
        names = getattr(self.sources.train, "names_sha256", None)
        self._names_sha256 = names() if callable(names) else None  # not every data set tells its images' names
        self.remarks: dict[str, Any] = {}
        self.measurements = self.prepare()
        if checkpoint is not None:
            self.load_state_dict(checkpoint)

    def state_dict(self, with_tensors: bool = True) -> Checkpoint:
        """The whole state; every process must take part in gathering it, and the main one alone has the tensors."""
        optimizer_tensors, groups = optimizer_state(self.optimizer, self.module)
        length, drawn = len(self.sources.train), self.step * self.config.training.batch_size
        state = {
            "step": self.step,
            "images_drawn": drawn,
            "epoch": drawn // length,
            "place_in_epoch": drawn % length,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            **self.measurements.state_dict(),
            **self.own_state(),
            "settings": self.config.fixed_settings(),
            "images_in_data_set": length,
            "names_sha256": self._names_sha256,
            "processes": self.processes.count,
            "optimizer": {"class": type(self.optimizer).__name__, "groups": groups},
            "gradient_scaler": self.scaler.state_dict(),
        }
        files = {"model": self.module.state_dict(), "ema": self.ema.state_dict(), "optimizer": optimizer_tensors}
        # Every process gathers what is sharded; eight whole copies would be too much for many a node.
        wanted = files.items() if with_tensors else ()
        return Checkpoint({file: whole(tensors, self.processes.is_main) for file, tensors in wanted}, state)

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Go on from a state, whatever number of processes it comes from; the module's weights are loaded before.

        Raises:
            InputError: it does not fit the configuration or the data.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        check_changes(state["settings"], self.config.fixed_settings(), self.run_folder.path)
        began, count = state["images_in_data_set"], len(self.sources.train)
        names = state.get("names_sha256")
        if began != count or (names and self._names_sha256 and names != self._names_sha256):
            raise InputError(f"the run began with {began} images; now there are {count}, or they have other names")
        self.ema.load_state_dict(tensors["ema"])
        load_optimizer_state(self.optimizer, self.module, tensors["optimizer"], state["optimizer"]["groups"])
        self.scaler.load_state_dict(state["gradient_scaler"])
        self.step = self._saved_at = state["step"]
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.measurements.load_state_dict(state)

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
        logged = self.processes.is_main, self.step, self.seconds, self.measurements.evaluated_at or 0
        with closing(Loggers(self.run_folder, self.config, *logged)) as loggers:
            try:
                if self.step:  # a signal came before it was done
                    self._measure(loggers)
                self._batches = self._loader()
                self._mark = time.monotonic()
                self._upcoming = self._fetch()
                stopped = self._exchange(torch.zeros(0, device=self.accelerator.device))[0] > 0.0
                while not stopped and not self.is_finished():
                    stopped = self._train_step(loggers)
                    is_due = self.step % self.config.training.checkpoint_every == 0 or self.measurements.due()
                    # Skipped steps in a row may end in failure, which is to name what was before them; at the end they
                    # have not.
                    if is_due and not stopped and (not self._skipped_in_a_row or self.is_finished()):
                        self._save(loggers)  # first: to evaluate may take longer than a launcher waits after its signal
                        self._measure(loggers)
                        self._mark = time.monotonic()  # the clock is of training alone
            except Stopped:  # what was done is saved, or the weights are as they were
                stopped = True
            if self.step and self._saved_at != self.step:
                self._save(loggers, must=True)
        self.processes.together(self._check_readable)
        is_done = self.is_finished() and not self.measurements.due()
        stopped_by = self.stop.name or "a signal to another process"
        return Outcome(self.step, stopped_by if stopped and not is_done else None)

    def _loader(self) -> Iterator[Any]:
        training, processes = self.config.training, self.processes
        share = processes.index, processes.count, training.accumulation_steps
        is_cuda = self.accelerator.device.type == "cuda"
        steps = self.step, training.steps
        return training_loader(self.samples(), *steps, self.workers, is_cuda, share, lambda: self.stop.name is not None)

    def _fetch(self) -> list[Any]:
        """Read the batches of the next step; none where that fails, or a signal comes meanwhile: see `_exchange`."""
        try:
            return list(islice(self._batches, self.config.training.accumulation_steps))
        except InputError as error:
            self._unreadable = error
            return []

    def _check_readable(self) -> None:
        if self._unreadable is not None:
            raise self._unreadable

    def _train_step(self, loggers: Loggers) -> bool:
        """Do one step, of the batches that were read before, and log it; says whether the processes are to stop."""
        training, device = self.config.training, self.accelerator.device
        seed_ambient(training.seed, self.step, self.processes.index)
        lr = training.learning_rate(training.progress(self.step + 0.5, self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        statistics = [buffer.clone() for buffer in self._buffers]
        batches, broken = self._upcoming, []
        local_losses = torch.zeros(len(self._logged) - 1, device=device)
        for number, batch in enumerate(batches, 1):
            arguments = self.arguments(batch)
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(*arguments)
                if not losses.total.requires_grad:
                    raise TrainingFailed("no loss term depends on anything that trains; see training.train and losses")
                self.accelerator.backward(self.scaler.scale(losses.total / len(batches)))
            local_losses += torch.stack([losses.total, *losses.terms.values()]).detach() / len(batches)
            broken += batch.broken
        self.scaler.unscale_(self.optimizer)  # in float16
        clip = math.inf if training.gradient_clip is None else training.gradient_clip
        norm = gathered(torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip))
        # Before the processes agree, so that all know where one of them can go no further.
        self._upcoming = self._fetch()
        agreed = self._exchange(torch.cat([local_losses, norm.reshape(1)]), len(broken))
        stops, broken_anywhere, lap, *values = agreed
        losses_and_norm = dict(zip(self._logged, values, strict=True))
        not_finite = [name for name, value in losses_and_norm.items() if not math.isfinite(value)]
        if len(not_finite) > 1:  # the gradient of a loss that is not finite
            not_finite.remove("gradient_norm")
        skipped = self._update(not_finite, statistics)
        self.step += 1
        self.seconds += lap
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_set()
        skips = {"skipped": not_finite} if not_finite else {}
        entry = {"step": self.step, **losses_and_norm, "lr": lr, **skips, **self.remarks}
        speed = training.batch_size / max(lap, 1e-9)
        loggers.step({**entry, "images_per_second": speed, "seconds": self.seconds, "memory_gib": peak / 2**30})
        if skipped:
            loggers.say(f"step {self.step} skipped: {skipped}")
        if self._skipped_in_a_row >= training.max_skipped_steps:
            raise TrainingFailed(f"step {self.step}: {skipped}; {self._last_good()}")
        if broken_anywhere:
            self.report_broken(broken, loggers)
        return stops > 0.0

    def _exchange(self, values: Tensor, broken: int = 0) -> list[float]:
        """Let the processes agree, by one sum, and one wait for the device, per step.

        Returns:
            Above 0 where a process is asked to stop or cannot read its next batch, and where images are broken; the
            main process's time since the last call; and the means of the values (N,).
        """
        now = time.monotonic()
        lap, self._mark = now - self._mark if self.processes.is_main else 0.0, now
        flags = [self.stop.name is not None or self._unreadable is not None, broken, lap]
        tensor = torch.tensor(flags, dtype=torch.float32, device=values.device)
        sums = sum_over_processes(torch.cat([tensor, values.float()])).tolist()
        return sums[:3] + [value / self.processes.count for value in sums[3:]]

    def _update(self, not_finite: Sequence[str], statistics: Sequence[Tensor]) -> str | None:
        """Move the weights and their average, or, where something is not finite, leave all as it was before the step.

        Returns:
            Why the step is skipped; None where it is not.
        """
        skipped = None
        if not not_finite:
            self.scaler.step(self.optimizer)
            self._skipped_in_a_row = 0
            self.ema.update(self.module.model, self.step + 1, self._evaluated)
        else:
            for buffer, kept in zip(self._buffers, statistics, strict=True):
                buffer.copy_(kept)
            self.skipped_steps += 1
            skipped = f"{', '.join(not_finite)} overflows float16, whose scale is halved"  # which is how it is found
            if not_finite != ["gradient_norm"] or self.scaler.get_scale() <= 1.0:  # 1 is float32's
                self._skipped_in_a_row += 1
                skipped = f"{', '.join(not_finite)} not finite ({self._skipped_in_a_row} in a row)"
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def _measure(self, loggers: Loggers) -> None:
        """Measure what is due at this step, and save what came out."""
        if self.measurements.due():
            best = self.measurements.best
            found_best = self.measurements.measure(loggers)
            if not self._save(loggers, found_best):
                self.measurements.best = best  # there is no checkpoint of it

    def _save(self, loggers: Loggers, is_best: bool = False, must: bool = False) -> bool:
        """Write a checkpoint and RUN/model; where that fails, the one before stays, and the run goes on.

        Returns:
            Whether it is written.

        Raises:
            TrainingFailed: it must be written and cannot be; the weights are not finite; or all steps were skipped.
        """
        if 0 < self.step == self.skipped_steps and self.is_finished():
            raise TrainingFailed(f"all {self.step} steps were skipped, because losses or gradients are not finite")
        checkpoint = self.state_dict(with_tensors=self._saved_at != self.step)

        def write() -> tuple[bool, str]:
            for name, tensor in checkpoint.tensors.get("model", {}).items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise TrainingFailed(f"step {self.step}: {name} is not finite; {self._last_good()}")
            written, what = False, "the checkpoint"
            try:
                folder = self.run_folder.checkpoints.save(checkpoint, is_best)
                written, what = True, str(self.run_folder.model)
                publish_model(self.run_folder, folder, checkpoint.state)
            except (OSError, InputError, SafetensorError) as error:
                return written, f"{what} cannot be written ({' '.join(str(error).split())})"
            return True, ""

        written, problem = self.processes.on_main(write)
        if written:
            self._saved_at = self.step
        if problem:
            message = f"step {self.step}: {problem}; {self._last_good()}"
            if must or self.is_finished():
                raise TrainingFailed(message)
            loggers.say(message)
        return written

    def _last_good(self) -> str:
        last = self.run_folder.checkpoints.last()
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
