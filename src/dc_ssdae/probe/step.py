"""One step of a probe as a module, its levels, and the losses of a network on latents that it was not trained on."""

from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dc_ssdae.distributed import Processes
from dc_ssdae.dynamics import Dynamics
from dc_ssdae.dynamics.corruption import predict
from dc_ssdae.losses import Losses
from dc_ssdae.probe.latents import LatentSubset
from dc_ssdae.probe.network import answer
from dc_ssdae.randomness import named_generator

SHARES = tuple((2 * place + 1) / 20 for place in range(10))
"""The shares of noise at which the loss is measured: the middles of ten equal parts."""


class FieldStep(nn.Module):
    """Corrupt latents and compare the network's answer with its target.

    Args:
        model: as `build_network` gives it.
        dynamics: any.
        precision: "float32", or "bfloat16" or "float16" for autocast around the network.
    """

    loss_terms: ClassVar[tuple[str, ...]] = ("dynamics",)

    model: Any

    def __init__(self, model: nn.Module, dynamics: Dynamics, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.dynamics = dynamics
        self._dtype = getattr(torch, precision)

    def predict(self, x_level: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        """What the dynamics' methods take: of the network at x_level (B, c, h, w), with levels and labels (B,)."""
        single = self._dtype == torch.float32
        with nullcontext() if single else torch.autocast(x_level.device.type, self._dtype):
            return predict(self.dynamics, lambda x: answer(self.model, self.dynamics, x, level, labels), x_level)

    def forward(self, latents: Tensor, labels: Tensor, noise: Tensor, level: Tensor) -> Losses:
        """Compute the loss of a batch (B, c, h, w) with labels (B,), noise like the latents and levels (B,)."""
        record = self.dynamics.corrupt(latents, noise, level)
        loss = self.dynamics.loss(record, self.predict(record.x_level, level, labels)).mean()
        return Losses(loss, {"dynamics": loss})


def draw_levels(levels: str, count: int, generator: torch.Generator, dynamics: Dynamics) -> Tensor:
    """Draw levels (count,) on the generator's device: the share of noise is uniform, or logit-normal."""
    device = generator.device
    if levels == "uniform":
        share = torch.rand(count, generator=generator, device=device)
    else:
        share = torch.randn(count, generator=generator, device=device).sigmoid()
    return level_of(dynamics, share)


def level_of(dynamics: Dynamics, share: Tensor) -> Tensor:
    """The level at which a share in [0, 1] of the mixture is noise."""
    return share if dynamics.noise_level == 1.0 else 1.0 - share


class FieldLosses(NamedTuple):
    """What a network does with latents that it was not trained on, at each of `SHARES`.

    field: mean squared error of the field per value, divided by λ² where there is a λ, and by the latents' variance.
    clean: mean squared error of the clean estimate, divided by the latents' variance: 1 where nothing is known.
    per_latent: the mean of `field` over the shares, (N,) float64, latent by latent.
    """

    field: list[float]
    clean: list[float]
    per_latent: Tensor


@torch.no_grad()
def field_losses(
    step: FieldStep, latents: LatentSubset, limit: int, batch_size: int, processes: Processes | None = None
) -> FieldLosses:
    """Measure the losses on at most `limit` latents, evenly spread, each with its own noise, whatever the batch.

    Args:
        step: in evaluation mode, with the weights to measure.
        latents: to measure on.
        limit: how many, at most.
        batch_size: latents at a time.
        processes: that share the work; this one alone by default.
    """
    processes = processes or Processes(device=next(step.parameters()).device)
    device, count = torch.device(processes.device), min(limit, len(latents))
    field, clean = torch.zeros(2, count, len(SHARES), dtype=torch.float64)
    moments = torch.zeros(3, dtype=torch.float64)
    mine = processes.share(count)
    for first in range(0, len(mine), batch_size):
        places = list(mine[first : first + batch_size])
        read = [latents.read(place * len(latents) // count) for place in places]
        x = torch.stack([latent.latent for latent in read])
        labels = torch.tensor([latent.label for latent in read], device=device)
        moments += torch.tensor([x.numel(), x.double().sum(), x.double().square().sum()], dtype=torch.float64)
        generators = [named_generator(0, f"latent {place}") for place in places]
        x = x.to(device)
        for column, share in enumerate(SHARES):
            noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(device)
            level = level_of(step.dynamics, torch.full((len(x),), share, device=device))
            record = step.dynamics.corrupt(x, noise, level)
            prediction = step.predict(record.x_level, level, labels).float()
            field[places, column] = step.dynamics.loss(record, prediction).cpu().double()
            error = step.dynamics.clean_estimate(record.x_level, prediction, level) - x
            clean[places, column] = error.square().flatten(1).mean(dim=1).cpu().double()
    values, total, squares = processes.sum(moments).tolist()
    variance = squares / values - (total / values) ** 2
    field, clean = (processes.sum(losses) / variance for losses in (field, clean))
    return FieldLosses(field.mean(dim=0).tolist(), clean.mean(dim=0).tolist(), field.mean(dim=1))
