"""Presets: what their files may say, and that every model they describe starts healthy."""

import pytest
import torch
from half_convolutions import ConvolutionsOfAGPU
from tiny_models import refusal

from dc_ssdae import DCSSDAE
from dc_ssdae.losses import StepOutputs
from dc_ssdae.presets import list_presets, load_preset
from dc_ssdae.training.build import build_objective
from dc_ssdae.training.config import DataConfig, RunConfig, TrainingConfig

PAPER = ("vq_f8c4_fm", "dc_f32c32_fm", "dc_f32c32_eqm", "dc_f64c128_eqm", "dc_f128c512_eqm", "dcae_f32c32_eqm")
FAST = ("fast_f8c4", "fast_f8c16", "fast_f16c64", "fast_f32c32", "fast_f32c64")

WHOLE = {
    "lpips": {"weight": 0.5, "init_args": {"net": "squeeze", "weights": "random"}},
    "repa": {"weight": 0.25, "init_args": {"backbone": "test_vit", "weights": "random"}},
}
"""The whole objective, with small networks in the places of VGG-16 and DINOv2."""


# The large models whose networks are another preset's are left out, and those of the largest factors are slow.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(("dc_f64", "dc_f128")) else ())
        for name in list_presets()
        if not name.endswith("_eqm_image")
    ],
)
@torch.no_grad()
def test_every_loss_is_finite_at_initialisation(name: str) -> None:
    """And KL is at most 10 per latent dimension, in float32 of white and black, which excite the latent's mean most of
    all images tried, and of uniform noise under autocast.
    """
    model = DCSSDAE.from_preset(name).train()
    objective = build_objective(RunConfig.from_mapping({**load_preset(name), "losses": WHOLE}).losses, model)
    side = max(64, 2 * model.config.downsample_factor)
    flat = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, side, side)
    for autocast, x in ((False, flat), (True, 2.0 * torch.rand(2, 3, side, side) - 1.0)):
        level = torch.tensor([0.4, 0.4])
        with ConvolutionsOfAGPU(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            posterior = model.encoder(x)
            record = model.dynamics.corrupt(x, torch.randn_like(x), level)
            time = level if model.dynamics.conditions_on_time else None
            prediction, features = model.decoder.forward_with_features(record.x_level, posterior.sample(), time)
            losses = objective(StepOutputs(model.dynamics, record, prediction, posterior, features))
        assert set(losses.terms) == {"dynamics", "lpips", "repa", "kl"}
        for term, value in (*losses.terms.items(), ("total", losses.total)):
            assert value.isfinite(), f"{term} is {value} with autocast={autocast}"
        per_dimension = (posterior.kl() / posterior.mean[0].numel()).max()
        assert per_dimension <= 10.0, f"KL per dimension is {per_dimension} with autocast={autocast}"
        assert posterior.mean.std() > 1e-3


def test_the_promised_presets_are_there() -> None:
    assert set(list_presets()) >= {*PAPER, *FAST, "demo"}


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


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_is_a_whole_run(name: str) -> None:
    """Together with the folder of images; the paper's presets take every setting of the loop from the defaults."""
    config = RunConfig.from_mapping(load_preset(name))
    if name != "demo":
        train = ["decoder", "losses.repa"] if "_frozen_" in name else None
        latent_noise = 0.8 if name.startswith("rae_") else 0.0
        assert config.training == TrainingConfig(train=train, latent_noise=latent_noise)
        assert config.data == DataConfig()


def test_an_unknown_preset_suggests_a_name_and_is_no_path() -> None:
    for build in (load_preset, DCSSDAE.from_preset):
        hint = "unknown preset 'dc_f32c32_eqn' (did you mean 'dc_f32c32_eqm'?)"
        assert hint in refusal(build, "dc_f32c32_eqn")
        assert "unknown preset" in refusal(build, "../presets/demo")


def test_settings_change_a_preset_part_by_part() -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset("demo", latent_channels=8, decoder={"window_radius": 2})
    assert model.config["latent_channels"] == 8
    assert model.config["decoder"]["init_args"]["window_radius"] == 2
    assert model.config["decoder"]["init_args"]["channels"] == 48
    assert load_preset("demo")["model"]["latent_channels"] == 4
