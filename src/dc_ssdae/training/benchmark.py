"""How fast training steps are: configurations are measured in alternation, in one process."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch

from dc_ssdae.errors import advising_on_memory
from dc_ssdae.evaluation.profile import count_flops, wait_for
from dc_ssdae.timing import Spread, measure_alternately, resident_set
from dc_ssdae.training.build import build_step, has_backbone, own_classes, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.optimizer import build_optimizer, evaluated_weights
from dc_ssdae.training.step import draw_noise

STEP_ROUNDS = 5
"""Rounds in which the configurations alternate."""

WARM_UP_STEPS = 3
"""Steps that are not timed: torch.compile compiles, cuDNN chooses, memory is taken from the system."""


def measure_training(configs: Mapping[str, RunConfig], device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Time training steps on random images that are on the device already: networks, objective, optimiser, average.

    Args:
        configs: configurations of runs by name, all of which are held in memory and alternate; `batch_size` is that of
            this process.
        device: to train on.
        steps: timed steps of each configuration.

    Returns:
        For each configuration:

        - name.
        - batch_size: images per step.
        - seconds: per step, a `Spread`.
        - images_per_second: the same as a rate.
        - phases: seconds of "forward", "backward" (with the gradient's norm) and "update" (optimiser and average), a
          `Spread` each; None where the device does not tell.
        - peak_memory_bytes: allocated on a CUDA device; elsewhere this process's resident set, for the first
          configuration alone.
        - flops: of the networks per step, three times those of the forward pass; None with a user's own classes.
        - tflops_per_second: FLOPs per second, in 10¹².
        - ratio: images per second relative to the first configuration, round by round; None for the first itself.
        - not_finite: number of timed steps whose loss or gradient was not finite.

    Raises:
        InputError: a configuration cannot be built, or does not fit into the memory.
    """
    rounds = min(STEP_ROUNDS, steps)
    counts = [len(range(round_, steps, rounds)) for round_ in range(rounds)]
    steppers = [_Stepper(name, config, device) for name, config in configs.items()]
    measured = measure_alternately([partial(next, map(stepper.run, counts)) for stepper in steppers], rounds)
    figures = []
    for number, (stepper, taken) in enumerate(zip(steppers, measured, strict=True)):
        share = stepper.batch_size / steppers[0].batch_size
        pairs = zip(measured[0], taken, strict=True)
        ratio = Spread.of([share * _median_seconds(first) / _median_seconds(own) for first, own in pairs])
        entry = {**stepper.figures(list(chain(*taken))), "ratio": ratio if number else None}
        if number and device.type != "cuda":
            entry["peak_memory_bytes"] = None  # a process has but one resident set
        figures.append(entry)
    return figures


def random_backbones(config: RunConfig) -> list[str]:
    """Name the built-in loss terms that look through a backbone, whose weights are random in a benchmark."""
    return [name for name, loss in config.losses.items() if loss.class_path is None and has_backbone(name, loss)]


class _Step(NamedTuple):
    """A step's seconds by phase, and whether its loss and gradient are finite."""

    phases: dict[str, float]
    finite: bool


def _seconds(step: _Step) -> float:
    return sum(step.phases.values())


def _median_seconds(steps: Iterable[_Step]) -> float:
    return statistics.median(map(_seconds, steps))


class _Stepper:
    """A configuration's model, objective, optimiser and average, set up and warmed up, with a batch of random images.

    Args:
        name: of the configuration.
        config: of the run.
        device: to train on.
    """

    def __init__(self, name: str, config: RunConfig, device: torch.device) -> None:
        self._name, self._config, self._device, training = name, config, device, config.training
        self.batch_size = training.batch_size
        self._advice = (
            f" on {device}: {name} with training.batch_size {self.batch_size}; make it smaller, or set "
            "training.accumulation_steps, training.gradient_checkpointing or training.precision"
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
        torch.manual_seed(training.seed)
        # How fast a backbone is does not depend on its weights, which would have to come from somewhere.
        losses = dict(config.losses)
        for term in random_backbones(config):
            losses[term] = replace(losses[term], init_args={**losses[term].init_args, "weights": "random"})
        size, parts = config.data.image_size, training.accumulation_steps
        images = torch.randint(0, 256, (parts, self.batch_size // parts, 3, size, size), dtype=torch.uint8)
        with advising_on_memory(self._advice):
            self._parts = images.to(device)
            self._module = build_step(replace(config, losses=losses))
            place_step(self._module, config, device)
            self._optimizer = build_optimizer(self._module, training)
            self._ema = ExponentialMovingAverage(self._module.model, training.ema_decay, training.ema_start)
        self._scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        self._evaluated = evaluated_weights(self._optimizer, self._module.model)
        self._step = training.ema_start  # from where on there is something to average
        self._finite = True
        self.run(WARM_UP_STEPS)
        is_cuda = device.type == "cuda"
        self._peak_memory = torch.cuda.max_memory_allocated(device) - allocated if is_cuda else resident_set()

    def run(self, steps: int) -> list[_Step]:
        """Do one untimed step, and then `steps` timed ones."""
        done = []
        wait_for(self._device)
        last = self._mark()
        with advising_on_memory(self._advice):
            for _ in range(steps + 1):
                marks = [("start", last), *((phase, self._mark()) for phase in self._do_step())]
                last = marks[-1][1]
                done.append((marks, self._finite))
        wait_for(self._device)  # before events are read
        timed, is_cuda = [], self._device.type == "cuda"
        for marks, finite in done[1:]:
            phases: dict[str, float] = defaultdict(float)
            for (_, start), (phase, end) in pairwise(marks):
                phases[phase] += start.elapsed_time(end) / 1000.0 if is_cuda else end - start
            timed.append(_Step(phases, finite))
        return timed

    def figures(self, steps: list[_Step]) -> dict[str, Any]:
        """Summarise timed steps."""
        seconds = Spread.of(list(map(_seconds, steps)))
        rates = (self.batch_size / value for value in (seconds.median, seconds.high, seconds.low))
        phases = {phase: Spread.of([step.phases[phase] for step in steps]) for phase in steps[0].phases}
        flops = None
        if not own_classes(self._config.model):
            # A backward pass has two products for each one of the forward pass.
            flops = 3 * self.batch_size * sum(count_flops(self._module.model, self._config.data.image_size))
        return {
            "name": self._name,
            "batch_size": self.batch_size,
            "seconds": seconds,
            "images_per_second": Spread(*rates),
            "phases": phases if self._device.type in ("cpu", "cuda") else None,
            "peak_memory_bytes": self._peak_memory,
            "flops": flops,
            "tflops_per_second": None if flops is None else flops / seconds.median / 1e12,
            "not_finite": sum(not step.finite for step in steps),
        }

    def _do_step(self) -> Iterator[str]:
        """Do a step as the trainer does; yields the name of each phase at its end."""
        training, model = self._config.training, self._module.model
        total = torch.zeros((), device=self._device)
        for pixels in self._parts:
            draw = range(len(pixels))
            noise = draw_noise(model, pixels.shape[-1], 0, training.batch_size, draw, self._device)
            loss = self._module(pixels, *noise).total / len(self._parts)
            yield "forward"
            self._scaler.scale(loss).backward()
            total += loss.detach()
            yield "backward"
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        clip = math.inf if training.gradient_clip is None else training.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), clip)
        # A run looks at its losses here, once per step, and waits for the device.
        self._finite = bool(torch.stack([total, norm.float()]).isfinite().all())
        yield "backward"
        self._scaler.step(self._optimizer)
        self._step += 1
        self._ema.update(model, self._step, self._evaluated)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        yield "update"

    def _mark(self) -> Any:
        """Mark a point in the device's time: by an event in CUDA's queue, which is read later, or by the clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
