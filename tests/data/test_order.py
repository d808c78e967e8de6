"""Every epoch is a permutation, drawn anew, that stays within few shards at a time."""

from collections import Counter

import numpy as np
import pytest

from dc_ssdae.data.order import MIXED_BLOCKS, permutation


@pytest.mark.parametrize("blocks", [(1,), (100,), (0, 5, 0, 3), (3,) * (3 * MIXED_BLOCKS + 5)])
@pytest.mark.parametrize("epoch", [0, 1000])
def test_an_epoch_is_a_permutation(blocks: tuple[int, ...], epoch: int) -> None:
    order = permutation(blocks, 5, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(sum(blocks)))


@pytest.mark.parametrize("blocks", [(4,), (2, 2), (1, 1, 1, 1), (3, 1)])
def test_with_few_blocks_every_order_is_as_likely_as_the_next(blocks: tuple[int, ...]) -> None:
    counts = Counter(tuple(permutation(blocks, 0, epoch)) for epoch in range(4800))
    assert len(counts) == 24
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_squared < 23 + 4 * (2 * 23) ** 0.5


def test_images_are_mixed_within_few_shards_at_a_time() -> None:
    blocks = (10,) * (3 * MIXED_BLOCKS)
    shards = permutation(blocks, 0, 0) // 10
    groups = [set(shards[start : start + 10 * MIXED_BLOCKS]) for start in range(0, len(shards), 10 * MIXED_BLOCKS)]
    assert [len(group) for group in groups] == [MIXED_BLOCKS] * 3
    assert not groups[0] & groups[1]
    # Within a group, neighbours come from the same shard about as rarely as chance has it: 9 of 639.
    assert np.mean(shards[1:] == shards[:-1]) < 3 * 9 / 639
    # And which shards are together is drawn anew.
    assert set(permutation(blocks, 0, 1)[: 10 * MIXED_BLOCKS] // 10) != groups[0]
