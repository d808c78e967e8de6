"""Two processes of one gloo group, in which functions of the tests run; started once, since each imports for long."""

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROCESSES = 2


class TwoProcesses:
    """A group that waits for work.

    Args:
        folder: where the two meet.
    """

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(PROCESSES)]
        self._pipes = [ours for ours, _ in pipes]
        for rank, (_, theirs) in enumerate(pipes):
            context.Process(target=_serve, args=(rank, str(folder / "rendezvous"), theirs), daemon=True).start()
            theirs.close()

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        """Run `function(rank, *args)`, of a test module's own level, in both; what fails in one is the test's error."""
        for pipe in self._pipes:
            pipe.send((function, args))
        failures = [failure for pipe in self._pipes if (failure := pipe.recv()) is not None]
        assert not failures, "\n".join(failures)

    def close(self) -> None:
        """End the two."""
        for pipe in self._pipes:
            pipe.close()


def _serve(rank: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    # Accelerate wants an address, but takes the group that is there.
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ.update(ranks, ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        failure = None
        try:
            torch.manual_seed(0)
            function(rank, *args)
        except Exception:
            failure = f"in process {rank}:\n{traceback.format_exc()}"
        pipe.send(failure)
