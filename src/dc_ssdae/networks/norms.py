"""Normalisations that PyTorch does not have in the form needed here."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.nn import functional as F


def full_precision(device_type: str) -> AbstractContextManager[None]:
    """Switch autocast off, on devices that have it (the meta device has none)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class ChannelRMSNorm(nn.Module):
    """RMS normalisation over the channels of each pixel, with weight and bias (Zhang & Sennrich 2019).

    Computed in float32 and returned in the input's dtype: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.eps)
        weight, bias = self.weight.float()[:, None, None], self.bias.float()[:, None, None]
        # In place, so that no memory is asked for, where no gradient will need it.
        return (wide * weight + bias if torch.is_grad_enabled() else wide.mul_(weight).add_(bias)).to(x.dtype)


SLOWEST = 1e-3
"""The least share that a batch has in the running statistics of inputs that stay, so that they follow new data."""


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Affine batch normalisation whose training statistics are those of the global batch.

    In a process group of several processes the sums are added up by an all-reduce that gradients pass through, on
    any backend; `nn.SyncBatchNorm` refuses CPU tensors. In one process, and in evaluation mode, it is exactly
    `nn.BatchNorm2d`. Always computed in float32 and returned in the input's dtype.

    Attributes:
        inputs_stay: what comes in is not being trained: training too normalises by the running statistics, which become
            the mean over the first 1,000 batches and then a moving one. A batch's own would be noise, which evaluation
            does not have.
    """

    inputs_stay = False
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        with full_precision(input.device.type):
            x, weight, bias = input.float(), self.weight.float(), self.bias.float()
            learns = self.training and not self.inputs_stay  # by the statistics of the batch
            if learns and _is_distributed():
                x, mean, variance, total = _moments(x)
                self._update(mean, variance, total, self.momentum)
                scale = weight * torch.rsqrt(variance + self.eps)
                return (x * scale[:, None, None] + bias[:, None, None]).to(input.dtype)
            if self.training and self.inputs_stay:
                self._update(*_moments(x)[1:], (1.0 / (self.num_batches_tracked + 1)).clamp(min=SLOWEST))
            mean, variance = self.running_mean.float(), self.running_var.float()
            if learns:
                self.num_batches_tracked.add_(1)
            elif self.training:
                # A copy, because the next batch changes them, perhaps before this one's gradients are there.
                mean, variance = mean.clone(), variance.clone()
            normalised = F.batch_norm(x, mean, variance, weight, bias, learns, self.momentum, self.eps)
            if learns and mean is not self.running_mean:
                # Half-precision buffers were widened into copies above: the update went there.
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
            return normalised.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, total: Tensor, weight: float | Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        self.num_batches_tracked.add_(1)
        unbiased = variance * total / (total - 1).clamp(min=1)
        for buffer, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            buffer.copy_(torch.lerp(buffer.float(), value, weight))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (B, C, H, W), over all processes: x less its mean, mean (C,), variance (C,) and number of values ()."""
    over_processes = _SumOverProcesses.apply if _is_distributed() else lambda values: values
    count = x.new_full((1,), float(x.numel() // x.shape[1]))
    # Two passes, mean first: E[x²] - E[x]² would lose the variance of latents with a large mean.
    sums = over_processes(torch.cat([x.sum(dim=(0, 2, 3)), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = x - mean[:, None, None]
    return centred, mean, over_processes(centred.square().sum(dim=(0, 2, 3))) / total, total


class _SumOverProcesses(torch.autograd.Function):
    """Adds a tensor up over all processes, and its gradient too.

    The functional collectives are what torch.compile keeps in a graph; not every version gives them a gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return wait_tensor(all_reduce(values.contiguous(), "sum", dist.group.WORLD))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)
