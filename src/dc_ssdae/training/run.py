"""A run's folder: what lies where, how it comes to be, and who may write in it.

RUN/config.yaml        the resolved configuration
RUN/environment.jsonl  a line each time the run is started: time, command line, versions, git commit, hardware
RUN/metrics.jsonl      a line a step;  evaluations.jsonl: a line an evaluation;  broken_images.jsonl: a line an image
RUN/model/             the averaged model, for `from_pretrained`
RUN/checkpoints/       see `checkpoint`
RUN/samples/           reconstructions of validation images
RUN/tensorboard/
RUN/teacher/           of a distillation: a copy of the model to learn from;  teacher_cache/: its results
"""

import fcntl
import filecmp
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from dc_ssdae.card import note_provenance
from dc_ssdae.errors import InputError
from dc_ssdae.files import folder_beside, sync, temporary_name, written_beside
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.model_folder import read_config, write_latent_statistics
from dc_ssdae.timing import describe_machine
from dc_ssdae.training.checkpoint import CheckpointFolder, check_tensors, read_state
from dc_ssdae.training.config import TrainingConfig, keeps_latent
from dc_ssdae.training.recipe import RECIPE_FILE
from dc_ssdae.weights import WEIGHTS

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = f"{WEIGHTS}.safetensors"


class RunFolder:
    """A run's folder; what lies in it is told at the top of this module.

    Args:
        path: the folder.
        keep_every: steps between checkpoints that are kept for good; None keeps the last and the best alone.
    """

    def __init__(self, path: Path, keep_every: int | None = None) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints", keep_every)
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.broken_images = path / "broken_images.jsonl"
        self.model = path / "model"
        self.teacher = path / "teacher"


def check_new(path: Path) -> None:
    """Refuse a place where a run cannot begin.

    Raises:
        InputError: something is there already.
    """
    if any((path / file).is_file() for file in (CONFIG_FILE, RECIPE_FILE)):
        raise InputError(f"{path} is a run already: give --resume {path}, or another --training.output")
    if os.path.lexists(path):
        raise InputError(f"{path} exists already and is no run; choose another --training.output")


def create_run(path: Path, config_text: str, model_config_text: str, teacher: Path | None = None) -> None:
    """Make a run's folder, with its configuration and the model's inside, by one rename.

    Args:
        path: of the run.
        config_text: of config.yaml.
        model_config_text: of model/config.json.
        teacher: the folder of a model to keep a copy of.

    Raises:
        InputError: something is there already.
        OSError: it cannot be written.
    """
    check_new(path)
    with new_folder(path) as partial:
        (partial / "model").mkdir()
        (partial / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        (partial / "model" / "config.json").write_text(model_config_text, encoding="utf-8")
        if teacher is not None:
            (partial / "teacher").mkdir()
            for name in ("config.json", WEIGHTS_FILE):
                # Not a link, through which a change of the file there would change this one too.
                shutil.copyfile(teacher / name, partial / "teacher" / name)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes its place at the end of the block by one rename, unless something failed.

    Args:
        path: of the folder.

    Raises:
        OSError: it cannot be written, or something is there by now.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process has left
    with folder_beside(path, partial):
        yield partial
        for entry in (*partial.rglob("*"), partial):
            if not entry.is_symlink():
                sync(entry)
        partial.rename(path)
        sync(path.parent)


def remove_run(path: Path) -> None:
    """Remove a run's folder.

    Raises:
        InputError: the run is being trained.
        OSError: it cannot be removed.
    """
    away = temporary_name(path)
    with run_lock(path):
        path.rename(away)  # so that no part of it is left under its name
    shutil.rmtree(away)


def is_finished(run: RunFolder, training: TrainingConfig) -> bool:
    """Whether the last checkpoint has the whole budget behind it, and what is done at the end.

    Raises:
        InputError: the checkpoint is damaged.
    """
    if (last := run.checkpoints.last()) is None:
        return False
    state = read_state(last)
    return training.progress(state["step"], state["seconds"]) >= 1.0 and not state.get("incomplete")


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder; the system ends the lock with this process, however that ends.

    Args:
        path: of the folder of a run or of a recipe.

    Raises:
        InputError: another process has the lock.
    """
    with (path / ".lock").open("a+b", buffering=0) as file:
        try:
            # Not flock, which the processes that read images would inherit, and hold for seconds after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read(200).decode("utf-8", "replace") or "another process"
            raise InputError(f"{path} is being trained by {owner}; stop that first") from None
        except OSError:  # some file systems have no locks
            pass
        yield


def publish_model(run: RunFolder, checkpoint: Path, state: Mapping[str, Any], recovers: bool = False) -> None:
    """Make a checkpoint's averaged weights those of RUN/model, by one rename; without a second copy where it can.

    A run that has skipped all its steps has no model yet.

    Args:
        run: the folder.
        checkpoint: the checkpoint's folder.
        state: of the checkpoint: what is known of the latent and of the model's provenance.
        recovers: leave what has been found out since about the weights that are there: statistics and figures.

    Raises:
        InputError: the checkpoint is damaged.
        OSError: it cannot be written.
    """
    if 0 < state["step"] == state.get("skipped_steps"):
        return
    before, weights, published = read_config(run.model), checkpoint / "ema.safetensors", run.model / WEIGHTS_FILE
    stays = recovers and published.is_file() and filecmp.cmp(weights, published)
    if not stays:
        if recovers:
            check_tensors(checkpoint, ["ema"])
        with written_beside(published) as beside:
            try:
                os.link(weights, beside)
            except OSError:
                shutil.copy(weights, beside)
    measured, provenance = state.get("latent_statistics"), state.get("provenance")
    # Earlier versions did not tell it.
    stays_by_setting = keeps_latent(state.get("settings", {}).get("training.train"))
    latent_stays = measured is None and state.get("keeps_latent", stays_by_setting)
    if not latent_stays and not (stays and before.get("latents_mean") is not None):
        write_latent_statistics(run.model, None if measured is None else LatentStatistics(**measured))
    if provenance is not None:
        there = before.get("provenance") or {}
        is_same = stays and there.get("steps") == provenance.get("steps")
        note_provenance(run.model, there if is_same else provenance)
    sync(run.model)


def recover_run(run: RunFolder) -> None:
    """Do what a killed run has left undone: remove what is half-written, link the best, publish the last's model.

    Raises:
        InputError: the last checkpoint is damaged.
        OSError: something cannot be written.
    """
    run.checkpoints.recover()
    for entry in run.model.glob(".*.partial"):
        entry.unlink()
    if (last := run.checkpoints.last()) is not None:
        publish_model(run, last, read_state(last), recovers=True)


def describe_environment(device: torch.device, processes: int, distribution: str) -> dict[str, Any]:
    """Describe where, when and with what a run starts.

    Args:
        device: of this process.
        processes: how many train together.
        distribution: how they do, in Accelerate's words.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "versions": {package.name: package.version for package in distributions()},
        "git": _git_state(Path(__file__).parent),
        "git_of_folder": _git_state(Path.cwd()),
        "processes": processes,
        "distribution": distribution,
        **describe_machine(device),
    }


def _git_state(folder: Path) -> str | None:
    """The commit of a working tree, with "-dirty" where files differ from it; None where there is no git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return found.stdout.strip() or None if found else None
