"""Alignment with a vision transformer: its value, its gradients, its weights in two formats."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_models import refusal
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae import DCSSDAE, DiagonalGaussian
from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.losses import REPALoss, StepOutputs

WIDTHS = {"channels": 8, "multipliers": [1, 1, 2, 2], "norm_groups": 4, "heads": 2}
MODEL: dict[str, Any] = {
    "latent_channels": 4,
    "downsample_factor": 8,
    "encoder": {"init_args": {"widths": [8, 16, 16, 16], "depths": [0, 1, 1, 1]}},
    "decoder": {"init_args": {**WIDTHS, "middle_layers": 3, "blocks_per_level": 1}},
}

TINY = "test_vit"
TINY_FILE = "test_vit.r160_in1k.safetensors"
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
DINOV2_S_REGISTERS = "vit_small_patch14_reg4_dinov2.lvd142m"
DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
TRAINS = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]


def term(channels: int = 12, **settings: Any) -> REPALoss:
    return REPALoss(channels, **{"backbone": TINY, "weights": "random", "precision": "float32", **settings})


def outputs(features: Tensor | None, x: Tensor | None = None) -> StepOutputs:
    """A step of images eight times as large as the features."""
    if x is None:
        assert features is not None
        x = 2.0 * torch.rand(features.shape[0], 3, 8 * features.shape[2], 8 * features.shape[3]) - 1.0
    dynamics = EquilibriumMatching()
    record = dynamics.corrupt(x, torch.randn_like(x), torch.rand(len(x)))
    return StepOutputs(dynamics, record, torch.zeros_like(x), DiagonalGaussian(torch.zeros(len(x), 1, 1, 1)), features)


# --- the value ---


def test_it_is_one_minus_the_mean_cosine_of_tokens() -> None:
    rows, columns = 2, 5
    ours, features = term(), torch.randn(2, 12, rows, columns)
    given = outputs(features)
    value = ours(given)
    assert (value.shape, value.dtype) == ((2,), torch.float32)
    transformer = timm.create_model(TINY, num_classes=0, img_size=(16 * rows, 16 * columns))
    state = ours.backbone.network.transformer.state_dict()
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], [rows, columns])
    transformer.load_state_dict(state)
    resized = F.interpolate(given.record.x, (16 * rows, 16 * columns), mode="bicubic", antialias=True)
    with torch.no_grad():
        targets = transformer.eval().forward_features(resized)[:, 1:]  # of mean and deviation 0.5: [-1, 1] it is
        for image in range(2):
            cosines = [
                F.cosine_similarity(ours.head(features[image, :, place // columns, place % columns]), target, dim=0)
                for place, target in enumerate(targets[image])
            ]
            torch.testing.assert_close(value[image], 1.0 - torch.stack(cosines).mean(), atol=1e-5, rtol=1e-4)


def test_the_images_colours_are_what_the_backbone_expects() -> None:
    network = term(backbone=DINOV2_S).backbone.network
    seen = []
    network.transformer.forward_features = lambda x: seen.append(x) or torch.zeros(1, 5, 384)
    colour = torch.tensor([0.2, 0.5, 0.9])
    assert network((2.0 * colour - 1.0).view(1, 3, 1, 1).expand(1, 3, 16, 16), 2, 2).shape == (1, 4, 384)
    expected = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0], expected.view(1, 3, 1, 1).expand(1, 3, 28, 28), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", [DINOV2_S_REGISTERS, "vit_small_patch16_dinov3"])
def test_other_transformers_fit(backbone: str) -> None:
    ours = term(backbone=backbone)
    assert ours(outputs(torch.randn(1, 12, 2, 3))).isfinite().all()
    assert ours.head[2].out_features == ours.backbone.network.channels


def test_dinov2_b_is_the_default() -> None:
    ours = REPALoss(12, weights="random")
    assert ours.backbone.network.transformer.pretrained_cfg["architecture"] == "vit_base_patch14_dinov2"
    assert (ours.head[0].out_features, ours.head[2].out_features, ours.decoder_layer) == (12, 768, None)
    assert 0 < ours(outputs(torch.randn(1, 12, 2, 3))) < 2


# --- gradients ---


def test_gradients_reach_features_and_head_and_nothing_of_the_backbone() -> None:
    ours, features = term(), torch.randn(2, 12, 4, 4, requires_grad=True)
    x = (2.0 * torch.rand(2, 3, 32, 32) - 1.0).requires_grad_()
    ours(outputs(features, x)).sum().backward()
    assert features.grad is not None
    assert (features.grad.flatten(2).norm(dim=(1, 2)) > 0).all()
    assert x.grad is None
    assert list(ours.state_dict()) == TRAINS
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is not None] == TRAINS
    assert all(parameter.grad is None for parameter in ours.backbone.network.parameters())


@pytest.mark.parametrize(("layer", "reached"), [(None, 1), (2, 2)])
def test_in_a_model_gradients_reach_the_encoder_and_no_later_block(layer: int | None, reached: int) -> None:
    model = DCSSDAE(**MODEL)
    ours = REPALoss.for_model(model, backbone=TINY, layer=layer, weights="random")
    assert (ours.head[0].in_features, ours.decoder_layer) == (16, layer)
    x = 2.0 * torch.rand(2, 3, 32, 48) - 1.0
    record = model.dynamics.corrupt(x, torch.randn_like(x), torch.rand(2))
    posterior = model.posterior(x)
    prediction, features = model.decoder.forward_with_features(record.x_level, posterior.sample(), None, layer)
    ours(StepOutputs(model.dynamics, record, prediction, posterior, features)).mean().backward()
    reaches = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder.")} <= reaches
    blocks = {int(name.split(".")[3]) for name in reaches if name.startswith("decoder.middle.blocks.")}
    assert blocks == set(range(reached + 1))
    assert not any(name.startswith(("decoder.up.", "decoder.middle.project_out")) for name in reaches)


# --- as a module ---


def test_a_step_without_features_is_refused() -> None:
    assert "computed none" in refusal(term(), outputs(None, torch.zeros(1, 3, 16, 16)))


class Decoder(nn.Module):
    """A decoder of one's own."""


def test_a_decoder_of_ones_own_tells_its_channels() -> None:
    model, settings = DCSSDAE(**MODEL), {"backbone": TINY, "weights": "random"}
    model.decoder = Decoder()  # type: ignore[assignment]
    message = refusal(REPALoss.for_model, model, **settings)
    assert "Decoder has no attribute feature_channels" in message
    assert "--losses.repa 0" in message
    assert REPALoss.for_model(model, decoder_channels=7, **settings).head[0].in_features == 7
    model.decoder.feature_channels = 5
    assert REPALoss.for_model(model, **settings).head[0].in_features == 5


# --- weights ---


def random_transformer(name: str) -> nn.Module:
    """All of whose tensors are random, for a test to tell them apart."""
    model = timm.create_model(name, num_classes=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def authors_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The same in the layout of DINOv2's authors: a mask token, and a place for the class token too."""
    state = {**model.state_dict(), "mask_token": torch.zeros(1, model.embed_dim)}
    if "reg4" in name:
        place = torch.randn_like(state["cls_token"])
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - place
    return state


@pytest.mark.parametrize(
    ("name", "authors_name"),
    [(DINOV2_S, "dinov2_vits14_pretrain.pth"), (DINOV2_S_REGISTERS, "dinov2_vits14_reg4_pretrain.pth")],
)
def test_timms_and_the_authors_files_give_the_same_features(name: str, authors_name: str, tmp_path: Path) -> None:
    model = random_transformer(name).eval()
    for folder in ("timm", "authors"):
        (tmp_path / folder).mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / f"{name}.safetensors")
    torch.save(authors_state(model, name), tmp_path / "authors" / authors_name)
    x = 2.0 * torch.rand(1, 3, 16, 24) - 1.0
    tokens = []
    for folder, file in (("timm", f"{name}.safetensors"), ("authors", authors_name)):
        ours = term(backbone=name, weights=str(tmp_path / folder))
        assert ours.weights_file == tmp_path / folder / file
        assert not ours.random_weights
        tokens.append(ours.backbone(x, 2, 3))
    torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-5)
    loaded = ours.backbone.network.transformer.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items() if key != "cls_token")


def test_a_folder_may_hold_a_snapshot_of_the_repository_and_a_file_a_classifier(tmp_path: Path) -> None:
    snapshot = tmp_path / TINY_FILE.removesuffix(".safetensors")
    snapshot.mkdir()
    state = timm.create_model(TINY, num_classes=1000).state_dict()
    assert "head.weight" in state
    save_file(state, snapshot / "model.safetensors")
    assert term(weights=str(tmp_path)).weights_file == snapshot / "model.safetensors"


@pytest.mark.parametrize("weights", ["random", "file"])
def test_building_draws_random_numbers_for_the_head_alone(weights: str, tmp_path: Path) -> None:
    save_file(random_transformer(TINY).state_dict(), tmp_path / TINY_FILE)
    expected, networks = nn.Sequential(nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 64)), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ours = term(weights=weights if weights == "random" else str(tmp_path))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        for layer in (0, 2):
            expected[layer].reset_parameters()
        torch.testing.assert_close(ours.head.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), after)
        networks.append(ours.backbone.network.state_dict())
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())
    assert ours.random_weights == (weights == "random") == (ours.weights_file is None)


def test_without_weights_one_line_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    config = timm.get_pretrained_cfg(DINOV2_B)
    for attempt, given in ((REPALoss, {"decoder_channels": 12}), (REPALoss.fetch, {})):
        message = refusal(attempt, **given)
        for part in (f"{DINOV2_B}.safetensors", Path(config.url).name, config.hf_hub_id, "--losses.repa 0"):
            assert part in message
    (tmp_path / TINY_FILE).touch()
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    REPALoss.fetch(TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 50, 64)}, "pos_embed has shape (1, 50, 64)"),
        ({"mask_token": torch.zeros(1), "norm.weight": None}, "missing: norm.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {**random_transformer(TINY).state_dict(), **change}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / TINY_FILE)
    error = refusal(term, weights=str(tmp_path))
    assert TINY_FILE in error
    assert message in error


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vit_base_patch14_dinov3.lvd142m"}, "did you mean 'vit_base_patch1"),
        ({"backbone": "resnet18"}, "resnet18 of timm is not a vision transformer"),
        ({"precision": "bf16"}, "unknown precision of a backbone 'bf16'"),
        ({"layer": -1}, "layer is -1"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(term, **settings)
