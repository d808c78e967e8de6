"""A share of the work for each of several processes, and putting together what they found."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dc_ssdae.errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: they may have hours more to do, where PyTorch gives up after 10 minutes."""


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over all processes, in place; in one process it stays."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


@dataclass(frozen=True)
class Processes:
    """The processes of a launcher, which have the same program and data.

    Args:
        index: of this one, from 0.
        count: of all.
        device: on which tensors are exchanged.
    """

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def join(cls, device: torch.device) -> "Processes":
        """Join the group that torchrun or accelerate launch has set up; alone where there is none.

        Args:
            device: of this process; on a CUDA device tensors are exchanged by NCCL, else by gloo.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type != "cuda", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    def share(self, count: int) -> range:
        """The places, of `count`, that this process works on."""
        return range(self.index, count, self.count)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes; the result is on the CPU."""
        # float64, which not every device has, but all that processes exchange by.
        return values if self.count == 1 else sum_over_processes(values.to(self.device)).cpu()

    def gather(self, value: T) -> list[T]:
        """One value of each process, in their order; in all of them."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process; what fails in one of them ends it in all, and the main one tells it.

        Raises:
            InputError: what was the matter, in the first process that failed.
            OSError: the same, where there is one process alone.
        """
        if self.count == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except (InputError, OSError) as error:
            failure = " ".join(str(error).split()) or type(error).__name__
        failures = [text for text in self.gather(failure) if text is not None]
        if failures:
            raise InputError(failures[0])
        return result  # type: ignore[return-value]  # it is there, or there was a failure

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process; all processes get its result, or its failure.

        Raises:
            InputError: as `together`, so that no process waits for the others.
        """
        return self.gather(self.together(work if self.is_main else lambda: None))[0]  # type: ignore[return-value]
