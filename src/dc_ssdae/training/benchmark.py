"""How fast training steps are: configurations are measured in alternation, in one process."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, count
from typing import Any

import torch

from dc_ssdae.errors import advising_on_memory
from dc_ssdae.evaluation.profile import count_flops, wait_for
from dc_ssdae.losses.total import BUILT_IN
from dc_ssdae.timing import Spread, measure_alternately, resident_set
from dc_ssdae.training.build import build_model, build_step, own_classes, place_step
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
    rounds, is_cuda = min(STEP_ROUNDS, steps), device.type == "cuda"
    timers: list[Iterator[list[dict[str, float]]]] = []
    figures: list[dict[str, Any]] = []
    for name, config in configs.items():
        entry: dict[str, Any] = {"name": name, "batch_size": config.training.batch_size}
        advice = f" on {device}: {name} with training.batch_size {entry['batch_size']}; make it smaller"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device) if is_cuda else 0
        timer = partial(_time_steps, _train(config, device, entry), device, advice)
        timer(WARM_UP_STEPS)
        entry["not_finite"] = 0
        # Elsewhere a process has but one peak.
        elsewhere = None if figures else resident_set()
        entry["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - allocated if is_cuda else elsewhere
        timers.append(map(timer, [len(range(round_, steps, rounds)) for round_ in range(rounds)]))
        figures.append(entry)
    measured = measure_alternately([partial(next, timer) for timer in timers], rounds)
    rates = []  # of each configuration, by round, images per second in the median step
    for entry, config, by_round in zip(figures, configs.values(), measured, strict=True):
        batch_size, taken = entry["batch_size"], list(chain(*by_round))
        rates.append([batch_size / statistics.median(sum(step.values()) for step in taken) for taken in by_round])
        seconds = Spread.of([sum(step.values()) for step in taken])
        entry["seconds"] = seconds
        entry["images_per_second"] = Spread(*(batch_size / at for at in (seconds.median, seconds.high, seconds.low)))
        entry["phases"] = {phase: Spread.of([step[phase] for step in taken]) for phase in taken[0]}
        ratios = [own / first for own, first in zip(rates[-1], rates[0], strict=True)]
        entry["ratio"] = Spread.of(ratios) if len(rates) > 1 else None
        entry["flops"] = entry["tflops_per_second"] = None
        if not own_classes(config.model):
            # A backward pass has two products for each one of the forward pass.
            with torch.device("meta"):
                model = build_model(config.model)
            entry["flops"] = 3 * batch_size * sum(count_flops(model, config.data.image_size))
            entry["tflops_per_second"] = entry["flops"] / seconds.median / 1e12
    return figures


def random_backbones(config: RunConfig) -> list[str]:
    """Name the built-in loss terms that look through a backbone, whose weights are random in a benchmark."""
    built_in = [name for name, loss in config.losses.items() if loss.weight and loss.class_path is None]
    return [name for name in built_in if hasattr(BUILT_IN[name], "fetch")]


def _time_steps(phases: Iterator[str], device: torch.device, advice: str, steps: int) -> list[dict[str, float]]:
    """Do one untimed step, and then `steps` timed ones; gives the seconds of each one's phases."""
    done = []
    with advising_on_memory(advice):
        for _ in range(steps + 1):
            seconds: dict[str, float] = defaultdict(float)
            wait_for(device)
            last = time.perf_counter()
            for phase in phases:
                wait_for(device)
                now = time.perf_counter()
                seconds[phase] += now - last
                last = now
                if phase == "update":
                    break
            done.append(seconds)
    return done[1:]


def _train(config: RunConfig, device: torch.device, entry: dict[str, Any]) -> Iterator[str]:
    """Train as the trainer does, on random images; yields the name of each phase at its end, "update" as the last.

    Args:
        config: of the run.
        device: to train on.
        entry: counts the steps whose loss or gradient is not finite, as "not_finite".
    """
    training = config.training
    torch.manual_seed(training.seed)
    # How fast a backbone is does not depend on its weights, which would have to come from somewhere.
    losses = dict(config.losses)
    for term in random_backbones(config):
        losses[term] = replace(losses[term], init_args={**losses[term].init_args, "weights": "random"})
    size, parts = config.data.image_size, training.accumulation_steps
    images = torch.randint(0, 256, (parts, training.batch_size // parts, 3, size, size), dtype=torch.uint8).to(device)
    module = build_step(replace(config, losses=losses))
    place_step(module, config, device)
    optimizer = build_optimizer(module, training)
    average = ExponentialMovingAverage(module.model, training.ema_decay, training.ema_start)
    evaluated = evaluated_weights(optimizer, module.model)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
    for number in count(training.ema_start + 1):  # from where on there is something to average
        total = torch.zeros((), device=device)
        for pixels in images:
            draw = range(len(pixels))
            noise = draw_noise(module.model, size, 0, training.batch_size, draw, device, training.latent_noise)
            loss = module(pixels, *noise).total / parts
            yield "forward"
            scaler.scale(loss).backward()
            total += loss.detach()
            yield "backward"
        scaler.unscale_(optimizer)  # in float16
        clip = math.inf if training.gradient_clip is None else training.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        # A run looks at its losses here, once per step, and waits for the device.
        is_finite = bool(torch.stack([total, norm.float()]).isfinite().all())
        entry["not_finite"] = entry.get("not_finite", 0) + (not is_finite)
        yield "backward"
        scaler.step(optimizer)
        average.update(module.model, number, evaluated)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield "update"
