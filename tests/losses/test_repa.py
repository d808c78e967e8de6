"""Alignment with a vision transformer: its value, its gradients, its weights in two formats."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_models import TINY_DECODER, image, refusal, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from dc_ssdae import DiagonalGaussian
from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.losses import REPALoss, StepOutputs

DECODER = {"init_args": {**TINY_DECODER["init_args"], "middle_layers": 3}}

TINY = "test_vit"
TINY_FILE = "test_vit.r160_in1k.safetensors"
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
DINOV2_S_REGISTERS = "vit_small_patch14_reg4_dinov2.lvd142m"
DINOV2_B = "vit_base_patch14_dinov2.lvd142m"


def term(channels: int = 12, **settings: Any) -> REPALoss:
    return REPALoss(channels, **{"backbone": TINY, "weights": "random", "precision": "float32", **settings})


def outputs(features: Tensor | None, x: Tensor) -> StepOutputs:
    dynamics = EquilibriumMatching()
    record = dynamics.corrupt(x, torch.randn_like(x), torch.rand(len(x)))
    return StepOutputs(dynamics, record, torch.zeros_like(x), DiagonalGaussian(torch.zeros(len(x), 1, 1, 1)), features)


# --- the value ---


def test_it_is_one_minus_the_mean_cosine_of_tokens() -> None:
    rows, columns = 2, 5
    ours, features, x = term(), torch.randn(2, 12, rows, columns), image(2, 16, 40)
    value = ours(outputs(features, x))
    assert (value.shape, value.dtype) == ((2,), torch.float32)
    transformer = timm.create_model(TINY, num_classes=0, img_size=(16 * rows, 16 * columns))
    state = ours.backbone.network.transformer.state_dict()
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], [rows, columns])
    transformer.load_state_dict(state)
    resized = F.interpolate(x, (16 * rows, 16 * columns), mode="bicubic", antialias=True)
    with torch.no_grad():
        targets = transformer.eval().forward_features(resized)[:, 1:]  # of mean and deviation 0.5: [-1, 1] it is
        for place in range(2):
            cosines = [
                F.cosine_similarity(ours.head(features[place, :, token // columns, token % columns]), target, dim=0)
                for token, target in enumerate(targets[place])
            ]
            torch.testing.assert_close(value[place], 1.0 - torch.stack(cosines).mean(), atol=1e-5, rtol=1e-4)


def test_the_images_colours_are_what_the_backbone_expects() -> None:
    network = term(backbone=DINOV2_S).backbone.network
    seen = []
    network.transformer.forward_features = lambda x: seen.append(x) or torch.zeros(1, 5, 384)
    colour = torch.tensor([0.2, 0.5, 0.9])
    assert network((2.0 * colour - 1.0).view(1, 3, 1, 1).expand(1, 3, 16, 16), 2, 2).shape == (1, 4, 384)
    expected = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0], expected.view(1, 3, 1, 1).expand(1, 3, 28, 28), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", [DINOV2_B, DINOV2_S_REGISTERS, "vit_small_patch16_dinov3"])
def test_dinov2_b_is_the_default_and_other_transformers_fit(backbone: str) -> None:
    ours = REPALoss(12, weights="random") if backbone == DINOV2_B else term(backbone=backbone)
    transformer = ours.backbone.network.transformer
    assert backbone.startswith(transformer.pretrained_cfg["architecture"])
    assert (ours.head[0].out_features, ours.head[2].out_features) == (12, transformer.embed_dim)
    assert 0 < ours(outputs(torch.randn(1, 12, 2, 3), image(1, 16, 24))) < 2


# --- gradients ---


def test_gradients_reach_features_and_head_and_nothing_of_the_backbone() -> None:
    ours, features = term(), torch.randn(2, 12, 4, 4, requires_grad=True)
    x = image(2, 32, 32).requires_grad_()
    ours(outputs(features, x)).sum().backward()
    assert features.grad is not None
    assert (features.grad.flatten(2).norm(dim=(1, 2)) > 0).all()
    assert x.grad is None
    trained = [name for name, parameter in ours.named_parameters() if parameter.grad is not None]
    assert list(ours.state_dict()) == trained == ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert all(parameter.grad is None for parameter in ours.backbone.network.parameters())


@pytest.mark.parametrize(("layer", "reached"), [(None, 1), (2, 2)])
def test_in_a_model_gradients_reach_the_encoder_and_no_later_block(layer: int | None, reached: int) -> None:
    model = tiny(decoder=DECODER)
    ours = REPALoss.for_model(model, backbone=TINY, layer=layer, weights="random")
    assert (ours.head[0].in_features, ours.decoder_layer) == (16, layer)
    x = image(2)
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


def test_a_decoder_of_ones_own_tells_its_channels() -> None:
    model, settings = tiny(), {"backbone": TINY, "weights": "random"}
    model.decoder = nn.Module()  # type: ignore[assignment]
    assert "feature_channels" in refusal(REPALoss.for_model, model, **settings)
    assert "computed none" in refusal(term(), outputs(None, image()))
    assert REPALoss.for_model(model, decoder_channels=7, **settings).head[0].in_features == 7
    model.decoder.feature_channels = 5
    assert REPALoss.for_model(model, **settings).head[0].in_features == 5


# --- weights ---


def random_transformer(name: str, num_classes: int = 0) -> nn.Module:
    """All of whose tensors are random, for a test to tell them apart."""
    model = timm.create_model(name, num_classes=num_classes)
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
    x, tokens = image(1, 16, 24), []
    for folder, file in (("timm", f"{name}.safetensors"), ("authors", authors_name)):
        ours = term(backbone=name, weights=str(tmp_path / folder))
        assert ours.weights_file == tmp_path / folder / file
        assert not ours.random_weights
        tokens.append(ours.backbone(x, 2, 3))
    torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-5)
    loaded = ours.backbone.network.transformer.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items() if key != "cls_token")


def test_a_folder_may_hold_a_snapshot_of_the_repository_and_a_file_a_classifier(tmp_path: Path) -> None:
    file = tmp_path / TINY_FILE.removesuffix(".safetensors") / "model.safetensors"
    file.parent.mkdir()
    state = random_transformer(TINY, num_classes=10).state_dict()
    save_file(state, file)
    ours = term(weights=str(tmp_path))
    assert ours.weights_file == file
    assert state.keys() - ours.backbone.network.transformer.state_dict().keys() == {"head.weight", "head.bias"}


def test_building_draws_random_numbers_for_the_head_alone(tmp_path: Path) -> None:
    save_file(random_transformer(TINY).state_dict(), tmp_path / TINY_FILE)
    networks = []
    for seed, weights in ((1, "random"), (2, "random"), (3, str(tmp_path))):
        torch.manual_seed(seed)
        ours = term(weights=weights)
        assert ours.random_weights == (weights == "random") == (ours.weights_file is None)
        networks.append(parameters_to_vector(ours.backbone.network.parameters()))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 64))
        assert torch.equal(parameters_to_vector(ours.head.parameters()), parameters_to_vector(expected.parameters()))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(networks[0], networks[1])


def test_without_weights_one_line_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, timeout: float) -> None:
        assert timeout <= 10
        raise OSError("no answer")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    config = timm.get_pretrained_cfg(DINOV2_B)
    for attempt, given in ((REPALoss, {"decoder_channels": 12}), (REPALoss.fetch, {})):
        message = refusal(attempt, **given)
        parts = (f"{DINOV2_B}.safetensors", Path(config.url).name, config.hf_hub_id, "no answer", "--losses.repa 0")
        assert all(part in message for part in parts)
    (tmp_path / TINY_FILE).touch()
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    REPALoss.fetch(TINY)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = random_transformer(TINY).state_dict()
    without_norm = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    for spoilt, named in ((without_norm, "norm.weight"), ({**state, "pos_embed": torch.zeros(1)}, "pos_embed")):
        save_file(spoilt, tmp_path / TINY_FILE)
        message = refusal(term, weights=str(tmp_path))
        assert TINY_FILE in message
        assert named in message


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vit_base_patch14_dinov3.lvd142m"}, "did you mean 'vit_base_patch1"),
        ({"backbone": "resnet18"}, "resnet18 of timm is not a vision transformer"),
        ({"layer": -1}, "layer is -1"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(term, **settings)
