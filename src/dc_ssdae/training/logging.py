"""What a run writes down: a line a step, TensorBoard, Weights & Biases, a progress bar, pictures."""

import json
import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dc_ssdae.data.images import write_png
from dc_ssdae.data.loader import BrokenImage
from dc_ssdae.errors import InputError
from dc_ssdae.files import write_whole
from dc_ssdae.training.config import RunConfig, TrainingConfig
from dc_ssdae.training.run import RunFolder

RATE_SMOOTHING = 0.1
"""Of the images a second that the progress bar shows; metrics.jsonl has every step's own."""


class JsonLines:
    """A file with one JSON object a line.

    A line that cannot be written, the disk being full, is kept and tried again with the next one.

    Args:
        path: the file; made with the first line.
        warn: called with one line when writing begins to fail.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._pending = b""
        self._failing = False

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an object; numbers that are not finite become null."""
        finite = {key: finite_or_none(value) for key, value in entry.items()}
        self._pending += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what is pending, whole lines only."""
        if not self._pending:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(self._pending) != len(self._pending):
                    file.truncate(before)
                    raise OSError("not enough space for a line")
            self._pending = b""
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._warn(f"{self.path} cannot be written ({error.strerror or error}); its lines are kept in memory")
            self._failing = True

    def cut(self, step: float, first: int = 0) -> None:
        """Keep the lines of steps before `step`, and whole lines alone: what comes after is about to be done again.

        Args:
            step: the first that is not kept.
            first: of the file's first line; where it is lower, as in files that counted from 0, all lines are raised.

        Raises:
            OSError: the shorter file cannot be written; the longer one stays.
        """
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        lines: list[bytes] = []
        raised = 0
        for line in content.splitlines(keepends=True):
            entry = _parse(line)
            if not line.endswith(b"\n") or not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                continue
            if not lines:
                raised = max(0, first - entry["step"])
            entry["step"] += raised
            if entry["step"] < step:
                lines.append(json.dumps(entry).encode() + b"\n" if raised else line)
        kept = b"".join(lines)
        if kept != content:
            write_whole(self.path, kept)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; one that a kill cut short is passed over.

    Args:
        path: of the file; a missing one has no lines.
    """
    if not path.is_file():
        return []
    return [entry for line in path.read_bytes().split(b"\n") if isinstance(entry := _parse(line), dict)]


class Loggers:
    """Everything a run tells about itself, in the main process; elsewhere it is silent.

    Args:
        run: the folder.
        config: of the run.
        active: False for processes that stay silent.
        first_step: steps done before this start of the run; later lines of an earlier start are cut.
        seconds: of training that earlier starts took.
        evaluated_at: step of the last evaluation that counts; None is `first_step`.

    Raises:
        InputError: Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        active: bool,
        first_step: int,
        seconds: float = 0.0,
        evaluated_at: int | None = None,
    ) -> None:
        self.active = active
        self.run = run
        self._metrics = JsonLines(run.metrics, self.say)
        self._evaluations = JsonLines(run.evaluations, self.say)
        self._broken = JsonLines(run.broken_images, self.say)
        self._bar: Any = None
        self._rate: float | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._named: set[str] = set()
        if not active:
            return
        self._metrics.cut(first_step + 1, first=1)
        self._evaluations.cut((first_step if evaluated_at is None else evaluated_at) + 1)
        self._broken.cut(math.inf)
        self._named = {line["name"] for line in read_lines(run.broken_images) if "name" in line}
        if config.training.wandb:
            self._wandb = _start_wandb(run, config)
        self._first_step = first_step
        self._open_tensorboard()
        self._bar = _progress_bar(run.path.name, config.training, first_step, seconds)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            tqdm.write(message, file=sys.stderr)

    def step(self, entry: Mapping[str, Any]) -> None:
        """Log a step: `step` (done), `loss/…`, `gradient_norm`, `lr`, `images_per_second`, `seconds`, `memory_gib`."""
        if not self.active:
            return
        self._metrics.write(entry)
        scalars = {
            key: value
            for key, value in entry.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._log_scalars({name if "/" in name else f"train/{name}": v for name, v in scalars.items()}, entry["step"])
        loss = scalars.get("loss/total")
        shown = "not finite" if loss is None else f"{loss:.4g}"
        done = entry["step"]
        by_steps = self._bar.unit == "step"
        step = "" if by_steps else f"step {done}, "
        now = entry["images_per_second"]
        self._rate = now if self._rate is None else self._rate + RATE_SMOOTHING * (now - self._rate)
        self._bar.set_postfix_str(f"{step}{self._rate:.1f} images/s, loss {shown}", refresh=False)
        self._bar.update(min(done if by_steps else entry["seconds"], self._bar.total) - self._bar.n)

    def evaluation(self, entry: Mapping[str, Any]) -> None:
        """Log an evaluation: `step` (steps done), the metrics, `images`."""
        if not self.active:
            return
        self._evaluations.write(entry)
        values = {key: value for key, value in entry.items() if isinstance(value, float)}
        if self._tensorboard is None:
            self._open_tensorboard()
        self._log_scalars({f"evaluation/{name}": value for name, value in values.items()}, entry["step"])
        self.say(f"step {entry['step']}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def broken(self, images: Sequence[BrokenImage], step: int, split: str) -> None:
        """Name each unreadable image of a split ("train" or "validation") once, over all starts of the run."""
        if not self.active:
            return
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
        self._on_tensorboard(lambda writer: writer.add_image("reconstructions", grid, step))
        if self._wandb is not None:
            self._wandb.log({"reconstructions": self._wandb.Image(grid.permute(1, 2, 0).numpy())}, step=step)
        try:
            self.run.samples.mkdir(exist_ok=True)
            write_png(grid, self.run.samples / f"step-{step:08d}.png")
        except (OSError, InputError) as error:
            self.say(f"{self.run.samples}: {error}")

    def close(self) -> None:
        """Flush and close everything."""
        for lines in (self._metrics, self._evaluations, self._broken):
            lines.flush()
        if self._bar is not None:
            self._bar.close()
        self._on_tensorboard(lambda writer: writer.close())
        if self._wandb is not None:
            self._wandb.finish()

    def _open_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            purge_step = self._first_step + 1 if self._first_step else None
            self._tensorboard = SummaryWriter(str(self.run.tensorboard), purge_step=purge_step)
        except OSError as error:
            self._give_up_tensorboard(error)

    def _on_tensorboard(self, work: Callable[[Any], None]) -> None:
        if self._tensorboard is not None:
            try:
                work(self._tensorboard)
            except OSError as error:
                self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: OSError) -> None:
        """Go on without; the disk may be full. What is lost stands in metrics.jsonl.

        The writer never works again: the next evaluation opens another.
        """
        self._tensorboard = None
        self.say(f"{self.run.tensorboard} cannot be written ({error.strerror or error}), until the next evaluation")

    def _log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        def write(writer: Any) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        self._on_tensorboard(write)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)


def _progress_bar(name: str, training: TrainingConfig, first_step: int, seconds: float) -> Any:
    """A bar over the steps, or, where the clock alone ends the run, over its seconds."""
    by_steps = training.steps is not None
    terminal = sys.stderr.isatty()
    clock_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    return tqdm(
        total=training.steps if by_steps else 60.0 * (training.minutes or 0.0),
        initial=first_step if by_steps else seconds,
        desc=name,
        unit="step" if by_steps else "s",
        bar_format=None if by_steps else clock_format,
        file=sys.stderr,
        mininterval=0.5 if terminal else 30.0,
        dynamic_ncols=terminal,
        smoothing=0.05,
    )


def _start_wandb(run: RunFolder, config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError("training.wandb is true, but Weights & Biases is not installed: pip install wandb") from None
    wandb.init(
        project=config.training.wandb_project,
        name=run.path.name,
        id=_wandb_id(run),
        dir=str(run.path),
        config=config.to_mapping(),
        resume="allow",
    )
    return wandb


def _wandb_id(run: RunFolder) -> str:
    """What Weights & Biases knows the run by; folders of the same name are different runs."""
    path = run.path / "wandb-id"
    if not path.is_file():
        path.write_text(f"{run.path.name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def finite_or_none(value: Any) -> Any:
    """Put None for numbers that are not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
