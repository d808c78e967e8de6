"""Random numbers that depend only on a seed and a place or a name, so that no state needs to be stored."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

# The first word of each seed sequence, so that no two purposes share a stream.
_IMAGE, _ORDER, _REPLACEMENT, _AMBIENT, _NAMED, _RESAMPLING, _NOISE = range(7)


def image_generator(seed: int, step: int, place: int) -> torch.Generator:
    """Make the CPU generator for one image's crop in one step.

    Args:
        seed: the run's seed, 0 or more.
        step: counted from 0.
        place: the image's place in the global batch, from 0.
    """
    return torch.Generator().manual_seed(_word(_IMAGE, seed, step, place))


def noise_generator(seed: int, step: int, place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make the generator, on `device`, for one image's level and noise in one step; see `image_generator`."""
    return torch.Generator(device).manual_seed(_word(_NOISE, seed, step, place))


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Make the generator for the order of an epoch; epochs are counted from 0."""
    return np.random.default_rng(np.random.SeedSequence([_ORDER, seed, epoch]))


def replacement_index(seed: int, position: int, attempt: int, length: int) -> int:
    """Choose the image that replaces a broken one.

    Args:
        seed: the run's seed.
        position: the broken image's position among all images that the run draws, from 0.
        attempt: counted from 0; a replacement may be broken too.
        length: number of images in the data set.
    """
    return _word(_REPLACEMENT, seed, position, attempt) % length


def seed_ambient(seed: int, step: int, process: int) -> None:
    """Seed PyTorch's default generators for a step, so that dropout in a user's own network is reproducible too."""
    torch.manual_seed(_word(_AMBIENT, seed, step, process))


def named_generator(seed: int, name: str) -> torch.Generator:
    """Make the CPU generator for one image from its name, whatever its place among other images."""
    return torch.Generator().manual_seed(_word(_NAMED, seed, *_digest(name)))


def resampling_counts(seed: int, names: Sequence[str], replicates: int) -> np.ndarray:
    """Draw how often each image occurs in each replicate of a Poisson bootstrap (Hanley and MacGibbon 2006).

    The counts have a Poisson distribution with mean 1 and depend on the image's name, not on its place or on the other
    images. So a sample that is never held in memory can be resampled in any order, in any number of processes.

    Args:
        seed: 0 or more.
        names: names of B images.
        replicates: number R of replicates.

    Returns:
        (B, R) int64.
    """
    seeds = [np.random.SeedSequence([_RESAMPLING, seed, *_digest(name)]) for name in names]
    rows = [np.random.default_rng(of_name).poisson(1.0, replicates) for of_name in seeds]
    return np.array(rows, dtype=np.int64).reshape(len(names), replicates)


def _digest(name: str) -> tuple[int, int]:
    """Hash a name to two 64-bit words."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _word(*entropy: int) -> int:
    return int(np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0])
