"""Presets and, in `recipes/`, recipes: one YAML file each, stating only what differs. Reading them needs no torch."""

from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.presets.plain_yaml import dump_yaml, parse_yaml, read_yaml

__all__ = [
    "DEFAULT_CLASSES",
    "SECTIONS",
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

SECTIONS = ("description", "model", "data", "training", "losses")


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    return _yaml_names(resources.files(__name__))


def list_recipes() -> list[str]:
    """Names of all recipes, sorted."""
    return _yaml_names(resources.files(__name__) / "recipes")


def _yaml_names(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset.

    Args:
        name: one of `list_presets()`.

    Returns:
        Its sections: `description` (a line), `model` (settings of `DCSSDAE`) and perhaps `data`, `training` and
        `losses` (settings of a run, see `dc_ssdae.training.config`).

    Raises:
        InputError: there is no such preset, or its file has a section that none should have.
    """
    names = list_presets()
    if name not in names:
        raise unknown_name("preset", name, names)
    text = (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    preset = read_yaml(text, f"preset {name}")
    for section in preset:
        if section not in SECTIONS:
            raise unknown_name(f"section of preset {name!r}", section, SECTIONS)
    for section in ("description", "model"):
        if section not in preset:
            raise InputError(f"preset {name!r} lacks its section {section!r}")
    return preset


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
    names = list_recipes()
    if name not in names:
        raise unknown_name("recipe", name, names)
    text = (resources.files(__name__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return read_yaml(text, f"recipe {name}")
