"""Named parameter groups: every tensor in exactly one, named for what it does; and the selectors that choose them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny_models import TINY_DECODER, BareDynamics, refusal, tiny_encoder
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, DiagonalGaussian
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.networks.blocks import ConditionedResidualBlock
from dc_ssdae.networks.dc_encoder import EfficientViTBlock, ResBlock
from dc_ssdae.networks.kl_encoder import KLResidualBlock
from dc_ssdae.parameter_groups import group_sizes, parameter_groups, select_groups
from dc_ssdae.presets import list_presets

HERE = __name__

SMALL_ENCODERS: dict[str, dict[str, Any]] = {
    "DC, stage 0 without blocks": tiny_encoder("DCEncoder", 8),
    "DC, stage 0 with blocks": {
        "class_path": "DCEncoder",
        "init_args": {"widths": [8] * 4, "depths": [1, 1, 1, 2], "block_types": ["ResBlock"] * 4, "norm": "none"},
    },
    "KL": tiny_encoder("KLEncoder", 8),
}

DECODER_GROUPS = [
    *("latent_inputs", "image_inputs", "down.0", "down.1", "down.2", "down.3"),
    *("middle", "up.3", "up.2", "up.1", "head"),
]

each_preset = pytest.mark.parametrize("name", list_presets())
each_encoder = pytest.mark.parametrize("encoder", SMALL_ENCODERS.values(), ids=list(SMALL_ENCODERS))


class TwoPartEncoder(nn.Module):
    """A user's encoder that names no groups."""

    def __init__(self, latent_channels: int, downsample_factor: int, declared=None) -> None:
        super().__init__()
        self.declared = declared
        self.patch = nn.Sequential(nn.Conv2d(3, 8, downsample_factor, downsample_factor), nn.BatchNorm2d(8))
        self.patch2 = nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8, 2 * latent_channels, 1)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(self.out(self.patch2(self.patch(x))))


class NamingEncoder(TwoPartEncoder):
    """One that names those it is told to."""

    def parameter_groups(self) -> Any:
        return self.declared


class LongerDecoder(UViTDecoder):
    """One that inherits the names and adds a layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.extra = nn.Conv2d(3, 3, 1)


class LearntDynamics(BareDynamics, nn.Module):
    """A dynamics with a parameter."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.full((3,), strength))


def preset(name: str, **settings: Any) -> DCSSDAE:
    with torch.device("meta"):
        return DCSSDAE.from_preset(name, **settings)


def build(encoder: str | Mapping[str, Any] = "TwoPartEncoder", declared: Any = None, **given: Any) -> DCSSDAE:
    """A small model, by default with an encoder of this file."""
    if isinstance(encoder, str):
        encoder = {"class_path": f"{HERE}.{encoder}", "init_args": {"declared": declared}}
    return DCSSDAE(4, 8, **{"encoder": encoder, "decoder": TINY_DECODER, **given})


@each_preset
def test_every_tensor_of_a_preset_is_in_exactly_one_group(name: str) -> None:
    model = preset(name)
    groups, sizes = parameter_groups(model), group_sizes(model)
    held = [tensor for tensors in groups.values() for tensor in tensors]
    assert sorted(held) == sorted(model.state_dict())
    for group, tensors in groups.items():
        assert {tensor.split(".")[0] for tensor in tensors} == {group.split(".")[0]}
    assert list(sizes) == list(groups)
    assert sum(sizes.values()) == model.num_parameters()


def test_names_are_in_network_order() -> None:
    dc = ["input", *(f"stages.{index}" for index in range(1, 6)), "latent_head"]
    kl = ["input", *(f"stages.{index}" for index in range(4)), "latent_head"]
    timed = [*DECODER_GROUPS[:2], "time", *DECODER_GROUPS[2:]]
    for name, encoder, decoder in (
        ("dc_f32c32_eqm", dc, DECODER_GROUPS),
        ("dc_f32c32_fm", dc, timed),
        ("dcae_sana_f32c32_eqm", ["input", "stages.0", *dc[1:]], DECODER_GROUPS),
        ("vq_f8c4_fm", kl, timed),
    ):
        expected = [*(f"encoder.{group}" for group in encoder), *(f"decoder.{group}" for group in decoder)]
        assert list(parameter_groups(preset(name))) == expected


@each_encoder
def test_numbers_are_the_levels_that_blocks_work_at(encoder: Mapping[str, Any]) -> None:
    """Level k works at 1/2^k of the image's sides; the head at full resolution."""
    model = build(encoder).eval()
    group_of = {tensor: group for group, tensors in parameter_groups(model).items() for tensor in tensors}
    sides: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, ConditionedResidualBlock | ResBlock | EfficientViTBlock | KLResidualBlock):
            module.register_forward_hook(lambda _, __, y, name=name: sides.update({name: y.shape[-1]}))
    model(torch.rand(1, 3, 32, 32))
    assert {name.split(".")[0] for name in sides} == {"encoder", "decoder"}
    for name, side in sides.items():
        (group,) = {group for tensor, group in group_of.items() if tensor.startswith(f"{name}.")}
        level = 0 if group == "decoder.head" else int(group.rpartition(".")[2])
        assert side == 32 // 2**level, f"{name} in {group}"


def test_meta_device_and_float16_change_nothing() -> None:
    model = build()
    twin = DCSSDAE.without_weights(model.config)
    assert next(twin.parameters()).is_meta
    assert parameter_groups(twin) == parameter_groups(model) == parameter_groups(build().half())
    assert group_sizes(twin) == group_sizes(model)


class TestUsersClasses:
    def test_without_the_method_a_class_is_one_group(self) -> None:
        model = build()
        groups = parameter_groups(model)
        assert list(groups) == ["encoder", *(f"decoder.{name}" for name in DECODER_GROUPS)]
        assert groups["encoder"] == [name for name in model.state_dict() if name.startswith("encoder.")]
        assert "encoder.patch.1.running_mean" in groups["encoder"]

    def test_with_the_method(self) -> None:
        declared = {"trunk.2": ["patch2"], "empty": [], "trunk.1": ["patch"], "latent-head": ["out.weight", "out.bias"]}
        model = build("NamingEncoder", declared)
        groups = {name: held for name, held in parameter_groups(model).items() if name.startswith("encoder")}
        # "patch" does not begin "patch2", and a group that holds nothing is none.
        assert list(groups) == ["encoder.trunk.2", "encoder.trunk.1", "encoder.latent-head"]
        assert groups["encoder.trunk.2"] == ["encoder.patch2.weight", "encoder.patch2.bias"]
        assert len(groups["encoder.trunk.1"]) == 2 + 5
        sizes = group_sizes(model)
        assert sizes["encoder.trunk.1"] == 3 * 8 * 8 * 8 + 8 + 2 * 8  # the statistics are no parameters

    @pytest.mark.parametrize(
        ("declared", "message"),
        [
            ({"a": ["patch", "patch2"]}, "tensor 'out.weight' is in no group"),
            (
                {"a": ["patch", "out"], "b": ["patch2", "out.bias"]},
                "tensor 'out.bias' is in 'encoder.a' and 'encoder.b'",
            ),
        ],
    )
    def test_broken_declarations_are_one_line(self, declared: Any, message: str) -> None:
        line = refusal(parameter_groups, build("NamingEncoder", declared))
        assert line.startswith(f"parameter_groups of encoder {HERE}.NamingEncoder")
        assert message in line

    def test_an_inherited_method_must_know_what_is_added(self) -> None:
        decoder = {"class_path": f"{HERE}.LongerDecoder", **TINY_DECODER}
        line = refusal(parameter_groups, build(decoder=decoder))
        assert f"decoder {HERE}.LongerDecoder: tensor 'extra.weight' is in no group" in line

    def test_a_dynamics_with_parameters_is_a_group(self) -> None:
        model = build(dynamics={"class_path": f"{HERE}.LearntDynamics"})
        groups = parameter_groups(model)
        assert list(groups)[-1] == "dynamics"
        assert groups["dynamics"] == ["dynamics.strength"]
        assert group_sizes(model)["dynamics"] == 3


class TestSelecting:
    GROUPS: Mapping[str, list[str]] = {
        name: []
        for name in (
            *("encoder.input", "encoder.stages.0", "encoder.stages.9", "encoder.stages.10", "encoder.latent_head"),
            *("decoder.down.0", "decoder.down.1", "decoder.middle", "decoder.up.3", "decoder.up.1", "decoder.head"),
        )
    }

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (["encoder.latent_head"], ["encoder.latent_head"]),
            (["encoder.stages"], ["encoder.stages.0", "encoder.stages.9", "encoder.stages.10"]),
            (["encoder.stages.-1"], ["encoder.stages.10"]),
            (["encoder.stages.-2", "encoder.stages.9"], ["encoder.stages.9"]),
            (["decoder.up.-1"], ["decoder.up.1"]),  # the last that data pass through
            (["decoder.head", "encoder.stages.10"], ["encoder.stages.10", "decoder.head"]),
            (["decoder", "encoder"], list(GROUPS)),
        ],
    )
    def test_meaning(self, wanted: list[str], expected: list[str]) -> None:
        assert select_groups(self.GROUPS, wanted) == expected

    @pytest.mark.parametrize(
        ("selector", "suggestion"), [("econder", "encoder"), ("encoder.stages.1", "encoder.stages.10")]
    )
    def test_a_typo_gets_a_suggestion(self, selector: str, suggestion: str) -> None:
        message = refusal(select_groups, self.GROUPS, ["encoder.input", selector])
        hint = f"unknown parameter group {selector!r} (did you mean {suggestion!r}?); accepted: decoder, decoder."
        assert message.startswith(hint)
        assert all(name in message for name in self.GROUPS)

    @pytest.mark.parametrize(
        "wanted", [[], "encoder", ["encoder.stages.-4"], ["encoder.stages.-0"], ["encoder.-1"], [""], ["encoder\n"]]
    )
    def test_what_is_not_there_or_no_list_of_selectors(self, wanted: Any) -> None:
        refusal(select_groups, self.GROUPS, wanted)

    def test_an_exact_name_means_that_group_alone(self) -> None:
        names = ("encoder.trunk", "encoder.trunk.out", "encoder.1", "encoder.1.a")
        groups: dict[str, list[str]] = {name: [] for name in names}
        assert select_groups(groups, ["encoder.trunk"]) == ["encoder.trunk"]
        assert select_groups(groups, ["encoder.-1"]) == select_groups(groups, ["encoder.1"]) == ["encoder.1"]
