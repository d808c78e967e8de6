"""What benchmarks share: medians with their spread, alternating order, and a description of the machine."""

import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dc_ssdae.errors import counted

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of measurements, and their quartiles `low` and `high`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one or more measurements."""
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high)


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Describe the processor, the cores this process may use, the threads, the versions, and the device if given."""
    machine: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__, "python": platform.python_version()}
    if device is not None:
        is_cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if is_cuda else None
        machine |= {"device": str(device), "device_name": name, "cuda": torch.version.cuda if is_cuda else None}
    return machine


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describe a machine, as `describe_machine` gives it, in a sentence."""
    device, cuda = machine.get("device_name"), machine.get("cuda")
    processor = f"{machine['cpu']}, {counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}"
    versions = f"PyTorch {machine['torch']}{f', CUDA {cuda}' if cuda else ''}, Python {machine['python']}"
    return f"Measured on {f'{device}, ' if device else ''}{processor}, {versions}."


def measure_alternately(measurements: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """Take every measurement once per round, in alternating order, so that none always comes first.

    Gives the results of each, round by round.
    """
    results: list[list[T]] = [[] for _ in measurements]
    for round_ in range(rounds):
        for index in range(len(measurements))[:: -1 if round_ % 2 else 1]:
            results[index].append(measurements[index]())
    return results


def resident_set() -> int:
    """Return the peak resident set size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    """Read the processor's name from the kernel, where it is Linux: `platform` often has none there."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
