"""Two processes that encode together, in a module of its own: they import no model, which takes seconds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from latent_samples import SETTINGS, encoded_photos, pooled, pooling, write_photos
from torch import Tensor

from dc_ssdae.data.latent_shard import LatentSettings
from dc_ssdae.distributed import Processes
from dc_ssdae.latent import DiagonalGaussian

PROCESSES = 2


def scenario(folder: Path, processes: Processes) -> dict[str, Any]:
    """What one of several processes finds."""
    lines: list[str] = []
    options: dict[str, Any] = {"processes": processes, "report": lines.append}
    done, _ = encoded_photos(folder / "photos", folder / "out", replace(SETTINGS, store="sample"), **options)
    found: dict[str, Any] = {"parts": done, "lines": list(lines)}

    def failing(pixels: Tensor) -> DiagonalGaussian:
        last = pixels[:, 2, 0, 0] == 6 * 17  # the last photo, in the second process's share
        return DiagonalGaussian(pooled(pixels).mean.masked_fill(last.view(-1, 1, 1, 1), float("nan")))

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    settings = replace(SETTINGS, shard_size=4)
    attempt(
        "one fails",
        lambda: encoded_photos(folder / "photos", folder / "nan", settings, pooling(encode=failing), **options),
    )
    attempt("all fail", lambda: encoded_photos(folder / "photos", folder / "odd", LatentSettings(12), **options))
    attempt("main fails", lambda: encoded_photos(folder / "photos", folder / "photos", **options))
    processes.together(lambda: lines.clear())
    encoded_photos(folder / "photos", folder / "few", replace(SETTINGS, shard_size=8), **options)
    found["few"] = [line for line in lines if "busy" in line]
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        torch.save(scenario(Path(folder), Processes(rank, PROCESSES)), f"{folder}/record{rank}")
    finally:
        dist.destroy_process_group()


def fill(folder: Path) -> None:
    write_photos(folder / "photos")
    mp.spawn(work, args=(str(folder),), nprocs=PROCESSES)
