"""A saved model's folder on the disk: finding it, reading its config.json and writing statistics into it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dc_ssdae.errors import InputError, MissingInputError
from dc_ssdae.files import check_file, write_whole
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.weights import WEIGHTS

NOT_MEASURED = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
"""The settings of a model whose latents' statistics are not known."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises:
        InputError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise MissingInputError(f"{folder} holds no model: config.json is missing")
    check_file(path)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no JSON object: {error}") from None


def write_latent_statistics(folder: Path, statistics: LatentStatistics | None) -> None:
    """Put the statistics of a model's latents into its config.json, as `update_config` does.

    Args:
        folder: of a saved model.
        statistics: of its latents; None puts the settings back to those of a model whose latents are not measured.
    """
    update_config(folder, NOT_MEASURED if statistics is None else statistics.settings())


def update_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put settings into a model folder's config.json, whole or not at all; all else in it stays.

    Args:
        folder: of a saved model.
        settings: by name, of which each replaces the one there.

    Raises:
        InputError: there is no config.json.
        OSError: it cannot be written; the old one stays.
    """
    changed = sorted({**read_config(folder), **settings}.items())  # as diffusers writes them
    write_changed(folder / "config.json", json.dumps(dict(changed), indent=2) + "\n")


def write_changed(path: Path, text: str) -> None:
    """Write a file as `write_whole` does, unless it holds this text already: a finished run's folder stays as it is."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_whole(path, text.encode())


def model_folder(path: str | Path) -> Path:
    """Find the folder of the model that a path means: its own, or `model/` in the folder of a training run.

    Args:
        path: a folder written by `save_pretrained`, or a run's; or "photos_f8c16", the model that comes with this
            package, where there is no such folder.

    Returns:
        The folder that holds config.json; `path` itself where neither does.
    """
    if str(path) == SHIPPED_MODEL and not os.path.exists(path):
        return Path(__file__).parent / "shipped" / SHIPPED_MODEL
    places = (Path(path), Path(path, "model"))
    return next((place for place in places if (place / "config.json").exists()), places[0])


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """The weight files in a saved model's folder, by variant; None stands for those without one, and comes first."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        middle = file.name.removeprefix(WEIGHTS).removesuffix(".safetensors")
        found.setdefault(re.sub(r"-\d+-of-\d+", "", middle).removeprefix(".") or None, []).append(file)
    return dict(sorted(found.items(), key=lambda entry: entry[0] or ""))


def may_be_on_the_hub(name: str) -> bool:
    """Tell a hub id, OWNER/MODEL, from a misspelt path, which should not wait for the network."""
    return bool(re.fullmatch(r"\w[\w.-]*/[^/]+", name)) and not os.path.exists(name.partition("/")[0])
