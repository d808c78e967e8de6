"""Alignment with a vision transformer: its value, its gradients, its weights in two formats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae import DCSSDAE, DiagonalGaussian, InputError
from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.losses import Objective, REPALoss, StepOutputs, WeightedTerm

MODEL: dict[str, Any] = {
    "latent_channels": 4,
    "downsample_factor": 8,
    "encoder": {"init_args": {"widths": [8, 16, 16, 16], "depths": [0, 1, 1, 1]}},
    "decoder": {
        "init_args": {
            "channels": 8,
            "multipliers": [1, 1, 2, 2],
            "middle_layers": 3,
            "blocks_per_level": 1,
            "norm_groups": 4,
            "heads": 2,
        }
    },
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


def as_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


# --- the value ---


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (3, 1)])
def test_it_is_one_minus_the_mean_cosine_of_tokens(rows: int, columns: int) -> None:
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
                F.cosine_similarity(
                    ours.head(features[image, :, row, column]), targets[image, row * columns + column], 0
                )
                for row in range(rows)
                for column in range(columns)
            ]
            torch.testing.assert_close(value[image], 1.0 - torch.stack(cosines).mean(), atol=1e-5, rtol=1e-4)


def test_equal_features_cost_nothing_whatever_their_length() -> None:
    ours = term(64)
    ours.head = nn.Identity()
    x = 2.0 * torch.rand(2, 3, 32, 48) - 1.0
    targets = as_map(ours.backbone(x, 4, 6), 4, 6)
    for scale, expected in ((1.0, 0.0), (100.0, 0.0), (-1.0, 2.0)):
        value = ours(outputs(scale * targets, x))
        torch.testing.assert_close(value, torch.full((2,), expected), atol=1e-5, rtol=0)


def test_a_token_is_the_patch_in_its_place() -> None:
    # With patches as large as 8×8 pixels nothing is resized; a change in one patch changes its own token most.
    ours = term(64)
    x = torch.zeros(1, 3, 32, 40)
    changed = x.clone()
    changed[:, :, 16:24, 32:40] = 1.0
    moved = (ours.backbone(changed, 4, 5) - ours.backbone(x, 4, 5)).norm(dim=-1)
    assert moved.argmax() == 2 * 5 + 4


def test_the_images_colours_are_what_the_backbone_expects() -> None:
    network = term(backbone=DINOV2_S).backbone.network
    torch.testing.assert_close(network.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(network.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    seen = []
    network.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network.transformer.forward_features = lambda x: seen.append(x) or torch.zeros(1, 5, 384)
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert network(2.0 * colour - 1.0, 2, 2).shape == (1, 4, 384)
    expected = (colour[0, :, 0, 0] - network.mean.flatten()) / network.std.flatten()
    assert seen[0].shape == (1, 3, 28, 28)
    torch.testing.assert_close(seen[0], expected.view(1, 3, 1, 1).expand_as(seen[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", [TINY, "test_vit3", DINOV2_S, DINOV2_S_REGISTERS, "vit_small_patch16_dinov3"])
def test_other_transformers_fit(backbone: str) -> None:
    ours = term(backbone=backbone)
    assert ours(outputs(torch.randn(1, 12, 2, 3))).isfinite().all()
    assert ours.head[2].out_features == ours.backbone.network.channels


def test_dinov2_b_is_the_default() -> None:
    ours = REPALoss(12, weights="random")
    network = ours.backbone.network
    assert (network.transformer.pretrained_cfg["architecture"], network.channels) == ("vit_base_patch14_dinov2", 768)
    assert (ours.head[0].out_features, ours.head[2].out_features, ours.decoder_layer) == (12, 768, None)
    value = ours(outputs(torch.randn(1, 12, 2, 3)))
    assert value.shape == (1,)
    assert 0 < value < 2


def test_bfloat16_changes_little() -> None:
    exact, half = term(), term(precision="bfloat16")
    half.head.load_state_dict(exact.head.state_dict())
    given = outputs(torch.randn(2, 12, 4, 4).bfloat16())
    value, expected = half(given), exact(given)
    assert value.dtype == torch.float32
    assert not torch.equal(value, expected)
    torch.testing.assert_close(value, expected, rtol=0.01, atol=0)


# --- gradients ---


def test_gradients_reach_features_and_head_and_nothing_of_the_backbone() -> None:
    ours, features = term(), torch.randn(2, 12, 4, 4, requires_grad=True)
    x = (2.0 * torch.rand(2, 3, 32, 32) - 1.0).requires_grad_()
    ours(outputs(features, x)).sum().backward()
    assert features.grad is not None
    assert (features.grad.flatten(2).norm(dim=(1, 2)) > 0).all()
    assert x.grad is None
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is not None] == TRAINS
    assert all(parameter.grad is None for parameter in ours.backbone.network.parameters())


@pytest.mark.parametrize(("layer", "reached"), [(None, 1), (0, 0), (2, 2)])
def test_in_a_model_gradients_reach_the_encoder_and_no_later_block(layer: int | None, reached: int) -> None:
    model = DCSSDAE(**MODEL)
    ours = REPALoss.for_model(model, backbone=TINY, layer=layer, weights="random")
    assert ours.head[0].in_features == 16
    assert ours.decoder_layer == layer
    x = 2.0 * torch.rand(2, 3, 32, 48) - 1.0
    record = model.dynamics.corrupt(x, torch.randn_like(x), torch.rand(2))
    posterior = model.posterior(x)
    prediction, features = model.decoder.forward_with_features(record.x_level, posterior.sample(), None, layer)
    ours(StepOutputs(model.dynamics, record, prediction, posterior, features)).mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    blocks = {int(name.split(".")[3]) for name in with_gradient if name.startswith("decoder.middle.blocks.")}
    assert blocks == set(range(reached + 1))
    assert not any(
        name.startswith(("decoder.up.", "decoder.middle.project_out", "decoder.conv_out")) for name in with_gradient
    )
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder.")} <= with_gradient
    first = next(parameter for name, parameter in model.named_parameters() if name.startswith("encoder."))
    assert first.grad is not None
    assert first.grad.any()


# --- as a module ---


def test_only_the_head_is_saved_and_trained() -> None:
    ours = term().train()
    assert list(ours.state_dict()) == TRAINS
    assert [name for name, _ in ours.named_parameters()] == TRAINS
    assert not any(module.training for module in ours.backbone.network.modules())


def test_it_moves_as_a_whole() -> None:
    ours = term().to(torch.float64)
    assert {tensor.dtype for tensor in ours.backbone.network.state_dict().values()} == {torch.float64}
    assert ours.backbone.network.mean.dtype == torch.float64
    assert ours(outputs(torch.randn(2, 12, 2, 3))).dtype == torch.float32


def test_an_objective_tells_what_it_needs() -> None:
    whole = Objective({"repa": WeightedTerm(0.25, term(layer=1))})
    assert (whole.wants_decoder_features, whole.decoder_layer, whole.random_backbones) == (True, 1, ["repa"])
    assert list(whole.state_dict()) == [f"terms.repa.{name}" for name in TRAINS]
    whole.compile_backbones()
    assert whole.terms["repa"].backbone.network._compiled_call_impl is not None


def test_a_step_without_features_is_refused() -> None:
    assert "computed none" in error_of(term(), outputs(None, torch.zeros(1, 3, 16, 16)))


# --- the model's decoder ---


class Decoder(nn.Module):
    """A decoder of one's own that gives no features."""


class FeatureDecoder(Decoder):
    """One that does."""

    def forward_with_features(self, x: Tensor, z: Tensor, time: Tensor | None, layer: int | None) -> None: ...


class SizedDecoder(FeatureDecoder):
    """One that tells how many."""

    feature_channels = 5


def with_decoder(decoder: nn.Module) -> DCSSDAE:
    model = DCSSDAE(**MODEL)
    model.decoder = decoder  # type: ignore[assignment]
    return model


def test_a_decoder_of_ones_own_tells_its_channels() -> None:
    settings = {"backbone": TINY, "weights": "random"}
    assert REPALoss.for_model(with_decoder(SizedDecoder()), **settings).head[0].in_features == 5
    ours = REPALoss.for_model(with_decoder(FeatureDecoder()), decoder_channels=7, **settings)
    assert ours.head[0].in_features == 7


def test_a_decoder_without_features_is_named() -> None:
    message = error_of(REPALoss.for_model, with_decoder(FeatureDecoder()), backbone=TINY, weights="random")
    assert "FeatureDecoder has no attribute feature_channels" in message
    assert "--losses.repa 0" in message


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
    network = ours.backbone.network
    expected = {key: tensor for key, tensor in model.state_dict().items() if key != "cls_token"}
    loaded = {key: tensor for key, tensor in network.transformer.state_dict().items() if key != "cls_token"}
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_a_classifier_is_left_out(tmp_path: Path) -> None:
    state = timm.create_model(TINY, num_classes=1000).state_dict()
    assert "head.weight" in state
    save_file(state, tmp_path / TINY_FILE)
    assert term(weights=str(tmp_path)).weights_file == tmp_path / TINY_FILE


def test_a_folder_may_hold_a_snapshot_of_the_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / TINY_FILE.removesuffix(".safetensors")
    snapshot.mkdir()
    save_file(random_transformer(TINY).state_dict(), snapshot / "model.safetensors")
    assert term(weights=str(tmp_path)).weights_file == snapshot / "model.safetensors"


@pytest.mark.parametrize("weights", ["random", "file"])
def test_building_draws_random_numbers_for_the_head_alone(weights: str, tmp_path: Path) -> None:
    save_file(random_transformer(TINY).state_dict(), tmp_path / TINY_FILE)
    torch.manual_seed(3)
    ours = term(weights=weights if weights == "random" else str(tmp_path))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 64))
    torch.testing.assert_close(ours.head.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), after)


def test_random_weights_are_the_same_at_every_start() -> None:
    terms = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        terms.append(term())
    first, second = (ours.backbone.network.state_dict() for ours in terms)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert terms[0].random_weights
    assert terms[0].weights_file is None
    assert not torch.equal(terms[0].head[0].weight, terms[1].head[0].weight)


def test_without_weights_one_line_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    config = timm.get_pretrained_cfg(DINOV2_B)
    for attempt in (lambda: REPALoss(12), REPALoss.fetch):
        message = error_of(attempt)
        for part in (f"{DINOV2_B}.safetensors", Path(config.url).name, config.hf_hub_id, "--losses.repa 0"):
            assert part in message


def test_fetching_finds_what_building_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"without {TINY_FILE}" in error_of(REPALoss.fetch, TINY, weights=str(tmp_path))
    (tmp_path / TINY_FILE).touch()
    REPALoss.fetch(TINY, weights=str(tmp_path))
    REPALoss.fetch(weights="random", layer=3, decoder_channels=5)
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    REPALoss.fetch(TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.norm1.weight": None}, "blocks.1.norm1.weight"),
        ({"pos_embed": torch.zeros(1, 50, 64)}, "size mismatch for pos_embed"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, "size mismatch for patch_embed.proj.weight"),
        ({"other": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "other"'),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {**random_transformer(TINY).state_dict(), **change}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / TINY_FILE)
    error = error_of(term, weights=str(tmp_path))
    assert TINY_FILE in error
    assert message in error


@pytest.mark.parametrize(
    "state", [{"encoder": torch.zeros(1)}, {"mask_token": torch.zeros(1)}, {"conv": torch.zeros(1)}]
)
def test_a_foreign_file_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / TINY_FILE)
    error = error_of(term, weights=str(tmp_path))
    assert TINY_FILE in error
    assert "Missing key(s)" in error


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    save_file(random_transformer(TINY).state_dict(), tmp_path / TINY_FILE)
    content = (tmp_path / TINY_FILE).read_bytes()
    (tmp_path / TINY_FILE).write_bytes(content[: int(share * len(content))])
    assert TINY_FILE in error_of(term, weights=str(tmp_path))


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vit_base_patch14_dinov3.lvd142m"}, "did you mean 'vit_base_patch1"),
        ({"backbone": "vit_base_patch14_dinov2.imagenet"}, "did you mean 'vit_base_patch14_dinov2"),
        ({"backbone": "nothing_like_it"}, "timm has no model 'nothing_like_it'"),
        ({"precision": "bf16"}, "unknown precision of a backbone 'bf16'"),
        ({"layer": -1}, "layer is -1"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    assert message in error_of(term, **settings)
    if "backbone" in settings:
        assert message in error_of(REPALoss.fetch, **settings)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_what_has_no_patch_tokens_is_refused(backbone: str) -> None:
    assert f"{backbone} of timm is not a vision transformer" in error_of(term, backbone=backbone)


def error_of(attempt: Callable[..., Any], *args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        attempt(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
