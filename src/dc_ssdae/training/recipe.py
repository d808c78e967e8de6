"""Recipes: phases of training, one after the other, as data. Reading and checking them needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dc_ssdae.errors import InputError, shown
from dc_ssdae.errors import InputError as mistake
from dc_ssdae.presets import read_yaml
from dc_ssdae.training.config import RunConfig

RECIPE_FILE = "recipe.yaml"

LONGEST_NAME = 64
"""Of a phase, in characters: file systems take no name of any length."""


class Phase(NamedTuple):
    """A run of its own, that starts from another one's averaged weights.

    Args:
        name: letters, digits and underscores.
        config: of the run. What it starts from, if not from an earlier phase, is its training.init_from.
        starts_from: name of the earlier phase, None for training.init_from or fresh weights.
    """

    name: str
    config: RunConfig
    starts_from: str | None


class Recipe(NamedTuple):
    """The phases in the order in which they are trained."""

    phases: list[Phase]

    def folder(self, path: Path, name: str) -> Path:
        """The run of a phase in the folder of the recipe: RUN/1-NAME, RUN/2-NAME and so on."""
        return path / f"{1 + [phase.name for phase in self.phases].index(name)}-{name}"


def check_phase_name(name: Any) -> None:
    """Refuse what cannot be part of a flag and of a folder's name.

    Raises:
        InputError: says what a name is made of.
    """
    if not isinstance(name, str) or not (name.isidentifier() and name.isascii()):
        raise mistake(f"a phase is called {shown(name)}; use letters, digits and underscores")
    if len(name) > LONGEST_NAME:
        raise mistake(f"a phase is called {shown(name)}; use {LONGEST_NAME} characters at most")


def both_sources(name: str) -> InputError:
    """Build the error for a phase that is told to start from two things."""
    return mistake(f"phases.{name} has both starts_from and training.init_from; give one of them")


def recipe_mapping(recipe: Recipe) -> dict[str, Any]:
    """Plain data that `read_recipe` takes back, every setting of every phase spelt out."""
    return {
        "phases": {
            phase.name: {"starts_from": phase.starts_from, **phase.config.to_mapping()} for phase in recipe.phases
        }
    }


def read_recipe(path: Path) -> Recipe:
    """Read what a recipe's folder keeps of it.

    Args:
        path: the folder.

    Raises:
        InputError: there is no recipe, or it is damaged.
    """
    file = path / RECIPE_FILE
    phases = read_yaml(file, str(file)).get("phases")
    if not isinstance(phases, Mapping) or not phases:
        raise InputError(f"{file} has no phases")
    recipe = Recipe([])
    for name, settings in phases.items():
        check_phase_name(name)
        if not isinstance(settings, Mapping):
            raise mistake(f"phases.{name} of {file} is {shown(settings)}; it must be a mapping of sections")
        starts_from = settings.get("starts_from")
        if starts_from is not None and starts_from not in [phase.name for phase in recipe.phases]:
            raise mistake(f"phases.{name} of {file} starts from {shown(starts_from)}, which is no earlier phase")
        sections = {section: value for section, value in settings.items() if section != "starts_from"}
        try:
            config = RunConfig.from_mapping(sections)
        except InputError as error:
            raise mistake(f"phase {name} of {file}: {error}") from None
        if starts_from is not None and config.training.init_from is not None:
            raise both_sources(name)
        recipe.phases.append(Phase(name, config, starts_from))
    return recipe
