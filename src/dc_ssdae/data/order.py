"""The order in which a run goes through its images, as a function of the seed and the position alone."""

from functools import lru_cache

import numpy as np

from dc_ssdae.randomness import epoch_generator

MIXED_BLOCKS = 64
"""Shards that are mixed with each other. Reads then stay within so many files, which slow disks want."""


@lru_cache(maxsize=1)  # 8 bytes per image
def permutation(blocks: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """Draw an epoch's order.

    Blocks are shuffled, and so are the images of each `MIXED_BLOCKS` of them together: with no more blocks than
    that, every order is as likely as the next.

    Args:
        blocks: lengths of the runs of images that are cheap to read together, in order; one for a folder.
        seed: of the run.
        epoch: from 0.

    Returns:
        int64 (N,): a permutation of 0 … N - 1.
    """
    generator = epoch_generator(seed, epoch)
    starts = np.concatenate([[0], np.cumsum(blocks)[:-1]]).astype(np.int64)
    shuffled = generator.permutation(len(blocks))
    parts = []
    for first in range(0, len(blocks), MIXED_BLOCKS):
        group = shuffled[first : first + MIXED_BLOCKS]
        indices = np.concatenate([np.arange(starts[i], starts[i] + blocks[i]) for i in group])
        parts.append(generator.permutation(indices))
    return np.concatenate(parts)
