"""`dc-ssdae train`: starts a run from a configuration, or continues one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.classes import importing_from
from dc_ssdae.cli.common import complain, is_main_process
from dc_ssdae.cli.run_config import RunOptions, config_yaml, read_layers, read_run_config, read_settings
from dc_ssdae.errors import InputError, check_names, unknown_name
from dc_ssdae.presets import list_recipes, load_recipe, read_yaml
from dc_ssdae.settings import setting
from dc_ssdae.training.config import RunConfig, check_changes, lay_over
from dc_ssdae.training.recipe import (
    RECIPE_FILE,
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
    from dc_ssdae.training.loop import Outcome


@dataclass(kw_only=True)
class Options(RunOptions):
    """Train an autoencoder.

    --config PRESET starts a run, --recipe NAME --config PRESET starts one in phases, and --resume RUN continues either.
    A later --config overrides an earlier one, and settings --section.name VALUE, such as --training.lr 1e-4, override
    every --config.

    Args:
        recipe: train in phases, one after the other: a YAML file with a section phases, or a recipe of this package
            such as three_phase. A phase overrides every --config, a setting overrides all phases, and
            --phases.PHASE.section.name VALUE overrides one phase.
        resume: continue the run in this folder exactly where it stopped.
    """

    recipe: str | None = setting(None, metavar="NAME")
    resume: Path | None = setting(None, metavar="RUN")


def run(options: Options) -> None:
    """Train until the budget is spent or a signal asks for the end."""
    with watching_training(options.resume is not None):
        if options.resume is not None and options.recipe is not None:
            raise InputError("--recipe is for a new run; --resume continues with the recipe in its folder")
        if options.recipe is not None:
            start_phases(options, options.recipe)
        elif options.resume is None:
            config, name = read_run_config(options)
            start(options.program, config, new_run_folder(config.training.output, name or "run"))
        elif (options.resume / RECIPE_FILE).is_file():
            resume_phases(options, options.resume)
        else:
            resume(options, options.resume)


def start(program: str, config: RunConfig, path: Path) -> "tuple[RunConfig, Outcome]":
    """Train a configuration in a new folder; gives it with every setting of the model's parts spelt out.

    Raises:
        InputError: as `start_run`.
    """
    from dc_ssdae.training.build import resolved
    from dc_ssdae.training.start import start_run

    config = resolved(config)
    outcome = start_run(config, config_yaml(config), path)
    tell_end(program, outcome, path)
    return config, outcome


def resume(options: RunOptions, path: Path) -> "tuple[RunConfig, Outcome | None]":
    """Continue the run at `path`, whose configuration the command's configurations and settings override.

    Raises:
        InputError: as `read_run_config`; or a setting is changed that cannot change within a run.
    """
    from dc_ssdae.training.start import resume_run

    before = RunConfig.from_mapping(read_yaml(path / "config.yaml"))
    config, _ = read_run_config(options, before.to_mapping())
    check_changes(before.fixed_settings(True), config.fixed_settings(True), path)
    outcome = resume_run(config, config_yaml(config) if config != before else None, path)
    tell_end(options.program, outcome, path)
    return config, outcome


def start_phases(options: RunOptions, word: str) -> None:
    """Train the phases of the recipe that `word` names, in a new folder."""
    recipe, name = read_new_recipe(options, word)
    output = recipe.phases[0].config.training.output
    # The folder is the recipe's, and no part of its phases, so that a printed recipe can be used again.
    recipe = Recipe([phase._replace(config=phase.config.with_training(output=None)) for phase in recipe.phases])
    options.exit_with(recipe_yaml(recipe))
    _train_phases(options, resolved_recipe(recipe), new_run_folder(output, name))


def resume_phases(options: RunOptions, path: Path) -> None:
    """Continue the recipe in a folder."""
    before = recipe = read_recipe(path)
    if options.config:
        raise InputError("--config is for a new run; change single settings with --section.name VALUE")
    if flags := read_settings(options.settings):
        recipe = change_recipe(before, flags, flags.pop("phases", {}), settled_phases(before, path))
    for old, new in zip(before.phases, recipe.phases, strict=True):
        folder = before.folder(path, old.name)
        if (folder / "config.yaml").is_file():
            check_changes(old.config.fixed_settings(True), new.config.fixed_settings(True), folder)
    options.exit_with(recipe_yaml(recipe))
    _train_phases(options, recipe, path, resumes=True)


def _train_phases(options: RunOptions, recipe: Recipe, path: Path, resumes: bool = False) -> None:
    outcome = train_recipe(recipe, path, config_yaml, resumes)
    tell_end(options.program, outcome, path, f"phases.{recipe.phases[-1].name}.")


def read_new_recipe(options: RunOptions, word: str) -> tuple[Recipe, str]:
    """Make a recipe from a command's options.

    Args:
        options: configurations and settings; settings under phases.PHASE go over everything else.
        word: the recipe's name, or a file.

    Returns:
        The recipe, and the name for its folder.

    Raises:
        InputError: a file or a setting is wrong; one line that names it.
    """
    file = Path(os.path.expanduser(word))
    if word not in list_recipes() and not file.exists():
        raise InputError(f"--recipe: {unknown_name('recipe', word, list_recipes())}, or a YAML file")
    name, content = (word, load_recipe(word)) if word in list_recipes() else (file.stem, read_yaml(file))
    check_names(f"section of recipe {name}", content, ("description", "phases"))
    phases = check_phases(content.get("phases"), f"recipe {name}")
    config_name, settings = read_layers(options.config, {})
    if "phases" in settings:
        phases = lay_over(phases, check_phases(settings.pop("phases"), "--config"))
    flags = read_settings(options.settings)
    recipe = make_recipe(settings, phases, flags, flags.pop("phases", {}))
    if any(phase.config.model != recipe.phases[0].config.model for phase in recipe.phases):
        raise InputError("the phases have different sections model; give one for all, with --config")
    return recipe, f"{config_name}-{name}" if config_name else name


@contextmanager
def watching_training(resumes: bool) -> Iterator[None]:
    """Import users' classes from the current folder, and heed signals."""
    # Signals not only once the trainer is built: a run that is resumed ends well whenever one comes.
    signals = StopRequest() if resumes else nullcontext()
    with importing_from(Path.cwd()), signals:
        yield


def new_run_folder(output: str | None, name: str) -> Path:
    """Choose the folder of a new run: `output` if it is given, else runs/NAME.

    Raises:
        InputError: something is there already.
    """
    from dc_ssdae.training.run import check_new

    path = Path(output or Path("runs") / name)
    if is_main_process():
        check_new(path)
    return path


def tell_end(program: str, outcome: "Outcome | None", path: Path, prefix: str = "") -> None:
    """Say how a run ended and how to continue it; `prefix` stands before the names of the settings to change."""
    if outcome is None:
        settings = f"--{prefix}training.steps N or --{prefix}training.minutes M"
        message = f"{path} is finished: its budget is used up; to continue, set a larger one with {settings}"
    elif outcome.stopped_by is not None:
        message = f"stopped by {outcome.stopped_by} after step {outcome.step}; go on with: {program} --resume {path}"
    else:
        message = f"done after step {outcome.step}: the model is {path / 'model'}"
    if is_main_process():
        complain(program, message)
