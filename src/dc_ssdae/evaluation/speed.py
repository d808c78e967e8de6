"""How fast autoencoders encode or decode random images: in one process, in alternation, against what it can do."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from dc_ssdae.evaluation.arena import peak_memory
from dc_ssdae.evaluation.candidates import Candidate, DiffusersCandidate, OurCandidate
from dc_ssdae.evaluation.profile import wait_for
from dc_ssdae.timing import Spread, measure_alternately

PEAK_CONVOLUTIONS = ((128, 64), (256, 64), (128, 128), (512, 32))
"""Channels and sides of the 3×3 convolutions among which the fastest one counts as the machine's peak."""


MIN_RUN_TIME = 0.001
"""Seconds of a round: what is faster is repeated."""


@dataclass(frozen=True)
class SpeedFigures:
    """What was measured of one autoencoder at one size of image.

    label: of the autoencoder.
    size: side of the images in pixels.
    batch_size: images at once.
    seconds: a batch takes: processor time of all threads on a CPU, else the time that passes.
    ratio: how many times as long the first autoencoder takes, round by round; None for that itself.
    flops: that were done for a batch; two for a multiply-add.
    share_of_peak: FLOPs a second against the fastest 3×3 convolution's.
    peak_memory_bytes: in use at most, the weights among it; None where the device does not tell.
    """

    label: str
    size: int
    batch_size: int
    seconds: Spread
    ratio: Spread | None
    flops: int
    share_of_peak: float
    peak_memory_bytes: int | None


@torch.inference_mode()
def measure_speed(
    work: str,
    candidates: Mapping[str, Candidate],
    size: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    threads: int = 1,
) -> list[SpeedFigures]:
    """Time one half of autoencoders on random images.

    Args:
        work: "encode" or "decode".
        candidates: by label, on the device; each must encode and decode apart.
        size: side of the images in pixels.
        batch_size: images at once.
        device: of the candidates.
        dtype: of their networks, for the peak.
        rounds: in which all alternate; medians count.
        threads: of the CPU.

    Returns:
        The figures in the candidates' order. Ratios are to the first.
    """
    x = torch.rand(batch_size, 3, size, size, device=device, generator=torch.Generator(device).manual_seed(0)) * 2 - 1
    timers, flops, memory = [], [], []
    for candidate in candidates.values():
        latent = candidate.latent(candidate.encode(x), None)
        half = partial(candidate.encode, x) if work == "encode" else partial(candidate.decode, latent)
        memory.append(peak_memory(candidate, half, device))
        statement = "encode(x)" if work == "encode" else "decode(latent)"
        names = {"encode": candidate.encode, "decode": candidate.decode, "x": x, "latent": latent, "device": device}
        if isinstance(candidate, OurCandidate | DiffusersCandidate):  # as a diffusion pipeline calls it
            names["decode"] = partial(candidate.model.decode, return_dict=False)
        timers.append(_timer(statement, names, threads))
        # The plain form of attention is made of matrix products, which are counted on every device.
        plainly = torch.compiler.set_stance("force_eager")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), plainly:
            half()
        flops.append(counter.get_total_flops())
    seconds = measure_alternately([partial(_median_seconds, timer) for timer in timers], rounds)
    peak = convolution_peak(device, dtype, threads)
    figures = []
    for index, label in enumerate(candidates):
        spread = Spread.of(seconds[index])
        ratios = [first / own for first, own in zip(seconds[0], seconds[index], strict=True)]
        ratio = Spread.of(ratios) if index else None
        share = flops[index] / spread.median / peak
        figures.append(SpeedFigures(label, size, batch_size, spread, ratio, flops[index], share, memory[index]))
    return figures


@torch.inference_mode()
def convolution_peak(device: torch.device, dtype: torch.dtype, threads: int = 1) -> float:
    """FLOPs a second of the fastest 3×3 convolution of a few, in channels-last order, batch 1."""
    best = 0.0
    for channels, side in PEAK_CONVOLUTIONS:
        x = torch.randn(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        timer = _timer("conv2d(x, w, padding=1)", {"conv2d": F.conv2d, "x": x, "w": weight, "device": device}, threads)
        seconds = min(timer.blocked_autorange(min_run_time=0.1).times)
        best = max(best, 2 * 9 * channels**2 * side**2 / seconds)
    return best


def _timer(statement: str, names: dict[str, Any], threads: int) -> Timer:
    clock = time.process_time if names["device"].type == "cpu" else time.perf_counter
    names["wait_for"] = wait_for
    return Timer(f"{statement}; wait_for(device)", globals=names, timer=clock, num_threads=threads)


def _median_seconds(timer: Timer) -> float:
    return timer.blocked_autorange(min_run_time=MIN_RUN_TIME).median
