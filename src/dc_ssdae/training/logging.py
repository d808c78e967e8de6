"""What a run writes down: a line per step, TensorBoard, Weights & Biases, a progress bar, pictures."""

import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from torch import Tensor
from tqdm import tqdm

from dc_ssdae.data.images import write_png
from dc_ssdae.data.loader import BrokenImage
from dc_ssdae.errors import InputError
from dc_ssdae.files import finite, write_whole
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.run import RunFolder

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class JsonLines:
    """A file with one JSON object per line.

    A line that cannot be written, because the disk is full, is kept and tried again with the next one.

    Args:
        path: the file; made with the first line.
        warn: called with one line when writing begins to fail.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._pending = b""

    def write(self, *entries: Mapping[str, Any]) -> None:
        """Append objects, and what could not be written before; numbers that are not finite become null."""
        was_failing = self._pending != b""
        self._pending += b"".join(map(_line, entries))
        if not self._pending:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(self._pending) != len(self._pending):
                    file.truncate(before)  # whole lines only
                    raise OSError("not enough space for a line")
            self._pending = b""
        except OSError as error:
            if not was_failing:
                self._warn(f"{self.path} cannot be written ({error.strerror or error}); its lines are kept in memory")

    def cut(self, step: float) -> None:
        """Keep the whole lines of steps before `step`, and no others: what comes after is about to be done again.

        Raises:
            OSError: the shorter file cannot be written; the longer one stays.
        """
        content = b"".join(_line(entry) for entry in read_lines(self.path) if entry["step"] < step)
        if self.path.is_file() and content != self.path.read_bytes():
            write_whole(self.path, content)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; one that a kill cut short is passed over.

    Args:
        path: of the file; a missing one has no lines.
    """
    entries = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(entry), allow_nan=False).encode() + b"\n"


class Loggers:
    """Everything a run tells about itself, in the main process; elsewhere it is silent.

    Args:
        run: the folder.
        config: of the run.
        active: False for processes that stay silent.
        first_step: steps done before this start of the run; later lines of an earlier start are cut.
        seconds: of training that earlier starts took.
        evaluated: step of the last evaluation that counts.
    """

    def __init__(
        self, run: RunFolder, config: RunConfig, active: bool, first_step: int, seconds: float = 0.0, evaluated: int = 0
    ) -> None:
        self.active = active
        self.run = run
        self._training = config.training
        files = (run.metrics, run.evaluations, run.broken_images) if active else [Path(os.devnull)] * 3
        self._metrics, self._evaluations, self._broken = [JsonLines(file, self.say) for file in files]
        self._metrics.cut(first_step + 1)
        self._evaluations.cut(evaluated + 1)
        self._broken.cut(math.inf)
        self._named = {line["name"] for line in read_lines(self._broken.path)}
        self._trackers: list[GeneralTracker] = [_TensorBoard("tensorboard", run.path, purge_step=first_step + 1)]
        if active and config.training.wandb:
            self._trackers.append(_wandb(run, config))
        self._track("start")
        done = min(config.training.progress(first_step, seconds), 1.0)  # of the budget, in steps or time
        interval = 0.5 if sys.stderr.isatty() else 30.0
        name, silent = run.path.name, not active
        self._bar = tqdm(desc=name, total=1.0, initial=done, bar_format=_BAR, mininterval=interval, disable=silent)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            tqdm.write(message, file=sys.stderr)

    def step(self, entry: Mapping[str, Any]) -> None:
        """Log a step: `step` (done), `loss/…`, `gradient_norm`, `lr`, `images_per_second`, `seconds`, `memory_gib`."""
        self._metrics.write(entry)
        self._track_numbers(entry, "train")
        shown = f"step {entry['step']}, {entry['images_per_second']:.1f} images/s, loss {entry['loss/total']:.4g}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(min(self._training.progress(entry["step"], entry["seconds"]), 1.0) - self._bar.n)

    def evaluation(self, entry: Mapping[str, Any]) -> None:
        """Log an evaluation: `step` (steps done), the metrics, `images`."""
        self._evaluations.write(entry)
        values = {key: value for key, value in entry.items() if isinstance(value, float)}
        self._track_numbers({"step": entry["step"], **values}, "evaluation")
        self.say(f"step {entry['step']}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def broken(self, images: Sequence[BrokenImage], step: int, split: str) -> None:
        """Name each unreadable image of a split ("train" or "validation") once, over all starts of the run."""
        for image in images:
            if image.name not in self._named:
                self._named.add(image.name)
                self._broken.write({"step": step, "split": split, "name": image.name, "reason": image.reason})
                self.say(f"skipped: {image.reason}")

    def pictures(self, originals: Tensor, reconstructions: Tensor, step: int) -> None:
        """Log reconstructions below their originals.

        Args:
            originals: uint8 (B, 3, S, S).
            reconstructions: uint8 of that shape.
            step: steps done.
        """
        if not self.active:
            return
        grid = torch.cat([torch.cat(list(rows), dim=2) for rows in (originals, reconstructions)], dim=1)
        self._track("log_images", {"reconstructions": grid.permute(1, 2, 0)[None].numpy()}, step)
        file = self.run.path / "samples" / f"step-{step:08d}.png"
        try:
            file.parent.mkdir(exist_ok=True)
            write_png(grid, file)
        except (OSError, InputError) as error:
            self.say(f"{file}: {error}")

    def close(self) -> None:
        """Flush and close everything."""
        for lines in (self._metrics, self._evaluations, self._broken):
            lines.write()
        self._bar.close()
        self._track("finish")

    def _track_numbers(self, entry: Mapping[str, Any], section: str) -> None:
        """Log the numbers of an entry that are finite, under names with a section."""
        numbers = {}
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                numbers[name if "/" in name else f"{section}/{name}"] = value
        self._track("log", numbers, entry["step"])

    def _track(self, work: str, *given: Any) -> None:
        """Let the trackers do something; one that fails, as on a full disk, says so and is not used again."""
        for tracker in list(self._trackers if self.active else ()):
            try:
                getattr(tracker, work)(*given)
            except OSError as error:
                self._trackers.remove(tracker)
                self.say(f"{tracker.name} cannot be written ({error}), until the run is started again")


class _TensorBoard(TensorBoardTracker):
    """Takes pictures (N, H, W, 3), as the tracker of Weights & Biases does."""

    def log_images(self, values: dict[str, Any], step: int | None = None, **settings: Any) -> None:
        super().log_images(values, step, dataformats="NHWC", **settings)


def _wandb(run: RunFolder, config: RunConfig) -> WandBTracker:
    name, file = run.path.name, run.path / "wandb-id"
    if not file.is_file():  # folders of the same name are different runs
        file.write_text(f"{name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
    identity = {"name": name, "id": file.read_text(encoding="utf-8").strip(), "dir": str(run.path), "resume": "allow"}
    return WandBTracker(config.training.wandb_project, config=config.to_mapping(), **identity)
