"""How fast training steps are: configurations are measured in alternation, in one process."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

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
          `Spread` each.
        - peak_memory_bytes: allocated on a CUDA device; elsewhere this process's resident set, for the first
          configuration alone.
        - flops: of the networks per step, three times those of the forward pass; None with a user's own classes.
        - tflops_per_second: FLOPs per second, in 10¹².
        - ratio: images per second relative to the first configuration, round by round; None for the first itself.
        - not_finite: number of steps after the warm-up whose loss or gradient was not finite.

    Raises:
        InputError: a configuration cannot be built, or does not fit into the memory.
    """
    rounds = min(STEP_ROUNDS, steps)
    counts = [len(range(round_, steps, rounds)) for round_ in range(rounds)]
    steppers = [_Stepper(name, config, device) for name, config in configs.items()]
    measured = measure_alternately([partial(next, map(stepper.run, counts)) for stepper in steppers], rounds)
    # Of each configuration, by round, an image's seconds in the median step.
    paces = [
        [statistics.median(sum(step.values()) for step in steps) / stepper.batch_size for steps in by_round]
        for stepper, by_round in zip(steppers, measured, strict=True)
    ]
    figures = []
    for place, (stepper, by_round) in enumerate(zip(steppers, measured, strict=True)):
        taken = list(chain(*by_round))
        seconds = Spread.of([sum(step.values()) for step in taken])
        rates = (stepper.batch_size / value for value in (seconds.median, seconds.high, seconds.low))
        ratios = [first / own for first, own in zip(paces[0], paces[place], strict=True)]
        entry = {
            "name": stepper.name,
            "batch_size": stepper.batch_size,
            "seconds": seconds,
            "images_per_second": Spread(*rates),
            "phases": {phase: Spread.of([step[phase] for step in taken]) for phase in taken[0]},
            # Elsewhere a process has but one peak.
            "peak_memory_bytes": None if place and device.type != "cuda" else stepper.peak_memory,
            "flops": stepper.flops,
            "tflops_per_second": stepper.flops and stepper.flops / seconds.median / 1e12,
            "ratio": Spread.of(ratios) if place else None,
            "not_finite": stepper.not_finite,
        }
        figures.append(entry)
    return figures


def random_backbones(config: RunConfig) -> list[str]:
    """Name the built-in loss terms that look through a backbone, whose weights are random in a benchmark."""
    return [name for name, loss in config.losses.items() if loss.class_path is None and has_backbone(name, loss)]


class _Stepper:
    """A configuration's model, objective, optimiser and average, set up and warmed up, with a batch of random images.

    Args:
        name: of the configuration.
        config: of the run.
        device: to train on.
    """

    def __init__(self, name: str, config: RunConfig, device: torch.device) -> None:
        self.name, self._config, self._device, training = name, config, device, config.training
        self.batch_size, self._step = training.batch_size, training.ema_start  # from where on there is an average
        self._advice = f" on {device}: {name} with training.batch_size {self.batch_size}; make it smaller"
        is_cuda = device.type == "cuda"
        if is_cuda:
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
        self.not_finite = 0
        self.run(WARM_UP_STEPS)
        self.not_finite = 0
        self.peak_memory = torch.cuda.max_memory_allocated(device) - allocated if is_cuda else resident_set()
        self.flops = None
        if not own_classes(config.model):
            # A backward pass has two products for each one of the forward pass.
            self.flops = 3 * self.batch_size * sum(count_flops(self._module.model, size))

    def run(self, steps: int) -> list[dict[str, float]]:
        """Do one untimed step, and then `steps` timed ones; gives the seconds of each one's phases."""
        done = []
        with advising_on_memory(self._advice):
            for _ in range(steps + 1):
                seconds: dict[str, float] = defaultdict(float)
                wait_for(self._device)
                last = time.perf_counter()
                for phase in self._do_step():
                    wait_for(self._device)
                    now = time.perf_counter()
                    seconds[phase] += now - last
                    last = now
                done.append(seconds)
        return done[1:]

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
        self.not_finite += not bool(torch.stack([total, norm.float()]).isfinite().all())
        yield "backward"
        self._scaler.step(self._optimizer)
        self._step += 1
        self._ema.update(model, self._step, self._evaluated)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        yield "update"
