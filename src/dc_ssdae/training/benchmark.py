"""How fast training steps are: configurations are measured in alternation, in one process."""

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
"""Rounds in which two configurations alternate."""

WARM_UP_STEPS = 3
"""Steps that are not timed: torch.compile compiles, cuDNN chooses, memory is taken from the system."""


@dataclass(frozen=True)
class StepFigures:
    """What was measured of a configuration's steps, in one process.

    name: of the configuration.
    batch_size: images per step.
    seconds: per step.
    images_per_second: the same as a rate.
    phases: seconds of "forward", "backward" (with the gradient's norm) and "update" (optimiser and average); None
        where the device does not tell.
    peak_memory_bytes: allocated on a CUDA device; else this process's resident set, None for what was compared.
    flops: of the networks per step, three times the forward pass's; None with a user's own classes.
    tflops_per_second: flops by seconds.
    ratio: of images per second to the plain configuration's, round by round; None for the plain one itself.
    not_finite: timed steps whose loss or gradient was not finite.
    """

    name: str
    batch_size: int
    seconds: Spread
    images_per_second: Spread
    phases: dict[str, Spread] | None
    peak_memory_bytes: int | None
    flops: int | None
    tflops_per_second: float | None
    ratio: Spread | None
    not_finite: int


def measure_training(
    name: str, config: RunConfig, compared: Mapping[str, RunConfig], device: torch.device, steps: int
) -> list[StepFigures]:
    """Time training steps on random images that are on the device already: networks, objective, optimiser, average.

    Args:
        name: of the configuration.
        config: of a run; its batch is this process's.
        compared: other configurations by name; each is measured in alternation with the first.
        device: to train on.
        steps: timed steps of each.

    Returns:
        The figures of the configuration, then of each compared.

    Raises:
        InputError: a configuration cannot be built, or does not fit into the memory.
    """

    def out_of_memory(name: str, config: RunConfig) -> str:
        return (
            f" on {device}: {name} with training.batch_size {config.training.batch_size}; make it smaller, or set "
            "training.accumulation_steps, training.gradient_checkpointing or training.precision"
        )

    with advising_on_memory(out_of_memory(name, config)):
        plain = _Stepper(config, device)
        plain_peak = plain.peak_memory() or resident_set()
        plain_steps = [] if compared else plain.run(steps)
    rounds = min(STEP_ROUNDS, steps)
    counts = [steps // rounds + (round_ < steps % rounds) for round_ in range(rounds)]
    figures = []
    for other_name, other_config in compared.items():
        with advising_on_memory(out_of_memory(other_name, other_config)):
            other = _Stepper(other_config, device)
            other_peak = other.peak_memory()
            measurements = [partial(next, map(stepper.run, counts)) for stepper in (plain, other)]
            plain_rounds, other_rounds = measure_alternately(measurements, rounds)
        share = other_config.training.batch_size / config.training.batch_size
        pairs = zip(plain_rounds, other_rounds, strict=True)
        ratio = Spread.of([share * _median_seconds(before) / _median_seconds(after) for before, after in pairs])
        plain_steps += chain(*plain_rounds)
        figures.append(other.figures(other_name, list(chain(*other_rounds)), other_peak, ratio))
        del other, measurements
        gc.collect()
        if other_config.training.compile and not config.training.compile:
            torch.compiler.reset()  # it stops compiling a function after the eighth time
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [plain.figures(name, plain_steps, plain_peak, None), *figures]


def frozen_backbones(config: RunConfig) -> list[str]:
    """Name the built-in loss terms that look through a backbone, whose weights are random in a benchmark."""
    return [name for name, loss in config.losses.items() if loss.class_path is None and has_backbone(name, loss)]


class _Step(NamedTuple):
    """Seconds of a step, from its wait for the device to the next step's, and of its phases; whether all is finite."""

    seconds: float
    phases: dict[str, float]
    finite: bool


def _median_seconds(steps: Sequence[_Step]) -> float:
    return statistics.median(step.seconds for step in steps)


class _Stepper:
    """A configuration's model, objective, optimiser and average, set up and warmed up, with a batch of random images.

    Args:
        config: of the run.
        device: to train on.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device, training = config, device, config.training
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        torch.manual_seed(training.seed)
        # How fast a backbone is does not depend on its weights, which would have to come from somewhere.
        losses = dict(config.losses)
        for name in frozen_backbones(config):
            losses[name] = replace(losses[name], init_args={**losses[name].init_args, "weights": "random"})
        self._module = build_step(replace(config, losses=losses))
        place_step(self._module, config, device)
        self._optimizer = build_optimizer(self._module, training)
        self._scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        self._ema = ExponentialMovingAverage(self._module.model, training.ema_decay, training.ema_start)
        self._evaluated = evaluated_weights(self._optimizer, self._module.model)
        self._step = training.ema_start  # from where on there is something to average
        self._finite = True
        size, parts = config.data.image_size, training.accumulation_steps
        shape = (parts, training.batch_size // parts, 3, size, size)
        self._parts = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
        self.run(WARM_UP_STEPS)

    def run(self, steps: int) -> list[_Step]:
        """Do one untimed step, and then `steps` timed ones."""
        done = []
        wait_for(self._device)
        for _ in range(steps + 1):
            marks = [("start", self._mark()), *((phase, self._mark()) for phase in self._do_step())]
            done.append((marks, self._finite))
        wait_for(self._device)
        timed = []
        for (before, _), (marks, finite) in pairwise(done):
            phases: dict[str, float] = defaultdict(float)
            for (_, start), (phase, end) in pairwise(marks):
                phases[phase] += self._seconds(start, end)
            timed.append(_Step(self._seconds(before[-2][1], marks[-2][1]), phases, finite))
        return timed

    def peak_memory(self) -> int | None:
        """Bytes allocated on a CUDA device at most since this was built, less what was there before."""
        return torch.cuda.max_memory_allocated(self._device) - self._allocated if self._device.type == "cuda" else None

    def figures(self, name: str, steps: Sequence[_Step], peak_memory: int | None, ratio: Spread | None) -> StepFigures:
        """Summarise timed steps."""
        batch_size = self._config.training.batch_size
        seconds = Spread.of([step.seconds for step in steps])
        rates = (batch_size / value for value in (seconds.median, seconds.high, seconds.low))
        phases = {phase: Spread.of([step.phases[phase] for step in steps]) for phase in steps[0].phases}
        tells = self._device.type in ("cpu", "cuda")
        flops = None
        if not own_classes(self._config.model):
            # A backward pass has two products for each one of the forward pass.
            flops = 3 * batch_size * sum(count_flops(self._module.model, self._config.data.image_size))
        speed = None if flops is None else flops / seconds.median / 1e12
        broken = sum(not step.finite for step in steps)
        return StepFigures(
            name,
            batch_size,
            seconds,
            Spread(*rates),
            phases if tells else None,
            peak_memory,
            flops,
            speed,
            ratio,
            broken,
        )

    def _do_step(self) -> Iterator[str]:
        """Do a step as the trainer does; gives the name of each phase at its end."""
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
        """A point in the device's time: an event in CUDA's queue, which is read later, or the clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000.0 if self._device.type == "cuda" else end - start
