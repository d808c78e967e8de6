"""Recipes: training in phases, each a run of its own that starts from an earlier one's averaged weights.

RUN/recipe.yaml   all phases, with all their settings
RUN/1-NAME/ …     a run each, see `run`
RUN/model         a link to the model of the last phase that has ended, of the first one until then

Reading and checking a recipe needs no torch; what trains imports it when it is called.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dc_ssdae.errors import InputError, check_names, prefixed, shown, unknown_name, wrong_value
from dc_ssdae.files import replace_link, write_whole
from dc_ssdae.presets import dump_yaml, read_yaml
from dc_ssdae.training.config import RunConfig, TrainingConfig, lay_over
from dc_ssdae.training.stopping import StopRequest

if TYPE_CHECKING:
    from dc_ssdae.distributed import Processes
    from dc_ssdae.training.loop import Outcome

RECIPE_FILE = "recipe.yaml"

PHASE_SECTIONS = ("starts_from", "model", "data", "training", "losses")
"""What a phase may change; `model` only in a recipe with all its settings, where all phases have the same."""

Settings = Mapping[str, Any]
"""Sections of settings, as `RunConfig.from_mapping` takes them."""


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

    def add(self, name: str, settings: Settings, starts_from: Any) -> None:
        """Add a phase with its whole configuration.

        Raises:
            InputError: it does not fit; or starts_from is no earlier phase, or beside training.init_from.
        """
        earlier = [phase.name for phase in self.phases]
        if starts_from is not None and starts_from not in earlier:
            raise unknown_name(f"earlier phase that phases.{name} starts_from", starts_from, earlier, f"phases.{name}")
        with prefixed(f"phase {name}"):
            config = RunConfig.from_mapping(settings)
        if starts_from is not None and config.training.init_from is not None:
            raise InputError(f"phases.{name} has both starts_from and training.init_from; give one of them")
        self.phases.append(Phase(name, config, starts_from))


def check_phases(phases: Any, source: str, accepted: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Check the form of section phases.

    Args:
        phases: sections of settings by the phases' names; in each also starts_from, the name of an earlier phase.
        source: of the section, for messages.
        accepted: names of the phases, where these are settings of the command line for a recipe that has them.

    Raises:
        InputError: it has another form, or a name cannot be part of a setting's and of a folder's name.
    """
    sections = PHASE_SECTIONS if accepted is None else ("data", "training", "losses")
    if not isinstance(phases, Mapping) or (not phases and accepted is None):
        raise wrong_value("phases", phases, f"a mapping of phases, in {source}")
    check_names("phase of the recipe", phases, phases if accepted is None else accepted, "phases.")
    for name, layer in phases.items():
        if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
            raise InputError(f"a phase is called {shown(name)}; use letters, digits and underscores", "phases")
        if not isinstance(layer, Mapping):
            raise wrong_value(f"phases.{name}", layer, f"a mapping of settings, in {source}")
        check_names(f"section of phases.{name}", layer, sections, f"phases.{name}.")
        for section, settings in layer.items():
            if section != "starts_from" and not isinstance(settings, Mapping | None):
                raise wrong_value(f"phases.{name}.{section}", settings, "a mapping of settings")
    return {name: dict(layer) for name, layer in phases.items()}


def make_recipe(
    settings: Settings, phases: Mapping[str, Settings], flags: Settings, phase_flags: Mapping[str, Settings]
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
    phase_flags = check_phases(phase_flags, "the command line", phases)
    recipe = Recipe([])
    for name, layer in phases.items():
        own = lay_over(layer, phase_flags.get(name, {}))
        starts_from = own.pop("starts_from", None)
        training = own.get("training") or {}
        if training.get("output") is not None:
            raise InputError(f"phases.{name}.training.output: phases lie in the recipe's folder, --training.output")
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
    recipe: Recipe, flags: Settings, phase_flags: Mapping[str, Settings], settled: Sequence[str] = ()
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
    phase_flags = check_phases(phase_flags, "the command line", [phase.name for phase in recipe.phases])
    changed = Recipe([])
    for phase in recipe.phases:
        own = phase_flags.get(phase.name, {})
        if phase.name not in settled:
            changed.add(phase.name, lay_over(lay_over(phase.config.to_mapping(), flags), own), phase.starts_from)
        elif own:
            raise InputError(f"phase {phase.name} is finished, and others have started from it: it cannot change")
        else:
            changed.phases.append(phase)
    return changed


def recipe_yaml(recipe: Recipe) -> str:
    """Spell a recipe out as YAML, every phase with all its settings, for `read_recipe`."""
    phases = {phase.name: {"starts_from": phase.starts_from, **phase.config.to_mapping()} for phase in recipe.phases}
    return f"# Each phase with all its settings, for dc-ssdae train --resume.\n{dump_yaml({'phases': phases})}"


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


def resolved_recipe(recipe: Recipe) -> Recipe:
    """Spell out every setting of the models' parts, as `resolved` does.

    Raises:
        InputError: a class or a setting is unknown or does not fit.
    """
    from dc_ssdae.training.build import resolved

    return Recipe([phase._replace(config=resolved(phase.config)) for phase in recipe.phases])


def train_recipe(
    recipe: Recipe, path: Path, spell: Callable[[RunConfig], str], resumes: bool = False, cpu: bool = False
) -> "Outcome | None":
    """Train the phases of a recipe in a new folder, or go on in the phase where that stopped.

    Args:
        recipe: with all settings resolved. Where it goes on, budgets may have changed: the folder keeps this one.
        path: of the folder.
        spell: writes a phase's configuration.
        resumes: whether the folder is there.
        cpu: use no GPU.

    Returns:
        How it ended; None where all phases were finished already.

    Raises:
        InputError: a phase, the data, the processes or the folder do not fit, or a checkpoint is damaged; all phases
            are checked before the first.
        TrainingFailed: as `Trainer.run`.
    """
    from accelerate.utils.memory import clear_device_cache

    from dc_ssdae.training.loop import Outcome
    from dc_ssdae.training.run import new_folder
    from dc_ssdae.training.start import locked, resume_run, start_run

    folders = [recipe.folder(path, phase.name) for phase in recipe.phases]
    processes = _check(recipe, path, cpu, resumes)

    def create() -> None:
        with new_folder(path) as partial:
            (partial / RECIPE_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
            replace_link(partial / "model", f"{folders[0].name}/model")

    def link(place: int) -> None:
        """Let RUN/model lead to the model of a phase that has ended, unless a later one has begun since."""
        if not any(map(_has_begun, folders[place + 1 :])):
            replace_link(path / "model", f"{folders[place].name}/model")

    if not resumes:
        processes.on_main(create)
    outcome = None
    try:
        # Each phase listens for signals itself; this is for one that comes between two phases.
        with locked(path, processes), StopRequest() as stop:
            processes.on_main(partial(write_whole, path / RECIPE_FILE, recipe_yaml(recipe).encode()))
            for place, (phase, folder) in enumerate(zip(recipe.phases, folders, strict=True)):
                if (signal := processes.on_main(lambda: stop.name)) is not None:
                    return Outcome(0 if outcome is None else outcome.step, signal)
                config = phase.config.with_training(output=str(folder))
                if phase.starts_from is not None:
                    config = config.with_training(init_from=str(recipe.folder(path, phase.starts_from)))
                # One process decides for all: the folder appears while others look.
                if processes.on_main(partial(_has_begun, folder)):
                    outcome = resume_run(config, spell(config), folder, cpu) or outcome
                else:
                    outcome = start_run(config, spell(config), folder, cpu)
                # The next one needs the memory that this one's cycles of references still hold.
                clear_device_cache(garbage_collection=True)
                if outcome is not None and outcome.stopped_by is not None:
                    return outcome
                processes.on_main(partial(link, place))
    except Exception:
        # A mistake that only the first step shows has removed the phase: what is mended begins anew, under this name.
        if not resumes and processes.is_main and not folders[0].exists():
            shutil.rmtree(path, ignore_errors=True)
        raise
    return outcome


def settled_phases(recipe: Recipe, path: Path) -> list[str]:
    """Names of the finished phases that another one has started from: these cannot go on any more.

    Raises:
        InputError: a checkpoint is damaged.
    """
    sources = {phase.starts_from for phase in recipe.phases if _has_begun(recipe.folder(path, phase.name))}
    return [phase.name for phase in recipe.phases if phase.name in sources and _is_finished(recipe, path, phase)]


def _is_finished(recipe: Recipe, path: Path, phase: Phase) -> bool:
    from dc_ssdae.training.run import RunFolder, is_finished

    return is_finished(RunFolder(recipe.folder(path, phase.name)), phase.config.training)


def _has_begun(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _check(recipe: Recipe, path: Path, cpu: bool, resumes: bool) -> "Processes":
    """Find mistakes of a late phase now, and not after days."""
    from accelerate.utils import DistributedType

    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.training.build import check_components, fetch_weights
    from dc_ssdae.training.start import start_processes

    accelerator, processes = start_processes(recipe.phases[0].config.training.processes, cpu)
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    fetching = recipe.phases if accelerator.is_local_main_process and not resumes else ()

    def check() -> None:
        for phase in recipe.phases:
            config, data = phase.config, phase.config.data
            if not _is_finished(recipe, path, phase):
                with prefixed(f"phase {phase.name}"):
                    start_processes(config.training.processes, cpu)
                    starts = phase.starts_from is None and not _has_begun(recipe.folder(path, phase.name))
                    check_components(config, starts, processes=processes.count, sharded=is_sharded)
                    open_sources(data.root, data.dataset, data.validation, data.cache)
        for phase in fetching:  # after everything that can be found out without a download
            with prefixed(f"phase {phase.name}"):
                fetch_weights(phase.config, starts=phase.starts_from is None)

    processes.together(check)
    return processes
