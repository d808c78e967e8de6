"""Random numbers are functions of what they are for; no two purposes or places share a stream."""

import itertools

import numpy as np
import torch

from dc_ssdae.randomness import epoch_generator, image_generator, noise_generator, replacement_index, seed_ambient


def test_an_images_stream_depends_on_seed_step_and_place_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = torch.randn(5, generator=image_generator(3, 4, 5))
    epoch_generator(0, 0)
    replacement_index(0, 0, 0, 10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(first, torch.randn(5, generator=image_generator(3, 4, 5)))


def test_neighbouring_places_are_not_correlated() -> None:
    """Of 400 neighbours the correlation of 50 numbers each is a standard normal over the square root of 20,000."""
    rows = torch.stack([torch.randn(50, generator=image_generator(0, 0, place)) for place in range(401)]).double()
    correlation = (rows[1:] * rows[:-1]).mean()
    assert abs(float(correlation)) < 4 / 20_000**0.5


def test_purposes_do_not_share_a_stream() -> None:
    numbers = set()
    for a, b in itertools.product(range(20), range(20)):
        numbers.add(image_generator(0, a, b).initial_seed())
        numbers.add(noise_generator(0, a, b).initial_seed())
        seed_ambient(0, a, b)
        numbers.add(torch.initial_seed())
        numbers.add(replacement_index(0, a, b, 2**63))
    assert len(numbers) == 4 * 400


def test_epochs_differ_and_come_back() -> None:
    drawn = [epoch_generator(seed, epoch).integers(0, 2**62) for seed in range(5) for epoch in range(5)]
    assert len(set(drawn)) == 25
    assert epoch_generator(2, 3).integers(0, 2**62) == drawn[13]
