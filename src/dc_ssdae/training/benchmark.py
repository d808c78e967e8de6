"""How fast steps are done: configurations are measured in alternation, in one process."""

import gc
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dc_ssdae.errors import InputError, is_out_of_memory
from dc_ssdae.evaluation.profile import count_flops, wait_for
from dc_ssdae.timing import Spread, alternating, resident_set
from dc_ssdae.training.build import build_model, build_step, has_backbone, own_classes, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.optimizer import build_optimizer, evaluated_weights
from dc_ssdae.training.step import draw_noise

STEP_ROUNDS = 5
"""Measurements of each of the things that alternate."""


WARM_UP_STEPS = 3
"""Steps that are not timed: torch.compile compiles, cuDNN chooses, memory is taken from the system."""


@dataclass(frozen=True)
class StepFigures:
    """What was measured of a configuration's steps, in one process.

    name: of the configuration.
    batch_size: images a step.
    seconds: a step takes.
    images_per_second: the same as a rate.
    phases: seconds of "forward", "backward" (with the gradient's norm) and "update" (optimiser and average); None
        where the device does not tell.
    peak_memory_bytes: allocated on a CUDA device; else this process's resident set, None for what was compared.
    flops: of the networks in a step, three times those of the forward pass; None with a user's own classes.
    tflops_per_second: flops by seconds.
    ratio: of images a second to the plain configuration's, round by round; None for that itself.
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
    with _naming_out_of_memory(name, config, device):
        plain = _Stepper(config, device)
        plain.run(WARM_UP_STEPS)
    plain_peak = plain.peak_memory() if device.type == "cuda" else resident_set()
    plain_times: list[_StepTime] = [] if compared else plain.run(steps)
    flops = _image_flops(config)
    figures = []
    for other_name, other_config in compared.items():
        with _naming_out_of_memory(other_name, other_config, device):
            other = _Stepper(other_config, device)
            other.run(WARM_UP_STEPS)
            other_peak = other.peak_memory() if device.type == "cuda" else None
            times: tuple[list[_StepTime], list[_StepTime]] = ([], [])
            ratios = []
            for round_, count in enumerate(_split_steps(steps)):
                rates = [0.0, 0.0]
                for number in alternating(2, round_):
                    stepper = (plain, other)[number]
                    found = stepper.run(count)
                    times[number].extend(found)
                    rates[number] = stepper.batch_size / statistics.median(entry.seconds for entry in found)
                ratios.append(rates[1] / rates[0])
        plain_times += times[0]
        same = other_config.model == config.model and other_config.data.image_size == config.data.image_size
        other_flops = flops if same else _image_flops(other_config)
        figures.append(_step_figures(other_name, other_config, times[1], other_peak, other_flops, Spread.of(ratios)))
        del other, stepper
        gc.collect()
        if other_config.training.compile and not config.training.compile:
            torch.compiler.reset()  # it stops compiling a function after the eighth time
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [_step_figures(name, config, plain_times, plain_peak, flops, None), *figures]


class _StepTime(NamedTuple):
    """Seconds of a step, and of its phases; whether all was finite."""

    seconds: float
    phases: dict[str, float] | None
    finite: bool


class _Stepper:
    """A configuration's model, objective, optimiser and average, set up as a run does, with a batch of random images.

    Args:
        config: of the run.
        device: to train on.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        training = config.training
        self.batch_size = training.batch_size
        self._device = device
        self._clip = math.inf if training.gradient_clip is None else training.gradient_clip
        self._allocated = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        torch.manual_seed(training.seed)
        self._module = build_step(_with_random_backbones(config))
        place_step(self._module, config, device)
        self._optimizer = build_optimizer(self._module, training)
        self._scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        self._ema = ExponentialMovingAverage(self._module.model, training.ema_decay, training.ema_start)
        self._evaluated = evaluated_weights(self._optimizer, self._module.model)
        self._step = training.ema_start  # from where on there is something to average
        self._parts = [self._random_pixels(config) for _ in range(training.accumulation_steps)]

    def run(self, steps: int) -> list[_StepTime]:
        """Do one step untimed and then `steps` timed ones, each from the wait for the device to the next such wait."""
        wait_for(self._device)
        done = [self._do_step() for _ in range(steps + 1)]
        wait_for(self._device)
        return [
            _StepTime(this.waited - before.waited, self._phases(this.marks), this.finite)
            for before, this in pairwise(done)
        ]

    def peak_memory(self) -> int:
        """Bytes allocated on the CUDA device at most since this was built, less what was there before."""
        return torch.cuda.max_memory_allocated(self._device) - self._allocated

    def _random_pixels(self, config: RunConfig) -> Tensor:
        count = config.training.batch_size // config.training.accumulation_steps
        shape = (count, 3, config.data.image_size, config.data.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8).to(self._device)

    def _do_step(self) -> "_Done":
        marks = [("start", self._mark())]
        total = torch.zeros((), device=self._device)
        for pixels in self._parts:
            draw = range(len(pixels))
            noise = draw_noise(self._module.model, pixels.shape[-1], 0, self.batch_size, draw, self._device)
            losses = self._module(pixels, *noise)
            marks.append(("forward", self._mark()))
            loss = losses.total / len(self._parts)
            self._scaler.scale(loss).backward()
            total += loss.detach()
            marks.append(("backward", self._mark()))
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        # A run looks at its losses here, once a step, and waits for the device.
        finite = bool(torch.stack([total, norm.float()]).isfinite().all())
        waited = time.perf_counter()
        marks.append(("backward", self._mark()))
        self._scaler.step(self._optimizer)
        self._step += 1
        self._ema.update(self._module.model, self._step, self._evaluated)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        marks.append(("update", self._mark()))
        return _Done(waited, marks, finite)

    def _mark(self) -> Any:
        """A point in the device's time: an event in CUDA's queue, which is read later, or the clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _phases(self, marks: "Sequence[tuple[str, Any]]") -> dict[str, float] | None:
        if self._device.type not in ("cpu", "cuda"):
            return None
        seconds: dict[str, float] = {}
        for (_, before), (name, mark) in pairwise(marks):
            spent = before.elapsed_time(mark) / 1000.0 if self._device.type == "cuda" else mark - before
            seconds[name] = seconds.get(name, 0.0) + spent
        return seconds


class _Done(NamedTuple):
    """A step: when its wait for the device was over, its marks with the phases that they end, whether it is finite."""

    waited: float
    marks: list[tuple[str, Any]]
    finite: bool


def _split_steps(steps: int) -> list[int]:
    rounds = min(STEP_ROUNDS, steps)
    return [steps // rounds + (round_ < steps % rounds) for round_ in range(rounds)]


def _step_figures(
    name: str,
    config: RunConfig,
    times: Sequence[_StepTime],
    peak_memory: int | None,
    image_flops: int | None,
    ratio: Spread | None,
) -> StepFigures:
    batch_size = config.training.batch_size
    seconds = Spread.of([entry.seconds for entry in times])
    split = [entry.phases for entry in times if entry.phases is not None]
    flops = None if image_flops is None else batch_size * image_flops
    return StepFigures(
        name,
        batch_size,
        seconds,
        Spread(batch_size / seconds.median, batch_size / seconds.high, batch_size / seconds.low),
        {phase: Spread.of([entry[phase] for entry in split]) for phase in split[0]} if split else None,
        peak_memory,
        flops,
        None if flops is None else flops / seconds.median / 1e12,
        ratio,
        sum(not entry.finite for entry in times),
    )


def _image_flops(config: RunConfig) -> int | None:
    """Of the networks, to train on one image: a backward pass has two products for each one of the forward pass."""
    if own_classes(config.model):
        return None
    with torch.device("meta"):
        model = build_model(config.model)
    flops = count_flops(model, config.data.image_size)
    return 3 * (flops.encode + flops.decode_step)


def _with_random_backbones(config: RunConfig) -> RunConfig:
    """Need no weights from anywhere: how fast a backbone is does not depend on them."""
    losses = {
        name: replace(loss, init_args={**loss.init_args, "weights": "random"})
        if loss.class_path is None and has_backbone(name, loss)
        else loss
        for name, loss in config.losses.items()
    }
    return replace(config, losses=losses)


@contextmanager
def _naming_out_of_memory(name: str, config: RunConfig, device: torch.device) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory on {device}: {name} with training.batch_size {config.training.batch_size}; make it "
            "smaller, or set training.accumulation_steps, training.gradient_checkpointing or training.precision"
        ) from error
