"""What benchmarks share: medians with their spread, alternation, and what machine it was."""

import os
import platform
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of measurements, and their quartiles `low` and `high`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def times(self, factor: float) -> "Spread":
        """The same in another unit; `factor` is positive."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Tell the processor, the cores that this process may use, threads and versions, and the device if one is given."""
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device is not None:
        machine["device"] = str(device)
        machine["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        machine["cuda"] = torch.version.cuda if device.type == "cuda" else None
    return machine


def machine_line(machine: Mapping[str, Any]) -> str:
    """Say in a sentence what `describe_machine` told."""
    device = machine.get("device_name") or machine.get("device", "cpu")
    on = "" if device == "cpu" else f"{device}, "
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    cores = f"{machine['cores']} core{'s' * (machine['cores'] > 1)}"
    cuda = f", CUDA {machine['cuda']}" if machine.get("cuda") else ""
    versions = f"PyTorch {machine['torch']}{cuda}, Python {machine['python']}"
    return f"Measured on {on}{machine['cpu']}, {cores}, {threads}, {versions}."


def alternating(count: int, round_: int) -> Sequence[int]:
    """Numbers from 0, forwards and backwards in turn, so that none always comes first."""
    return range(count) if round_ % 2 == 0 else range(count)[::-1]


def measure_alternately(measurements: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """Take every measurement once per round, in alternating order; gives each one's results, round by round."""
    results: list[list[T]] = [[] for _ in measurements]
    for round_ in range(rounds):
        for index in alternating(len(measurements), round_):
            results[index].append(measurements[index]())
    return results


@contextmanager
def keeping_threads() -> Iterator[int]:
    """Put PyTorch's number of threads, which it yields, back at the end of the block."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def resident_set() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
