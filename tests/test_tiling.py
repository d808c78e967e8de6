"""Tiles against closed forms, tiled models against whole ones, and seams in photos."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import image, patchwise, refusal, tiny
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.tiling import blend_tiles, check_tiling, tile_starts, tile_weights

pytestmark = pytest.mark.usefixtures("without_gradients")

SIDES = st.tuples(st.integers(1, 60), st.integers(2, 12), st.integers(0, 9)).filter(lambda side: side[2] < side[1])


class TestTiles:
    @settings(derandomize=True, deadline=None)
    @given(SIDES)
    def test_they_cover_a_side_overlap_and_lie_inside(self, side: tuple[int, int, int]) -> None:
        length, size, overlap = side
        starts, size = tile_starts(length, size, overlap), min(size, length)
        assert (starts[0], starts[-1]) == (0, length - size)
        assert all(0 < after - before <= size - overlap for before, after in itertools.pairwise(starts))

    def test_weights_are_ramps_over_the_overlap(self) -> None:
        first, second = tile_weights([0, 6], 8, 14, scale=2)  # 2 units overlap, which are 4 places
        ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])
        torch.testing.assert_close(first, torch.cat([torch.ones(12), ramp.flip(0), torch.zeros(12)]))
        torch.testing.assert_close(second, torch.cat([torch.zeros(12), ramp, torch.ones(12)]))

    @settings(derandomize=True, deadline=None, max_examples=30)
    @given(SIDES, SIDES, st.integers(1, 3))
    def test_what_tiles_do_alike_is_blended_to_the_whole(
        self, rows: tuple[int, int, int], columns: tuple[int, int, int], scale: int
    ) -> None:
        height, size, overlap = rows
        width = columns[0]
        whole = torch.arange(2.0 * height * width * scale**2).view(1, 2, height * scale, width * scale) % 17

        def compute(tile: Tensor) -> Tensor:
            assert max(tile.shape[2:]) <= size * scale
            return tile

        torch.testing.assert_close(blend_tiles(compute, [(whole, scale)], size, overlap, scale), whole)

    def test_defaults_the_least_overlap_and_what_does_not_fit(self) -> None:
        for factor, expected in ((8, (64, 16)), (32, (16, 4)), (128, (4, 1)), (256, (4, 1))):
            assert check_tiling(None, 0.25, factor) == expected
        assert check_tiling(64, 0.01, 8) == (8, 1)
        assert check_tiling(64, 0.0, 8) == (8, 0)
        assert "tile_size is 500; it must be a multiple of f = 8" in refusal(check_tiling, 500, 0.25, 8)
        assert "overlap is 0.8; it must be at least 0.0 and at most 0.75" in refusal(check_tiling, 64, 0.8, 8)
        assert "tile_size" in refusal(check_tiling, 64.0, 0.25, 8)


def shapes_decoded(model: DCSSDAE) -> list[torch.Size]:
    """A list that gets the shape of every batch of images that the decoder is called with."""
    shapes: list[torch.Size] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    return shapes


class TestModels:
    @pytest.mark.parametrize(("variance", "height"), [(True, 72), (False, 16)])
    def test_tiled_encoding_of_a_local_encoder_is_exact(self, variance: bool, height: int) -> None:
        model, x = patchwise(variance=variance), image(2, height, 104)
        whole = model.encode(x).latent_dist
        model.enable_tiling(32)
        tiled = model.encode(x).latent_dist
        for name in ("mean", "logvar") if variance else ("mean",):
            torch.testing.assert_close(getattr(tiled, name), getattr(whole, name), atol=1e-5, rtol=0)
        assert (tiled.logvar is None) == (not variance)

    @pytest.mark.parametrize(
        ("dynamics", "decoding"),
        [
            ({}, {}),
            ({}, {"sampler": "nesterov", "num_steps": 4, "tolerance": 0.2}),
            ({"init_args": {"explicit_energy": "dot"}}, {"num_steps": 2}),
            ({"class_path": "FlowMatching"}, {"num_steps": 3}),
        ],
    )
    def test_tiled_decoding_of_a_local_field_is_exact(self, dynamics: dict[str, Any], decoding: dict[str, Any]) -> None:
        """Tiles agree only where their noise is cut from one noise for the whole image."""
        model, z = patchwise(dynamics), torch.randn(2, 4, 9, 13)
        whole = model.decode(z, generator=torch.Generator().manual_seed(3), **decoding)
        shapes = shapes_decoded(model)
        model.enable_tiling(32)
        tiled = model.decode(z, generator=torch.Generator().manual_seed(3), **decoding)
        torch.testing.assert_close(tiled.sample, whole.sample, atol=1e-5, rtol=0)
        assert torch.equal(tiled.num_evaluations, whole.num_evaluations)
        assert {tuple(shape[2:]) for shape in shapes} == {(32, 32)}

    def test_an_image_that_fits_into_a_tile_keeps_its_bits_and_disabling_brings_them_back(self) -> None:
        model, x = tiny(), image(1, 32, 48)
        whole = model(x).sample
        model.enable_tiling(48)
        assert torch.equal(model(x).sample, whole)
        model.enable_tiling(16)
        assert not torch.equal(model(x).sample, whole)
        model.disable_tiling()
        assert torch.equal(model(x).sample, whole)

    def test_gradients_reach_every_tile(self) -> None:
        model = tiny()
        model.enable_tiling(16)
        with torch.enable_grad():
            x = image(1, 32, 48).requires_grad_()
            model(x).sample.square().mean().backward()
        assert x.grad is not None
        assert (x.grad.abs().amax(dim=1) > 0).float().mean() > 0.9


class TestSlicing:
    @pytest.mark.parametrize("decoding", [{}, {"tolerance": 0.5}])
    def test_slices_give_what_the_batch_gives(self, decoding: dict[str, object]) -> None:
        model, x = tiny(), image(3)

        def outcome() -> tuple[Tensor, ...]:
            posterior = model.encode(x).latent_dist
            generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
            return posterior.mean, posterior.logvar, model.decode(z, generator=generators, **decoding).sample

        z = model.encode(x).latent_dist.mode()
        whole = outcome()
        model.enable_slicing()
        torch.testing.assert_close(outcome(), whole, atol=1e-5, rtol=0)

    def test_networks_see_one_image_at_a_time(self) -> None:
        model = patchwise({"class_path": "FlowMatching"}, variance=False)
        shapes = shapes_decoded(model)
        model.enable_slicing()
        z = model.encode(image(3, 40, 40)).latent_dist
        assert z.logvar is None
        model.decode(z.mode(), num_steps=2)
        assert {shape[0] for shape in shapes} == {1}
