"""`dc-ssdae train`: start a run from a configuration, or go on with one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import complain
from dc_ssdae.cli.run_config import (
    RunOptions,
    config_yaml,
    print_text,
    read_layer,
    read_run_config,
    read_settings,
)
from dc_ssdae.errors import InputError, ToldElsewhere, counted, unknown_name
from dc_ssdae.presets import list_recipes, load_recipe, read_yaml
from dc_ssdae.settings import setting
from dc_ssdae.training.config import RunConfig, TrainingConfig, check_changes, lay_over, spell_weights
from dc_ssdae.training.recipe import (
    Recipe,
    change_recipe,
    check_phases,
    make_recipe,
    read_recipe,
    recipe_yaml,
    resolved_recipe,
    settled_phases,
    train_recipe,
)
from dc_ssdae.training.stopping import StopRequest

if TYPE_CHECKING:
    from dc_ssdae.training.trainer import Outcome


@dataclass(kw_only=True)
class Options(RunOptions):
    """Train an autoencoder.

    Configurations are laid over each other in their order, settings over all of them; what is given twice counts as
    given last.

    Args:
        recipe: train in phases, one after the other: a YAML file with section phases, or a recipe of this package such
            as three_phase. Its phases go over the configurations, settings over all phases, and
            --phases.PHASE.section.name VALUE over one.
        resume: go on with the run in this folder, exactly where it stopped.
    """

    program = "dc-ssdae train"
    usage = (
        "dc-ssdae train --config PRESET [--config FILE] [--section.name VALUE]\n"
        "       dc-ssdae train --recipe NAME --config PRESET [--section.name VALUE]\n"
        "       dc-ssdae train --resume RUN [--section.name VALUE]"
    )
    recipe: str | None = setting(None, metavar="NAME")
    resume: Path | None = setting(None, metavar="RUN")


def run(options: Options) -> int:
    """Train; gives the exit code, 0 also where a signal asked for the end."""
    with watching_training(options.resume is not None):
        if options.resume is not None and options.recipe is not None:
            raise InputError("--recipe is for a new run; --resume goes on with the recipe in its folder")
        if options.recipe is not None or (options.resume is not None and (options.resume / "recipe.yaml").is_file()):
            return run_recipe(options)
        from dc_ssdae.training.build import resolved
        from dc_ssdae.training.start import new_run, resume_run

        if options.resume is None:
            config, name = read_run_config(options)
            if not name and config.training.output is None:
                raise InputError("which configuration? --config PRESET (dc-ssdae info lists them) or --config FILE")
            path = new_run_folder(config.training.output, name)
            config = resolved(config)
            with new_run(config, config_yaml(config), path) as trainer:
                outcome: Outcome | None = trainer.run()
        else:
            path, before = options.resume, read_run(options.resume)
            config = read_changes(options, before, path)
            outcome = resume_run(config, config_yaml(config) if config != before else None, path)
        tell_end(Options.program, outcome, path, _spent(config.training))
    return 0


def run_recipe(options: Options) -> int:
    """Train in phases; gives the exit code."""

    def say(message: str) -> None:
        if is_main_process():
            complain(Options.program, message)

    if options.resume is None:
        assert options.recipe is not None
        recipe, name = read_new_recipe(options, options.recipe)
        output = recipe.phases[0].config.training.output
        # The folder is the recipe's, and no part of its phases, so that a printed recipe can be used again.
        recipe = Recipe([phase._replace(config=phase.config.with_training(output=None)) for phase in recipe.phases])
    else:
        path = options.resume
        before = recipe = read_recipe(path)
        if options.config:
            raise InputError("--config is for a new run; change single settings by --section.name VALUE")
        flags = read_settings(options.settings)
        if flags:
            recipe = change_recipe(before, flags, flags.pop("phases", {}), settled_phases(before, path))
        for old, new in zip(before.phases, recipe.phases, strict=True):
            folder = before.folder(path, old.name)
            if (folder / "config.yaml").is_file():
                check_changes(old.config.fixed_settings(True), new.config.fixed_settings(True), folder)
    if options.print_config:
        print_text(recipe_yaml(recipe))
        return 0
    if options.resume is None:
        path = new_run_folder(output, name)
        recipe = resolved_recipe(recipe)
    outcome = train_recipe(recipe, path, config_yaml, say, resumes=options.resume is not None)
    last = recipe.phases[-1].name
    spent = f"{counted(len(recipe.phases), 'phase')}, all budgets spent (--phases.{last}.training.steps N goes on to N)"
    tell_end(Options.program, outcome, path, spent)
    return 0


def read_new_recipe(options: RunOptions, word: str) -> tuple[Recipe, str]:
    """Make a recipe of a command's words.

    Args:
        options: configurations and settings; settings under phases.PHASE go over everything else.
        word: the recipe's name, or a file.

    Returns:
        The recipe, and the name for its folder.

    Raises:
        InputError: a file or a setting is wrong; one line that names it.
    """
    file = Path(word).expanduser()
    if word not in list_recipes() and not file.exists():
        raise InputError(f"--recipe: {unknown_name('recipe', word, list_recipes())}, or a YAML file")
    name, content = (word, load_recipe(word)) if word in list_recipes() else (file.stem, read_yaml(file))
    for section in content:
        if section not in ("description", "phases"):
            raise unknown_name(f"section of recipe {name}", section, ("description", "phases"))
    phases = check_phases(spell_weights(content).get("phases"), f"recipe {name}")
    settings, folder = _take_model(phases), name
    if settings and options.config:
        raise InputError(f"recipe {name} has the phases' section model: leave --config out, or take that section out")
    for config in options.config:
        config_name, layer = read_layer(config)
        folder = f"{config_name}-{name}"
        if "phases" in layer:
            own = check_phases(layer.pop("phases"), config)
            if _take_model(own):
                raise InputError(f"phases of {config} have a section model; it belongs beside phases, for all of them")
            phases = lay_over(phases, own)
        settings = lay_over(settings, layer)
    flags = read_settings(options.settings)
    return make_recipe(settings, phases, flags, flags.pop("phases", {})), folder


def _take_model(phases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Take section model out of the phases of a printed recipe, or of RUN/recipe.yaml: they all have the same.

    Raises:
        InputError: they have not.
    """
    models = {name: layer.pop("model", None) for name, layer in phases.items()}
    for name, model in models.items():
        if model != next(iter(models.values())):
            raise InputError(f"phases.{name} has another section model than the others; give it by --config, for all")
    return {"model": model} if model is not None else {}


@contextmanager
def watching_training(resumes: bool) -> Iterator[None]:
    """Find a user's own classes where the command is given, heed signals, and let one process tell what all meet."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        # From here on, not only once the trainer is built: a run that is resumed ends well whenever a signal comes.
        with StopRequest() if resumes else nullcontext():
            yield
    except InputError as error:
        from dc_ssdae.data.loader import ReadingFailed

        if isinstance(error, ReadingFailed | ToldElsewhere) or is_main_process():
            raise
        raise ToldElsewhere(str(error)) from error


def new_run_folder(output: str | None, name: str) -> Path:
    """The folder of a new run: what is given, else runs/NAME.

    Raises:
        InputError: something is there already.
    """
    from dc_ssdae.training.run import check_new

    path = Path(output or Path("runs") / name)
    if is_main_process():
        check_new(path)
    return path


def tell_end(program: str, outcome: "Outcome | None", path: Path, spent: str) -> None:
    """Say how a run ended, and what to do next; `spent` is said of a run that was finished before."""
    if outcome is None:
        message = f"{path} is finished: {spent}"
    elif outcome.stopped_by is not None:
        message = f"stopped by {outcome.stopped_by} after step {outcome.step}; go on with: {program} --resume {path}"
    else:
        message = f"done after step {outcome.step}: the model is {path / 'model'}"
    if is_main_process():
        complain(program, message)


def _spent(training: TrainingConfig) -> str:
    budgets = []
    if training.steps is not None:
        budgets.append(f"{counted(training.steps, 'step')} (--training.steps N goes on to N)")
    if training.minutes is not None:
        budgets.append(f"{training.minutes:g} minutes (--training.minutes M goes on to M)")
    return "its budget is spent: " + " or ".join(budgets)


def read_run(path: Path) -> RunConfig:
    """Read the configuration of the run that --resume names.

    Raises:
        InputError: it is no run, or its configuration is damaged.
    """
    if not path.is_dir():
        raise InputError(f"--resume {path}: no such folder")
    file = path / "config.yaml"
    if not file.is_file():
        raise InputError(f"--resume {path}: it holds no config.yaml, so it is no run")
    return RunConfig.from_mapping(read_yaml(file))


def read_changes(options: RunOptions, before: RunConfig, path: Path) -> RunConfig:
    """Lay a command's configurations and settings over those of the run at `path`.

    Raises:
        InputError: as `read_run_config`; or a change would make it another run.
    """
    after, _ = read_run_config(options, before.to_mapping())
    check_changes(before.fixed_settings(True), after.fixed_settings(True), path)
    return after


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"
