"""Two processes that encode together, in a module of its own: they import no model, which takes seconds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from latent_samples import SETTINGS, encoded_photos, pooled, pooling
from torch import Tensor
from two_processes import PROCESSES

from dc_ssdae.data.latent_shard import LatentSettings
from dc_ssdae.distributed import Processes
from dc_ssdae.latent import DiagonalGaussian


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
    torch.save(scenario(Path(folder), Processes(rank, PROCESSES)), f"{folder}/record{rank}")
