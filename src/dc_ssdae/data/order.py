"""The order in which a run goes through its images, as a function of the seed and the position alone."""

from collections.abc import Sequence

import numpy as np

from dc_ssdae.randomness import epoch_generator

MIXED_BLOCKS = 64
"""Shards that are mixed with each other. Reads then stay within so many files, which slow disks want."""


class EpochOrder:
    """Permutations of a data set, one an epoch; the newest is kept in memory (8 bytes an image).

    Args:
        blocks: lengths of the runs of images that are cheap to read together, in order; one for a folder.
        seed: of the run.
    """

    def __init__(self, blocks: Sequence[int], seed: int) -> None:
        self.blocks = list(blocks)
        self.seed = seed
        self.length = sum(self.blocks)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        """The index of the image at a position, counted over all epochs."""
        epoch, place = divmod(position, self.length)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, permutation(self.blocks, self.seed, epoch)
        return int(self._epoch[1][place])


def permutation(blocks: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Draw an epoch's order.

    Blocks are shuffled, and so are the images of each `MIXED_BLOCKS` of them together: with no more blocks than
    that, every order is as likely as the next.

    Args:
        blocks: lengths, in the data set's order.
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
