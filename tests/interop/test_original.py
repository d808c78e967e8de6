"""The original's checkpoints: their names, both ways, and conversion end to end."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.interop.original import (
    convert_original,
    original_model_names,
    original_names,
    rename_tensors,
    settings_shown_by,
)
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder

CONFIGURATIONS = {"vq_f8c4_FM": "vq_f8c4_fm", "dc_f32c32_FM": "dc_f32c32_fm", "dc_f32c32_EqM": "dc_f32c32_eqm"}


def meta_model(preset: str) -> DCSSDAE:
    """A preset as the original builds it: no norm in the deep-compression encoder, a 15×15 window."""
    encoder = {"norm": "none"} if preset.startswith("dc_") else {}
    with torch.device("meta"):
        return DCSSDAE.from_preset(preset, encoder=encoder, decoder={"window_radius": 7})


def synthetic_state(model: DCSSDAE) -> dict[str, Tensor]:
    """Different half-precision values for every tensor of a model, of a size that keeps activations finite."""
    expected = model.state_dict()
    longest = max(tensor.numel() for tensor in expected.values())
    pool = torch.randn(longest + len(expected), generator=torch.Generator().manual_seed(1))
    state = {}
    for index, (name, tensor) in enumerate(expected.items()):
        if not tensor.dtype.is_floating_point:
            state[name] = torch.full(tensor.shape, 7, dtype=tensor.dtype)
            continue
        fan_in = max(tensor[0].numel(), 1) if tensor.ndim in (2, 4) else 4
        values = fan_in**-0.5 * pool[index : index + tensor.numel()].view(tensor.shape)
        state[name] = (values.abs() + 0.5 if name.endswith("running_var") else values).half()
    return state


def write(state: dict[str, Tensor], model: DCSSDAE, path: Path) -> Path:
    """Save a state dict of ours under the original's names."""
    names = original_model_names(model)
    save_file({names[name]: tensor for name, tensor in state.items()}, path)
    return path


@pytest.fixture
def reference_keys(golden_dir: Path) -> dict[str, dict[str, tuple[list[int], str]]]:
    path = golden_dir / "reference_state_dict_keys.json"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_name_maps_both_ways(
    configuration: str, reference_keys: dict[str, dict[str, tuple[list[int], str]]]
) -> None:
    model = meta_model(CONFIGURATIONS[configuration])
    names = original_model_names(model)
    expected = reference_keys[configuration]
    ours = model.state_dict()
    assert names.keys() == ours.keys()
    assert set(names.values()) == set(expected)
    back = {theirs: mine for mine, theirs in names.items()}
    assert len(back) == len(names)
    for theirs, (shape, dtype) in expected.items():
        tensor = ours[back[theirs]]
        assert (list(tensor.shape), str(tensor.dtype)) == (shape, f"torch.{dtype}"), theirs
    shapes = {name: tuple(shape) for name, (shape, _) in expected.items()}
    shown = settings_shown_by(expected, shapes)
    assert shown["decoder"] == {"window_radius": 7}
    assert shown.get("encoder") == ({"norm": "none"} if configuration.startswith("dc_") else None)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_parameter_counts_of_the_reference(
    configuration: str, reference_keys: dict[str, dict[str, tuple[list[int], str]]]
) -> None:
    model = meta_model(CONFIGURATIONS[configuration])
    for part, count in reference_keys[f"{configuration}__params"].items():
        assert sum(parameter.numel() for parameter in getattr(model, part).parameters()) == count


@pytest.mark.parametrize(
    "build",
    [
        lambda: KLEncoder(4, 16, channels=8, norm_groups=8),
        lambda: DCEncoder(4, 8, widths=[16] * 4, depths=[0, 1, 2, 1]),
        lambda: DCEncoder(4, 8, widths=[16] * 4, depths=[1, 1, 2, 1], norm="none"),
        lambda: UViTDecoder(4, 8, channels=8, norm_groups=8, middle_layers=2, time_conditioning=True),
    ],
    ids=["KL", "DC with a norm", "DC with a full first stage", "decoder"],
)
def test_names_are_one_to_one_and_rename_back(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        network = build()
    names = original_names(network)
    assert len(set(names.values())) == len(names)
    state = network.state_dict()
    renamed = rename_tensors(network, {theirs: state[ours] for ours, theirs in names.items()})
    assert renamed.keys() == state.keys()
    assert all(renamed[name] is state[name] for name in state)


def test_a_plain_input_convolution_has_one_conv_in_its_name() -> None:
    """Only the downsampling input layer wraps its convolution once more, as project_in.conv.conv."""
    with torch.device("meta"):
        plain = DCEncoder(4, 8, widths=[16] * 4, depths=[1, 1, 1, 1], norm="none")
        downsampling = DCEncoder(4, 8, widths=[16] * 4, depths=[0, 1, 1, 1], norm="none")
    assert original_names(plain)["project_in.weight"] == "project_in.conv.weight"
    assert original_names(downsampling)["project_in.conv.weight"] == "project_in.conv.conv.weight"


@pytest.mark.parametrize(
    "settings",
    [{"block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"]}, {"out_shortcut": True}],
    ids=["EfficientViT", "output shortcut"],
)
def test_parts_without_known_names_are_refused(settings: dict[str, object]) -> None:
    with torch.device("meta"):
        encoder = DCEncoder(4, 8, widths=[32] * 4, depths=[0, 1, 1, 1], norm="none", **settings)
    with pytest.raises(InputError, match="ResBlock"):
        original_names(encoder)


def test_modules_without_known_names_are_refused() -> None:
    with pytest.raises(InputError, match="Linear"):
        original_names(nn.Linear(1, 1))


def test_the_file_shows_its_norm_and_window() -> None:
    table = "decoder.mid_block.transformer_blocks.0.attn1.relative_position_bias.relative_bias_table"
    shapes = {table: (17, 17, 4), "encoder.project_in.conv.conv.weight": (64, 3, 3, 3)}
    assert settings_shown_by(shapes, shapes) == {"encoder": {"norm": "none"}, "decoder": {"window_radius": 8}}
    shapes["encoder.stages.1.op_list.0.main.conv2.norm.weight"] = (256,)
    assert settings_shown_by(shapes, shapes)["encoder"] == {"norm": "rms_norm"}
    assert settings_shown_by(["encoder.conv_in.weight"], {}) == {}


@torch.no_grad()
@pytest.mark.parametrize("preset", ["demo", "dc_f32c32_eqm"])
def test_conversion_end_to_end(preset: str, tmp_path: Path) -> None:
    """A half-precision checkpoint with a 15×15 window, its encoder with a norm (demo) and without one."""
    direct = meta_model(preset)
    state = synthetic_state(direct)
    checkpoint = write(state, direct, tmp_path / "original.safetensors")
    converted = convert_original(checkpoint, preset)
    assert not any(module.training for module in converted.modules())
    assert converted.config["decoder"]["init_args"]["window_radius"] == 7
    assert converted.config["encoder"]["init_args"]["norm"] == ("none" if preset.startswith("dc_") else "rms_norm")
    assert all(not tensor.is_meta for tensor in converted.state_dict().values())
    assert converted.dtype == torch.float32
    dtypes = {name: tensor.dtype for name, tensor in direct.state_dict().items()}
    direct.load_state_dict({name: state[name].to(dtype) for name, dtype in dtypes.items()}, assign=True)
    direct.eval()
    x = 2.0 * torch.rand(1, 3, 64, 96) - 1.0
    posterior, expected = converted.encode(x).latent_dist, direct.encode(x).latent_dist
    assert posterior.mean.isfinite().all()
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    y = converted.decode(posterior.mode()).sample
    assert y.isfinite().all()
    assert torch.equal(y, direct.decode(expected.mode()).sample)


@torch.no_grad()
def test_a_converted_model_saves_and_loads(demo: tuple[DCSSDAE, dict[str, Tensor]], tmp_path: Path) -> None:
    model, state = demo
    converted = convert_original(write(state, model, tmp_path / "original.safetensors"), "demo")
    converted.save_pretrained(tmp_path / "saved")
    loaded = DCSSDAE.from_pretrained(tmp_path / "saved")
    assert loaded.config["decoder"]["init_args"]["window_radius"] == 7
    x = 2.0 * torch.rand(1, 3, 16, 24) - 1.0
    assert torch.equal(loaded(x).sample, converted(x).sample)


@pytest.fixture
def demo() -> tuple[DCSSDAE, dict[str, Tensor]]:
    """The smallest preset on the meta device, and values for it under our names."""
    model = meta_model("demo")
    return model, synthetic_state(model)


@pytest.fixture
def checkpoint(demo: tuple[DCSSDAE, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A whole checkpoint under the original's names, to be spoilt."""
    model, state = demo
    names = original_model_names(model)
    return {names[name]: tensor for name, tensor in state.items()}


def refusal(path: Path, preset: str = "demo") -> str:
    with pytest.raises(InputError) as error:
        convert_original(path, preset)
    assert "\n" not in str(error.value)
    return str(error.value)


def spoilt(tensors: dict[str, Tensor], tmp_path: Path) -> str:
    path = tmp_path / "original.safetensors"
    save_file(tensors, path)
    message = refusal(path)
    assert str(path) in message
    assert "'demo'" in message
    return message


def test_a_missing_tensor_is_named(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    del checkpoint["decoder.conv_out.weight"]
    assert "missing: decoder.conv_out.weight" in spoilt(checkpoint, tmp_path)


def test_a_tensor_left_over_is_named(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint["decoder.discriminator.weight"] = torch.zeros(1)
    checkpoint["optimizer"] = torch.zeros(1)
    assert "left over: decoder.discriminator.weight; left over: optimizer" in spoilt(checkpoint, tmp_path)


def test_a_tensor_of_another_shape_is_named(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint["encoder.project_in.conv.conv.weight"] = torch.zeros(8, 4, 3, 3)
    message = spoilt(checkpoint, tmp_path)
    assert "encoder.project_in.conv.conv.weight has shape (8, 4, 3, 3), not (8, 3, 3, 3)" in message


def test_every_problem_is_listed_at_once(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    del checkpoint["decoder.conv_out.weight"]
    checkpoint["surplus"] = torch.zeros(1)
    checkpoint["encoder.project_in.conv.conv.bias"] = torch.zeros(3)
    message = spoilt(checkpoint, tmp_path)
    assert re.search(
        r"encoder\.project_in\.conv\.conv\.bias has shape.*missing: decoder\.conv_out\.weight.*left over: surplus",
        message,
    )


@pytest.mark.parametrize("shape", [(17, 17, 4), (16, 16, 4), (15, 15), ()])
def test_windows_that_differ_or_are_none_are_named(
    shape: tuple[int, ...], checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    tables = [name for name in checkpoint if name.endswith("relative_bias_table")]
    assert len(tables) == 2
    checkpoint[tables[0]] = torch.zeros(shape)
    path = tmp_path / "original.safetensors"
    save_file(checkpoint, path)
    assert "relative_bias_table has shape" in refusal(path)


def test_a_truncated_checkpoint_is_refused(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "original.safetensors"
    save_file(checkpoint, path)
    body = path.read_bytes()
    path.write_bytes(body[:-10])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_a_pickle_is_never_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"original{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "pickle" in refusal(path)


@pytest.mark.parametrize("body", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), b"\xff" * 64])
def test_what_is_no_safetensors_file(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "original.safetensors"
    path.write_bytes(body)
    assert str(path) in refusal(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.safetensors")
    assert str(tmp_path) in refusal(tmp_path)


def test_an_unknown_preset_is_told_before_the_file_is_read(tmp_path: Path) -> None:
    assert "unknown preset 'domo' (did you mean 'demo'?)" in refusal(tmp_path / "absent.safetensors", "domo")


def test_a_checkpoint_of_another_architecture_is_told_as_such(tmp_path: Path) -> None:
    """The message speaks of the file and its tensors, not of a setting that nobody gave."""
    path = tmp_path / "original.safetensors"
    save_file({"encoder.project_in.conv.conv.weight": torch.zeros(64, 3, 3, 3)}, path)
    message = refusal(path)
    assert str(path) in message
    assert "missing: " in message
