"""Presets and, in `recipes/`, recipes: one YAML file each, stating only what differs. Reading them needs no torch."""

from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from dc_ssdae.errors import check_names
from dc_ssdae.presets.plain_yaml import dump_yaml, parse_yaml, read_yaml

__all__ = [
    "DEFAULT_CLASSES",
    "SHIPPED_MODEL",
    "dump_yaml",
    "list_presets",
    "list_recipes",
    "load_preset",
    "load_recipe",
    "parse_yaml",
    "read_yaml",
]

DEFAULT_CLASSES = {"encoder": "DCEncoder", "decoder": "UViTDecoder", "dynamics": "EquilibriumMatching"}
"""What a part of a model without class_path is: naming this class changes nothing."""

SHIPPED_MODEL = "photos_f8c16"
"""Name of the trained model that comes with this package, which is taken where none is named."""


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    return _names(resources.files(__name__))


def list_recipes() -> list[str]:
    """Names of all recipes, sorted."""
    return _names(resources.files(__name__) / "recipes")


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset.

    Args:
        name: one of `list_presets()`.

    Returns:
        Its sections: `description` (a line), `model` (settings of `DCSSDAE`) and perhaps `data`, `training` and
        `losses` (settings of a run, see `dc_ssdae.training.config`).

    Raises:
        InputError: there is no such preset.
    """
    return _load("preset", name, resources.files(__name__))


def load_recipe(name: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        name: one of `list_recipes()`.

    Returns:
        Its sections: `description`, and `phases`, a mapping from names to settings of a run (see
        `dc_ssdae.training.recipe`), in the order in which they are trained.

    Raises:
        InputError: there is no such recipe.
    """
    return _load("recipe", name, resources.files(__name__) / "recipes")


def _names(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _load(kind: str, name: str, folder: Traversable) -> dict[str, Any]:
    check_names(kind, [name], _names(folder))
    return read_yaml((folder / f"{name}.yaml").read_text(encoding="utf-8"), f"{kind} {name}")
