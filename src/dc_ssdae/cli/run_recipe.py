"""A recipe from the command line: phases laid over presets and YAML files, then settings. No torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dc_ssdae.cli.run_config import RunOptions, print_text, read_layer, read_settings
from dc_ssdae.errors import InputError, shown, unknown_name
from dc_ssdae.presets import dump_yaml, list_recipes, load_recipe, read_yaml
from dc_ssdae.training.config import RunConfig, TrainingConfig, lay_over, spell_weights
from dc_ssdae.training.recipe import Phase, Recipe, both_sources, check_phase_name, recipe_mapping

IN_FOLDER = "the phases lie in the recipe's folder"
PHASE_SECTIONS = ("starts_from", "model", "data", "training", "losses")


def read_new_recipe(options: RunOptions, word: str) -> tuple[Recipe, str, str | None]:
    """Make a recipe of a command's words.

    Args:
        options: as `read_run_config`'s; settings under phases.PHASE go over everything else.
        word: the recipe's name, or a file.

    Returns:
        The recipe, the name for its folder, and the folder, None where none is given.

    Raises:
        InputError: a file or a setting is wrong; one line that names it.
        SystemExit: after --print_config, with 0.
    """
    name, phases = _read_phases(word)
    names, settings = [name], _take_model(phases)
    if settings and options.config:
        raise InputError(f"recipe {name} has the phases' section model: leave --config out, or take that section out")
    for config in options.config:
        config_name, layer = read_layer(config)
        names = [config_name, name]
        own = checked_phases(layer.pop("phases", {}), config)
        if _take_model(own):
            raise InputError(f"phases of {config} have a section model; it belongs beside phases, for all of them")
        phases, settings = lay_over(phases, own), lay_over(settings, layer)
    flags = read_settings(options.settings)
    phase_flags = flags.pop("phases", {})
    recipe = _make_recipe(settings, phases, flags, phase_flags)
    output = recipe.phases[0].config.training.output
    # The folder is the recipe's, and no part of its phases, so that a printed recipe can be used again.
    recipe = Recipe([phase._replace(config=phase.config.with_training(output=None)) for phase in recipe.phases])
    if options.print_config:
        print_text(recipe_yaml(recipe))
        raise SystemExit(0)
    return recipe, "-".join(names), output


def change_recipe(recipe: Recipe, options: RunOptions, finished: Sequence[str] = ()) -> Recipe:
    """Change the phases of a recipe by settings, when it goes on.

    Args:
        recipe: as it was.
        options: settings, for all phases, and under phases.PHASE for one.
        finished: phases that stay as they are.

    Raises:
        InputError: as `read_new_recipe`; or configurations are given, or a setting of a phase that is finished.
    """
    if options.config:
        raise InputError("--config and --recipe are for a new run; change single settings by --section.name VALUE")
    flags = read_settings(options.settings)
    phase_flags = flags.pop("phases", {})
    _check_phase_flags(phase_flags, [phase.name for phase in recipe.phases])
    phases = []
    for phase in recipe.phases:
        own = phase_flags.get(phase.name, {})
        if phase.name in finished:
            if own:
                raise InputError(f"phase {phase.name} is finished, and others have started from it: it cannot change")
            phases.append(phase)
            continue
        config = _config(phase.name, lay_over(lay_over(phase.config.to_mapping(), flags), own))
        if config.training.output != phase.config.training.output:
            raise InputError(f"training.output: {IN_FOLDER}, which may be moved; it cannot change when they go on")
        if phase.starts_from is not None and config.training.init_from is not None:
            raise both_sources(phase.name)
        phases.append(phase._replace(config=config))
    if finished and any(phase.config.model != phases[0].config.model for phase in phases):
        raise InputError(f"section model cannot change: phase {finished[0]} is finished, and the others go on from it")
    if options.print_config:
        print_text(recipe_yaml(Recipe(phases)))
        raise SystemExit(0)
    return Recipe(phases)


def recipe_yaml(recipe: Recipe) -> str:
    """Spell a recipe out as YAML, every phase with all its settings, for `training.recipe.read_recipe`."""
    head = "# A recipe's phases, each with all its settings; dc-ssdae train --resume goes on with it.\n"
    return head + dump_yaml(recipe_mapping(recipe))


def checked_phases(phases: Any, source: str) -> dict[str, Any]:
    """Check the form of section phases.

    Raises:
        InputError: it is no mapping from names to sections.
    """
    for name, layer in phases.items() if isinstance(phases, Mapping) else {"": None}.items():
        if not isinstance(layer, Mapping):
            where = f"phases.{name}" if name else "section phases"
            raise InputError(f"{where} of {source} is {shown(layer if name else phases)}; it must be a mapping")
        check_phase_name(name)
        for section in layer:
            if section not in PHASE_SECTIONS:
                raise unknown_name(f"section of phases.{name}", section, PHASE_SECTIONS)
    return dict(phases)


def _read_phases(word: str) -> tuple[str, dict[str, Any]]:
    """Read a recipe: its name, and its phases by name."""
    path = Path(os.path.expanduser(word))
    if word in list_recipes():
        name, layer = word, load_recipe(word)
    elif path.exists():
        name, layer = path.stem, read_yaml(path)
    else:
        raise InputError(f"--recipe: {unknown_name('recipe', word, list_recipes())}, or a YAML file")
    for section in layer:
        if section not in ("description", "phases"):
            raise unknown_name(f"section of recipe {name}", section, ("description", "phases"))
    return name, checked_phases(spell_weights(layer).get("phases"), f"recipe {name}")


def _take_model(phases: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Take section model out of the phases of a printed recipe, or of RUN/recipe.yaml: they all have the same.

    Raises:
        InputError: they have not.
    """
    models = {name: layer.pop("model") for name, layer in phases.items() if "model" in layer}
    for name in phases if models else ():
        if models.get(name) != next(iter(models.values())):
            raise InputError(f"phases.{name} has another section model than the others; give it by --config, for all")
    return {"model": next(iter(models.values()))} if models else {}


def _make_recipe(
    settings: Mapping[str, Any],
    phases: Mapping[str, Mapping[str, Any]],
    flags: Mapping[str, Any],
    phase_flags: Mapping[str, Mapping[str, Any]],
) -> Recipe:
    """Lay each phase over the configurations, and the flags over it."""
    if not phases:
        raise InputError("the recipe has no phases")
    _check_phase_flags(phase_flags, list(phases))
    made: list[Phase] = []
    for name, layer in phases.items():
        own = lay_over(layer, phase_flags.get(name, {}))
        earlier = [phase.name for phase in made]
        starts_from = own.pop("starts_from", None)
        training = own.get("training") or {}
        source = training.get("init_from")
        if training.get("output") is not None:
            raise InputError(f"phases.{name}.training.output: {IN_FOLDER}; name that by --training.output")
        if starts_from is not None and starts_from not in earlier:
            raise unknown_name(f"earlier phase that phases.{name} starts_from", starts_from, earlier)
        if starts_from is not None and source is not None:
            raise both_sources(name)
        whole = lay_over(lay_over(lay_over(settings, own), flags), phase_flags.get(name, {}))
        changed = dict(whole.get("training") or {})
        seed = changed.get("seed", TrainingConfig.seed)
        if "seed" not in training and isinstance(seed, int):
            # With one seed for all, a later phase would see the crops and noise of the first again.
            changed["seed"] = seed + len(made)
        if made:
            starts_from = starts_from or (earlier[-1] if source is None else None)
            changed["init_from"] = source  # what the first phase starts from is not what the others do
        made.append(Phase(name, _config(name, {**whole, "training": changed}), starts_from))
    return Recipe(made)


def _config(phase: str, settings: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.from_mapping(settings)
    except InputError as error:
        raise InputError(f"phase {phase}: {error}") from None


def _check_phase_flags(given: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    for name, settings in given.items():
        if name not in names:
            raise unknown_name("phase of the recipe", name, names)
        for section in ("model", "distillation"):
            if section in settings:
                raise InputError(f"--phases.{name}.{section}: section {section} is of all phases; give --{section}")
