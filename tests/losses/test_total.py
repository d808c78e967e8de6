"""The weighted sum of loss terms, the built-in terms against closed forms, and terms of a user's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.dynamics import Dynamics, EquilibriumMatching, FlowMatching
from dc_ssdae.losses import DynamicsLoss, KLLoss, LossTerm, Objective, StepOutputs, WeightedTerm
from dc_ssdae.losses.total import BUILT_IN
from dc_ssdae.training.build import build_objective
from dc_ssdae.training.config import BUILT_IN_LOSSES, LossConfig

DYNAMICS = [EquilibriumMatching(), EquilibriumMatching("truncated", 4.0), FlowMatching()]
IDS = ["eqm", "eqm with a scale", "fm"]


def outputs(dynamics: Dynamics | None = None, batch: int = 3) -> StepOutputs:
    dynamics = dynamics or EquilibriumMatching()
    x = 2.0 * torch.rand(batch, 3, 8, 8) - 1.0
    record = dynamics.corrupt(x, torch.randn_like(x), dynamics.sample_level(batch))
    prediction = torch.randn(batch, 3, 8, 8, requires_grad=True)
    posterior = DiagonalGaussian(torch.randn(batch, 4, 2, 3, requires_grad=True), torch.randn(batch, 4, 2, 3))
    return StepOutputs(dynamics, record, prediction, posterior)


def objective(**weights: float) -> Objective:
    return Objective({name: WeightedTerm(weight, BUILT_IN[name]()) for name, weight in weights.items()})


class Edges(nn.Module):
    """A term of one's own: compares the clean estimate, scaled by a parameter, with the image."""

    def __init__(self, per_image: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.per_image = per_image

    def forward(self, outputs: StepOutputs) -> Tensor:
        difference = (self.scale * outputs.clean_estimate - outputs.record.x).abs()
        return difference.flatten(1).mean(1) if self.per_image else difference.mean()


class Gives(nn.Module):
    """A term that gives whatever it is told."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, outputs: StepOutputs) -> object:
        return self.value


# --- built-in terms ---


def test_the_names_and_default_weights_are_the_specifications() -> None:
    assert dict(BUILT_IN_LOSSES) == {"dynamics": 1.0, "kl": 1e-6}
    assert BUILT_IN.keys() == BUILT_IN_LOSSES.keys()


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=IDS)
def test_the_dynamics_term_is_the_mean_square_of_the_error(dynamics: Dynamics) -> None:
    given = outputs(dynamics)
    scale = dynamics.gradient_scale if isinstance(dynamics, EquilibriumMatching) else 1.0
    error = (given.prediction - given.record.target) / scale
    torch.testing.assert_close(DynamicsLoss()(given), error.square().mean(dim=(1, 2, 3)))


def test_with_the_linear_decay_it_is_the_mean_square_of_the_clean_estimates_error() -> None:
    given = outputs(EquilibriumMatching())
    expected = (given.clean_estimate - given.record.x).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(DynamicsLoss()(given), expected)


def test_kl_is_summed_over_the_latent() -> None:
    given = outputs()
    posterior = given.posterior
    assert posterior.logvar is not None
    each = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(KLLoss()(given), each.sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=IDS)
def test_the_clean_estimate_of_the_true_field_is_the_image(dynamics: Dynamics) -> None:
    given = outputs(dynamics)
    true = StepOutputs(dynamics, given.record, given.record.target, given.posterior)
    torch.testing.assert_close(true.clean_estimate, given.record.x, atol=1e-5, rtol=1e-5)
    assert true.clean_estimate is true.clean_estimate, "computed once"


def test_the_clean_estimate_is_float32() -> None:
    given = outputs()
    half = StepOutputs(given.dynamics, given.record, given.prediction.bfloat16(), given.posterior)
    assert half.clean_estimate.dtype == torch.float32


# --- the sum ---


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=IDS)
def test_terms_are_unweighted_means_and_the_total_is_their_weighted_sum(dynamics: Dynamics) -> None:
    given = outputs(dynamics)
    losses = objective(dynamics=0.7, kl=0.03)(given)
    assert list(losses.terms) == ["dynamics", "kl"]
    torch.testing.assert_close(losses.terms["dynamics"], DynamicsLoss()(given).mean())
    torch.testing.assert_close(losses.terms["kl"], KLLoss()(given).mean())
    torch.testing.assert_close(losses.total, 0.7 * losses.terms["dynamics"] + 0.03 * losses.terms["kl"])


def test_everything_is_a_finite_float32_scalar_with_gradients() -> None:
    given = outputs()
    losses = objective(dynamics=1.0, kl=1e-6)(given)
    for value in (losses.total, *losses.terms.values()):
        assert (value.shape, value.dtype) == ((), torch.float32)
        assert value.isfinite()
    losses.total.backward()
    for tensor in (given.prediction, given.posterior.mean):
        assert tensor.grad is not None
        assert tensor.grad.any()


def test_half_precision_predictions_are_summed_in_float32() -> None:
    given = outputs()
    half = StepOutputs(given.dynamics, given.record, given.prediction.bfloat16(), given.posterior)
    assert objective(dynamics=1.0)(half).total.dtype == torch.float32


@pytest.mark.parametrize("per_image", [False, True])
def test_a_term_of_ones_own_trains(per_image: bool) -> None:
    term: LossTerm = Edges(per_image)
    assert isinstance(term, nn.Module)
    whole = Objective({"dynamics": WeightedTerm(1.0, DynamicsLoss()), "edges": WeightedTerm(0.5, term)})
    assert [name for name, _ in whole.named_parameters()] == ["terms.edges.scale"]
    given = outputs()
    losses = whole(given)
    expected = (2.0 * given.clean_estimate - given.record.x).abs().mean()
    torch.testing.assert_close(losses.terms["edges"], expected)
    torch.testing.assert_close(losses.total, losses.terms["dynamics"] + 0.5 * expected)
    losses.total.backward()
    assert term.scale.grad is not None
    assert term.scale.grad != 0


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (torch.zeros(2), r"\(2,\)"),
        (torch.zeros(3, 1), r"\(3, 1\)"),
        (torch.zeros(3, 3, 8, 8), r"\(3, 3, 8, 8\)"),
        (1.5, "float"),
        (None, "NoneType"),
    ],
)
def test_a_term_of_another_shape_is_named(value: object, given: str) -> None:
    whole = Objective({"mine": WeightedTerm(1.0, Gives(value))})
    with pytest.raises(InputError, match=rf"losses\.mine gives {given}; a term gives a tensor of shape \(\) or \(3,\)"):
        whole(outputs())


def test_whole_numbers_count_too() -> None:
    losses = Objective({"mine": WeightedTerm(2.0, Gives(torch.tensor([1, 2, 6])))})(outputs())
    assert float(losses.total) == 6.0


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="at least one term of a weight above 0"):
        Objective({})


def test_a_prediction_of_another_shape_is_refused() -> None:
    given = outputs()
    wrong = StepOutputs(given.dynamics, given.record, torch.zeros(3, 3, 8, 4), given.posterior)
    with pytest.raises(InputError, match="prediction has shape"):
        objective(dynamics=1.0)(wrong)


# --- from a configuration ---


def test_a_zero_weight_leaves_its_term_out() -> None:
    whole = build_objective({"dynamics": LossConfig(0.5), "kl": LossConfig(0.0)})
    assert list(whole.terms) == ["dynamics"]
    assert whole.weights == {"dynamics": 0.5}


def test_a_class_is_built_with_its_settings() -> None:
    settings = LossConfig(0.5, "torch.nn.Linear", {"in_features": 2, "out_features": 3})
    (term,) = build_objective({"mine": settings}).terms.values()
    assert isinstance(term, nn.Linear)
    assert term.out_features == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(1.0, "torch.nn.Linear", {"in_feature": 2}), r"losses\.mine: Linear does not take these init_args"),
        (LossConfig(1.0, "collections.OrderedDict"), r"losses\.mine.* OrderedDict, which is no torch\.nn\.Module"),
        (LossConfig(1.0, "no_such_module.Term"), "no_such_module"),
    ],
)
def test_a_class_that_does_not_fit_is_named(config: LossConfig, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_objective({"mine": config})
    assert "\n" not in str(caught.value)
