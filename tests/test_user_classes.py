"""A user's own encoder, decoder and dynamics: built, saved and loaded again, and never imported by a file's word."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from tiny_models import TINY_DECODER, BareDynamics, loading_refusal, refusal
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, DiagonalGaussian
from dc_ssdae.autoencoder import COMPONENTS
from dc_ssdae.dynamics import FlowMatching
from dc_ssdae.model_folder import read_config
from dc_ssdae.networks import KLEncoder, UViTDecoder

HERE = __name__

DECODER = {"class_path": "UViTDecoder", **TINY_DECODER}


class PatchEncoder(nn.Module):
    """One strided convolution; `rates` read off a tensor, as many published networks do."""

    def __init__(
        self,
        latent_channels: int,
        downsample_factor: int,
        gain: float = 1.0,
        kernel: tuple[int, int] | None = None,
        order: tuple[tuple[int, str], ...] = ((1, "a"),),
        bias: bool | Literal["auto"] = True,
        anything=("x", 2),
    ) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0.0, gain, 3)]
        self.gain, self.kernel, self.order, self.bias, self.anything = gain, kernel, order, bias, anything
        self.patch = nn.Conv2d(3, 2 * latent_channels, downsample_factor, downsample_factor)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(self.gain * self.patch(x))


class Outer:
    class InnerEncoder(PatchEncoder): ...


class OpenEncoder(PatchEncoder):
    def __init__(self, latent_channels: int, downsample_factor: int, **settings: Any) -> None:
        super().__init__(latent_channels, downsample_factor)
        self.settings = settings


class HandingOn(PatchEncoder):
    """With a hint that only a type checker can read."""

    def __init__(self, colour: "NotThere" = "red", **settings: Any) -> None:  # noqa: F821
        super().__init__(**settings)


class OwnDecoder(UViTDecoder):
    """With the inherited constructor."""


class SlowFlow(BareDynamics):
    def __init__(self, speed: float = 0.5) -> None:
        self.speed, self.corrupt = speed, FlowMatching().corrupt

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        return x_level + self.speed * prediction


def build(encoder: Any = "PatchEncoder", settings: Mapping[str, Any] | None = None, **given: Any) -> DCSSDAE:
    elsewhere = encoder in COMPONENTS["encoder"] or encoder.startswith("own_")
    path = encoder if elsewhere else f"{HERE}.{encoder}"
    part = {"class_path": path, "init_args": dict(settings or {})}
    return DCSSDAE(**{"latent_channels": 4, "downsample_factor": 8, "encoder": part, "decoder": DECODER, **given})


@pytest.fixture
def moved() -> Iterator[ModuleType]:
    """A module that is imported before saving; a test takes it out of `sys.modules` to stand for a new session."""
    name = "own_package_parts"
    module = sys.modules[name] = ModuleType(name)
    for kind in (PatchEncoder, OwnDecoder):
        named = {"__module__": name, "__qualname__": kind.__name__}
        setattr(module, kind.__name__, type(kind.__name__, (kind,), named))
    yield module
    sys.modules.pop(name, None)


class TestBuilding:
    @torch.no_grad()
    def test_every_part_may_be_a_users(self) -> None:
        decoder, dynamics = {"class_path": f"{HERE}.OwnDecoder", **TINY_DECODER}, {"class_path": f"{HERE}.SlowFlow"}
        model = build(settings={"gain": 2.0}, decoder=decoder, dynamics=dynamics)
        assert (type(model.encoder), type(model.decoder), type(model.dynamics)) == (PatchEncoder, OwnDecoder, SlowFlow)
        assert model.decoder.time_conditioning
        assert model.eval()(torch.zeros(1, 3, 16, 24)).sample.shape == (1, 3, 16, 24)

    def test_a_bare_name_is_one_of_the_classes_passed(self) -> None:
        class Local(PatchEncoder):
            pass

        model = DCSSDAE.from_preset("demo", encoder={"class_path": "Local"}, classes=iter([Local, OwnDecoder]))
        assert type(model.encoder) is Local
        assert not model.training
        assert model.config.encoder["class_path"] == f"{HERE}.{Local.__qualname__}"
        assert type(DCSSDAE.from_config(model.config, classes=[Local]).encoder) is Local
        assert "is not imported" in refusal(DCSSDAE.from_config, model.config)

    def test_bare_names_of_this_package_come_first(self) -> None:
        """Otherwise a class that happens to be passed could change what a preset means."""
        model = build("KLEncoder", {"channels": 32}, classes=[type("KLEncoder", (PatchEncoder,), {})])
        assert type(model.encoder) is KLEncoder

    def test_the_config_holds_full_names_and_every_default(self) -> None:
        model = build("Outer.InnerEncoder", {"gain": 2.0})
        expected = {"gain": 2.0, "kernel": None, "order": [[1, "a"]], "bias": True, "anything": ["x", 2]}
        assert model.config.encoder == {"class_path": f"{HERE}.Outer.InnerEncoder", "init_args": expected}

    def test_settings_reach_the_constructor_as_their_type_hints_ask(self) -> None:
        for kernel, order in (((3, 5), ((2, "b"), (3, "c"))), ([3, 5], [[2, "b"], [3, "c"]])):
            given = {"kernel": kernel, "order": order, "bias": False, "anything": {"a": [None, 0.5]}}
            encoder = build(settings=given).encoder
            assert (encoder.kernel, encoder.order, encoder.bias) == ((3, 5), ((2, "b"), (3, "c")), False)
            assert encoder.anything == {"a": [None, 0.5]}, "has no type hint"

    def test_a_constructor_with_keywords_of_any_name(self) -> None:
        model = build("OpenEncoder", {"colour": "red", "sizes": (1, 2)})
        assert model.encoder.settings == model.config.encoder["init_args"] == {"colour": "red", "sizes": [1, 2]}
        model = build("HandingOn", {"gain": 3.0})
        assert model.encoder.gain == 3.0
        assert model.config.encoder["init_args"] == {"colour": "red", "gain": 3.0}


class TestSaving:
    @torch.no_grad()
    def test_a_saved_model_loads_once_its_classes_are_imported(self, moved: ModuleType, tmp_path: Path) -> None:
        x = torch.rand(1, 3, 16, 24)
        decoder = {"class_path": "own_package_parts.OwnDecoder", **TINY_DECODER}
        model = build("own_package_parts.PatchEncoder", {"gain": 2.0, "kernel": (3, 5)}, decoder=decoder).eval()
        model.save_pretrained(tmp_path / "first")
        for loading in ({}, {"low_cpu_mem_usage": False}, {"classes": [moved.PatchEncoder]}):
            loaded = DCSSDAE.from_pretrained(tmp_path / "first", **loading)
            assert type(loaded.encoder) is moved.PatchEncoder
            assert loaded.encoder.kernel == (3, 5)
            assert torch.equal(loaded(x).sample, model(x).sample)
        loaded.save_pretrained(tmp_path / "second")
        first, second = (read_config(tmp_path / name) for name in ("first", "second"))
        assert first["encoder"]["class_path"] == "own_package_parts.PatchEncoder"
        assert "classes" not in first
        assert first == second

    def test_a_class_that_has_moved_since(self, moved: ModuleType, tmp_path: Path) -> None:
        build("own_package_parts.PatchEncoder").save_pretrained(tmp_path)
        del sys.modules["own_package_parts"]
        assert "'own_package_parts.PatchEncoder' is not imported" in loading_refusal(tmp_path)
        loaded = DCSSDAE.from_pretrained(tmp_path, classes=[SlowFlow, PatchEncoder])
        assert type(loaded.encoder) is PatchEncoder
        assert loaded.config.encoder["class_path"] == f"{HERE}.PatchEncoder"
        twins = [PatchEncoder, moved.PatchEncoder]
        assert type(DCSSDAE.from_pretrained(tmp_path, classes=twins).encoder) is moved.PatchEncoder
        others = [PatchEncoder, type("PatchEncoder", (PatchEncoder,), {"__qualname__": "Other.PatchEncoder"})]
        assert "pass one such class" in loading_refusal(tmp_path, classes=others)

    def test_without_weights(self) -> None:
        model = DCSSDAE.without_weights(build().config)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model.encoder.rates == [0.0, 0.5, 1.0]


class NoSettings(nn.Module):
    """Whose constructor is nn.Module's own, which takes anything and refuses it."""


class NeedsWidth(nn.Module):
    def __init__(self, latent_channels: int, downsample_factor: int, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError("width must be\neven")


class WideEncoder(PatchEncoder):
    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.patch(x))


class NoLoss(BareDynamics):
    loss = None


class NoLevel(BareDynamics):
    noise_level = property()  # which raises AttributeError


class TestMistakes:
    @pytest.mark.parametrize(
        ("encoder", "settings", "message"),
        [
            ("NoSettings", {}, "has no setting latent_channels"),
            ("NeedsWidth", {}, f"{HERE}.NeedsWidth needs its setting 'width': give it in init_args of encoder"),
            ("NeedsWidth", {"width": 5}, "ValueError: width must be even"),
            ("PatchEncoder", {"anything": [torch.zeros(2)]}, "made of numbers, text"),
            ("PatchEncoder", {"gian": 1.0}, f"unknown setting of {HERE}.PatchEncoder 'gian' (did you mean 'gain'?)"),
            ("OpenEncoder", {"latent_channels": 4}, "multiple values for keyword argument 'latent_channels'"),
            ("SlowFlow", {}, "is no torch.nn.Module"),
            ("build", {}, "or is no class"),
        ],
    )
    def test_encoders(self, encoder: str, settings: dict[str, Any], message: str) -> None:
        assert message in refusal(build, encoder=encoder, settings=settings)

    def test_decoders_dynamics_and_classes(self) -> None:
        for part, name, message in (
            ("decoder", "PatchEncoder", "has no setting time_conditioning"),
            ("dynamics", "NoLoss", "has no method loss"),
            ("dynamics", "NoLevel", "has no attribute noise_level"),
        ):
            assert message in refusal(build, **{part: {"class_path": f"{HERE}.{name}"}})
        for classes in (PatchEncoder, "PatchEncoder", [5]):
            assert "classes" in refusal(build, classes=classes)
            assert "classes" in refusal(DCSSDAE.from_pretrained, "absent", classes=classes)

    def test_an_encoder_that_gives_something_else(self) -> None:
        model = build("WideEncoder")
        assert "must give a DiagonalGaussian of shape (1, 4, 2, 3)" in refusal(model.encode, torch.zeros(1, 3, 16, 24))
        model.encoder = nn.AvgPool2d(8)
        assert "must give a DiagonalGaussian" in refusal(model.encode, torch.zeros(1, 3, 16, 24))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that can be imported, and an imported one that imports it when asked for an attribute."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_trap.py").write_text("class Trap:\n    pass\n")
    lazy = ModuleType("own_lazy")
    lazy.__getattr__ = lambda name: __import__("own_trap").Trap  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "own_lazy", lazy)
    yield
    sys.modules.pop("own_trap", None)


NAMES: Sequence[str] = (
    *("os.system", "subprocess.Popen", "builtins.__import__", "torch.nn.Linear", "torch.nn.Module", "torch.hub.load"),
    *("own_trap.Trap", "own_lazy.Trap", "own_lazy.own_trap.Trap", "own_trap", "own_trap.", "own_trap\n.Trap"),
)


@pytest.mark.usefixtures("trap")
class TestFilesImportNothing:
    def test_the_traps_spring(self) -> None:
        _ = sys.modules["own_lazy"].Trap
        assert "own_trap" in sys.modules

    @pytest.mark.parametrize("part", COMPONENTS)
    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_in_a_file(self, part: str, name: str, tmp_path: Path) -> None:
        witness = tmp_path / "executed"
        named = {part: {"class_path": name, "init_args": {"command": f"touch {witness}"}}}
        config = {"_class_name": "DCSSDAE", "latent_channels": 4, "downsample_factor": 8, **named}
        (tmp_path / "config.json").write_text(json.dumps(config))
        before = set(sys.modules)
        assert repr(name) in loading_refusal(tmp_path)
        assert repr(name) in refusal(DCSSDAE.from_config, config)
        assert set(sys.modules) == before
        assert not witness.exists()
