"""Pixels and models that the tests of several commands make."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dc_ssdae import DCSSDAE


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random pixels, uint8 (height, width, channels)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), np.uint8)
    bands = [
        Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BILINEAR)
        for band in range(channels)
    ]
    return np.stack([np.array(band) for band in bands], axis=-1)


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
