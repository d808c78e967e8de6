"""The block shortcuts: against SciPy's cosine transform, and what a fresh model with them makes of a photo."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch.nn import functional as F

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.networks import DCEncoder, UViTDecoder
from dc_ssdae.networks.block_transform import BlockAnalysis, BlockSynthesis, strongest_cosines


def test_the_cosines_are_scipys_along_brightness_and_two_colour_differences() -> None:
    """Of a block of 8 pixels: the sums of squares of SciPy's coefficients are those of ours."""
    block = np.random.default_rng(0).standard_normal((3, 8, 8))
    cosines, deviations = strongest_cosines(192, 8)
    ours = (cosines @ F.pixel_unshuffle(torch.from_numpy(block)[None].float(), 8).flatten()).square()
    grey = dctn(block.sum(axis=0) / np.sqrt(3), norm="ortho")
    assert ours[0].item() == pytest.approx(grey[0, 0] ** 2, rel=1e-4)
    assert ours.sum().item() == pytest.approx((block**2).sum(), rel=1e-4)
    torch.testing.assert_close(cosines @ cosines.T, torch.eye(192), atol=1e-5, rtol=0)
    assert deviations.tolist() == sorted(deviations.tolist(), reverse=True)
    # After the means of brightness and of red against blue: the two slowest waves of brightness.
    slowest = sorted([grey[0, 1] ** 2, grey[1, 0] ** 2])
    assert sorted(ours[2:4].tolist()) == pytest.approx(slowest, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("factor", "channels"), [(2, 12), (8, 192)])
def test_with_all_cosines_fresh_maps_undo_each_other(factor: int, channels: int) -> None:
    x = torch.randn(2, 3, 3 * factor, 2 * factor)
    z = BlockAnalysis(channels, factor)(x)
    assert z.shape == (2, channels, 3, 2)
    torch.testing.assert_close(BlockSynthesis(channels, factor)(z), x, atol=1e-4, rtol=0)
    assert BlockSynthesis(channels, factor, "zero")(z).count_nonzero() == 0


@torch.no_grad()
def test_a_fresh_model_with_both_shortcuts_keeps_what_its_cosines_keep() -> None:
    data = pytest.importorskip("skimage.data")
    pixels = torch.from_numpy(np.ascontiguousarray(data.astronaut()[:256, 128:384]))
    x = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    model = DCSSDAE.from_preset("fast_f8c16")
    cosines, _ = strongest_cosines(16, 8)
    blocks = F.pixel_unshuffle(x, 8)
    kept = F.pixel_shuffle(torch.einsum("kp,kq,bqhw->bphw", cosines, cosines, blocks), 8)
    posterior = model.encode(x).latent_dist
    error, bound = ((y - x).square().mean() for y in (model.decode(posterior.mode()).sample, kept))
    assert error < 2.0 * bound < 0.02  # the fresh networks add a little to both
    assert 0.3 < posterior.mean.std() < 3.0
    assert posterior.std.max() < 0.5


def test_shortcuts_train_and_belong_to_a_group() -> None:
    encoder = DCEncoder(4, 8, architecture="fast", block_shortcut=True)
    decoder = UViTDecoder(4, 8, size="fast", block_shortcut="cosines")
    x = torch.randn(1, 3, 32, 32)
    decoder(torch.randn_like(x), encoder(x).mean).square().mean().backward()
    for network, group in ((encoder, "latent_head"), (decoder, "latent_inputs")):
        assert "block_shortcut" in network.parameter_groups()[group]
        assert network.block_shortcut.weight.grad.abs().max() > 0


def test_more_channels_than_a_block_has_and_an_unknown_start_are_refused() -> None:
    with pytest.raises(InputError, match="8×8 pixels has at most 192 channels, not 193"):
        DCEncoder(193, 8, block_shortcut=True)
    with pytest.raises(InputError, match="block_shortcut of UViTDecoder"):
        UViTDecoder(4, 8, block_shortcut="wavelets")  # type: ignore[arg-type]
