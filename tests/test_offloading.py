"""Hooks that move or cast weights: those of diffusers and accelerate, as far as a machine without a GPU goes."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_models import image, tiny
from torch import Tensor

from dc_ssdae import DCSSDAE

CPU = torch.device("cpu")
MODELS = [("DCEncoder", "EquilibriumMatching"), ("KLEncoder", "EquilibriumMatching"), ("KLEncoder", "FlowMatching")]


def outcome(model: DCSSDAE) -> list[Tensor]:
    """What the ways into a model give: encode, decode in one step and several, tiled, and the model itself."""
    torch.manual_seed(2)
    x = image(2, 16, 32)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        assert posterior.logvar is not None
        z = posterior.mean
        outputs = [z, posterior.logvar, model.decode(z).sample, model.decode(z, num_steps=2).sample, model(x).sample]
        model.enable_tiling(16)
        outputs += [model.encode(x).latent_dist.mean, model.decode(z).sample]
        model.disable_tiling()
    return outputs


def make(encoder: str = "DCEncoder", dynamics: str = "EquilibriumMatching") -> DCSSDAE:
    torch.manual_seed(1)
    return tiny(8, encoder, dynamics={"class_path": dynamics})


def same_bits(model: DCSSDAE, expected: list[Tensor]) -> None:
    for got, wanted in zip(outcome(model), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], list[Tensor]]:
    """What models give without any hook."""
    return {kinds: outcome(make(*kinds)) for kinds in MODELS}


@pytest.mark.parametrize(("encoder", "dynamics"), MODELS)
def test_sequential_offload(encoder: str, dynamics: str, expected: Any) -> None:
    """Weights lie on the meta device between calls: nothing may read one outside of its own layer."""
    model = make(encoder, dynamics)
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    same_bits(model, expected[encoder, dynamics])
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_whole_models_hook_runs_before_encode_and_decode() -> None:
    """Which is how a model that waits on the CPU comes to the GPU, though neither is its forward."""
    model, hook = make(), ModelHook()
    hook.pre_forward = Mock(side_effect=lambda module, *args, **kwargs: (args, kwargs))
    add_hook_to_module(model, hook)
    model.encode(image())
    model.decode(torch.zeros(1, 4, 2, 3))
    assert hook.pre_forward.call_count == 2


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"encoder": "cpu", "decoder": "disk"}], ids=str)
def test_device_map(device_map: Any, tmp_path: Path, expected: Any) -> None:
    make().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    offloaded = str(tmp_path / "offloaded")
    model = DCSSDAE.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=offloaded)
    same_bits(model, expected["DCEncoder", "EquilibriumMatching"])


@pytest.mark.parametrize("encoder", ["DCEncoder", "KLEncoder"])
def test_casting_layer_by_layer(encoder: str, expected: Any) -> None:
    """Weights are kept in bfloat16 or float8 and computed with in float32."""
    for storage, tolerance in ((torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.3)):
        model = make(encoder)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert storage in {parameter.dtype for parameter in model.parameters()}
        got = outcome(model)
        for place in (0, 2):  # encode; decode in one step
            wanted = expected[encoder, "EquilibriumMatching"][place]
            assert got[place].dtype == torch.float32
            # Only the rounding of weights is lost: a small share of what the outputs are.
            assert (got[place] - wanted).norm() < tolerance * wanted.norm()
        assert storage in {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(kind: str, expected: Any) -> None:
    model = make()
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)
    same_bits(model, expected["DCEncoder", "EquilibriumMatching"])


def test_blocks_that_must_stay_whole_exist() -> None:
    """A name in `_no_split_modules` that no class has would split a block whose outputs join its inputs."""
    names = {type(module).__name__ for encoder in ("DCEncoder", "KLEncoder") for module in make(encoder).modules()}
    assert set(DCSSDAE._no_split_modules) <= names
