"""Named parameter groups: every tensor in exactly one, named for what it does; and the selectors that choose them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny_models import TINY_DECODER, BareDynamics, refusal, tiny
from torch import nn

from dc_ssdae import DCSSDAE
from dc_ssdae.networks.blocks import ConditionedResidualBlock
from dc_ssdae.networks.dc_encoder import EfficientViTBlock, ResBlock
from dc_ssdae.networks.kl_encoder import KLResidualBlock
from dc_ssdae.parameter_groups import group_sizes, parameter_groups, select_groups
from dc_ssdae.presets import list_presets

HERE = __name__

DECODER_GROUPS = [
    *("latent_inputs", "image_inputs", "down.0", "down.1", "down.2", "down.3"),
    *("middle", "up.3", "up.2", "up.1", "head"),
]

TIMED_GROUPS = [*DECODER_GROUPS[:2], "time", *DECODER_GROUPS[2:]]


class NamingEncoder(nn.Module):
    """A user's encoder, which names the groups that it is told to."""

    def __init__(self, latent_channels: int, downsample_factor: int, declared=None) -> None:
        super().__init__()
        self.declared = declared
        self.patch = nn.Sequential(nn.Conv2d(3, 8, downsample_factor, downsample_factor), nn.BatchNorm2d(8))
        self.patch2 = nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8, 2 * latent_channels, 1)

    def parameter_groups(self) -> Any:
        return self.declared


class LearntDynamics(BareDynamics, nn.Module):
    """A dynamics with a parameter."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.full((3,), strength))


def preset(name: str) -> DCSSDAE:
    with torch.device("meta"):
        return DCSSDAE.from_preset(name)


def build(encoder: str, settings: Mapping[str, Any], **given: Any) -> DCSSDAE:
    part = {"class_path": encoder, "init_args": settings}
    return DCSSDAE(4, 8, encoder=part, decoder=TINY_DECODER, **given)


def naming(declared: Any) -> DCSSDAE:
    return build(f"{HERE}.NamingEncoder", {"declared": declared})


@pytest.mark.parametrize("name", list_presets())
def test_every_tensor_of_a_preset_is_in_exactly_one_group(name: str) -> None:
    model = preset(name)
    groups, sizes = parameter_groups(model), group_sizes(model)
    held = [tensor for tensors in groups.values() for tensor in tensors]
    assert sorted(held) == sorted(model.state_dict())
    assert list(sizes) == list(groups)
    assert sum(sizes.values()) == model.num_parameters()


def test_names_are_in_network_order() -> None:
    dc = ["input", *(f"stages.{index}" for index in range(1, 6)), "latent_head"]
    kl = ["input", *(f"stages.{index}" for index in range(4)), "latent_head"]
    for name, encoder, decoder in (
        ("dc_f32c32_eqm", dc, DECODER_GROUPS),
        ("dc_f32c32_fm", dc, TIMED_GROUPS),
        ("dcae_sana_f32c32_eqm", ["input", "stages.0", *dc[1:]], DECODER_GROUPS),
        ("vq_f8c4_fm", kl, TIMED_GROUPS),
    ):
        expected = [*(f"encoder.{group}" for group in encoder), *(f"decoder.{group}" for group in decoder)]
        assert list(parameter_groups(preset(name))) == expected


@pytest.mark.parametrize("kind", ["DCEncoder", "KLEncoder"])
def test_numbers_are_the_levels_that_blocks_work_at(kind: str) -> None:
    """Level k works at 1/2^k of the image's sides; the head at full resolution."""
    model = tiny(8, kind)
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


class TestUsersClasses:
    def test_without_the_method_a_class_is_one_group(self) -> None:
        model = build("tiny_models.PatchEncoder", {}, dynamics={"class_path": f"{HERE}.LearntDynamics"})
        groups = parameter_groups(model)
        assert list(groups) == ["encoder", *(f"decoder.{name}" for name in TIMED_GROUPS), "dynamics"]
        assert groups["encoder"] == [name for name in model.state_dict() if name.startswith("encoder.")]
        assert groups["dynamics"] == ["dynamics.strength"]
        assert group_sizes(model)["dynamics"] == 3

    def test_with_the_method(self) -> None:
        declared = {"trunk.2": ["patch2"], "empty": [], "trunk.1": ["patch"], "latent-head": ["out.weight", "out.bias"]}
        model = naming(declared)
        groups = {name: held for name, held in parameter_groups(model).items() if name.startswith("encoder")}
        # "patch" does not begin "patch2", and a group that holds nothing is none.
        assert list(groups) == ["encoder.trunk.2", "encoder.trunk.1", "encoder.latent-head"]
        assert groups["encoder.trunk.2"] == ["encoder.patch2.weight", "encoder.patch2.bias"]
        assert len(groups["encoder.trunk.1"]) == 2 + 5
        assert group_sizes(model)["encoder.trunk.1"] == 3 * 8 * 8 * 8 + 8 + 2 * 8  # the statistics are no parameters

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
        line = refusal(parameter_groups, naming(declared))
        assert line.startswith(f"parameter_groups of encoder {HERE}.NamingEncoder")
        assert message in line


class TestSelecting:
    STAGES = ("encoder.stages.0", "encoder.stages.9", "encoder.stages.10")
    NAMES = ("encoder.input", *STAGES, "decoder.down.0", "decoder.up.3", "decoder.up.1", "decoder.head")
    GROUPS: Mapping[str, list[str]] = {name: [] for name in NAMES}

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (["encoder.stages"], list(STAGES)),
            (["encoder.stages.-1"], ["encoder.stages.10"]),
            (["encoder.stages.-2", "encoder.stages.9"], ["encoder.stages.9"]),
            (["decoder.up.-1"], ["decoder.up.1"]),  # the last that data pass through
            (["decoder.head", "encoder.stages.10"], ["encoder.stages.10", "decoder.head"]),
            (["decoder", "encoder"], list(NAMES)),
        ],
    )
    def test_meaning(self, wanted: list[str], expected: list[str]) -> None:
        assert select_groups(self.GROUPS, wanted) == expected

    def test_what_is_not_there_or_no_list_of_selectors(self) -> None:
        for selector, suggestion in (("econder", "encoder"), ("encoder.stages.1", "encoder.stages.10")):
            message = refusal(select_groups, self.GROUPS, ["encoder.input", selector])
            assert f"unknown parameter group {selector!r} (did you mean {suggestion!r}?); accepted: decoder" in message
            assert all(name in message for name in self.GROUPS)
        for selector in ("encoder.stages.-4", "encoder.stages.-0", "encoder.-1", "", "encoder\n"):
            refusal(select_groups, self.GROUPS, [selector])
        refusal(select_groups, self.GROUPS, "encoder")

    def test_an_exact_name_means_that_group_alone(self) -> None:
        names = ("encoder.trunk", "encoder.trunk.out", "encoder.1", "encoder.1.a")
        groups: dict[str, list[str]] = {name: [] for name in names}
        assert select_groups(groups, ["encoder.trunk"]) == ["encoder.trunk"]
        assert select_groups(groups, ["encoder.-1"]) == select_groups(groups, ["encoder.1"]) == ["encoder.1"]
