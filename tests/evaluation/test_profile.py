"""Parameters, latent shape, compression and FLOPs, against counts made layer by layer on a real forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.profile import compression_ratio, count_flops, count_parameters, latent_shape
from dc_ssdae.networks.attention import SpatialSelfAttention, WindowedSelfAttention


class LayerByLayer:
    """Counts two FLOPs a multiply-add in convolutions, linear layers and attention, from the shapes they meet."""

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, SpatialSelfAttention, WindowedSelfAttention)):
                layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            self.total += 2 * output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            self.total += 2 * output.numel() * layer.in_features
        else:
            # Queries with keys, then weights with values, over all pairs of tokens.
            channels = inputs[0].shape[1] if isinstance(layer, SpatialSelfAttention) else inputs[0].shape[2]
            tokens = output.numel() // channels
            self.total += 2 * 2 * tokens**2 * channels


@pytest.mark.parametrize("size", [64, 128])
def test_flops_equal_those_of_the_layers(size: int) -> None:
    model = DCSSDAE.from_preset("demo")
    encoder, decoder = LayerByLayer(model.encoder), LayerByLayer(model.decoder)
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    assert count_flops(model, size) == (encoder.total, decoder.total)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_need_no_weights_and_leave_the_model_alone(device: str) -> None:
    with torch.device(device):
        model = DCSSDAE.from_preset("demo").train()
    before = {name: (tensor.device, tensor._version) for name, tensor in model.state_dict().items()}
    small, large = count_flops(model, 256), count_flops(model, 512)
    assert model.training
    assert {name: (tensor.device, tensor._version) for name, tensor in model.state_dict().items()} == before
    # Convolutions grow with the area; the encoder's attention over all pixels with its square.
    assert 4 <= large.encode / small.encode < 16
    assert large.decode_step / small.decode_step == pytest.approx(4, rel=0.05)


def test_a_step_of_flow_matching_is_counted_too() -> None:
    with torch.device("meta"):
        eqm, fm = DCSSDAE.from_preset("dc_f32c32_eqm"), DCSSDAE.from_preset("dc_f32c32_fm")
    matching, flow = count_flops(eqm, 64), count_flops(fm, 64)
    assert matching.encode == flow.encode
    assert matching.decode_step < flow.decode_step < 1.01 * matching.decode_step


def test_parameters_of_the_report() -> None:
    # SPEC section 3's counts, which are those of the original code: no norm, window radius 7.
    original = {"encoder": {"norm": "none"}, "decoder": {"window_radius": 7}}
    with torch.device("meta"):
        model = DCSSDAE.from_preset("dc_f32c32_eqm", **original)
    assert count_parameters(model) == {
        "encoder": 227_986_240,
        "decoder": 12_800_195,
        "total": 240_786_435,
    }


def test_latent_shape_and_compression_ratio() -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset("dc_f64c128_eqm")
    assert latent_shape(model, 256, 512) == (128, 4, 8)
    assert compression_ratio(model) == (3 * 256 * 512) / (128 * 4 * 8)
    for height, width in ((256, 100), (0, 64), (-64, 64)):
        with pytest.raises(InputError, match="positive multiples of f = 64"):
            latent_shape(model, height, width)
    with pytest.raises(InputError, match="positive multiples of f = 64, not 96"):
        count_flops(model, 96)


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_an_explicit_energys_step_is_a_forward_and_a_backward_pass(energy: str) -> None:
    """A backward pass to the image has a product for each of the forward pass, and attention's has two."""
    plain = count_flops(DCSSDAE.from_preset("demo", decoder={"patch": 1}), 64)
    dynamics = {"explicit_energy": energy, "prediction": "field"}
    explicit = count_flops(DCSSDAE.from_preset("demo", dynamics=dynamics, decoder={"patch": 1}), 64)
    assert explicit.encode == plain.encode
    assert 1.8 * plain.decode_step < explicit.decode_step < 2.5 * plain.decode_step
