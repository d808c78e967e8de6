"""`dc-ssdae train`: start a run from a configuration, or go on with one."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import complain
from dc_ssdae.errors import InputError, ToldElsewhere

if TYPE_CHECKING:
    from dc_ssdae.training.config import TrainingConfig

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
            raise _told_once(error) from error

    def _parse(self, words: Sequence[str]) -> argparse.Namespace:
        from dc_ssdae.cli.run_config import parse_run_config

        resume, rest = _take_option(words, "--resume")
        rest = [word for word in rest if word != "--debug"]
        if resume is None:
            parsed = parse_run_config(rest)
            if not parsed.name and parsed.config.training.output is None:
                raise InputError("which configuration? --config PRESET (dc-ssdae info lists them) or --config FILE")
            return _words(resume=None, config=parsed.config, name=parsed.name, changed=True)
        if any(word in ("--help", "-h") for word in rest):
            parse_run_config(rest)
        path = Path(resume)
        before = _read_run(path)
        after = parse_run_config(rest, base=before.to_mapping()).config if rest else before
        _check_changes(before.to_mapping(), after.to_mapping(), path)
        return _words(resume=path, config=after, name=path.name, changed=after != before)


def _words(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(program=PROGRAM, **values)


def build_parser() -> TrainParser:
    """Build the command's parser."""
    return TrainParser()


def run(args: argparse.Namespace) -> int:
    """Train; gives the exit code, 0 also where a signal asked for the end."""
    # A user's own classes are named in the configuration, and lie where the command is given.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    from dc_ssdae.data.loader import ReadingFailed

    try:
        return _run(args)
    except (ReadingFailed, ToldElsewhere):
        raise
    except InputError as error:  # which all processes meet
        raise _told_once(error) from error


def _run(args: argparse.Namespace) -> int:
    from dc_ssdae.cli.run_config import config_yaml
    from dc_ssdae.training.build import resolved
    from dc_ssdae.training.launch import resume_run, start_run
    from dc_ssdae.training.run import check_new

    if args.resume is None:
        path = Path(args.config.training.output or Path("runs") / args.name)
        if _is_main_process():
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
    if outcome.stopped_by is not None:
        _say(f"stopped by {outcome.stopped_by} after step {outcome.step}; go on with: dc-ssdae train --resume {path}")
    else:
        _say(f"done after step {outcome.step}: the model is {path / 'model'}")
    return 0


def _spent(training: "TrainingConfig") -> str:
    budgets = []
    if training.steps is not None:
        budgets.append(f"{training.steps} steps (--training.steps N goes on to N)")
    if training.minutes is not None:
        budgets.append(f"{training.minutes:g} minutes (--training.minutes M goes on to M)")
    return "its budget is spent: " + " or ".join(budgets)


def _read_run(path: Path) -> Any:
    from dc_ssdae.presets import read_yaml
    from dc_ssdae.training.config import RunConfig

    if not path.is_dir():
        raise InputError(f"--resume {path}: no such folder")
    file = path / "config.yaml"
    if not file.is_file():
        raise InputError(f"--resume {path}: it holds no config.yaml, so it is no run")
    return RunConfig.from_mapping(read_yaml(file, str(file)))


def _check_changes(before: dict[str, Any], after: dict[str, Any], path: Path) -> None:
    from dc_ssdae.training.config import MAY_CHANGE
    from dc_ssdae.training.config_checks import shown

    for section in before:
        for name, value in before[section].items():
            if after[section].get(name) == value or name in MAY_CHANGE.get(section, ()):
                continue
            wish = shown(after[section].get(name))
            raise InputError(
                f"{section}.{name} is {shown(value)} in {path} and cannot become {wish} when "
                f"the run goes on; a new run can start from its weights: --training.init_from {path}"
            )
    if added := sorted(set(after["losses"]) - set(before["losses"])):
        raise InputError(f"losses.{added[0]} is not part of {path}; start a new run with --training.init_from {path}")


def _take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take an option with its value out of the words."""
    value, rest = None, []
    position = 0
    while position < len(words):
        word = words[position]
        if word == name:
            if position + 1 == len(words) or words[position + 1].startswith("--"):
                raise InputError(f"{name} needs the folder of a run")
            position += 1
            value = words[position]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
        position += 1
    if value is not None and not value.strip():
        raise InputError(f"{name} is empty; it needs the folder of a run")
    return value, rest


def _told_once(error: InputError) -> InputError:
    """An error that every process meets, for one of them to tell."""
    return error if _is_main_process() else ToldElsewhere(str(error))


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(message: str) -> None:
    if _is_main_process():
        complain(PROGRAM, message)
