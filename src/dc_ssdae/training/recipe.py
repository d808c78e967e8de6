"""Recipes: training in phases, each a run of its own that starts from an earlier one's averaged weights.

RUN/recipe.yaml   all phases, with all their settings
RUN/1-NAME/ …     a run each, see `run`
RUN/model         a link to the model of the last phase that has ended, of the first one until then

Reading and checking a recipe needs no torch; what trains imports it when it is called.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dc_ssdae.errors import InputError, shown, unknown_name
from dc_ssdae.files import replace_link, write_whole
from dc_ssdae.presets import dump_yaml, read_yaml
from dc_ssdae.training.config import RunConfig, TrainingConfig, lay_over
from dc_ssdae.training.stopping import StopRequest

if TYPE_CHECKING:
    from dc_ssdae.distributed import Processes
    from dc_ssdae.training.trainer import Outcome

RECIPE_FILE = "recipe.yaml"

PHASE_SECTIONS = ("starts_from", "model", "data", "training", "losses")
"""What a phase may change; `model` only in a recipe with all its settings, where all phases have the same."""

IN_FOLDER = "the phases lie in the recipe's folder"

LEARNING_TERMS = ("repa",)
"""The built-in loss terms with parameters of their own."""

Spell = Callable[[RunConfig], str]
"""Writes a configuration as YAML."""

Tell = Callable[[str], None]
"""Says a line to the user, once over all processes."""


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

    def add(self, name: str, settings: Mapping[str, Any], starts_from: Any) -> None:
        """Add a phase with its whole configuration.

        Raises:
            InputError: it does not fit; or starts_from is no earlier phase, or beside training.init_from.
        """
        earlier = [phase.name for phase in self.phases]
        if starts_from is not None and starts_from not in earlier:
            raise unknown_name(f"earlier phase that phases.{name} starts_from", starts_from, earlier, f"phases.{name}")
        with _naming_phase(name):
            config = RunConfig.from_mapping(settings)
        if starts_from is not None and config.training.init_from is not None:
            raise InputError(f"phases.{name} has both starts_from and training.init_from; give one of them")
        self.phases.append(Phase(name, config, starts_from))


@contextmanager
def _naming_phase(name: str) -> Iterator[None]:
    """Let an error say which phase it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"phase {name}: {error}", error.field) from None


def check_phases(phases: Any, source: str) -> dict[str, dict[str, Any]]:
    """Check the form of section phases.

    Args:
        phases: sections of settings by the phases' names; in each also starts_from, the name of an earlier phase.
        source: of the section, for messages.

    Raises:
        InputError: it has another form, or a name cannot be part of a setting's and of a folder's name.
    """
    if not isinstance(phases, Mapping) or not phases:
        raise InputError(f"section phases of {source} is {shown(phases)}; it must be a mapping of phases", "phases")
    for name, layer in phases.items():
        if not isinstance(name, str) or not (name.isidentifier() and name.isascii()):
            raise InputError(f"a phase is called {shown(name)}; use letters, digits and underscores", "phases")
        if not isinstance(layer, Mapping):
            raise InputError(f"phases.{name} of {source} is {shown(layer)}; it must be a mapping", f"phases.{name}")
        for section in layer:
            if section not in PHASE_SECTIONS:
                raise unknown_name(f"section of phases.{name}", section, PHASE_SECTIONS, f"phases.{name}.{section}")
    return {name: dict(layer) for name, layer in phases.items()}


def make_recipe(
    settings: Mapping[str, Any],
    phases: Mapping[str, Mapping[str, Any]],
    flags: Mapping[str, Any],
    phase_flags: Mapping[str, Mapping[str, Any]],
) -> Recipe:
    """Lay each phase over a configuration, and settings of the command line over it.

    Args:
        settings: the configuration.
        phases: as `check_phases` gives them.
        flags: settings of the command line for all phases.
        phase_flags: settings of the command line for one phase, by the phase's name.

    Raises:
        InputError: a phase is not there, or its configuration does not fit.
    """
    _check_phase_flags(phase_flags, phases)
    recipe = Recipe([])
    for name, layer in phases.items():
        own = lay_over(layer, phase_flags.get(name, {}))
        starts_from = own.pop("starts_from", None)
        training = own.get("training") or {}
        if training.get("output") is not None:
            raise InputError(f"phases.{name}.training.output: {IN_FOLDER}; name that by --training.output", name)
        whole = lay_over(lay_over(lay_over(settings, own), flags), phase_flags.get(name, {}))
        changed = dict(whole.get("training") or {})
        seed = changed.get("seed", TrainingConfig.seed)
        if "seed" not in training and isinstance(seed, int):
            # With one seed for all, a later phase would see the crops and noise of the first again.
            changed["seed"] = seed + len(recipe.phases)
        if recipe.phases:
            changed["init_from"] = training.get("init_from")  # what the first phase starts from is not for the others
            if starts_from is None and changed["init_from"] is None:
                starts_from = recipe.phases[-1].name
        recipe.add(name, {**whole, "training": changed}, starts_from)
    return recipe


def change_recipe(
    recipe: Recipe,
    flags: Mapping[str, Any],
    phase_flags: Mapping[str, Mapping[str, Any]],
    settled: Sequence[str] = (),
) -> Recipe:
    """Change the phases of a recipe that goes on.

    Args:
        recipe: as it was.
        flags: settings for all phases.
        phase_flags: settings for one phase, by the phase's name.
        settled: names of the phases that stay as they are.

    Raises:
        InputError: a setting does not fit, or is of a settled phase.
    """
    _check_phase_flags(phase_flags, [phase.name for phase in recipe.phases])
    changed = Recipe([])
    for phase in recipe.phases:
        own = phase_flags.get(phase.name, {})
        if phase.name in settled:
            if own:
                raise InputError(f"phase {phase.name} is finished, and others have started from it: it cannot change")
            changed.phases.append(phase)
            continue
        changed.add(phase.name, lay_over(lay_over(phase.config.to_mapping(), flags), own), phase.starts_from)
        if changed.phases[-1].config.training.output != phase.config.training.output:
            raise InputError(f"training.output: {IN_FOLDER}, which may be moved; it cannot change when they go on")
    if settled and any(phase.config.model != recipe.phases[0].config.model for phase in changed.phases):
        raise InputError(f"section model cannot change: phase {settled[0]} is finished, and the others go on from it")
    return changed


def recipe_yaml(recipe: Recipe) -> str:
    """Spell a recipe out as YAML, every phase with all its settings, for `read_recipe`."""
    phases = {phase.name: {"starts_from": phase.starts_from, **phase.config.to_mapping()} for phase in recipe.phases}
    head = "# A recipe's phases, each with all its settings; dc-ssdae train --resume goes on with it.\n"
    return head + dump_yaml({"phases": phases})


def read_recipe(path: Path) -> Recipe:
    """Read what a recipe's folder keeps of it.

    Args:
        path: the folder.

    Raises:
        InputError: there is no recipe, or it is damaged.
    """
    file = path / RECIPE_FILE
    recipe = Recipe([])
    for name, layer in check_phases(read_yaml(file).get("phases"), str(file)).items():
        starts_from = layer.pop("starts_from", None)
        recipe.add(name, layer, starts_from)
    return recipe


def _check_phase_flags(given: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    for name, settings in given.items():
        if name not in names:
            raise unknown_name("phase of the recipe", name, names, f"phases.{name}")
        if not isinstance(settings, Mapping):
            raise InputError(f"--phases.{name} names no setting; write --phases.{name}.section.name VALUE")
        for section in ("model", "distillation"):
            if section in settings:
                raise InputError(f"--phases.{name}.{section}: section {section} is of all phases; give --{section}")


def resolved_recipe(recipe: Recipe) -> Recipe:
    """Spell out every setting of the models' parts, as `resolved` does.

    Raises:
        InputError: a class or a setting is unknown or does not fit.
    """
    from dc_ssdae.training.build import resolved

    return Recipe([phase._replace(config=resolved(phase.config)) for phase in recipe.phases])


def train_recipe(
    recipe: Recipe, path: Path, spell: Spell, tell: Tell, resumes: bool = False, cpu: bool = False
) -> "Outcome | None":
    """Train the phases of a recipe in a new folder, or go on in the phase where that stopped.

    Args:
        recipe: with all settings resolved. Where it goes on, budgets may have changed: the folder keeps this one.
        path: of the folder.
        spell: writes a phase's configuration.
        tell: is told where each phase begins.
        resumes: whether the folder is there.
        cpu: use no GPU.

    Returns:
        How it ended; None where all phases were finished already.

    Raises:
        InputError: a phase, the data, the processes or the folder do not fit, or a checkpoint is damaged; all phases
            are checked before the first.
        TrainingFailed: as `Trainer.run`.
    """
    from dc_ssdae.training.run import check_new, new_folder

    processes = _check(recipe, cpu, path if resumes else None)
    first = recipe.folder(path, recipe.phases[0].name)

    def create() -> None:
        check_new(path)
        with new_folder(path) as partial:
            (partial / RECIPE_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
            replace_link(partial / "model", Path(first.name, "model"))

    if not resumes:
        processes.on_main(create)
    try:
        return _train(recipe, path, spell, tell, processes, cpu)
    except Exception:
        # A mistake that only the first step shows has removed the phase: what is mended begins anew, under this name.
        if not resumes and processes.is_main and not first.exists():
            shutil.rmtree(path, ignore_errors=True)
        raise


def finished_phases(recipe: Recipe, path: Path) -> list[str]:
    """Names of the phases that have spent their budget.

    Raises:
        InputError: a checkpoint is damaged.
    """
    from dc_ssdae.training.run import RunFolder, is_finished

    return [
        phase.name
        for phase in recipe.phases
        if is_finished(RunFolder(recipe.folder(path, phase.name)), phase.config.training)
    ]


def settled_phases(recipe: Recipe, path: Path) -> list[str]:
    """Names of the finished phases that another one has started from: these cannot go on any more.

    Raises:
        InputError: a checkpoint is damaged.
    """
    sources = {phase.starts_from for phase in recipe.phases if _has_begun(recipe.folder(path, phase.name))}
    return [name for name in finished_phases(recipe, path) if name in sources]


def _has_begun(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _check(recipe: Recipe, cpu: bool, path: Path | None = None) -> "Processes":
    """Find mistakes of a late phase now, and not after days; where `path` is given, in what is left of it."""
    from accelerate.utils import DistributedType

    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.training.build import check_components, fetch_backbones
    from dc_ssdae.training.start import start_processes

    accelerator, processes = start_processes(recipe.phases[0].config.training.processes, cpu)
    is_sharded = accelerator.distributed_type == DistributedType.FSDP

    def check() -> None:
        finished = [] if path is None else finished_phases(recipe, path)
        opened = []
        for phase in recipe.phases:
            if phase.name in finished:
                continue
            data = phase.config.data
            begun = path is not None and _has_begun(recipe.folder(path, phase.name))
            images = (data.root, data.dataset, data.validation, data.cache)
            with _naming_phase(phase.name):
                start_processes(phase.config.training.processes, cpu)
                _check_trained_terms(recipe, phase)
                starts = phase.starts_from is None and not begun
                check_components(phase.config, starts, processes=processes.count, sharded=is_sharded)
                if images not in opened:
                    open_sources(*images)
                    opened.append(images)

    def fetch() -> None:
        for phase in recipe.phases if accelerator.is_local_main_process else ():
            with _naming_phase(phase.name):
                fetch_backbones(phase.config.losses)

    processes.together(check)
    if path is None:  # after everything that can be found out without a download
        processes.together(fetch)
    return processes


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


def _train(recipe: Recipe, path: Path, spell: Spell, tell: Tell, processes: "Processes", cpu: bool) -> "Outcome | None":
    """Train the phases that are left, one after the other, from where each of them stopped."""
    from accelerate.utils.memory import clear_device_cache

    from dc_ssdae.training.start import locked, resume_run, start_run
    from dc_ssdae.training.trainer import Outcome

    def keep() -> None:
        if read_recipe(path) != recipe:
            write_whole(path / RECIPE_FILE, recipe_yaml(recipe).encode())

    outcome = None
    # Each phase listens for signals itself; this is for one that comes between two phases.
    with locked(path, processes), StopRequest() as stop:
        processes.on_main(keep)
        for place, phase in enumerate(recipe.phases, 1):
            signal = processes.on_main(lambda: stop.name)
            if signal is not None:
                return Outcome(0 if outcome is None else outcome.step, signal)
            folder = recipe.folder(path, phase.name)
            config = phase.config.with_training(output=str(folder))
            if phase.starts_from is not None:
                config = config.with_training(init_from=str(recipe.folder(path, phase.starts_from)))
            # One process decides for all: the folder appears while others look.
            if processes.on_main(partial(_has_begun, folder)):
                outcome = resume_run(config, spell(config), folder, cpu) or outcome
            else:
                tell(f"phase {phase.name} ({place} of {len(recipe.phases)}) begins: {folder}")
                outcome = start_run(config, spell(config), folder, cpu)
            # The next one needs the memory that this one's cycles of references still hold.
            clear_device_cache(garbage_collection=True)
            if outcome is not None and outcome.stopped_by is not None:
                return outcome
            processes.on_main(partial(_link_model, recipe, path, phase.name))
    return outcome


def _link_model(recipe: Recipe, path: Path, name: str) -> None:
    """Let RUN/model lead to the model of a phase, if it does not lead to a later one's already."""
    link, names = path / "model", [phase.name for phase in recipe.phases]
    later = [recipe.folder(path, later).name for later in names[names.index(name) :]]
    if not (link.is_symlink() and Path(os.readlink(link)).parts[0] in later):
        replace_link(link, Path(later[0], "model"))
