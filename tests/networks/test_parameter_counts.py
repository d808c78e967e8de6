"""Parameter counts against the specification's section 3, to the last digit; the meta device allocates nothing."""

import pytest
import torch
from torch import nn

from dc_ssdae import DCSSDAE
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.networks.uvit_decoder import SIZES

ORIGINAL_WINDOW = {"window_radius": 7}

MILLIONS = {"XS": 5.02, "S": 14.12, "B": 21.20, "M": 50.40, "L": 90.88, "XL": 161.46, "H": 363.09}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def decoder(size: str, radius: int) -> UViTDecoder:
    with torch.device("meta"):
        return UViTDecoder(latent_channels=32, size=size, window_radius=radius, time_conditioning=True)


@pytest.mark.parametrize(
    ("preset", "encoder", "encoder_parameters", "decoder_parameters"),
    [
        ("vq_f8c4_fm", {}, 34_163_664, 14_091_979),
        ("dc_f32c32_fm", {"norm": "none"}, 227_986_240, 14_116_227),
        ("dc_f32c32_eqm", {"norm": "none"}, 227_986_240, 12_800_195),
    ],
)
def test_the_originals_three_configurations(
    preset: str, encoder: dict[str, str], encoder_parameters: int, decoder_parameters: int
) -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset(preset, encoder=encoder, decoder=ORIGINAL_WINDOW)
    assert count(model.encoder) == encoder_parameters
    assert count(model.decoder) == decoder_parameters


@pytest.mark.parametrize("size", sorted(SIZES.keys() - {"fast"}))
def test_sizes(size: str) -> None:
    """A window of radius 8 adds 64 parameters for each head and layer."""
    narrow, wide = decoder(size, radius=7), decoder(size, radius=8)
    assert f"{count(narrow) / 1e6:.2f}" == f"{MILLIONS[size]:.2f}"
    heads = wide.middle.blocks[0].attention.heads
    assert count(wide) - count(narrow) == 64 * heads * SIZES[size].middle_layers


def test_the_window_is_the_papers_17_by_17_by_default() -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset("dc_f32c32_eqm")
    assert model.decoder.middle.blocks[0].attention.relative_position_table.shape[:2] == (17, 17)
