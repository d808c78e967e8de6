"""Training in phases: each is a run of its own, that starts from an earlier one's averaged weights.

RUN/recipe.yaml   all phases, with all their settings
RUN/1-NAME/ …     a run each, see `run`
RUN/model         a link to the model of the last phase that has ended, of the first one until then
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from dc_ssdae.data.sources import open_sources
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.files import replace_link, write_whole
from dc_ssdae.training.build import fetch_backbones, resolved
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.distributed import on_main_process, start_processes, together
from dc_ssdae.training.launch import check_config, resume_run, start_run
from dc_ssdae.training.recipe import RECIPE_FILE, Phase, Recipe
from dc_ssdae.training.run import CONFIG_FILE, RunFolder, RunLock, check_new, is_finished, new_folder
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Outcome

LEARNING_TERMS = ("repa",)
"""The built-in loss terms with parameters of their own."""

Spell = Callable[[RunConfig], str]
"""Writes a configuration as YAML."""

Tell = Callable[[str], None]
"""Says a line to the user, once over all processes."""


def start_recipe(recipe: Recipe, text: str, path: Path, spell: Spell, tell: Tell, cpu: bool = False) -> Outcome:
    """Begin a recipe in a new folder and train its phases.

    Args:
        recipe: with all settings resolved.
        text: the same as YAML, which is kept in the folder.
        path: of the folder.
        spell: writes a phase's configuration.
        tell: is told where each phase begins.
        cpu: use no GPU.

    Raises:
        InputError: a phase, the data, the processes or the folder do not fit; all phases are checked before the first.
        TrainingFailed: as `Trainer.run`.
    """
    accelerator = start_processes(recipe.phases[0].config.training.processes, cpu)
    _check(recipe, accelerator, cpu)
    first = recipe.folder(path, recipe.phases[0].name)
    on_main_process(accelerator, lambda: _create(path, text, first))
    try:
        outcome = _train(recipe, path, spell, tell, accelerator, cpu)
    except Exception:
        # A mistake that only the first step shows has removed the phase: what is mended begins anew, under this name.
        if accelerator.is_main_process and not first.exists():
            shutil.rmtree(path, ignore_errors=True)
        raise
    assert outcome is not None
    return outcome


def resume_recipe(
    recipe: Recipe, text: str | None, path: Path, spell: Spell, tell: Tell, cpu: bool = False
) -> Outcome | None:
    """Go on with a recipe in the phase where it stopped.

    Args:
        recipe: perhaps with other budgets.
        text: the same as YAML, to replace the folder's own; None keeps that.
        path: of the folder.
        spell: writes a phase's configuration.
        tell: is told where each phase begins.
        cpu: use no GPU.

    Returns:
        How it ended; None where all phases were finished already.

    Raises:
        InputError: as `start_recipe`; or a checkpoint is damaged.
        TrainingFailed: as `Trainer.run`.
    """
    accelerator = start_processes(recipe.phases[0].config.training.processes, cpu)
    _check(recipe, accelerator, cpu, path)
    return _train(recipe, path, spell, tell, accelerator, cpu, text)


def resolved_recipe(recipe: Recipe) -> Recipe:
    """Spell out every setting of the models' parts, as `resolved` does.

    Raises:
        InputError: a class or a setting is unknown or does not fit.
    """
    return Recipe([phase._replace(config=resolved(phase.config)) for phase in recipe.phases])


def finished_phases(recipe: Recipe, path: Path) -> list[str]:
    """Names of the phases that have spent their budget.

    Raises:
        InputError: a checkpoint is damaged.
    """
    names = []
    for phase in recipe.phases:
        folder = recipe.folder(path, phase.name)
        if (folder / CONFIG_FILE).is_file() and is_finished(RunFolder(folder), phase.config.training):
            names.append(phase.name)
    return names


def settled_phases(recipe: Recipe, path: Path) -> list[str]:
    """Names of the finished phases that another one has started from: these cannot go on any more.

    Raises:
        InputError: a checkpoint is damaged.
    """
    sources = {
        phase.starts_from for phase in recipe.phases if (recipe.folder(path, phase.name) / CONFIG_FILE).is_file()
    }
    return [name for name in finished_phases(recipe, path) if name in sources]


def _check(recipe: Recipe, accelerator: Accelerator, cpu: bool, path: Path | None = None) -> None:
    """Find mistakes of a late phase now, and not after days; where `path` is given, in what is left of it."""
    fresh = path is None

    def check() -> None:
        finished = [] if path is None else finished_phases(recipe, path)
        opened = []
        for phase in recipe.phases:
            if phase.name in finished:
                continue
            config = phase.config
            data = config.data
            begun = path is not None and (recipe.folder(path, phase.name) / CONFIG_FILE).is_file()
            starts = phase.starts_from is None and not begun
            images = (data.root, data.dataset, data.validation, data.cache)
            try:
                start_processes(config.training.processes, cpu)
                _check_trained_terms(recipe, phase)
                check_config(config, accelerator, starts)
                if images not in opened:
                    open_sources(*images)
                    opened.append(images)
            except InputError as error:
                raise InputError(f"phase {phase.name}: {error}") from None

    def fetch() -> None:
        for phase in recipe.phases if accelerator.is_local_main_process else ():
            try:
                fetch_backbones(phase.config.losses)
            except InputError as error:
                raise InputError(f"phase {phase.name}: {error}") from None

    together(accelerator, check)
    if fresh:  # after everything that can be found out without a download
        together(accelerator, fetch)


def _check_trained_terms(recipe: Recipe, phase: Phase) -> None:
    """Refuse to train what no term learns, and a term that would have to stay as it is made.

    Whether a user's term learns is known when it is built.
    """
    config, chosen = phase.config, phase.config.trained_groups()
    if chosen is None:
        return
    active = [name for name, loss in config.losses.items() if loss.weight]
    learning = [name for name in active if config.losses[name].class_path is not None or name in LEARNING_TERMS]
    groups = [f"losses.{name}" for name in learning]
    for selector in chosen:
        if selector.partition(".")[0] == "losses" and selector not in ("losses", *groups):
            raise InputError(f"training.train: {unknown_name('parameter group', selector, groups)}")
    before = {earlier.name: earlier.config.losses for earlier in recipe.phases}.get(phase.starts_from or "")
    for name in learning:
        frozen = name in LEARNING_TERMS and not {"losses", f"losses.{name}"}.intersection(chosen)
        is_new = before is not None and not (name in before and before[name].weight)
        if frozen and is_new:
            raise InputError(
                f"losses.{name} has parameters of its own, which phase {phase.starts_from} does not train: add "
                f"losses.{name} to training.train, or leave the term out: losses.{name} 0"
            )


def _create(path: Path, text: str, first: Path) -> None:
    """Make the folder, with the recipe and the link to the first phase's model inside, by one rename."""
    check_new(path)
    with new_folder(path) as partial:
        (partial / RECIPE_FILE).write_text(text, encoding="utf-8")
        _link_model(partial, first)


def _train(
    recipe: Recipe,
    path: Path,
    spell: Spell,
    tell: Tell,
    accelerator: Accelerator,
    cpu: bool,
    text: str | None = None,
) -> Outcome | None:
    lock = RunLock(path)
    on_main_process(accelerator, lock.acquire)
    outcome = None
    try:
        if text is not None:
            on_main_process(accelerator, partial(write_whole, path / RECIPE_FILE, text.encode()))
        # Each phase listens for signals itself; this is for one that comes between two phases.
        with StopRequest() as stop:
            for place, phase in enumerate(recipe.phases):
                signal = on_main_process(accelerator, lambda: stop.name)
                if signal is not None:
                    return Outcome(0 if outcome is None else outcome.step, signal)
                folder = recipe.folder(path, phase.name)
                config = _with_source(recipe, phase, path)
                # One process decides for all: the folder appears while others look.
                begun = on_main_process(accelerator, (folder / CONFIG_FILE).is_file)
                where = f"phase {phase.name} ({place + 1} of {len(recipe.phases)})"
                if not begun:
                    tell(f"{where} begins: {folder}")
                    outcome = start_run(config, spell(config), folder, cpu)
                else:
                    found = resume_run(config, spell(config), folder, cpu)
                    if found is not None:
                        outcome = found
                # The next one needs the memory that this one's cycles of references still hold.
                clear_device_cache(garbage_collection=True)
                if outcome is not None and outcome.stopped_by is not None:
                    return outcome
                on_main_process(accelerator, partial(_link_later_model, path, folder))
    finally:
        lock.release()
    return outcome


def _with_source(recipe: Recipe, phase: Phase, path: Path) -> RunConfig:
    """The phase's configuration, with what it starts from and where it lies."""
    settings = {"output": str(recipe.folder(path, phase.name))}
    if phase.starts_from is not None:
        settings["init_from"] = str(recipe.folder(path, phase.starts_from))
    return phase.config.with_training(**settings)


def _link_later_model(path: Path, folder: Path) -> None:
    """Let RUN/model lead to the model of a phase that has ended, if it does not lead to a later one's already."""
    link = path / "model"
    if not link.is_symlink() or _place(Path(os.readlink(link)).parts[0]) < _place(folder.name):
        _link_model(path, folder)


def _place(name: str) -> int:
    """The number with which the folder of a phase begins."""
    number = name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def _link_model(path: Path, folder: Path) -> None:
    """Let RUN/model lead to a phase's model."""
    link, target = path / "model", Path(folder.name, "model")
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return
    replace_link(link, target)
