"""Random numbers from a seed and a place or a name, and nothing else, so that no state needs to be stored."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

# The first word of each seed sequence, so that no two purposes share a stream.
_IMAGE, _ORDER, _REPLACEMENT, _AMBIENT, _NAMED, _RESAMPLING, _NOISE = range(7)


def image_generator(seed: int, step: int, place: int) -> torch.Generator:
    """Make the CPU generator of one image's crop in one step.

    Args:
        seed: of the run, 0 or more.
        step: from 0.
        place: of the image in the global batch, from 0.
    """
    return torch.Generator().manual_seed(_word(_IMAGE, seed, step, place))


def noise_generator(seed: int, step: int, place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make the generator, on a device, of one image's level and noise in one step; arguments as `image_generator`'s."""
    return torch.Generator(device).manual_seed(_word(_NOISE, seed, step, place))


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Make the generator of an epoch's order, from 0 on."""
    return np.random.default_rng(np.random.SeedSequence([_ORDER, seed, epoch]))


def replacement_index(seed: int, position: int, attempt: int, length: int) -> int:
    """Choose the image that stands in for a broken one.

    Args:
        seed: of the run.
        position: of the broken image among all images that the run draws, from 0.
        attempt: from 0; a replacement may be broken too.
        length: of the data set.
    """
    return _word(_REPLACEMENT, seed, position, attempt) % length


def seed_ambient(seed: int, step: int, process: int) -> None:
    """Seed PyTorch's default generators for a step: dropout in a user's own network is then reproducible too."""
    torch.manual_seed(_word(_AMBIENT, seed, step, process))


def named_generator(seed: int, name: str) -> torch.Generator:
    """Make the CPU generator of an image that is known by its name, wherever it stands among others."""
    return torch.Generator().manual_seed(_word(_NAMED, seed, *_digest(name)))


def resampling_counts(seed: int, names: Sequence[str], replicates: int) -> np.ndarray:
    """Draw how often each of some images is in each replicate of a Poisson bootstrap.

    The counts are Poisson's with mean 1 and depend on the image's name, not on its place or on the others: a sample
    that is never held in memory can be resampled in any order, in any number of processes (Hanley and MacGibbon 2006).

    Args:
        seed: 0 or more.
        names: of B images.
        replicates: how many, R.

    Returns:
        (B, R) int64.
    """
    rows = [
        np.random.default_rng(np.random.SeedSequence([_RESAMPLING, seed, *_digest(name)])).poisson(1.0, replicates)
        for name in names
    ]
    return np.stack(rows) if rows else np.zeros((0, replicates), dtype=np.int64)


def _digest(name: str) -> tuple[int, int]:
    """Two words that stand for a name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _word(*entropy: int) -> int:
    return int(np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0])
