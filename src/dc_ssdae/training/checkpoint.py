"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

    checkpoints/step-00002000/   model.safetensors  ema.safetensors  optimizer.safetensors  state.json
    checkpoints/last             symbolic link to the newest
    checkpoints/best             symbolic link to the best

A folder is written under another name, flushed to the disk and renamed; then the link is replaced by a rename. Killed
at any instant, `last` is a whole checkpoint, the old one or the new one.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from dc_ssdae.errors import InputError
from dc_ssdae.files import folder_beside, replace_link, sha256, sync, temporary_name, write_json
from dc_ssdae.weights import read_safetensors

FORMAT = 1
STATE_FILE = "state.json"
TENSOR_FILES = ("model", "ema", "optimizer")
LAST, BEST = "last", "best"

_FOLDER = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """A whole state.

    tensors: by file ("model", "ema", "optimizer"), then by name; on the CPU, not sharded.
    state: everything else, as JSON holds it; `step` says how many steps are done, and `best`, where there is one, holds
        the `step` of the best checkpoint.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        path: the folder; made when the first checkpoint is written.
        keep_every: steps between checkpoints that are kept for good; None keeps the last and the best alone.
    """

    def __init__(self, path: Path, keep_every: int | None = None) -> None:
        self.path = path
        self.keep_every = keep_every

    def save(self, checkpoint: Checkpoint, is_best: bool = False) -> Path:
        """Write a checkpoint, make it the last and perhaps the best, and remove those that nothing keeps.

        Args:
            checkpoint: the whole state; without tensors where the step is written already and only its state changes.
            is_best: whether it is the best so far.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError, SafetensorError: it cannot be written, as on a full disk. What was there before stays.
        """
        step = checkpoint.state["step"]
        target = self.of_step(step)
        if not checkpoint.tensors:
            state = {"format": FORMAT, **checkpoint.state, "sha256": read_state(target).get("sha256")}
            write_json(target / STATE_FILE, state)
        else:
            with folder_beside(target) as beside:
                write_checkpoint(beside, checkpoint)
                if target.exists():  # from a run that was killed before the link followed
                    target.rename(temporary_name(target))
                beside.rename(target)
                sync(self.path)
            self._link(LAST, step)
        if is_best:
            self._link(BEST, step)
        self.clean()
        return target

    def of_step(self, step: int) -> Path:
        """The folder of the checkpoint after a number of steps, whether it is there or not."""
        return self.path / f"step-{step:08d}"

    def last(self) -> Path | None:
        """Find the newest checkpoint's folder; None before the first.

        Raises:
            InputError: it has been taken away; the run would begin anew.
        """
        link = self.path / LAST
        if link.is_symlink() and not link.exists():
            raise InputError(f"{link} leads to {os.readlink(link)}, which is not there: link another checkpoint")
        return link.resolve() if link.exists() else None

    def best(self) -> Path | None:
        """Find the best checkpoint's folder; None before the first."""
        return (self.path / BEST).resolve() if (self.path / BEST).exists() else None

    def recover(self) -> None:
        """Do what a killed run has left undone: link the best checkpoint, and `clean`.

        A copy of the run may hold folders in the place of links, or no links: they are made again.

        Raises:
            InputError: the last checkpoint is damaged.
        """
        for name in (LAST, BEST):
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink():
                target = self.of_step(read_state(folder)["step"])
                folder.rename(temporary_name(target) if target.exists() else target)
        if not (self.path / LAST).is_symlink() and (steps := self._steps()):
            self._link(LAST, max(steps))  # whole, since it has its name
        last = self.last()
        best = None if last is None else (read_state(last).get("best") or {}).get("step")
        if best is not None and self.of_step(best).is_dir() and self.of_step(best).resolve() != self.best():
            self._link(BEST, best)
        self.clean()

    def clean(self) -> None:
        """Remove what a killed run left half-written, and the checkpoints that nothing keeps."""
        linked = self.last(), self.best()
        for step in self._steps():
            lasting = self.keep_every is not None and step % self.keep_every == 0
            if not lasting and self.of_step(step).resolve() not in linked:
                shutil.rmtree(self.of_step(step), ignore_errors=True)
        for entry in self.path.glob("*.partial"):
            if entry.is_symlink():
                entry.unlink()
            shutil.rmtree(entry, ignore_errors=True)

    def _steps(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return [int(match[1]) for entry in self.path.glob("step-*") if (match := _FOLDER.fullmatch(entry.name))]

    def _link(self, name: str, step: int) -> None:
        # A link's target is given by its name alone, so that the run's folder may be moved.
        replace_link(self.path / name, self.of_step(step).name)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's files into a folder, made if need be, and flush them to the disk.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    folder.mkdir(exist_ok=True)
    checksums = {}
    for name in TENSOR_FILES:
        path = folder / f"{name}.safetensors"
        path.touch()  # with the umask's permissions, which safetensors does not heed
        mode = path.stat().st_mode
        save_file(dict(checkpoint.tensors[name]), path, metadata={"format": "pt"})
        path.chmod(mode)
        sync(path)
        checksums[name] = sha256(path)
    write_json(folder / STATE_FILE, {"format": FORMAT, **checkpoint.state, "sha256": checksums})


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: a file is missing or damaged, or of another version of the format.
    """
    state = read_state(folder)
    check_tensors(folder, TENSOR_FILES)
    state.pop("sha256", None)  # of these files; others will have their own
    return Checkpoint({name: read_safetensors(folder / f"{name}.safetensors") for name in TENSOR_FILES}, state)


def check_tensors(folder: Path, names: Iterable[str]) -> None:
    """Refuse files of a checkpoint that are not as they were written; without checksums, as of old, all are taken.

    Raises:
        InputError: names the file.
    """
    checksums = read_state(folder).get("sha256") or {}
    for name in names:
        path = folder / f"{name}.safetensors"
        if name in checksums and path.is_file() and sha256(path) != checksums[name]:
            raise InputError(f"{path} is damaged; to go on from another: ln -sfn step-NUMBER {folder.parent / LAST}")


def read_state(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint holds besides tensors.

    Raises:
        InputError: as `read_checkpoint`.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "step" not in state:
        raise InputError(f"{path} is not a checkpoint's state of format {FORMAT}")
    return state
