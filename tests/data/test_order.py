"""Every epoch is a permutation, drawn anew, that stays within few shards at a time."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dc_ssdae.data.order import MIXED_BLOCKS, EpochOrder, permutation

SHAPES = {
    "one image": [1],
    "folder": [100],
    "shards": [10, 7, 1, 12],
    "empty shards": [0, 5, 0, 3],
    "many shards": [3] * (3 * MIXED_BLOCKS + 5),
}


@pytest.mark.parametrize("blocks", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("epoch", [0, 1, 1000])
def test_an_epoch_is_a_permutation(blocks: list[int], epoch: int) -> None:
    order = permutation(blocks, 5, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(sum(blocks)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation([100], seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(permutation([100], 2, 3)) in orders


@pytest.mark.parametrize("blocks", [[4], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_with_few_blocks_every_order_is_as_likely_as_the_next(blocks: list[int]) -> None:
    counts = Counter(tuple(permutation(blocks, 0, epoch)) for epoch in range(4800))
    assert len(counts) == 24
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_squared < 23 + 4 * (2 * 23) ** 0.5


def test_images_are_mixed_within_few_shards_at_a_time() -> None:
    blocks = [10] * (3 * MIXED_BLOCKS)
    shards = permutation(blocks, 0, 0) // 10
    groups = [set(shards[start : start + 10 * MIXED_BLOCKS]) for start in range(0, len(shards), 10 * MIXED_BLOCKS)]
    assert [len(group) for group in groups] == [MIXED_BLOCKS] * 3
    assert not groups[0] & groups[1]
    # Within a group, neighbours come from the same shard about as rarely as chance has it: 9 of 639.
    same = np.mean(shards[1:] == shards[:-1])
    assert same < 3 * 9 / 639
    # And which shards are together is drawn anew.
    other = permutation(blocks, 0, 1) // 10
    assert set(other[: 10 * MIXED_BLOCKS]) != groups[0]


def test_positions_are_counted_over_all_epochs() -> None:
    order = EpochOrder([3, 4], seed=1)
    expected = list(itertools.chain.from_iterable(permutation([3, 4], 1, epoch) for epoch in range(3)))
    assert [order[position] for position in range(21)] == expected
    assert order.length == 7


def test_a_position_does_not_depend_on_what_was_asked_before() -> None:
    expected = [EpochOrder([11], seed=1)[position] for position in range(44)]
    order = EpochOrder([11], seed=1)
    positions = np.random.default_rng(0).permutation(44)
    assert [order[int(position)] for position in positions] == [expected[position] for position in positions]
