"""The original's checkpoints: their names, both ways, and conversion end to end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import refusal
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.interop.original import convert_original, original_names, rename_tensors, settings_shown_by
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder

TENSORS = json.loads((Path(__file__).parent / "original_tensors.json").read_text(encoding="utf-8"))
"""Shapes of all tensors of the original's models with flow matching, by module and name; all float32 but a counter."""

CONFIGURATIONS = {"vq_f8c4_fm": "vq_f8c4_FM", "dc_f32c32_fm": "dc_f32c32_FM", "dc_f32c32_eqm": "dc_f32c32_FM"}


def meta_model(preset: str, norm: str = "none") -> DCSSDAE:
    """A preset as the original builds it: no norm in the deep-compression encoder, a 15×15 window."""
    encoder = {} if preset.startswith("vq_") else {"norm": norm}
    with torch.device("meta"):
        return DCSSDAE.from_preset(preset, encoder=encoder, decoder={"window_radius": 7})


@pytest.mark.parametrize("preset", CONFIGURATIONS)
def test_every_name_maps_both_ways(preset: str) -> None:
    model = meta_model(preset)
    expected = {
        f"{module}.{name}": tuple(shape)
        for module, tensors in TENSORS[CONFIGURATIONS[preset]].items()
        for name, shape in tensors.items()
        if preset != "dc_f32c32_eqm" or "time_emb" not in module
    }
    names, ours = original_names(model), model.state_dict()
    assert names.keys() == ours.keys()
    back = {theirs: ours[mine] for mine, theirs in names.items()}
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == expected
    counter = "decoder.batch_norm_z.num_batches_tracked"
    assert {name for name, tensor in back.items() if tensor.dtype != torch.float32} == {counter}
    shown = settings_shown_by(back)
    assert shown["decoder"] == {"window_radius": 7}
    assert shown.get("encoder") == (None if preset.startswith("vq_") else {"norm": "none"})


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "f16 KL": lambda: KLEncoder(8, 16, channels=32, blocks_per_level=3, norm_groups=8),
    "norm": lambda: DCEncoder(8, 16, widths=[32] * 5, depths=[1, 2, 1, 1, 3], norm="rms_norm"),
    "more middle layers": lambda: UViTDecoder(8, 16, time_conditioning=True, channels=16, middle_layers=3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_sizes_map_there_and_back(name: str) -> None:
    with torch.device("meta"):
        network = VARIANTS[name]()
    names, state = original_names(network), network.state_dict()
    renamed = rename_tensors(network, {theirs: state[ours] for ours, theirs in names.items()})
    assert len(renamed) == len(state)
    assert all(renamed[name] is state[name] for name in state)


def test_a_plain_input_convolution_has_one_conv_in_its_name() -> None:
    """Only the downsampling input layer wraps its convolution once more, as project_in.conv.conv."""
    for depth, name in ((1, "project_in.weight"), (0, "project_in.conv.weight")):
        encoder = DCEncoder(4, 8, widths=[16] * 4, depths=[depth, 1, 1, 1], norm="none")
        assert original_names(encoder)[name] == name.replace("project_in.", "project_in.conv.")


def test_networks_without_known_names_are_refused() -> None:
    settings: dict[str, Any] = {"widths": [32] * 4, "depths": [0, 1, 1, 1], "norm": "none"}
    linear = DCEncoder(4, 8, **settings, block_types=["ResBlock"] * 3 + ["EfficientViTBlock"])
    for network in (nn.Linear(1, 1), linear, DCEncoder(4, 8, **settings, out_shortcut=True)):
        assert type(network).__name__ in refusal(original_names, network)


def checkpoint_of(model: DCSSDAE) -> dict[str, Tensor]:
    """Half-precision values for every tensor, under the original's names, of a size that keeps activations finite."""
    generator, names, tensors = torch.Generator().manual_seed(1), original_names(model), {}
    for name, tensor in model.state_dict().items():
        values = 0.1 * torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        tensors[names[name]] = values.half() if tensor.is_floating_point() else torch.full(tensor.shape, 7)
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms_norm", "none"])
def test_conversion_end_to_end(norm: str, tmp_path: Path) -> None:
    """A half-precision checkpoint with a 15×15 window, its encoder with a norm and without one."""
    direct = meta_model("demo", norm)
    tensors = checkpoint_of(direct)
    save_file(tensors, tmp_path / "original.safetensors")
    converted = convert_original(tmp_path / "original.safetensors", "demo")
    converted.save_pretrained(tmp_path / "saved")
    direct.load_state_dict(rename_tensors(direct, tensors), assign=True)
    x = 2.0 * torch.rand(1, 3, 64, 96) - 1.0
    for model in (converted, DCSSDAE.from_pretrained(tmp_path / "saved")):
        assert not any(module.training for module in model.modules())
        assert model.config["decoder"]["init_args"]["window_radius"] == 7
        assert model.config["encoder"]["init_args"]["norm"] == norm
        assert model.dtype == torch.float32
        found, expected = model(x).sample, direct.eval()(x).sample
        assert found.isfinite().all()
        assert torch.equal(found, expected)


TABLE = "decoder.mid_block.transformer_blocks.0.relative_position_bias.relative_bias_table"


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors, path = checkpoint_of(meta_model("demo", "rms_norm")), tmp_path / "original.safetensors"
    del tensors["decoder.conv_out.weight"]
    changed = {"encoder.project_in.conv.conv.weight": torch.zeros(8, 4, 3, 3), TABLE: torch.zeros(())}
    save_file({**tensors, **changed, "optimizer": torch.zeros(1)}, path)
    message = refusal(convert_original, path, "demo")
    assert message.startswith(f"{path}, preset 'demo': ")
    for told in ("shape (8, 4, 3, 3), not", f"{TABLE} has shape", "missing: decoder.conv_out", "left over: optimizer"):
        assert told in message


def test_files_that_are_no_checkpoint_and_presets_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "original.ckpt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    save_file({"encoder.project_in.conv.conv.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    for name, preset, told in (
        ("original.ckpt", "demo", "pickle"),
        ("original.safetensors", "demo", "pickle"),
        ("nothing.safetensors", "demo", "no such file"),
        ("other.safetensors", "domo", "did you mean 'demo'?"),
        ("other.safetensors", "demo", "missing: "),
    ):
        message = refusal(convert_original, tmp_path / name, preset)
        assert message.startswith(str(tmp_path))
        assert told in message
