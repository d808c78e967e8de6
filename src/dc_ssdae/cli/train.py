"""`dc-ssdae train`: start a run from a configuration, or go on with one."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import complain
from dc_ssdae.errors import InputError, ToldElsewhere, counted
from dc_ssdae.training.changes import check_changes, lasting_settings
from dc_ssdae.training.stopping import StopRequest

if TYPE_CHECKING:
    from dc_ssdae.training.config import RunConfig, TrainingConfig
    from dc_ssdae.training.recipe import Recipe
    from dc_ssdae.training.trainer import Outcome

PROGRAM = "dc-ssdae train"


class TrainParser:
    """Reads the command's words; the settings are jsonargparse's, `--resume` and `--debug` are its own."""

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:
        """Read and check everything that needs no torch.

        Raises:
            InputError: something is wrong; one line.
            SystemExit: after --help and --print_config.
        """
        try:
            return self._parse(words)
        except InputError as error:
            raise told_once(error) from error

    def _parse(self, words: Sequence[str]) -> argparse.Namespace:
        from dc_ssdae.cli.run_config import parse_run_config
        from dc_ssdae.cli.run_recipe import asks_for_recipe, parse_recipe

        resume, rest = take_option(words, "--resume", "the folder of a run")
        rest = [word for word in rest if word != "--debug"]
        if resume is None:
            if asks_for_recipe(rest):
                recipe, name, output = parse_recipe(rest)
                return _words(resume=None, config=None, recipe=recipe, name=name, output=output)
            config, name = parse_run_config(rest)
            output = config.training.output
            if not name and output is None:
                raise InputError("which configuration? --config PRESET (dc-ssdae info lists them) or --config FILE")
            return _words(resume=None, config=config, recipe=None, name=name, output=output)
        if any(word in ("--help", "-h") for word in rest):
            parse_run_config(rest)
        path = Path(resume)
        if (path / "recipe.yaml").is_file():
            before, after = _changed_recipe(path, rest)
            return _words(resume=path, config=None, recipe=after, changed=after != before)
        run = read_run(path)
        config = parse_run_config(rest, base=run.to_mapping()).config if rest else run
        check_changes(lasting_settings(run), lasting_settings(config), path)
        return _words(resume=path, config=config, recipe=None, changed=config != run)


def _words(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(program=PROGRAM, **values)


def build_parser() -> TrainParser:
    """Build the command's parser."""
    return TrainParser()


def run(args: argparse.Namespace) -> int:
    """Train; gives the exit code, 0 also where a signal asked for the end."""
    with watching_training(args):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.recipe is not None:
        return _run_recipe(args)
    from dc_ssdae.cli.run_config import config_yaml
    from dc_ssdae.training.build import resolved
    from dc_ssdae.training.run import check_new
    from dc_ssdae.training.start import resume_run, start_run

    if args.resume is None:
        path = Path(args.output or Path("runs") / args.name)
        if is_main_process():
            check_new(path)
        config = resolved(args.config)
        outcome = start_run(config, config_yaml(config), path)
    else:
        path, config = args.resume, args.config
        found = resume_run(config, config_yaml(config) if args.changed else None, path)
        if found is None:
            _say(f"{path} is finished: {_spent(config.training)}")
            return 0
        outcome = found
    tell_end(PROGRAM, outcome, path)
    return 0


def _run_recipe(args: argparse.Namespace) -> int:
    from dc_ssdae.cli.run_config import config_yaml
    from dc_ssdae.cli.run_recipe import recipe_yaml
    from dc_ssdae.training.recipe import resolved_recipe, resume_recipe, start_recipe
    from dc_ssdae.training.run import check_new

    if args.resume is None:
        path = Path(args.output or Path("runs") / args.name)
        if is_main_process():
            check_new(path)
        recipe = resolved_recipe(args.recipe)
        outcome = start_recipe(recipe, recipe_yaml(recipe), path, config_yaml, _say)
    else:
        path, recipe = args.resume, args.recipe
        text = recipe_yaml(recipe) if args.changed else None
        found = resume_recipe(recipe, text, path, config_yaml, _say)
        if found is None:
            _say(
                f"{path} is finished: {counted(len(recipe.phases), 'phase')}, all budgets spent "
                f"(--phases.{recipe.phases[-1].name}.training.steps N goes on to N)"
            )
            return 0
        outcome = found
    tell_end(PROGRAM, outcome, path)
    return 0


@contextmanager
def watching_training(args: argparse.Namespace) -> Iterator[None]:
    """Let a run that is resumed heed signals, and one process tell what all meet."""
    find_own_classes()
    from dc_ssdae.data.loader import ReadingFailed

    try:
        # From here on, not only once the trainer is built: a run that is resumed ends well whenever a signal comes.
        with StopRequest() if args.resume is not None else nullcontext():
            yield
    except (ReadingFailed, ToldElsewhere):
        raise
    except InputError as error:  # which all processes meet
        raise told_once(error) from error


def find_own_classes() -> None:
    """Let Python find a user's own classes, which a configuration names, where the command is given."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


def tell_end(program: str, outcome: "Outcome", path: Path) -> None:
    """Say how a run ended, and what to do next."""
    if outcome.stopped_by is not None:
        message = f"stopped by {outcome.stopped_by} after step {outcome.step}; go on with: {program} --resume {path}"
    else:
        message = f"done after step {outcome.step}: the model is {path / 'model'}"
    if is_main_process():
        complain(program, message)


def _spent(training: "TrainingConfig") -> str:
    budgets = []
    if training.steps is not None:
        budgets.append(f"{counted(training.steps, 'step')} (--training.steps N goes on to N)")
    if training.minutes is not None:
        budgets.append(f"{training.minutes:g} minutes (--training.minutes M goes on to M)")
    return "its budget is spent: " + " or ".join(budgets)


def _changed_recipe(path: Path, words: Sequence[str]) -> "tuple[Recipe, Recipe]":
    """A recipe's run as it was, and as flags want it: phases that have ended stay, the others may change."""
    from dc_ssdae.cli.run_recipe import lay_over_recipe
    from dc_ssdae.training.recipe import read_recipe, settled_phases

    before = read_recipe(path)
    if not words:
        return before, before
    after = lay_over_recipe(before, words, settled_phases(before, path))
    for old, new in zip(before.phases, after.phases, strict=True):
        folder = before.folder(path, old.name)
        if (folder / "config.yaml").is_file():
            check_changes(lasting_settings(old.config), lasting_settings(new.config), folder)
    return before, after


def read_run(path: Path) -> "RunConfig":
    """Read the configuration of the run that --resume names.

    Raises:
        InputError: it is no run, or its configuration is damaged.
    """
    from dc_ssdae.presets import read_yaml
    from dc_ssdae.training.config import RunConfig

    if not path.is_dir():
        raise InputError(f"--resume {path}: no such folder")
    file = path / "config.yaml"
    if not file.is_file():
        raise InputError(f"--resume {path}: it holds no config.yaml, so it is no run")
    return RunConfig.from_mapping(read_yaml(file, str(file)))


def take_option(words: Sequence[str], name: str, needs: str) -> tuple[str | None, list[str]]:
    """Take an option with its value out of the words.

    Args:
        words: of the command.
        name: of the option, with its dashes.
        needs: what its value is, for messages.

    Raises:
        InputError: it has no value.
    """
    value, rest = None, []
    position = 0
    while position < len(words):
        word = words[position]
        if word == name:
            if position + 1 == len(words) or words[position + 1].startswith("--"):
                raise InputError(f"{name} needs {needs}")
            position += 1
            value = words[position]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
        position += 1
    if value is not None and not value.strip():
        raise InputError(f"{name} is empty; it needs {needs}")
    return value, rest


def told_once(error: InputError) -> InputError:
    """An error that every process meets, for one of them to tell."""
    return error if is_main_process() else ToldElsewhere(str(error))


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _say(message: str) -> None:
    if is_main_process():
        complain(PROGRAM, message)
