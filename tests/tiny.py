"""What the tests of the loop share: a model that trains in milliseconds, batches, pictures, configurations."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor

from dc_ssdae.data.sources import open_sources
from dc_ssdae.training.build import build_model
from dc_ssdae.training.checkpoint import Checkpoint, read_checkpoint
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.loop import Outcome
from dc_ssdae.training.run import RunFolder, create_run
from dc_ssdae.training.start import resume_run, start_processes, start_run
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Trainer

SIZE = 32
VARIABLE = {"images_per_second", "seconds", "memory_gib"}

MODEL: dict[str, Any] = {
    "latent_channels": 4,
    "downsample_factor": 8,
    "encoder": {"init_args": {"widths": [8, 16, 16, 16], "depths": [0, 1, 1, 1]}},
    "decoder": {
        "init_args": {
            "channels": 8,
            "multipliers": [1, 1, 2, 2],
            "middle_layers": 1,
            "blocks_per_level": 1,
            "norm_groups": 4,
            "heads": 2,
        }
    },
}


def make_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Write PNGs of smooth random colours, 40 to 56 pixels a side."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = (int(generator.integers(40, 57)), int(generator.integers(40, 57)))
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"image{index:04d}.png")
    return folder


def fill(disk: Path) -> None:
    """Leave no room on a file system."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def run_config(
    root: Path | str | None = None,
    data: dict[str, Any] | None = None,
    losses: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    """A run of the tiny model: 8 steps of 4 images, a checkpoint every 2, no evaluation but at the end."""
    return RunConfig.from_mapping(
        {
            "model": {**MODEL, **(model or {})},
            "data": {
                "root": None if root is None else str(root),
                "image_size": SIZE,
                "workers": 0,
                "validation_images": 5,
                **(data or {}),
            },
            "training": {
                "steps": 8,
                "batch_size": 4,
                "optimizer": "adamw",
                "lr": 1e-3,
                "precision": "float32",
                "ema_decay": 0.9,
                "ema_start": 1,
                "checkpoint_every": 2,
                "evaluate_every": 1000,
                "sample_images": 0,
                **training,
            },
            "losses": {"lpips": 0.0, "repa": 0.0, **(losses or {})},
        }
    )


def start(config: RunConfig, path: Path) -> Outcome:
    return start_run(config, yaml.safe_dump(config.to_mapping()), path, cpu=True)


def resume(config: RunConfig, path: Path) -> Outcome | None:
    return resume_run(config, None, path, cpu=True)


def trainer_of(config: RunConfig, path: Path) -> Trainer:
    """A trainer before its first step, in a new run's folder or in one that is there."""
    if not path.exists():
        teacher = None if config.distillation is None else Path(config.distillation.teacher)
        create_run(path, yaml.safe_dump(config.to_mapping()), build_model(config.model).to_json_string(), teacher)
    data = config.data
    sources = open_sources(data.root, data.dataset, data.validation, data.cache)
    accelerator, processes = start_processes(None, cpu=True)
    return Trainer(config, RunFolder(path, config.training.keep_every), accelerator, processes, sources, StopRequest())


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps, without what differs between equal runs."""
    entries = read_lines(path / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key not in VARIABLE} for entry in entries]


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, noise, level and latent noise of a step's global batch, in the order that a training step takes."""
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randint(0, 256, (size, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        torch.randn(size, 3, SIZE, SIZE, generator=generator),
        torch.rand(size, generator=generator),
        torch.randn(size, 4, SIZE // 8, SIZE // 8, generator=generator),
    )


def last(path: Path) -> Checkpoint:
    """The last checkpoint of a run."""
    folder = RunFolder(path).checkpoints.last()
    assert folder is not None
    return read_checkpoint(folder)


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the same in shape, dtype and every bit; NaN and the sign of 0 count."""
    assert one.keys() == other.keys()

    def content(tensor: Tensor) -> tuple[torch.Size, torch.dtype, bytes]:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        return tensor.shape, tensor.dtype, bits.numpy().tobytes()

    return {name for name, tensor in one.items() if content(tensor) != content(other[name])}


def differences(one: Checkpoint, other: Checkpoint) -> set[str]:
    """The same of all files of two checkpoints, as FILE: NAME."""
    assert one.tensors.keys() == other.tensors.keys()
    return {f"{file}: {name}" for file in one.tensors for name in different(one.tensors[file], other.tensors[file])}


def forget_processes() -> None:
    """Let Accelerate begin anew: it keeps what it found in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
