"""How fast autoencoders encode or decode images: in one process, in alternation, against what it can do."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from dc_ssdae.evaluation.arena import peak_memory
from dc_ssdae.evaluation.candidates import Candidate
from dc_ssdae.evaluation.profile import wait_for
from dc_ssdae.timing import Spread, measure_alternately

PEAK_CONVOLUTIONS = ((128, 64), (256, 64), (128, 128), (512, 32))
"""Channels and sides of the 3×3 convolutions among which the fastest one counts as the machine's peak."""


@torch.inference_mode()
def measure_speed(
    work: str, candidates: Mapping[str, Candidate], x: Tensor, dtype: torch.dtype, rounds: int, threads: int = 1
) -> list[dict[str, Any]]:
    """Time one half of autoencoders.

    Args:
        work: "encode" or "decode".
        candidates: by label, on the images' device.
        x: images (B, 3, S, S) in [-1, 1].
        dtype: of the candidates' networks, for the peak.
        rounds: in which all alternate; medians count.
        threads: of the CPU.

    Returns:
        For each candidate its label; the images' size and batch_size; seconds that a batch takes: processor time of all
        threads on a CPU, else the time that passes; ratio, how many times as fast as the first candidate, round by
        round, and None for the first; flops of a batch, two for a multiply-add; share_of_peak, the FLOPs per second
        against the fastest 3×3 convolution's; and peak_memory_bytes in use, the weights among it, None where the device
        does not tell.
    """
    device, halves = x.device, []
    for candidate in candidates.values():
        latent = candidate.latent(candidate.encode(x), None)
        halves.append(partial(candidate.encode, x) if work == "encode" else partial(candidate.decode, latent))
    memory = [peak_memory(*pair, device) for pair in zip(candidates.values(), halves, strict=True)]
    seconds = measure_alternately([partial(_seconds, half, device, threads, 0.001) for half in halves], rounds)
    peak = convolution_peak(device, dtype, threads)
    figures: list[dict[str, Any]] = []
    for label, half, own, most in zip(candidates, halves, seconds, memory, strict=True):
        # The plain form of attention is made of matrix products, which are counted on every device.
        plainly = torch.compiler.set_stance("force_eager")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), plainly:
            half()
        flops, spread = counter.get_total_flops(), Spread.of(own)
        ratio = Spread.of([first / mine for first, mine in zip(seconds[0], own, strict=True)]) if figures else None
        found = {"label": label, "size": x.shape[-1], "batch_size": len(x), "seconds": spread, "ratio": ratio}
        share = flops / spread.median / peak
        figures.append({**found, "flops": flops, "share_of_peak": share, "peak_memory_bytes": most})
    return figures


@torch.inference_mode()
def convolution_peak(device: torch.device, dtype: torch.dtype, threads: int = 1) -> float:
    """Measure the FLOPs per second of the fastest 3×3 convolution of a few, in channels-last order, batch 1."""
    rates = []
    for channels, side in PEAK_CONVOLUTIONS:
        x = torch.randn(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        seconds = _seconds(partial(F.conv2d, x, weight, padding=1), device, threads, 0.1)
        rates.append(2 * 9 * channels**2 * side**2 / seconds)
    return max(rates)


def _seconds(work: Callable[[], object], device: torch.device, threads: int, at_least: float) -> float:
    """Time work, repeated for so many seconds at least; gives the median."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    names = {"work": work, "wait_for": wait_for, "device": device}
    timer = Timer("work(); wait_for(device)", globals=names, timer=clock, num_threads=threads)
    return timer.blocked_autorange(min_run_time=at_least).median
