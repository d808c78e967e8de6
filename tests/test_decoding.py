"""Decoding: samplers against loops by hand, what an output carries, stopping, energies, compiling, and mistakes."""

import copy
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_models import TINY_DECODER, BareDynamics, image, patchwise, refusal, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from dc_ssdae import DCSSDAE
from dc_ssdae.decoding import (
    DEFAULT_MOMENTUM,
    DEFAULT_MOST_STEPS,
    DEFAULT_NUM_STEPS,
    DESCENTS,
    INTEGRATORS,
    DecoderOutput,
    Divergence,
    default_noise,
    plan_decoding,
)
from dc_ssdae.dynamics import Corruption, EquilibriumMatching
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.samplers import SamplerResult

DYNAMICS: dict[str, dict[str, Any]] = {
    "linear": {},
    "truncated": {"init_args": {"decay": "truncated", "gradient_scale": 4.0}},
    "flow": {"class_path": "FlowMatching"},
}
KINDS = ("dot", "l2")


class Settling(UViTDecoder):
    """Pulls an image to a goal, at a rate that is the mean size of its latent's values."""

    def forward(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        rate = z.abs().mean(dim=(1, 2, 3), keepdim=True)
        return rate * x + 0.2 * super().forward(x, z, time)


class Spherical(BareDynamics):
    """A dynamics that mixes image and noise along a circle."""

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        angle = 0.5 * math.pi * level[:, None, None, None]
        return Corruption(x, noise, level, angle.cos() * x + angle.sin() * noise, x)

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        return 0.5 * x_level + (1.0 + level[:, None, None, None]) * prediction


def settling(**dynamics: Any) -> DCSSDAE:
    """A model of equilibrium matching with a decoder that pulls."""
    return tiny(decoder={"class_path": f"{__name__}.Settling", **TINY_DECODER}, dynamics={"init_args": dynamics})


def latents(*rates: float) -> Tensor:
    """z (B, 4, 2, 3) whose values have these mean sizes."""
    z = torch.randn(len(rates), 4, 2, 3)
    return torch.tensor(rates)[:, None, None, None] * z / z.abs().mean(dim=(1, 2, 3), keepdim=True)


RATES = (0.4, 2.0, 0.7, 1.0, 1.5, 0.5)
"""With which images settle after different numbers of steps."""


def rms(field: Tensor) -> Tensor:
    return field.double().square().mean(dim=(1, 2, 3)).sqrt().float()


@pytest.fixture(scope="module")
def models() -> dict[str, DCSSDAE]:
    """A model for each of `DYNAMICS`, which tests never change."""
    torch.manual_seed(0)
    return {name: tiny(dynamics=dynamics) for name, dynamics in DYNAMICS.items()}


class TestSamplers:
    """From noise, and from x_γ = γ · draft + (1 − γ) · noise."""

    def check(
        self, model: DCSSDAE, start: float | None, expected: Callable[[Tensor, Tensor], SamplerResult], **given: Any
    ) -> None:
        """A decode gives what is expected of x_γ and z."""
        z, noise, draft = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24), image(2, 16, 24)
        share = start or 0.0
        begin = {} if start is None else {"draft": draft, "start": start}
        output = model.decode(z, noise=noise, return_trajectory=True, **given, **begin)
        for got, wanted in zip(output.to_tuple(), expected(share * draft + (1.0 - share) * noise, z), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0.0)
        if start == 1.0:
            assert torch.equal(output.trajectory[0], draft)

    @torch.no_grad()
    @pytest.mark.parametrize("start", [None, 0.3, 1.0])
    @pytest.mark.parametrize("kind", DYNAMICS)
    def test_one_step(self, kind: str, start: float | None, models: dict[str, DCSSDAE]) -> None:
        """x̂ = x_γ − (1 − γ)/c(γ) f/λ, or x_γ + (1 − γ) u."""
        remaining = 1.0 - (start or 0.0)
        # The truncated decay's c(γ) is min(1, (1 − γ)/0.2).
        rate = {"linear": -1.0, "truncated": -max(remaining, 0.2) / 4.0, "flow": remaining}[kind]

        def expected(x: Tensor, z: Tensor) -> SamplerResult:
            field = models[kind].decoder(x, z, torch.full((2,), remaining) if kind == "flow" else None)
            sample = x + rate * field
            return SamplerResult(sample, torch.tensor([1, 1]), rms(field), torch.zeros(2) > 0, torch.stack([x, sample]))

        self.check(models[kind], start, expected, sampler="one_step")

    @torch.no_grad()
    @pytest.mark.parametrize("start", [None, 0.3])
    @pytest.mark.parametrize("sampler", INTEGRATORS)
    def test_integrators(self, sampler: str, start: float | None, models: dict[str, DCSSDAE]) -> None:
        """What their own functions make of `DCSSDAE.field`, which serves a sampler of one's own too."""
        own = partial(INTEGRATORS[sampler], num_steps=3, start_time=1.0 - (start or 0.0), return_trajectory=True)
        field, given = models["flow"].field, {"sampler": sampler, "num_steps": 3}
        self.check(models["flow"], start, lambda x, z: own(lambda state, time: field(state, z, time), x), **given)

    @torch.no_grad()
    @pytest.mark.parametrize("start", [None, 0.3])
    @pytest.mark.parametrize("sampler", DESCENTS)
    @pytest.mark.parametrize("kind", ["truncated", "dot"])
    def test_descents(self, kind: str, sampler: str, start: float | None, models: dict[str, DCSSDAE]) -> None:
        model = models[kind] if kind in models else energetic(kind)

        def settings(step_size: Any, momentum: Any) -> dict[str, Any]:
            return {"step_size": step_size, **({} if sampler == "gradient_descent" else {"momentum": momentum})}

        for given, whole in (
            ({}, settings(model.dynamics.step_sizes(4, start or 0.0), [0.0, 0.0, DEFAULT_MOMENTUM, DEFAULT_MOMENTUM])),
            ({"step_size": [0.2, 0.1, 0.1, 0.05]}, settings([0.2, 0.1, 0.1, 0.05], DEFAULT_MOMENTUM)),
            (settings(0.1, 0.7), settings(0.1, 0.7)),
        ):
            own = partial(DESCENTS[sampler], model.field, num_steps=4, return_trajectory=True, **whole)
            self.check(model, start, lambda x, z, own=own: own(x, condition=z), sampler=sampler, num_steps=4, **given)

    def test_a_first_step_that_lands_gives_no_velocity(self) -> None:
        """Where the step sizes are the default ones; a schedule of momenta stays as it is."""
        for num_steps, given, expected in (
            (4, {"momentum": 0.4}, [0.0, 0.0, 0.4, 0.4]),
            (1, {"momentum": 0.4}, [0.0]),
            (4, {"momentum": [0.1, 0.2, 0.3, 0.4]}, [0.1, 0.2, 0.3, 0.4]),
        ):
            assert plan_decoding(EquilibriumMatching(), "nesterov", num_steps, **given)[1]["momentum"] == expected

    @torch.no_grad()
    def test_what_is_left_open(self, models: dict[str, DCSSDAE]) -> None:
        z = torch.randn(1, 4, 2, 2)
        for kind, given, same in (
            ("linear", {"num_steps": 1}, {"sampler": "one_step"}),
            ("linear", {"sampler": "gradient_descent"}, {"num_steps": DEFAULT_NUM_STEPS}),
            ("linear", {"tolerance": 0.1}, {"tolerance": 0.1, "num_steps": DEFAULT_MOST_STEPS}),
            ("linear", {"momentum": 0.6}, {"sampler": "nesterov", "momentum": 0.6}),
            ("flow", {"num_steps": 3}, {"sampler": "euler", "num_steps": 3}),
            ("flow", {"sampler": "midpoint"}, {"sampler": "midpoint", "num_steps": DEFAULT_NUM_STEPS}),
        ):
            output, expected = models[kind].decode(z, **given), models[kind].decode(z, **same)
            torch.testing.assert_close(output.to_tuple(), expected.to_tuple(), atol=0.0, rtol=0.0)

    @pytest.mark.parametrize("kind", ["linear", "flow"])
    def test_the_field_refuses_what_does_not_fit(self, kind: str, models: dict[str, DCSSDAE]) -> None:
        field = models[kind].field
        for x, z in ((DRAFT[:0], NOTHING[:0]), (DRAFT[:1], NOTHING), (DRAFT, NOTHING[:, :3])):
            refusal(field, x, z, 1.0 if kind == "flow" else None)
        for other in {"linear": (0.5,), "flow": (None, torch.ones(3), torch.ones(2, 1))}[kind]:
            assert "time" in refusal(field, DRAFT, NOTHING, other)


@torch.no_grad()
def test_the_default_noise_is_what_a_decode_starts_from_and_never_changes(models: dict[str, DCSSDAE]) -> None:
    """Reports and exported programs were made with these numbers."""
    values = default_noise(64, 64).flatten()[[0, 1, 2, 12287]].tolist()
    assert values == pytest.approx([-1.1258398, -1.1523602, -0.2505786, -0.6734276], abs=1e-6)
    z = torch.randn(2, 4, 2, 3)
    given = models["linear"].decode(z, noise=default_noise(16, 24).expand(2, -1, -1, -1))
    assert torch.equal(given.sample, models["linear"].decode(z).sample)


def test_default_noise_that_was_drawn_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        default_noise(8, 40)
    (default_noise(8, 40) * torch.ones(1, requires_grad=True)).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sampler"), [("linear", "gradient_descent"), ("flow", "euler")])
def test_half_precision_iterates_in_full(kind: str, sampler: str) -> None:
    """Latents are cast to the model's dtype; images in half precision count as they are, and float64 stays."""
    model, z = tiny(dynamics=DYNAMICS[kind]).to(torch.bfloat16), torch.randn(2, 4, 2, 3)
    seen = set()
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.update(part.dtype for part in inputs[:2]))
    output = model.decode(z, num_steps=4, sampler=sampler, return_trajectory=True)
    assert seen == {torch.bfloat16}
    assert output.trajectory.dtype == torch.float32
    assert torch.equal(output.sample, output.trajectory[-1].bfloat16())
    assert not any(torch.equal(state, state.bfloat16().float()) for state in output.trajectory)

    hook.remove()
    x, time = output.trajectory[1], 0.5 if kind == "flow" else None
    field = model.field(x, z.bfloat16(), time)
    assert field.dtype == torch.float32
    assert torch.equal(model.field(x, z, time), field)
    assert torch.equal(model.field(x.bfloat16(), z, time), field)
    wide = model.double().field(x.double(), z, time)
    assert wide.dtype == torch.float64
    assert not torch.equal(wide, wide.float().double())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("settling", {}),
        ("settling", {"sampler": "gradient_descent", "step_size": 0.3, "tolerance": 0.2}),
        ("settling", {"sampler": "nesterov", "step_size": 0.3, "tolerance": 0.2}),
        ("flow", {"sampler": "euler", "num_steps": 4}),
    ],
)
def test_an_image_does_not_depend_on_its_batch(kind: str, given: dict[str, Any]) -> None:
    model, z = settling() if kind == "settling" else tiny(dynamics=DYNAMICS[kind]), latents(*RATES)

    def decode(rows: Sequence[int]) -> DecoderOutput:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return model.decode(z[rows], generator=generators, **given)

    together = decode(range(6))
    if "tolerance" in given:
        assert len(set(together.num_evaluations.tolist())) >= 3
    for rows in ([0], [2], [5, 3], [1, 4, 0, 2]):
        apart = decode(rows)
        for name in ("sample", "residual_rms", "num_evaluations"):
            torch.testing.assert_close(apart[name], together[name][rows], atol=1e-5, rtol=0.0)


def test_a_tolerance_is_for_a_gradient_scale_of_1() -> None:
    """A field 4 times as large, of a model with λ = 4, stops the same way."""
    assert plan_decoding(EquilibriumMatching(gradient_scale=4.0), tolerance=0.25)[1]["tolerance"] == 1.0


@torch.no_grad()
@pytest.mark.parametrize(("sampler", "tolerance"), [("gradient_descent", None), ("nesterov", 0.2)])
def test_images_that_diverge(sampler: str, tolerance: float | None) -> None:
    """They are told of, once, and fall back to their best state; the others do not notice."""
    model, z = settling(), latents(0.3, 2.6, 0.5, 3.0)
    given = {"sampler": sampler, "num_steps": 5, "step_size": 2.0, "tolerance": tolerance}
    with pytest.warns(Divergence, match="2 of 4 images diverged") as caught:
        output = model.decode(z, return_trajectory=True, **given)
    assert [warning.filename for warning in caught] == [__file__]
    assert output.diverged.tolist() == [False, True, False, True]
    # The field grew with every step.
    start = output.trajectory[0, 1::2]
    assert torch.equal(output.sample[1::2], start)
    torch.testing.assert_close(output.residual_rms[1::2], rms(model.decoder(start, z[1::2])), atol=1e-5, rtol=0.0)
    with warnings.catch_warnings(action="error"):
        apart = model.decode(z[::2], **given)
    torch.testing.assert_close(output.sample[::2], apart.sample, atol=3e-5, rtol=0.0)


NOTHING = torch.zeros(2, 4, 1, 1)
DRAFT = torch.zeros(2, 3, 8, 8)


class TestMistakes:
    @pytest.mark.parametrize(
        ("kind", "given", "words"),
        [
            ("linear", {"z": NOTHING / 0.0}, "z holds NaN or infinite values"),
            ("linear", {"start": 0.5}, "draft and start go together"),
            ("flow", {"draft": DRAFT, "start": 1.5}, "start is 1.5"),
            ("linear", {"draft": DRAFT.byte()[:1], "start": 0.5}, "draft is torch.uint8 of shape (1, 3, 8, 8)"),
            ("linear", {"noise": DRAFT / 0.0}, "noise holds NaN or infinite values"),
            ("flow", {"sampler": "nesterov"}, "sampler of FlowMatching 'nesterov'"),
            ("linear", {"sampler": "gradient_descent", "momentum": 0.3}, "of EquilibriumMatching 'momentum'"),
        ],
    )
    def test_settings(self, kind: str, given: dict[str, Any], words: str, models: dict[str, DCSSDAE]) -> None:
        assert words in refusal(models[kind].decode, **{"z": NOTHING, **given})

    @torch.no_grad()
    def test_a_dynamics_of_ones_own_has_one_step(self) -> None:
        model = tiny(dynamics={"class_path": f"{__name__}.Spherical"})
        z, noise, draft = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24), image(2, 16, 24)
        level = torch.full((2,), 0.75)
        x = model.dynamics.corrupt(draft, noise, level).x_level
        expected = 0.5 * x + (1.0 + level[0]) * model.decoder(x, z, level)
        output = model.decode(z, noise=noise, draft=draft, start=0.25)
        torch.testing.assert_close(output.sample, expected, atol=1e-5, rtol=0.0)
        assert output.num_evaluations.tolist() == [1, 1]
        assert "'num_steps'" in refusal(model.decode, z, num_steps=2)
        assert "sampler of Spherical 'euler'" in refusal(model.decode, z, sampler="euler")


def energetic(kind: str | None, **dynamics: Any) -> DCSSDAE:
    return tiny(dynamics={"init_args": {"explicit_energy": kind, **dynamics}})


@pytest.mark.parametrize("kind", KINDS)
class TestExplicitEnergies:
    def test_the_field_is_the_gradient_of_the_energy(self, kind: str) -> None:
        """Of a decoder f the energy is ⟨x, f⟩ or ½‖f‖²; a model of float64 computes both in float64."""
        model = energetic(kind, gradient_scale=3.0).double()
        z, x = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4, 2, 3), (3, 3, 16, 24)))
        field, energy, answer = model.field(x, z), model.energy(x.requires_grad_(), z), model.decoder(x, z)
        expected = x * answer if kind == "dot" else 0.5 * answer.square()
        torch.testing.assert_close(energy, expected.flatten(1).sum(dim=1), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(field, torch.autograd.grad(energy.sum(), x)[0], atol=1e-12, rtol=1e-12)

    @pytest.mark.parametrize("tokens", [(2, 3), (23, 23)], ids=["all pairs", "tiles"])
    def test_the_field_can_be_trained(self, kind: str, tokens: tuple[int, int]) -> None:
        """The loss's gradient, a second derivative of the energy, against differences of losses in float64."""
        model = energetic(kind)
        z, x = torch.randn(1, 4, *tokens), image(1, 8 * tokens[0], 8 * tokens[1])
        record = model.dynamics.corrupt(x, torch.randn_like(x), torch.tensor([0.4]))
        loss = model.dynamics.loss(record, model.field(record.x_level, z)).mean()
        loss.backward()
        parameters = dict(model.decoder.named_parameters())
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []

        wide = copy.deepcopy(model.decoder).double().requires_grad_(False)
        # The norm of the latent computes in float32, in which so small a difference would be lost.
        moved = [name for name in parameters if not name.startswith("latent_norm")]
        directions = {name: torch.randn_like(parameters[name], dtype=torch.float64) for name in moved}

        def wide_loss(step: float) -> float:
            for name in moved:
                wide.get_parameter(name).copy_(parameters[name].detach() + step * directions[name])
            field = model.dynamics.predict(lambda x: wide(x, z.double()), record.x_level.double())
            return (field - record.target.double()).square().mean().item()

        assert loss.item() == pytest.approx(wide_loss(0.0), rel=1e-4)
        slope = sum((gradients[name].double() * directions[name]).sum().item() for name in moved)
        assert slope == pytest.approx((wide_loss(1e-6) - wide_loss(-1e-6)) / 2e-6, rel=1e-3)

    @torch.no_grad()
    def test_half_precision(self, kind: str) -> None:
        model = energetic(kind)
        z, x = torch.randn(2, 4, 2, 3).bfloat16(), torch.randn(2, 3, 16, 24)
        expected = model.field(x, z)
        field = model.to(torch.bfloat16).field(x, z)
        assert ((field - expected).norm() / expected.norm()).item() < 0.05
        if kind == "dot":  # of which x itself is a factor, not rounded
            assert not torch.equal(field, field.bfloat16().float())
        assert model.energy(x, z).dtype == torch.float32

    def test_a_frozen_table_of_attention_does_not_stop_training(self, kind: str) -> None:
        """With it attention could take a fused kernel, which has no second derivative."""
        model = energetic(kind)
        model.decoder.middle.blocks[0].attention.relative_position_table.requires_grad_(False)
        model.field(torch.randn(2, 3, 16, 24), torch.randn(2, 4, 2, 3)).square().mean().backward()


def test_an_energy_that_is_not_there_or_does_not_fit_is_refused(models: dict[str, DCSSDAE]) -> None:
    assert "explicit_energy 'dot' or 'l2'" in refusal(models["linear"].energy, DRAFT, NOTHING)
    assert "FlowMatching has no energy" in refusal(models["flow"].energy, DRAFT, NOTHING)
    model = energetic("dot")
    assert "(B, 4, h, w)" in refusal(model.energy, DRAFT, torch.zeros(2, 3, 1, 1))
    assert "(2, 3, 16, 8)" in refusal(model.energy, DRAFT, torch.zeros(2, 4, 2, 1))
    assert "NaN" in refusal(model.energy, DRAFT, NOTHING + math.nan)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("explicit_energy", [None, *KINDS])
def test_decoding_in_every_mode_of_autograd(explicit_energy: str | None, mode: Callable[[], Any]) -> None:
    """Also of what was made in inference mode."""
    model = energetic(explicit_energy)
    given = {"z": torch.randn(2, 4, 2, 3), "noise": torch.randn(2, 3, 16, 24), "draft": image(2, 16, 24)}
    with torch.inference_mode():
        made = {name: tensor.clone() for name, tensor in given.items()}
    for steps in ({}, {"num_steps": 2, "step_size": 0.02}):
        expected = model.decode(**given, start=0.5, **steps).sample
        with mode():
            sample = model.decode(**made, start=0.5, **steps).sample
        torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0.0)
        assert sample.requires_grad == (mode is nullcontext)
    expected.square().mean().backward()
    gradients = [parameter.grad for parameter in model.decoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients)


@pytest.fixture
def fresh_compiler(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # Which pytest would capture, and the compiler write at length for it.
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
@pytest.mark.parametrize("explicit_energy", [None, "dot"])
def test_a_batch_that_shrinks_compiles_once(explicit_energy: str | None) -> None:
    model = settling(explicit_energy=explicit_energy)
    z = latents(*RATES, 0.3)
    given = {"sampler": "gradient_descent", "step_size": 0.3, "tolerance": 0.35}
    expected = model.decode(z, num_steps=8, **given)
    counts = expected.num_evaluations
    assert len(set(counts.tolist())) >= 4
    counter = CompileCounter()
    model.decoder.compile(backend=counter)
    model.decode(z, num_steps=1, **given)
    assert counter.frame_count == 1
    output = model.decode(z, num_steps=8, **given)
    assert counter.frame_count == 1
    assert torch.equal(output.num_evaluations, counts)
    torch.testing.assert_close(output.sample, expected.sample, atol=1e-5, rtol=0.0)


def of_any_size(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose batch and sides a graph may not hold fast."""
    for tensor, axis in itertools.product(tensors, (0, 2, 3)):
        torch._dynamo.mark_dynamic(tensor, axis)
    return tensors


def check_one_graph(function: Callable[..., Tensor], batches: Sequence[tuple[Tensor, ...]], backend: str) -> None:
    """Batches of all shapes are computed by one graph, within 1e-5 of what the function gives without compiling."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in batches:
        torch.testing.assert_close(compiled(*of_any_size(*batch)), function(*batch), atol=1e-5, rtol=0.0)
    assert counter.frame_count == 1


class Decode(torch.nn.Module):
    """From the latent alone."""

    def __init__(self, model: DCSSDAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample


SHAPES = ((2, 2, 3), (3, 5, 4))
"""Batches, and sides in latents."""


@pytest.mark.usefixtures("fresh_compiler", "without_gradients")
class TestOneGraph:
    """What torch.compile(…, fullgraph=True) takes, and torch.export."""

    @pytest.mark.parametrize("sampler", ["one_step", "gradient_descent", "nesterov", *INTEGRATORS])
    def test_decode(self, sampler: str) -> None:
        model = patchwise(DYNAMICS["flow" if sampler in INTEGRATORS else "truncated"])
        batches = [(torch.randn(batch, 4, *sides),) for batch, *sides in SHAPES]
        steps = {"sampler": sampler, "num_steps": 1 if sampler == "one_step" else 2}
        backend = "aot_eager" if sampler == "one_step" else "eager"
        check_one_graph(lambda z: model.decode(z, **steps).sample, batches, backend)

    def test_noise_and_draft(self) -> None:
        model = patchwise()
        batches = [
            (torch.randn(b, 4, h, w), torch.randn(b, 3, 8 * h, 8 * w), image(b, 8 * h, 8 * w)) for b, h, w in SHAPES
        ]
        check_one_graph(lambda z, e, d: model.decode(z, noise=e, draft=d, start=0.4).sample, batches, "eager")

    def test_the_whole_model_and_posteriors_samples(self) -> None:
        """Of samples the random numbers are others, but the shapes and the scale are right."""
        whole, model, x = tiny(), patchwise(), image(2, 16, 24)
        compiled, sampling = (torch.compile(each, fullgraph=True, backend="eager") for each in (whole, model))
        torch.testing.assert_close(compiled(x).sample, whole(x).sample, atol=1e-5, rtol=0.0)
        for batch, height, width in SHAPES:
            (x,) = of_any_size(image(batch, 8 * height, 8 * width))
            sample = sampling(x, sample_posterior=True).sample
            assert sample.shape == x.shape
            assert not torch.equal(sample, model(x).sample)

    @pytest.mark.parametrize("packaged", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_an_exported_decode_draws_the_noise_of_any_size(self, packaged: bool, tmp_path: Path) -> None:
        """Packaged: by AOTInductor, of the U-ViT."""
        module = Decode(tiny() if packaged else patchwise())
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        program = torch.export.export(module, (torch.randn(2, 4, 6, 7),), dynamic_shapes=(dims,))
        run = program.module()
        if packaged:
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decode.pt2"))
            run = torch._inductor.aoti_load_package(path)
        for batch, height, width in SHAPES:
            z = torch.randn(batch, 4, height, width)
            torch.testing.assert_close(run(z), module(z), atol=1e-5, rtol=0.0)
