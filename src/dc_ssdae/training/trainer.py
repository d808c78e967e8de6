"""A minimal training loop: one process, AdamW, a step or clock budget."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.transforms import random_resized_crop
from dc_ssdae.losses import Losses, total_loss
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.randomness import image_generator


class Batch(NamedTuple):
    """Images (B, 3, S, S) in [-1, 1], noise of that shape, levels (B,), and each image's generator."""

    x: Tensor
    noise: Tensor
    level: Tensor
    generators: list[torch.Generator]


class StepRecord(NamedTuple):
    """What is known after a step; `progress` is the share of the budget spent, `seconds` since the start."""

    step: int
    losses: dict[str, float]
    gradient_norm: float
    lr: float
    progress: float
    seconds: float


def draw_batch(photos: Sequence[Tensor], model: DCSSDAE, config: TrainingConfig, step: int) -> Batch:
    """Draw a step's random crops, levels and noise, on the CPU, reproducibly.

    Args:
        photos: uint8 images (3, H, W), each as likely as the next.
        model: its dynamics draws the levels.
        config: gives crop, batch size and seed.
        step: from 0.
    """
    crops, noise, level = [], [], []
    generators = [image_generator(config.seed, step, index) for index in range(config.batch_size)]
    for generator in generators:
        photo = photos[int(torch.randint(len(photos), (1,), generator=generator))]
        crops.append(random_resized_crop(photo, config.image_size, config.crop_scale, generator))
        level.append(model.dynamics.sample_level(1, generator=generator))
        noise.append(torch.randn(3, config.image_size, config.image_size, generator=generator))
    return Batch(to_model_range(torch.stack(crops)), torch.stack(noise), torch.cat(level), generators)


def compute_losses(model: DCSSDAE, batch: Batch, config: TrainingConfig) -> Losses:
    """Encode, corrupt, predict and add up the objective of one batch; gradients flow to encoder and decoder."""
    device = next(model.parameters()).device
    x, noise, level = (part.to(device) for part in batch[:3])
    record = model.dynamics.corrupt(x, noise, level)
    time_input = level if model.dynamics.conditions_on_time else None
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        posterior = model.encoder(x)
        prediction = model.decoder(record.x_level, posterior.sample(batch.generators), time_input)
    return total_loss(model.dynamics, record, prediction, posterior, config.loss_weights)


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Linear warm-up, then a cosine to 0, at a share `progress` in [0, 1] of the budget."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    decayed = (progress - config.warmup) / (1.0 - config.warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(decayed, 1.0)))


def train(
    model: DCSSDAE,
    photos: Sequence[Tensor],
    config: TrainingConfig,
    on_step: Callable[[StepRecord], None] | None = None,
) -> list[StepRecord]:
    """Train a model in place on random crops of photos held in memory; leaves it in eval mode.

    Args:
        model: on the device that is to do the work.
        photos: uint8 images (3, H, W).
        config: the settings; with a budget in steps a run is reproducible, with the clock it is not.
        on_step: called after every step, for progress bars and logs.

    Returns:
        A record of every step.

    Raises:
        FloatingPointError: a loss or the gradient is not finite; names the step and the terms.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    history: list[StepRecord] = []
    model.train()
    start = time.monotonic()
    while (progress := _progress(config, len(history), time.monotonic() - start)) < 1.0:
        step = len(history)
        # The middle of the step, so that a warm-up of any length starts above 0.
        lr = learning_rate(config, _progress(config, step + 0.5, time.monotonic() - start))
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = compute_losses(model, draw_batch(photos, model, config, step), config)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        values = {name: float(term.detach()) for name, term in {"total": losses.total, **losses.terms}.items()}
        if not all(math.isfinite(value) for value in (*values.values(), float(norm))):
            raise FloatingPointError(f"step {step}: not finite: {values}, gradient norm {float(norm)}")
        optimizer.step()
        history.append(StepRecord(step, values, float(norm), lr, progress, time.monotonic() - start))
        if on_step is not None:
            on_step(history[-1])
    model.eval()
    return history


def _progress(config: TrainingConfig, steps: float, seconds: float) -> float:
    return steps / config.steps if config.steps is not None else seconds / (60.0 * (config.minutes or 0.0))
