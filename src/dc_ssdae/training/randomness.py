"""Random numbers of a training step, from (seed, step, place in the global batch) and nothing else."""

import numpy as np
import torch


def image_generator(seed: int, step: int, index: int) -> torch.Generator:
    """Make the CPU generator of one image in one step: its crop, level, noise and latent sample, in that order.

    Args:
        seed: of the run, 0 or more.
        step: from 0.
        index: the image's place in the global batch, from 0.
    """
    state = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
