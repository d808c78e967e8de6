"""What a command leaves, and the photos and models that the tests of several commands make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dc_ssdae import DCSSDAE

WEIGHTS = "diffusion_pytorch_model.safetensors"

PEERS = """
from torch.nn import functional as F

def nan(x):
    return x / 0 * 0

def bug(x):
    return 1 // 0

def greedy(x):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

class Blocks:
    def encode(self, x):
        return F.avg_pool2d(x, 8)

    def decode(self, z):
        return F.interpolate(z, scale_factor=8)
"""
"""Autoencoders of a user's, for the fixture `workplace`."""


class Outcome(NamedTuple):
    """What a run of the command line left: its exit code, and the lines of standard output and error."""

    code: int
    out: list[str]
    err: list[str]

    def json(self) -> Any:
        return json.loads("\n".join(self.out))


Run = Callable[..., Outcome]
Refusal = Callable[..., str]
Words = tuple[object, ...]


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random pixels, uint8 (height, width, channels)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def save_photo(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels(height, width, seed=seed)).save(path)
    return path


def save_photos(folder: Path, *names: str) -> Path:
    """A folder with a PNG of 40 by 52 pixels (height by width) under each name."""
    for seed, name in enumerate(names):
        save_photo(folder / f"{name}.png", 40, 52, seed)
    return folder


def save_model(folder: Path, **settings: object) -> Path:
    """Save the demo preset (f8, c4), or what `settings` make of it, with random weights."""
    if factor := settings.get("downsample_factor"):
        halvings = int(factor).bit_length() - 1  # type: ignore[call-overload]
        settings["encoder"] = {"widths": [16] * (halvings + 1), "depths": [0] + [1] * halvings}
        settings["encoder"]["block_types"] = ["ResBlock"] * (halvings + 1)  # type: ignore[index]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        DCSSDAE.from_preset("demo", **settings).save_pretrained(folder)
    return folder
