"""The weighted sum of loss terms, the built-in terms against closed forms, and terms of a user's own."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import image, refusal, tiny
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dc_ssdae import DiagonalGaussian
from dc_ssdae.dynamics import Dynamics, EquilibriumMatching, FlowMatching
from dc_ssdae.losses import DynamicsLoss, FrozenBackbone, KLLoss, Objective, StepOutputs, WeightedTerm
from dc_ssdae.losses.total import BUILT_IN
from dc_ssdae.training.build import build_objective
from dc_ssdae.training.config import BUILT_IN_LOSSES, LossConfig


def outputs(dynamics: Dynamics | None = None) -> StepOutputs:
    dynamics = dynamics or EquilibriumMatching()
    x = image(3, 8, 8)
    record = dynamics.corrupt(x, torch.randn_like(x), dynamics.sample_level(3))
    prediction = torch.randn(3, 3, 8, 8, requires_grad=True)
    posterior = DiagonalGaussian(torch.randn(3, 4, 2, 3, requires_grad=True), torch.randn(3, 4, 2, 3))
    return StepOutputs(dynamics, record, prediction, posterior)


class Edges(nn.Module):
    """A term of one's own: compares the clean estimate, scaled by a parameter, with the image."""

    def __init__(self, per_image: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.per_image = per_image

    def forward(self, outputs: StepOutputs) -> Tensor:
        difference = (self.scale * outputs.clean_estimate - outputs.record.x).abs()
        return difference.flatten(1).mean(1).double() if self.per_image else difference.mean()


class ReadsFeatures(nn.Module):
    """A term that reads the decoder's features; without `layer` it has no opinion of its own which."""

    reads_decoder_features = True

    def __init__(self, layer: int | None = None) -> None:
        super().__init__()
        if layer is not None:
            self.decoder_layer = layer

    def forward(self, outputs: StepOutputs) -> Tensor:
        assert outputs.decoder_features is not None
        return outputs.decoder_features.square().mean(dim=(1, 2, 3))


# --- built-in terms ---


def test_the_names_and_default_weights_are_the_specifications() -> None:
    assert dict(BUILT_IN_LOSSES) == {"dynamics": 1.0, "lpips": 0.5, "repa": 0.25, "kl": 1e-6}
    assert BUILT_IN.keys() == BUILT_IN_LOSSES.keys()


@pytest.mark.parametrize(
    ("dynamics", "scale"),
    [(EquilibriumMatching("truncated", 4.0), 4.0), (FlowMatching(), 1.0)],
    ids=["equilibrium", "flow"],
)
def test_the_dynamics_term_is_the_mean_square_of_the_error(dynamics: Dynamics, scale: float) -> None:
    given = outputs(dynamics)
    error = (given.prediction - given.record.target) / scale
    torch.testing.assert_close(DynamicsLoss()(given), error.square().mean(dim=(1, 2, 3)))
    true = replace(given, prediction=given.record.target)
    torch.testing.assert_close(true.clean_estimate, given.record.x, atol=1e-5, rtol=1e-5)


# --- the sum ---


def test_terms_are_unweighted_means_and_the_total_is_their_weighted_sum() -> None:
    half = torch.randn(3, 3, 8, 8).bfloat16().requires_grad_()
    given = replace(outputs(), prediction=half)
    whole = Objective({"dynamics": WeightedTerm(0.7, DynamicsLoss()), "kl": WeightedTerm(0.03, KLLoss())})
    losses = whole(given)
    assert list(losses.terms) == ["dynamics", "kl"]
    assert losses.total.dtype == given.clean_estimate.dtype == torch.float32
    torch.testing.assert_close(losses.terms["dynamics"], DynamicsLoss()(given).mean())
    posterior = given.posterior
    each = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(KLLoss()(given), each.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(losses.terms["kl"], KLLoss()(given).mean())
    torch.testing.assert_close(losses.total, 0.7 * losses.terms["dynamics"] + 0.03 * losses.terms["kl"])
    losses.total.backward()
    assert half.grad is not None
    assert posterior.mean.grad is not None


@pytest.mark.parametrize("per_image", [False, True])
def test_a_term_of_ones_own_trains(per_image: bool) -> None:
    term = Edges(per_image)
    whole = Objective({"dynamics": WeightedTerm(1.0, DynamicsLoss()), "edges": WeightedTerm(0.5, term)})
    assert [name for name, _ in whole.named_parameters()] == ["terms.edges.scale"]
    given = outputs()
    losses = whole(given)
    expected = (2.0 * given.clean_estimate - given.record.x).abs().mean()
    torch.testing.assert_close(losses.terms["edges"], expected)
    torch.testing.assert_close(losses.total, losses.terms["dynamics"] + 0.5 * expected)
    losses.total.backward()
    assert term.scale.grad


@pytest.mark.parametrize(("value", "given"), [(torch.zeros(2), "(2,)"), (torch.zeros(3, 1), "(3, 1)"), (1.5, "float")])
def test_a_term_of_another_shape_is_named(value: object, given: str) -> None:
    term = Edges()
    term.forward = lambda outputs: value  # type: ignore[method-assign]
    assert f"losses.mine returns {given}; " in refusal(Objective({"mine": WeightedTerm(1.0, term)}), outputs())
    assert "at least one term" in refusal(Objective, {})


@pytest.mark.parametrize(("layer", "another"), [(None, 3), (3, 0)])
def test_an_objective_tells_which_features_it_reads(layer: int | None, another: int) -> None:
    weighted = WeightedTerm(1.0, ReadsFeatures(layer))
    whole = Objective({"dynamics": WeightedTerm(1.0, DynamicsLoss()), "mine": weighted, "again": weighted})
    assert (whole.wants_decoder_features, whole.decoder_layer) == (True, layer)
    features = torch.randn(3, 4, 1, 1)
    losses = whole(replace(outputs(), decoder_features=features))
    torch.testing.assert_close(losses.terms["mine"], features.square().mean())
    different = {"mine": weighted, "other": WeightedTerm(1.0, ReadsFeatures(another))}
    assert f"losses.mine {layer}, losses.other {another}" in refusal(Objective, different)


def test_backbones_are_compiled_wherever_they_are() -> None:
    term = nn.Sequential(FrozenBackbone(nn.Linear(2, 2)))
    Objective({"mine": WeightedTerm(1.0, term)}).compile_backbones()
    assert term[0].network._compiled_call_impl is not None


def test_importing_the_losses_imports_no_backbones() -> None:
    code = "import sys, dc_ssdae.losses; sys.exit(bool({'lpips', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- from a configuration ---


def test_the_heaviest_terms_are_built_for_the_model() -> None:
    losses = {
        "lpips": LossConfig(0.5, None, {"net": "alex", "weights": "random"}),
        "repa": LossConfig(0.25, None, {"backbone": "test_vit", "weights": "random", "layer": 0}),
    }
    whole = build_objective(losses, tiny())
    assert whole.random_backbones == ["lpips", "repa"]
    assert (whole.wants_decoder_features, whole.decoder_layer) == (True, 0)
    assert whole.state_dict()["terms.repa.head.0.weight"].shape == (16, 16)


def test_a_zero_weight_leaves_its_term_out_and_a_class_gets_its_settings() -> None:
    own = LossConfig(0.5, "torch.nn.Linear", {"in_features": 2, "out_features": 3})
    whole = build_objective({"mine": own, "kl": LossConfig(0.0)}, tiny())
    assert whole.weights == {"mine": 0.5}
    assert whole.terms["mine"].out_features == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(1.0, "torch.nn.Linear", {"in_feature": 2}), "losses.mine: Linear does not take these init_args"),
        (LossConfig(1.0, "collections.OrderedDict"), "OrderedDict, which is no torch.nn.Module"),
        (LossConfig(1.0, "no_such_module.Term"), "no_such_module"),
    ],
)
def test_a_class_that_does_not_fit_is_named(config: LossConfig, message: str) -> None:
    assert message in refusal(build_objective, {"mine": config}, tiny())
