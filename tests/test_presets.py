"""Presets: what their files may say, and that every model they describe starts healthy."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pytest
import torch
from half_convolutions import ConvolutionsOfAGPU
from torch import Tensor
from torch.nn import functional as F

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.autoencoder import COMPONENTS
from dc_ssdae.losses import StepOutputs
from dc_ssdae.networks import DCEncoder
from dc_ssdae.presets import DEFAULT_CLASSES, list_presets, load_preset
from dc_ssdae.training.build import build_objective
from dc_ssdae.training.config import BUILT_IN_LOSSES, DataConfig, RunConfig, TrainingConfig

REQUIRED = {
    "vq_f8c4_fm",
    "dc_f32c32_fm",
    "dc_f32c32_eqm",
    "dc_f64c128_eqm",
    "dc_f128c512_eqm",
    "dcae_f32c32_eqm",
    "demo",
}

FAST = ("fast_f8c4", "fast_f8c16", "fast_f16c64", "fast_f32c32", "fast_f32c64")

each_preset = pytest.mark.parametrize("name", list_presets())
each_network = pytest.mark.parametrize("name", [name for name in list_presets() if not name.endswith("_eqm_image")])
"""The large models whose networks are another preset's are left out."""


def photo(side: int) -> Tensor:
    """A crop of a real photo in [-1, 1], (1, 3, side, side); smooth noise where scikit-image is not installed."""
    try:
        from skimage import data
    except ImportError:
        generator = torch.Generator().manual_seed(1)
        coarse = torch.randn(1, 3, 8, 8, generator=generator)
        return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1.0, 1.0)
    pixels = np.ascontiguousarray(data.astronaut()[:side, 128 : 128 + side])
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1.0


WHOLE = {
    "lpips": {"weight": 0.5, "init_args": {"net": "squeeze", "weights": "random"}},
    "repa": {"weight": 0.25, "init_args": {"backbone": "test_vit", "weights": "random"}},
}
"""The whole objective, with small networks in the places of VGG-16 and DINOv2."""


@each_network
@torch.no_grad()
def test_every_loss_is_finite_at_initialisation(name: str) -> None:
    """And KL is at most 10 per latent dimension, on a photo in float32 and on uniform noise under autocast."""
    model = DCSSDAE.from_preset(name).train()
    objective = build_objective(RunConfig.from_mapping({**load_preset(name), "losses": WHOLE}).losses, model)
    side = 256 if model.config.downsample_factor == 128 else 128
    for autocast, x in ((False, photo(side)), (True, 2.0 * torch.rand(1, 3, side, side) - 1.0)):
        level = torch.tensor([0.4])
        with ConvolutionsOfAGPU(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            posterior = model.encoder(x)
            record = model.dynamics.corrupt(x, torch.randn_like(x), level)
            time = level if model.dynamics.conditions_on_time else None
            prediction, features = model.decoder.forward_with_features(record.x_level, posterior.sample(), time)
            losses = objective(StepOutputs(model.dynamics, record, prediction, posterior, features))
        assert set(losses.terms) == {"dynamics", "lpips", "repa", "kl"}
        for term, value in (*losses.terms.items(), ("total", losses.total)):
            assert value.isfinite(), f"{term} is {value} with autocast={autocast}"
        per_dimension = (posterior.kl() / posterior.mean[0].numel()).item()
        assert per_dimension <= 10.0, f"KL per dimension is {per_dimension} with autocast={autocast}"
        assert posterior.mean.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("name", "seed"), [("dc_f32c32_eqm", 10), ("dcae_f32c32_eqm", 10), ("dcae_f32c32_eqm", 15)])
def test_kl_of_flat_images_is_small_at_initialisation(name: str, seed: int) -> None:
    """Of all images tried, plain white and plain black excite the mean of the latent most."""
    torch.manual_seed(seed)
    settings = load_preset(name)["model"].get("encoder", {}).get("init_args", {})
    posterior = DCEncoder(32, 32, **settings)(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 128, 128))
    per_dimension = posterior.kl() / posterior.mean[0].numel()
    assert per_dimension.max() <= 10.0, f"KL per dimension is {per_dimension.tolist()}"


def test_the_required_presets_are_there() -> None:
    assert set(list_presets()) >= REQUIRED.union(FAST)
    assert list_presets() == sorted(list_presets())


@pytest.mark.parametrize("name", [name for name in list_presets() if name != "demo"])
def test_name_says_what_the_model_is(name: str) -> None:
    """A name such as dc_f32c32_eqm spells f, c and the dynamics."""
    preset = load_preset(name)
    assert preset["description"]
    with torch.device("meta"):
        config = DCSSDAE.from_preset(name).config
    assert f"_f{config['downsample_factor']}c{config['latent_channels']}_" in f"{name}_"
    dynamics = config["dynamics"]
    ending = {"EquilibriumMatching": "_eqm", "FlowMatching": "_fm"}[dynamics["class_path"]]
    ending += "_image" if dynamics["init_args"]["prediction"] == "image" else ""
    # Where it is a family of its own, all of it is alike.
    assert (name.partition("_")[0], ending) == ("fast", "_eqm_image") or name.endswith(ending)


def test_the_fast_presets_share_one_decoder_and_the_one_to_ship_is_small() -> None:
    """So that the model whose speed is reported is the one whose quality is reported."""
    with torch.device("meta"):
        models = {name: DCSSDAE.from_preset(name) for name in FAST}
    settings = [model.config.decoder for model in models.values()]
    assert settings == [{"class_path": "UViTDecoder", "init_args": settings[0]["init_args"]}] * len(FAST)
    assert all(model.dynamics.prediction == "image" for model in models.values())
    assert sum(parameter.numel() for parameter in models["fast_f8c16"].parameters()) <= 5_000_000


def stated_defaults(model: dict[str, Any]) -> list[str]:
    """Settings of a preset that say what would hold without them."""
    found = []
    for name, parameter in inspect.signature(DCSSDAE.__init__).parameters.items():
        if name in model and name not in COMPONENTS and model[name] == parameter.default:
            found.append(f"{name}: {model[name]}")
    for part, classes in COMPONENTS.items():
        given = model.get(part, {})
        if given.get("class_path") == DEFAULT_CLASSES[part]:
            found.append(f"{part}.class_path: {given['class_path']}")
        parameters = inspect.signature(classes[given.get("class_path", DEFAULT_CLASSES[part])]).parameters
        for name, value in given.get("init_args", {}).items():
            default = parameters[name].default
            if value == (list(default) if isinstance(default, tuple) else default):
                found.append(f"{part}.{name}: {value}")
    return found


def stated_run_defaults(preset: Mapping[str, Any]) -> list[str]:
    """Settings of a run, in a preset or another mapping, that say what would hold without them."""
    found = []
    for section, kind in {"data": DataConfig, "training": TrainingConfig}.items():
        given = preset.get(section, {})
        for entry in fields(kind):
            default = entry.default_factory() if entry.default is MISSING else entry.default  # type: ignore[misc]
            default = list(default) if isinstance(default, tuple) else default
            if entry.name in given and given[entry.name] == default:
                found.append(f"{section}.{entry.name}: {default}")
    for name, loss in preset.get("losses", {}).items():
        weight = loss.get("weight") if isinstance(loss, Mapping) else loss
        if weight == BUILT_IN_LOSSES.get(name, 1.0):
            found.append(f"losses.{name}: {weight}")
    return found


@each_preset
def test_a_preset_states_only_what_differs_from_the_defaults(name: str) -> None:
    preset = load_preset(name)
    assert stated_defaults(preset["model"]) == []
    assert stated_run_defaults(preset) == []
    assert all(preset.values()), "an empty section states nothing"


def test_stated_defaults_are_found() -> None:
    stated = {
        "data": {"image_size": 256, "root": "x"},
        "training": {"betas": [0.9, 0.999], "lr": 1.0},
        "losses": {"kl": 1e-6, "dynamics": {"weight": 1.0}, "own": {"weight": 2.0}},
    }
    found = ["data.image_size: 256", "training.betas: [0.9, 0.999]", "losses.kl: 1e-06", "losses.dynamics: 1.0"]
    assert stated_run_defaults(stated) == found
    assert stated_defaults({"encoder": {"class_path": "DCEncoder"}}) == ["encoder.class_path: DCEncoder"]


@each_preset
def test_a_preset_is_a_whole_run(name: str) -> None:
    """Together with the folder of images; the paper's presets take every setting of the loop from the defaults."""
    config = RunConfig.from_mapping(load_preset(name))
    if name != "demo":
        assert config.training == TrainingConfig(train=["decoder", "losses.repa"] if "_frozen_" in name else None)
        assert config.data == DataConfig()


def test_an_unknown_preset_suggests_a_name() -> None:
    for build in (load_preset, DCSSDAE.from_preset):
        with pytest.raises(InputError, match=r"unknown preset 'dc_f32c32_eqn' \(did you mean 'dc_f32c32_eqm'\?\)"):
            build("dc_f32c32_eqn")


@pytest.mark.parametrize("name", ["../presets/demo", "demo.yaml", "", "/etc/passwd"])
def test_a_preset_is_no_path(name: str) -> None:
    with pytest.raises(InputError, match="unknown preset"):
        load_preset(name)


def test_settings_change_a_preset_part_by_part() -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset(
            "demo", latent_channels=8, decoder={"window_radius": 2}, dynamics={"gradient_scale": 4.0}
        )
    assert model.config["latent_channels"] == 8
    assert model.config["decoder"]["init_args"]["window_radius"] == 2
    assert model.config["decoder"]["init_args"]["channels"] == 48
    assert model.dynamics.gradient_scale == 4.0
    assert load_preset("demo")["model"]["latent_channels"] == 4
