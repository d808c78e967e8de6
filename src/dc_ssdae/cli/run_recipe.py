"""A recipe from the command line: phases laid over presets and YAML files, then flags. No torch."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dc_ssdae.cli.run_config import (
    build_run_parser,
    checked_phases,
    flags_as_mapping,
    lay_over,
    print_text,
    read_layer,
    sort_words,
    weights_as_mappings,
)
from dc_ssdae.errors import InputError
from dc_ssdae.presets import dump_yaml, list_recipes, load_recipe, read_yaml
from dc_ssdae.training.config import RunConfig, TrainingConfig
from dc_ssdae.training.config_checks import mistake, unknown
from dc_ssdae.training.recipe import Phase, Recipe, both_sources, recipe_mapping

IN_FOLDER = "the phases lie in the recipe's folder"


class ParsedRecipe(NamedTuple):
    """A `recipe`, the `name` for its folder, and the folder `output`, None where none is given."""

    recipe: Recipe
    name: str
    output: str | None


def asks_for_recipe(words: Sequence[str]) -> bool:
    """Whether the command's words name a recipe."""
    return any(word == "--recipe" or word.startswith("--recipe=") for word in words)


def parse_recipe(words: Sequence[str]) -> ParsedRecipe:
    """Make a recipe of the command's words.

    Args:
        words: as `parse_run_config`'s; also --recipe NAME, and flags such as --phases.PHASE.training.lr 1e-4, which go
            over everything else.

    Raises:
        InputError: a word, a file or a setting is wrong; one line that names it.
        SystemExit: after --help and --print_config, with 0.
    """
    parser = build_run_parser("dc-ssdae train")
    given = sort_words(words, parser)
    assert given.recipe is not None
    name, phases = _read_recipe(given.recipe)
    names = []
    settings = _take_model(phases)
    if settings and given.configs:
        raise mistake(f"recipe {name} has the phases' section model: leave --config out, or take that section out")
    for word in given.configs:
        config_name, layer = read_layer(word)
        names = [config_name]
        own_phases = layer.pop("phases", {})
        if _take_model(own_phases):
            raise mistake(f"phases of {word} have a section model; it belongs beside phases, for all of them")
        phases = lay_over(phases, own_phases)
        settings = lay_over(settings, layer)
    by_phase = {phase: flags_as_mapping(own, parser) for phase, own in given.phase_flags.items()}
    recipe = _make_recipe(settings, phases, flags_as_mapping(given.flags, parser), by_phase)
    output = recipe.phases[0].config.training.output
    # The folder is the recipe's, and no part of its phases, so that a printed recipe can be used again.
    recipe = Recipe([phase._replace(config=phase.config.with_training(output=None)) for phase in recipe.phases])
    if given.print_config:
        print_text(partial(recipe_yaml, recipe))
        raise SystemExit(0)
    return ParsedRecipe(recipe, "-".join([*names, name]), output)


def _take_model(phases: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Take section model out of the phases of a printed recipe, or of RUN/recipe.yaml: they all have the same.

    Raises:
        InputError: they have not.
    """
    models = {name: layer.pop("model") for name, layer in phases.items() if "model" in layer}
    if not models:
        return {}
    first = next(iter(models.values()))
    for name in phases:
        if models.get(name) != first:
            raise mistake(f"phases.{name} has another section model than the others; give it by --config, for all")
    return {"model": first}


def lay_over_recipe(recipe: Recipe, words: Sequence[str], finished: Sequence[str] = ()) -> Recipe:
    """Change the phases of a recipe by flags, as a run that goes on is told.

    Args:
        recipe: as it was.
        words: flags such as --training.steps 100, for all phases, and --phases.PHASE.training.steps 100.
        finished: phases that stay as they are.

    Raises:
        InputError: as `parse_run_config`; or configurations are given, or a flag is of a phase that is finished.
    """
    parser = build_run_parser("dc-ssdae train")
    given = sort_words(words, parser)
    if given.configs or given.recipe is not None:
        raise mistake("--config and --recipe are for a new run; change single settings by flags")
    flags = flags_as_mapping(given.flags, parser)
    by_phase = {phase: flags_as_mapping(own, parser) for phase, own in given.phase_flags.items()}
    _check_phase_flags(by_phase, [phase.name for phase in recipe.phases])
    phases = []
    for phase in recipe.phases:
        own = by_phase.get(phase.name, {})
        if phase.name in finished:
            if own:
                raise mistake(f"phase {phase.name} is finished, and others have started from it: it cannot change")
            phases.append(phase)
            continue
        settings = lay_over(lay_over(weights_as_mappings(phase.config.to_mapping()), flags), own)
        config = _config(phase.name, settings)
        if config.training.output != phase.config.training.output:
            raise mistake(f"training.output: {IN_FOLDER}, which may be moved; it cannot change when they go on")
        if phase.starts_from is not None and config.training.init_from is not None:
            raise both_sources(phase.name)
        phases.append(phase._replace(config=config))
    changed = Recipe(phases)
    if finished and any(phase.config.model != phases[0].config.model for phase in phases):
        raise mistake(f"section model cannot change: phase {finished[0]} is finished, and the others go on from it")
    if given.print_config:
        print_text(partial(recipe_yaml, changed))
        raise SystemExit(0)
    return changed


def _make_recipe(
    settings: Mapping[str, Any],
    phases: Mapping[str, Mapping[str, Any]],
    flags: Mapping[str, Any],
    phase_flags: Mapping[str, Mapping[str, Any]],
) -> Recipe:
    """Lay each phase over the configurations, and the flags over it."""
    _check_phase_flags(phase_flags, phases)
    made: list[Phase] = []
    for name, layer in phases.items():
        own = lay_over(weights_as_mappings(layer), phase_flags.get(name, {}))
        earlier = [phase.name for phase in made]
        starts_from = own.pop("starts_from", None)
        training = own.get("training") or {}
        source = training.get("init_from")
        if training.get("output") is not None:
            raise mistake(f"phases.{name}.training.output: {IN_FOLDER}; name that by --training.output")
        if starts_from is not None and starts_from not in earlier:
            raise unknown(f"earlier phase that phases.{name} starts_from", starts_from, earlier)
        if starts_from is not None and source is not None:
            raise both_sources(name)
        whole = lay_over(lay_over(lay_over(settings, own), flags), phase_flags.get(name, {}))
        if "seed" not in training:
            whole = _reseeded(whole, len(made))
        if made:
            starts_from = starts_from or (earlier[-1] if source is None else None)
            # What the first phase starts from is not what the others do.
            whole = {**whole, "training": {**(whole.get("training") or {}), "init_from": source}}
        made.append(Phase(name, _config(name, whole), starts_from))
    return Recipe(made)


def _config(phase: str, settings: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.from_mapping(settings)
    except InputError as error:
        raise mistake(f"phase {phase}: {error}") from None


def _reseeded(settings: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Let each phase draw anew: with one seed for all, a later one would see the crops and noise of the first again."""
    training = dict(settings.get("training") or {})
    seed = training.get("seed", TrainingConfig.seed)
    if isinstance(seed, int) and not isinstance(seed, bool):  # what is none is refused later
        training["seed"] = seed + place
    return {**settings, "training": training}


def _check_phase_flags(given: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    for name, settings in given.items():
        if name not in names:
            raise unknown("phase of the recipe", name, names)
        for section in ("model", "distillation"):
            if section in settings:
                raise mistake(f"--phases.{name}.{section}: section {section} is of all phases; give --{section}")


def _read_recipe(word: str) -> tuple[str, dict[str, Any]]:
    """Read a recipe: its name, and its phases by name."""
    recipes = list_recipes()
    path = Path(os.path.expanduser(word))
    if word in recipes:
        name, layer = word, load_recipe(word)
    elif os.path.lexists(path):
        name, layer = path.stem, read_yaml(path, word)
    else:
        raise mistake(f"--recipe: {unknown('recipe', word, recipes)}, or a YAML file")
    for section in layer:
        if section not in ("description", "phases"):
            raise unknown(f"section of recipe {name}", section, ("description", "phases"))
    return name, checked_phases(layer.get("phases"), f"recipe {name}")


def recipe_yaml(recipe: Recipe, ascii_only: bool = False) -> str:
    """Spell a recipe out as YAML, every phase with all its settings, for `training.recipe.read_recipe`.

    Args:
        recipe: what to write.
        ascii_only: escape all other characters.
    """
    head = "# A recipe's phases, each with all its settings; dc-ssdae train --resume goes on with it.\n"
    return head + dump_yaml(recipe_mapping(recipe), ascii_only)
