"""Two processes that encode together, in a module of its own: they import no model, which takes seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from latent_samples import SETTINGS, encoded_photos, pooled, pooling
from torch import Tensor
from two_processes import PROCESSES

from dc_ssdae.data.encode_latents import LatentSettings
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError
from dc_ssdae.latent import DiagonalGaussian


def failing(pixels: Tensor) -> DiagonalGaussian:
    last = pixels[:, 2, 0, 0] == 6 * 17  # the last photo, in the second process's share
    return DiagonalGaussian(pooled(pixels).mean.masked_fill(last.view(-1, 1, 1, 1), float("nan")))


def work(rank: int, folder: str) -> None:
    """Encode photos, fail in three ways, and save what this process finds as `record` and its rank."""
    root, lines = Path(folder), list[str]()

    def encode(name: str, *given: Any) -> Any:
        options = {"processes": Processes(rank, PROCESSES), "report": lines.append}
        try:
            return encoded_photos(root / "photos", root / name, *given, **options)[0]
        except InputError as error:
            return str(error)

    found: dict[str, Any] = {"manifests": encode("out", replace(SETTINGS, store="sample")), "lines": list(lines)}
    found["one fails"] = encode("nan", replace(SETTINGS, shard_size=4), pooling(encode=failing))
    found["all fail"] = encode("odd", LatentSettings(12))
    found["main fails"] = encode("photos")
    torch.save(found, root / f"record{rank}")
