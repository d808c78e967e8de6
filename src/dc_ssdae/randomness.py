"""Random numbers from (seed, step, place in the global batch) and nothing else, so that no state needs to be stored."""

import numpy as np
import torch

# The first word of each seed sequence, so that no two purposes share a stream.
_IMAGE, _ORDER, _REPLACEMENT, _AMBIENT = range(4)


def image_generator(seed: int, step: int, place: int) -> torch.Generator:
    """Make the CPU generator of one image in one step: its crop, level, noise and latent's noise, in that order.

    Args:
        seed: of the run, 0 or more.
        step: from 0.
        place: of the image in the global batch, from 0.
    """
    return torch.Generator().manual_seed(_word(_IMAGE, seed, step, place))


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


def _word(*entropy: int) -> int:
    return int(np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0])
