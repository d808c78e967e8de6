"""Decoding: samplers against loops by hand, what an output carries, stopping, energies, compiling, and mistakes."""

import copy
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_models import TINY_DECODER, BareDynamics, image, refusal, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from dc_ssdae import DCSSDAE
from dc_ssdae.decoding import (
    DEFAULT_MOMENTUM,
    DEFAULT_MOST_STEPS,
    DEFAULT_NUM_STEPS,
    DESCENTS,
    INTEGRATORS,
    SAMPLERS,
    Divergence,
    default_noise,
    plan_decoding,
)
from dc_ssdae.dynamics import Corruption, EquilibriumMatching
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.samplers import gradient_descent, nesterov

DYNAMICS: dict[str, dict[str, Any]] = {
    "linear": {},
    "truncated": {"init_args": {"decay": "truncated", "gradient_scale": 4.0}},
    "flow": {"class_path": "FlowMatching"},
}
KINDS = ("dot", "l2")


class Plain(torch.nn.Module):
    """A decoder of two convolutions, which is quick to compile."""

    def __init__(self, latent_channels: int, downsample_factor: int, time_conditioning: bool) -> None:
        super().__init__()
        self.of_image = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.of_latent = torch.nn.ConvTranspose2d(latent_channels, 3, downsample_factor, stride=downsample_factor)

    def forward(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.of_image(x) + self.of_latent(z)
        return y if time is None else y * (0.5 + time[:, None, None, None])


def plain(dynamics: dict[str, Any]) -> DCSSDAE:
    encoder, decoder = {"class_path": "tiny_models.PatchEncoder"}, {"class_path": f"{__name__}.Plain"}
    return DCSSDAE(4, 8, encoder=encoder, decoder=decoder, dynamics=dynamics).eval()


class Pull:
    """Pulls an image to a goal, at a rate that is the mean size of its latent's values."""

    gain = 1.0

    def forward(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        rate = z.abs().mean(dim=(1, 2, 3), keepdim=True)
        return self.gain * (rate * x + 0.2 * super().forward(x, z, time))


class Settling(Pull, UViTDecoder): ...


class PlainSettling(Pull, Plain): ...


class Spherical(BareDynamics):
    """A dynamics that mixes image and noise along a circle."""

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        angle = 0.5 * math.pi * level[:, None, None, None]
        return Corruption(x, noise, level, angle.cos() * x + angle.sin() * noise, x)

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        return 0.5 * x_level + (1.0 + level[:, None, None, None]) * prediction


def settling(kind: type = Settling, **dynamics: Any) -> DCSSDAE:
    """A model of equilibrium matching with a decoder that pulls."""
    settings = TINY_DECODER["init_args"] if kind is Settling else {}
    decoder = {"class_path": f"{__name__}.{kind.__name__}", "init_args": settings}
    return tiny(decoder=decoder, dynamics={"init_args": dynamics})


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


def descend_by_hand(
    model: DCSSDAE, sampler: str, sizes: Sequence[float], momenta: Sequence[float], x: Tensor, z: Tensor, share: float
) -> tuple[list[Tensor], Tensor]:
    """All states of a descent from x, and the last field."""
    states = [x]
    for index, (eta, mu) in enumerate(zip(sizes, momenta, strict=True)):
        ahead = states[-1]
        if sampler != "gradient_descent" and index > 0:
            ahead = states[-1] + mu * (states[-1] - states[-2])
        field = model.decoder(ahead, z)
        states.append((states[-1] if sampler == "nesterov_eqm" else ahead) - eta * field)
    return states, field


STARTS = pytest.mark.parametrize("start", [None, 0.3, 1.0])


class TestSamplersAgainstLoops:
    """From noise, and from x_γ = γ · draft + (1 − γ) · noise."""

    def check(self, model: DCSSDAE, start: float | None, by_hand: Callable[..., Any], **given: Any) -> None:
        """A decode gives the states of a loop by hand, called with x, z and γ, and what the last field tells."""
        z, noise, draft = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24), image(2, 16, 24)
        share = start or 0.0
        states, field = by_hand(share * draft + (1.0 - share) * noise, z, share)
        begin = {} if start is None else {"draft": draft, "start": start}
        output = model.decode(z, noise=noise, return_trajectory=True, **given, **begin)
        torch.testing.assert_close(output.sample, states[-1], atol=1e-5, rtol=0.0)
        torch.testing.assert_close(output.trajectory, torch.stack(states), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(output.residual_rms, rms(field), atol=1e-5, rtol=0.0)
        assert output.num_evaluations.tolist() == [len(states) - 1] * 2
        assert output.diverged.tolist() == [False] * 2
        if start == 1.0:
            assert torch.equal(output.trajectory[0], draft)

    @torch.no_grad()
    @STARTS
    @pytest.mark.parametrize("kind", ["linear", "truncated"])
    def test_one_step_of_equilibrium_matching(self, kind: str, start: float | None, models: dict[str, DCSSDAE]) -> None:
        """x̂ = x_γ − (1 − γ)/c(γ) f/λ."""

        def by_hand(x: Tensor, z: Tensor, share: float) -> tuple[list[Tensor], Tensor]:
            # The truncated decay's c(γ) is min(1, (1 − γ)/0.2).
            ratio, scale = (1.0, 1.0) if kind == "linear" else (max(1.0 - share, 0.2), 4.0)
            field = models[kind].decoder(x, z)
            return [x, x - ratio / scale * field], field

        self.check(models[kind], start, by_hand, sampler="one_step")

    @torch.no_grad()
    @STARTS
    @pytest.mark.parametrize("sampler", DESCENTS)
    @pytest.mark.parametrize("kind", ["linear", "truncated"])
    def test_descents(self, kind: str, sampler: str, start: float | None, models: dict[str, DCSSDAE]) -> None:
        model, accelerated = models[kind], sampler != "gradient_descent"
        sizes = [0.2, 0.1, 0.1, 0.05]
        for chosen, by_hand in (
            ({}, None),
            ({"momentum": 0.4} if accelerated else {}, None),
            ({"step_size": sizes}, (sizes, [DEFAULT_MOMENTUM] * 4)),
            ({"step_size": 0.1, **({"momentum": 0.7} if accelerated else {})}, ([0.1] * 4, [0.7] * 4)),
        ):
            _, plan = plan_decoding(model.dynamics, sampler, 4, start=start or 0.0, **chosen)
            schedules = (plan["step_size"], plan.get("momentum", [0.0] * 4)) if by_hand is None else by_hand
            loop = partial(descend_by_hand, model, sampler, *schedules)
            self.check(model, start, loop, sampler=sampler, num_steps=4, **chosen)

    @torch.no_grad()
    @STARTS
    @pytest.mark.parametrize("sampler", ["one_step", "euler"])
    def test_flow_matching(self, sampler: str, start: float | None, models: dict[str, DCSSDAE]) -> None:
        """From t = 1 − γ, and all times with it."""
        num_steps = 1 if sampler == "one_step" else 3

        def by_hand(x: Tensor, z: Tensor, share: float) -> tuple[list[Tensor], Tensor]:
            states = [x]
            times = [(1.0 - share) * (1.0 - k / num_steps) ** 4 for k in range(num_steps + 1)]
            for now, after in itertools.pairwise(times):
                field = models["flow"].decoder(states[-1], z, torch.full((2,), now))
                states.append(states[-1] + (now - after) * field)
            return states, field

        self.check(models["flow"], start, by_hand, sampler=sampler, num_steps=num_steps)

    def test_a_first_step_that_lands_gives_no_velocity(self) -> None:
        """Where the step sizes are the default ones; a schedule of momenta stays as it is."""

        def momenta(num_steps: int, **given: Any) -> list[float]:
            return plan_decoding(EquilibriumMatching(), "nesterov", num_steps, **given)[1]["momentum"]

        assert momenta(4) == [0.0, 0.0, DEFAULT_MOMENTUM, DEFAULT_MOMENTUM]
        assert momenta(4, momentum=0.4) == [0.0, 0.0, 0.4, 0.4]
        assert momenta(1, momentum=0.4) == [0.0]
        assert momenta(4, momentum=0.4, step_size=0.1) == [0.4] * 4
        assert momenta(4, momentum=[0.1, 0.2, 0.3, 0.4]) == [0.1, 0.2, 0.3, 0.4]

    @torch.no_grad()
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_start_of_0_is_no_draft(self, sampler: str, models: dict[str, DCSSDAE]) -> None:
        model, z = models["flow" if sampler in INTEGRATORS else "truncated"], torch.randn(2, 4, 2, 3)
        expected = model.decode(z, sampler=sampler)
        output = model.decode(z, sampler=sampler, draft=image(2, 16, 24), start=0.0)
        assert torch.equal(output.sample, expected.sample)
        assert torch.equal(output.residual_rms, expected.residual_rms)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("kind", "given", "same"),
        [
            ("linear", {"num_steps": 1}, {"sampler": "one_step"}),
            ("linear", {"sampler": "gradient_descent"}, {"num_steps": DEFAULT_NUM_STEPS}),
            ("linear", {"tolerance": 0.1}, {"tolerance": 0.1, "num_steps": DEFAULT_MOST_STEPS}),
            ("linear", {"momentum": 0.6}, {"sampler": "nesterov", "momentum": 0.6}),
            ("flow", {"num_steps": 3}, {"sampler": "euler", "num_steps": 3}),
            ("flow", {"sampler": "midpoint"}, {"sampler": "midpoint", "num_steps": DEFAULT_NUM_STEPS}),
        ],
    )
    def test_what_is_left_open(
        self, kind: str, given: dict[str, Any], same: dict[str, Any], models: dict[str, DCSSDAE]
    ) -> None:
        z = torch.randn(1, 4, 2, 2)
        output, expected = models[kind].decode(z, **given), models[kind].decode(z, **same)
        assert torch.equal(output.sample, expected.sample)
        assert torch.equal(output.num_evaluations, expected.num_evaluations)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["linear", "dot", "flow"])
    def test_the_field_serves_a_sampler_of_ones_own(self, kind: str, models: dict[str, DCSSDAE]) -> None:
        model = models[kind] if kind in models else tiny(dynamics={"init_args": {"explicit_energy": kind}})
        z, x = torch.randn(3, 4, 2, 3), torch.randn(3, 3, 16, 24)
        if kind == "flow":
            for time in (torch.ones(3), 1.0, 1, torch.tensor(1.0, dtype=torch.float64)):
                velocity = model.field(x, z, time)
                torch.testing.assert_close(x + velocity, model.decode(z, noise=x).sample, atol=1e-6, rtol=0.0)
            return
        for sampler, chosen in ((gradient_descent, {}), (nesterov, {"momentum": 0.4})):
            own = sampler(model.field, x, 4, 0.1, condition=z, **chosen)
            output = model.decode(z, noise=x, num_steps=4, step_size=0.1, sampler=sampler.__name__, **chosen)
            torch.testing.assert_close(own.sample, output.sample, atol=1e-6, rtol=0.0)
            torch.testing.assert_close(own.residual_rms, output.residual_rms, atol=1e-6, rtol=0.0)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["linear", "flow"])
    def test_the_field_casts_as_decode_does(self, kind: str) -> None:
        """Latents to the model's dtype; images in half precision count as they are, and float64 stays."""
        model = tiny(dynamics=DYNAMICS[kind]).to(torch.bfloat16)
        z, x, time = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24), 0.5 if kind == "flow" else None
        expected = model.field(x, z.bfloat16(), time)
        assert expected.dtype == torch.float32
        assert torch.equal(model.field(x, z, time), expected)
        assert torch.equal(model.field(x.bfloat16(), z, time), expected)
        wide = model.double().field(x.double(), z, time)
        assert wide.dtype == torch.float64
        assert not torch.equal(wide, wide.float().double())

    @pytest.mark.parametrize("kind", ["linear", "flow"])
    def test_the_field_refuses_what_does_not_fit(self, kind: str, models: dict[str, DCSSDAE]) -> None:
        field, time = models[kind].field, {"flow": (1.0,)}.get(kind, ())
        for x, z in ((DRAFT[:0], NOTHING[:0]), (DRAFT[:1], NOTHING), (DRAFT, NOTHING[:, :3])):
            refusal(field, x, z, *time)
        times = {"linear": (0.5,), "flow": (None, torch.ones(3), torch.ones(2, 1))}[kind]
        for other in times:
            assert "time" in refusal(field, DRAFT, NOTHING, other)


class TestDefaultNoise:
    @torch.no_grad()
    def test_it_is_what_a_decode_starts_from(self, models: dict[str, DCSSDAE]) -> None:
        z = torch.randn(2, 4, 2, 3)
        noise = default_noise(16, 24)
        assert noise.shape == (3, 16, 24)
        given = models["linear"].decode(z, noise=noise.expand(2, -1, -1, -1))
        assert torch.equal(given.sample, models["linear"].decode(z).sample)

    def test_it_never_changes(self) -> None:
        """Reports and exported programs were made with these numbers."""
        values = default_noise(64, 64).flatten()[[0, 1, 2, 12287]].tolist()
        assert values == pytest.approx([-1.1258398, -1.1523602, -0.2505786, -0.6734276], abs=1e-6)

    def test_what_was_drawn_in_inference_mode_can_be_trained_with(self) -> None:
        with torch.inference_mode():
            default_noise(8, 40)
        (default_noise(8, 40) * torch.ones(1, requires_grad=True)).sum().backward()


class TestOutputs:
    @torch.no_grad()
    @pytest.mark.parametrize(("kind", "sampler"), [("linear", "gradient_descent"), ("flow", "euler")])
    def test_half_precision_iterates_in_full(self, kind: str, sampler: str) -> None:
        model = tiny(dynamics=DYNAMICS[kind]).to(torch.bfloat16)
        seen = []
        model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append({part.dtype for part in inputs[:2]}))
        output = model.decode(torch.randn(2, 4, 2, 3), num_steps=4, sampler=sampler, return_trajectory=True)
        assert seen == [{torch.bfloat16}] * 4
        assert output.sample.dtype == torch.bfloat16
        assert output.sample.isfinite().all()
        assert output.trajectory.dtype == torch.float32
        assert torch.equal(output.sample, output.trajectory[-1].bfloat16())
        for state in output.trajectory:
            assert not torch.equal(state, state.bfloat16().float())


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


SPLITS = ([[0], [1], [2], [3], [4], [5]], [[5, 3], [1, 4, 0, 2]])


class TestBatches:
    @torch.no_grad()
    @pytest.mark.parametrize("origin", ["generators", "noise"])
    @pytest.mark.parametrize(
        ("settles", "given"),
        [
            (True, {}),
            (True, {"sampler": "gradient_descent", "step_size": 0.3, "tolerance": 0.2}),
            (True, {"sampler": "nesterov", "step_size": 0.3, "tolerance": 0.2}),
            (True, {"sampler": "nesterov_eqm", "step_size": 0.3, "tolerance": 0.2}),
            (False, {"sampler": "euler", "num_steps": 4}),
        ],
    )
    def test_an_image_does_not_depend_on_its_batch(self, settles: bool, given: dict[str, Any], origin: str) -> None:
        model = settling() if settles else tiny(dynamics=DYNAMICS["flow"])
        z, noise = latents(*RATES), torch.randn(6, 3, 16, 24)

        def decode(rows: Sequence[int]) -> Any:
            start: dict[str, Any] = {"noise": noise[rows]} if origin == "noise" else {"generator": seeds(*rows)}
            return model.decode(z[rows], **start, **given)

        together = decode(range(6))
        if "tolerance" in given:
            assert len(set(together.num_evaluations.tolist())) >= 3
        for split in SPLITS:
            for rows in split:
                apart = decode(rows)
                for name in ("sample", "residual_rms"):
                    torch.testing.assert_close(apart[name], together[name][rows], atol=1e-5, rtol=0.0)
                assert torch.equal(apart.num_evaluations, together.num_evaluations[rows])


class TestStopping:
    @torch.no_grad()
    def test_a_tolerance_is_for_a_gradient_scale_of_1(self) -> None:
        """A field 4 times as large, of a model with λ = 4, descends and stops the same way."""
        ones = settling(decay="truncated")
        fours = settling(decay="truncated", gradient_scale=4.0)
        fours.load_state_dict(ones.state_dict())
        fours.decoder.gain = 4.0
        z = latents(*RATES)
        expected, output = (model.decode(z, tolerance=0.6) for model in (ones, fours))
        assert len(set(expected.num_evaluations.tolist())) >= 3
        assert torch.equal(output.num_evaluations, expected.num_evaluations)
        torch.testing.assert_close(output.sample, expected.sample, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(output.residual_rms, 4.0 * expected.residual_rms, atol=1e-5, rtol=0.0)

    @torch.no_grad()
    @pytest.mark.parametrize("tolerance", [None, 0.2])
    @pytest.mark.parametrize("sampler", DESCENTS)
    def test_images_that_diverge(self, sampler: str, tolerance: float | None) -> None:
        """They are told of, once, and fall back to their best state; the others do not notice."""
        model, z = settling(), latents(0.3, 2.6, 0.5, 3.0)
        given = {"sampler": sampler, "num_steps": 5, "step_size": 2.0, "tolerance": tolerance}
        with pytest.warns(Divergence, match="2 of 4 images diverged") as caught:
            output = model.decode(z, return_trajectory=True, **given)
        assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
        assert output.diverged.tolist() == [False, True, False, True]
        assert output.sample.isfinite().all()
        assert output.trajectory.isfinite().all()
        # The field grew with every step.
        assert torch.equal(output.sample[1::2], output.trajectory[0, 1::2])
        start = output.trajectory[0, 1::2]
        torch.testing.assert_close(output.residual_rms[1::2], rms(model.decoder(start, z[1::2])), atol=1e-5, rtol=0.0)
        with warnings.catch_warnings(action="error"):
            apart = model.decode(z[::2], **given)
        assert apart.diverged.tolist() == [False, False]
        torch.testing.assert_close(output.sample[::2], apart.sample, atol=3e-5, rtol=0.0)


NOTHING = torch.zeros(2, 4, 1, 1)
DRAFT = torch.zeros(2, 3, 8, 8)


class TestMistakes:
    def test_latents_that_are_not_finite(self, models: dict[str, DCSSDAE]) -> None:
        z = torch.zeros(5, 4, 2, 2)
        z[1, 2, 0, 1], z[3, 0, 1, 1] = math.nan, math.inf
        assert "z holds NaN" in refusal(models["linear"].decode, z)

    @pytest.mark.parametrize(
        ("kind", "given", "words"),
        [
            ("linear", {"num_steps": 0}, "num_steps is 0"),
            ("linear", {"tolerance": math.nan}, "tolerance is nan"),
            ("linear", {"step_size": [0.1, 0.2], "num_steps": 3}, "step_size lists 2 numbers for num_steps 3"),
            ("linear", {"start": 0.5}, "draft and start go together"),
            ("flow", {"draft": DRAFT, "start": 1.5}, "start is 1.5"),
            ("linear", {"draft": DRAFT[:1], "start": 0.5}, "draft is torch.float32 of shape (1, 3, 8, 8)"),
            ("linear", {"draft": DRAFT.byte(), "start": 0.5}, "draft is torch.uint8 of shape (2, 3, 8, 8)"),
            ("linear", {"noise": DRAFT / 0.0}, "noise holds NaN or infinite values"),
            ("linear", {"sampler": "gradient_decent"}, "'gradient_decent' (did you mean 'gradient_descent'?)"),
            ("flow", {"sampler": "nesterov"}, "sampler of FlowMatching 'nesterov'"),
            (
                "linear",
                {"sampler": "gradient_descent", "momentum": 0.3},
                "setting of sampler 'gradient_descent' of EquilibriumMatching 'momentum'",
            ),
            (
                "linear",
                {"sampler": "one_step", "tolerance": 0.1},
                "setting of sampler 'one_step' of EquilibriumMatching 'tolerance'",
            ),
            ("flow", {"num_steps": 3, "step_size": 0.1}, "setting of sampler 'euler' of FlowMatching 'step_size'"),
            (
                "flow",
                {"sampler": "one_step", "num_steps": 3},
                "setting of sampler 'one_step' of FlowMatching 'num_steps'",
            ),
        ],
    )
    def test_settings(self, kind: str, given: dict[str, Any], words: str, models: dict[str, DCSSDAE]) -> None:
        assert words in refusal(models[kind].decode, NOTHING, **given)

    @torch.no_grad()
    @pytest.mark.parametrize("start", [0.0, 0.25, 1.0])
    def test_a_dynamics_of_ones_own_has_one_step(self, start: float) -> None:
        model = tiny(dynamics={"class_path": f"{__name__}.Spherical"})
        z, noise, draft = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24), image(2, 16, 24)
        level = torch.full((2,), 1.0 - start)
        x = model.dynamics.corrupt(draft, noise, level).x_level
        expected = 0.5 * x + (1.0 + level[0]) * model.decoder(x, z, level)
        output = model.decode(z, noise=noise, draft=draft, start=start)
        torch.testing.assert_close(output.sample, expected, atol=1e-5, rtol=0.0)
        assert output.num_evaluations.tolist() == [1, 1]
        assert "'num_steps'" in refusal(model.decode, z, num_steps=2)
        assert "sampler of Spherical 'euler'" in refusal(model.decode, z, sampler="euler")


def energetic(kind: str, **dynamics: Any) -> DCSSDAE:
    return tiny(dynamics={"init_args": {"explicit_energy": kind, **dynamics}})


def wide_energy(decoder: torch.nn.Module, kind: str, x: Tensor, z: Tensor) -> Tensor:
    """The sum of the images' energies, in the decoder's own dtype."""
    answer = decoder(x, z)
    return (x * answer).sum() if kind == "dot" else 0.5 * answer.square().sum()


@pytest.mark.parametrize("kind", KINDS)
class TestExplicitEnergies:
    def test_the_field_is_the_gradient_of_the_energy(self, kind: str) -> None:
        model = energetic(kind, gradient_scale=3.0)
        z, x = torch.randn(3, 4, 2, 3), torch.randn(3, 3, 16, 24)
        field = model.field(x, z)
        leaf = x.clone().requires_grad_()
        energy = model.energy(leaf, z)
        assert energy.shape == (3,)
        torch.testing.assert_close(field, torch.autograd.grad(energy.sum(), leaf)[0], atol=1e-5, rtol=0.0)

    def test_decoding_in_every_mode_of_autograd(self, kind: str) -> None:
        model = energetic(kind)
        z, noise = torch.randn(3, 4, 2, 3), torch.randn(3, 3, 16, 24)
        modes: dict[str, AbstractContextManager[Any]] = {
            "no_grad": torch.no_grad(),
            "inference_mode": torch.inference_mode(),
            "grad": nullcontext(),
        }
        outputs = {}
        for name, mode in modes.items():
            with mode:
                outputs[name] = model.decode(z, noise=noise, num_steps=4, step_size=0.02, tolerance=0.0)
        assert [output.sample.requires_grad for output in outputs.values()] == [False, False, True]
        for name in ("inference_mode", "grad"):
            torch.testing.assert_close(outputs[name].sample, outputs["no_grad"].sample, atol=1e-5, rtol=0.0)
            torch.testing.assert_close(outputs[name].residual_rms, outputs["no_grad"].residual_rms, atol=1e-5, rtol=0.0)
        outputs["grad"].sample.square().mean().backward()
        gradients = [parameter.grad for parameter in model.decoder.parameters()]
        assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients)

    def test_a_descent_lowers_the_energy_with_every_step(self, kind: str) -> None:
        model, z = energetic(kind), 2.0 * torch.randn(4, 4, 2, 3)
        with torch.no_grad():
            states = model.decode(z, num_steps=6, step_size=0.005, return_trajectory=True).trajectory
            energies = torch.stack([model.energy(state, z) for state in states])
        assert (energies.diff(dim=0) < 0.0).all(), energies

    @pytest.mark.parametrize("tokens", [(2, 3), (23, 23)], ids=["all pairs", "tiles"])
    def test_the_field_can_be_trained(self, kind: str, tokens: tuple[int, int]) -> None:
        """The loss's gradient, a second derivative of the energy, against differences of losses in float64."""
        model = energetic(kind)
        batch = 2 if tokens == (2, 3) else 1
        z, x = torch.randn(batch, 4, *tokens), image(batch, 8 * tokens[0], 8 * tokens[1])
        record = model.dynamics.corrupt(x, torch.randn_like(x), torch.full((batch,), 0.4))
        loss = model.dynamics.loss(record, model.field(record.x_level, z)).mean()
        loss.backward()
        parameters = dict(model.decoder.named_parameters())
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
        assert [name for name, grad in gradients.items() if not grad.any()] == []

        wide = copy.deepcopy(model.decoder).double().requires_grad_(False)
        # The norm of the latent computes in float32, in which so small a difference would be lost.
        moved = [name for name in parameters if not name.startswith("latent_norm")]
        directions = {name: torch.randn_like(parameters[name], dtype=torch.float64) for name in moved}

        def wide_loss(step: float) -> float:
            for name in moved:
                wide.get_parameter(name).copy_(parameters[name].detach() + step * directions[name])
            at = record.x_level.double().requires_grad_()
            (field,) = torch.autograd.grad(wide_energy(wide, kind, at, z.double()), at)
            return (field - record.target.double()).square().mean().item()

        assert loss.item() == pytest.approx(wide_loss(0.0), rel=1e-4)
        slope = sum((gradients[name].double() * directions[name]).sum().item() for name in moved)
        assert slope == pytest.approx((wide_loss(1e-6) - wide_loss(-1e-6)) / 2e-6, rel=1e-3)

    @torch.no_grad()
    def test_half_precision(self, kind: str) -> None:
        model = energetic(kind)
        z, x = torch.randn(2, 4, 2, 3).bfloat16(), torch.randn(2, 3, 16, 24)
        expected = model.field(x, z.float())
        model.to(torch.bfloat16)
        field = model.field(x, z)
        assert field.dtype == torch.float32
        assert ((field - expected).norm() / expected.norm()).item() < 0.05
        if kind == "dot":  # of which x itself is a factor, not rounded
            assert not torch.equal(field, field.bfloat16().float())
        assert model.energy(x, z).dtype == torch.float32

    @pytest.mark.parametrize("frozen", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, kind: str, frozen: bool) -> None:
        """Where the table is frozen attention could take a fused kernel, which has no second derivative."""
        model = energetic(kind)
        model.decoder.middle.blocks[0].attention.relative_position_table.requires_grad_(not frozen)
        z, x = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24)
        gradients = []
        for _ in range(2):
            model.field(x, z).square().mean().backward()
            gradients.append([parameter.grad for parameter in model.decoder.parameters() if parameter.requires_grad])
            model.zero_grad()
            model.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_energy_of_float64_is_computed_in_float64(kind: str) -> None:
    """Of a linear network A: ∇⟨x, A x⟩ = (A + Aᵀ) x and ∇½‖A x‖² = Aᵀ A x."""
    matrix, x = torch.randn(6, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    dynamics = EquilibriumMatching(explicit_energy=kind)
    gradient = matrix + matrix.T if kind == "dot" else matrix.T @ matrix
    value = x * (x @ matrix.T) if kind == "dot" else 0.5 * (x @ matrix.T).square()
    torch.testing.assert_close(dynamics.field(lambda y: y @ matrix.T, x), x @ gradient.T, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(dynamics.energy(x, x @ matrix.T), value.sum(dim=1), atol=1e-13, rtol=1e-13)
    assert dynamics.energy(x.half(), x.half()).dtype == torch.float32


class TestNoExplicitEnergy:
    def test_is_refused(self, models: dict[str, DCSSDAE]) -> None:
        assert "explicit_energy 'dot' or 'l2'" in refusal(models["linear"].energy, DRAFT, NOTHING)
        assert "FlowMatching has no energy" in refusal(models["flow"].energy, DRAFT, NOTHING)

    def test_shapes_and_values_that_do_not_fit(self) -> None:
        model = energetic("dot")
        assert "(B, 4, h, w)" in refusal(model.energy, DRAFT, torch.zeros(2, 3, 1, 1))
        assert "(2, 3, 16, 8)" in refusal(model.energy, DRAFT, torch.zeros(2, 4, 2, 1))
        assert "NaN" in refusal(model.energy, DRAFT, NOTHING + math.nan)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("explicit_energy", [None, "dot"])
def test_what_was_made_in_inference_mode_may_be_decoded_outside_of_it(explicit_energy: str | None, grad: bool) -> None:
    model = tiny(dynamics={"init_args": {"explicit_energy": explicit_energy}})
    given = {"z": torch.randn(2, 4, 2, 3), "noise": torch.randn(2, 3, 16, 24), "draft": image(2, 16, 24)}
    with torch.inference_mode():
        made = {name: tensor.clone() for name, tensor in given.items()}
    for steps in ({}, {"num_steps": 2, "step_size": 0.02}):
        with torch.set_grad_enabled(grad):
            expected, sample = (model.decode(**tensors, start=0.5, **steps).sample for tensors in (given, made))
        torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0.0)
        assert sample.requires_grad == grad


@pytest.fixture
def fresh_compiler(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # Which pytest would capture, and the compiler write at length for it.
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("explicit_energy", "dtype"), [(None, torch.float32), (None, torch.bfloat16), ("dot", torch.float32)]
    )
    def test_a_batch_that_shrinks_compiles_once(self, explicit_energy: str | None, dtype: torch.dtype) -> None:
        model = settling(Settling if explicit_energy else PlainSettling, explicit_energy=explicit_energy).to(dtype)
        z = latents(0.8, 0.3, 2.0, 0.6, 1.0, 1.5, 0.4)
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
        atol = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(output.sample, expected.sample, atol=atol, rtol=0.0)


def check_one_graph(function: Callable[..., Tensor], batches: Sequence[tuple[Tensor, ...]], backend: str) -> None:
    """Batches of all shapes are computed by one graph, within 1e-5 of what the function gives without compiling."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in batches:
        for tensor in batch:
            for axis in (0, 2, 3):
                torch._dynamo.mark_dynamic(tensor, axis)
        torch.testing.assert_close(compiled(*batch), function(*batch), atol=1e-5, rtol=0.0)
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


@pytest.mark.usefixtures("fresh_compiler")
class TestOneGraph:
    """What torch.compile(…, fullgraph=True) takes, and torch.export."""

    @pytest.fixture(autouse=True)
    def without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("sampler", ["one_step", "gradient_descent", "nesterov", *INTEGRATORS])
    def test_decode(self, sampler: str) -> None:
        model = plain(DYNAMICS["flow" if sampler in INTEGRATORS else "truncated"])
        batches = [(torch.randn(batch, 4, *sides),) for batch, *sides in SHAPES]
        steps = {"sampler": sampler, "num_steps": 1 if sampler == "one_step" else 2}
        check_one_graph(
            lambda z: model.decode(z, **steps).sample, batches, "aot_eager" if sampler == "one_step" else "eager"
        )

    def test_noise_and_draft(self) -> None:
        model = plain({})
        batches = [
            (torch.randn(b, 4, h, w), torch.randn(b, 3, 8 * h, 8 * w), image(b, 8 * h, 8 * w)) for b, h, w in SHAPES
        ]
        check_one_graph(lambda z, e, d: model.decode(z, noise=e, draft=d, start=0.4).sample, batches, "eager")

    def test_posteriors_samples(self) -> None:
        """The random numbers are others, but the shapes and the scale are right."""
        model = plain({})
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for batch, height, width in SHAPES:
            x = image(batch, 8 * height, 8 * width)
            for axis in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, axis)
            sample = compiled(x, sample_posterior=True).sample
            assert sample.shape == x.shape
            assert not torch.equal(sample, model(x).sample)

    def test_the_whole_model(self) -> None:
        model, x = tiny(), image(2, 16, 24)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x).sample, model(x).sample, atol=1e-5, rtol=0.0)

    @pytest.mark.parametrize("packaged", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_an_exported_decode_draws_the_noise_of_any_size(self, packaged: bool, tmp_path: Path) -> None:
        """Packaged: by AOTInductor, of the U-ViT."""
        module = Decode(tiny() if packaged else plain({}))
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        program = torch.export.export(module, (torch.randn(2, 4, 6, 7),), dynamic_shapes=(dims,))
        if packaged:
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decode.pt2"))
            run = torch._inductor.aoti_load_package(path)
        else:
            run = program.module()
        for batch, height, width in SHAPES:
            z = torch.randn(batch, 4, height, width)
            torch.testing.assert_close(run(z), module(z), atol=1e-5, rtol=0.0)
