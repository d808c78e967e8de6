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


def test_flops_are_those_of_the_layers_and_leave_the_model_alone() -> None:
    model = DCSSDAE.from_preset("demo").train()
    before = {name: (tensor.device, tensor._version) for name, tensor in model.state_dict().items()}
    found = count_flops(model, 128)
    assert model.training
    assert {name: (tensor.device, tensor._version) for name, tensor in model.state_dict().items()} == before
    encoder, decoder = LayerByLayer(model.encoder), LayerByLayer(model.decoder)
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, 128, 128))
    assert found == (encoder.total, decoder.total)
    own = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("encoder", "decoder")}
    assert count_parameters(model) == own | {"total": sum(own.values())}


def test_a_step_of_flow_matching_and_of_an_explicit_energy_is_counted_too() -> None:
    """A backward pass to the image has a product for each of the forward pass, and attention's has two."""
    with torch.device("meta"):
        eqm, fm = (count_flops(DCSSDAE.from_preset(f"dc_f32c32_{kind}"), 64) for kind in ("eqm", "fm"))
    assert eqm.encode == fm.encode
    assert eqm.decode_step < fm.decode_step < 1.01 * eqm.decode_step
    dynamics, patch = {"explicit_energy": "dot", "prediction": "field"}, {"patch": 1}
    plain = count_flops(DCSSDAE.from_preset("demo", decoder=patch), 64)
    explicit = count_flops(DCSSDAE.from_preset("demo", decoder=patch, dynamics=dynamics), 64)
    assert 1.8 * plain.decode_step < explicit.decode_step < 2.5 * plain.decode_step


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
