"""`dc-ssdae train`: start a run from a configuration, or go on with one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import complain
from dc_ssdae.cli.run_config import RunOptions, config_yaml, read_run_config
from dc_ssdae.cli.run_recipe import change_recipe, read_new_recipe, recipe_yaml
from dc_ssdae.errors import InputError, ToldElsewhere, counted
from dc_ssdae.presets import read_yaml
from dc_ssdae.settings import setting
from dc_ssdae.training.changes import check_changes, lasting_settings
from dc_ssdae.training.config import RunConfig, TrainingConfig
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
        from dc_ssdae.training.start import resume_run, start_run

        if options.resume is None:
            config, name = read_run_config(options)
            if not name and config.training.output is None:
                raise InputError("which configuration? --config PRESET (dc-ssdae info lists them) or --config FILE")
            path = new_run_folder(config.training.output, name)
            config = resolved(config)
            outcome: Outcome | None = start_run(config, config_yaml(config), path)
        else:
            path, before = options.resume, read_run(options.resume)
            config = read_changes(options, before, path)
            outcome = resume_run(config, config_yaml(config) if config != before else None, path)
        tell_end(Options.program, outcome, path, _spent(config.training))
    return 0


def run_recipe(options: Options) -> int:
    """Train in phases; gives the exit code."""
    from dc_ssdae.training.recipe import read_recipe, resolved_recipe, resume_recipe, settled_phases, start_recipe

    def say(message: str) -> None:
        if is_main_process():
            complain(Options.program, message)

    if options.resume is None:
        assert options.recipe is not None
        recipe, name, output = read_new_recipe(options, options.recipe)
        path = new_run_folder(output, name)
        recipe = resolved_recipe(recipe)
        outcome: Outcome | None = start_recipe(recipe, recipe_yaml(recipe), path, config_yaml, say)
    else:
        path = options.resume
        before = recipe = read_recipe(path)
        if options.config or options.settings or options.print_config:
            recipe = change_recipe(before, options, settled_phases(before, path))
        for old, new in zip(before.phases, recipe.phases, strict=True):
            folder = before.folder(path, old.name)
            if (folder / "config.yaml").is_file():
                check_changes(lasting_settings(old.config), lasting_settings(new.config), folder)
        outcome = resume_recipe(recipe, recipe_yaml(recipe) if recipe != before else None, path, config_yaml, say)
    last = recipe.phases[-1].name
    spent = f"{counted(len(recipe.phases), 'phase')}, all budgets spent (--phases.{last}.training.steps N goes on to N)"
    tell_end(Options.program, outcome, path, spent)
    return 0


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
    check_changes(lasting_settings(before), lasting_settings(after), path)
    return after


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"
