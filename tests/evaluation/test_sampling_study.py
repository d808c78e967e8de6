"""The sampling study: what is swept, what is measured of it, and what two models need for the same quality."""

from typing import Any

import pytest
import torch
from tiny_models import refusal
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.decoding import INTEGRATORS, SAMPLERS
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.evaluation.metrics import psnr, ssim
from dc_ssdae.evaluation.sampling_study import (
    Grid,
    Measurement,
    Setting,
    evaluations_needed,
    measure_sampling,
)
from dc_ssdae.timing import Spread

SMALL = Grid(steps=(1, 3), step_sizes=(None, 0.25), tolerances=(0.5,))


def model_of(**dynamics: Any) -> DCSSDAE:
    torch.manual_seed(3)
    model = DCSSDAE.from_preset("demo", dynamics={"class_path": "EquilibriumMatching", **dynamics})
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pixels(count: int = 5, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def measured(model: str, evaluations: float, quality: float, sampler: str = "euler", **setting: Any) -> Measurement:
    return Measurement(model, Setting(sampler, 1, **setting), {"psnr": quality}, evaluations, seconds=Spread.of([1.0]))


def test_each_dynamics_has_its_samplers() -> None:
    descents = {setting.sampler for setting in SMALL.settings(EquilibriumMatching())}
    assert descents == {name for name in SAMPLERS if name not in INTEGRATORS}
    integrations = [setting for setting in SMALL.settings(FlowMatching()) if setting.sampler != "one_step"]
    assert integrations == [Setting(name, steps) for name in INTEGRATORS for steps in (1, 3)]
    assert Grid(samplers=["one_step"]).settings(EquilibriumMatching()) == [Setting("one_step", 1)]


def test_a_grid_is_the_product_and_nothing_twice() -> None:
    settings = SMALL.settings(EquilibriumMatching())
    assert [setting for setting in settings if setting.sampler == "gradient_descent"] == [
        Setting("gradient_descent", 1),
        Setting("gradient_descent", 3),
        Setting("gradient_descent", 3, None, None, 0.5),
        Setting("gradient_descent", 1, 0.25),
        Setting("gradient_descent", 3, 0.25),
        Setting("gradient_descent", 3, 0.25, None, 0.5),
    ]
    assert {setting.momentum for setting in settings if setting.sampler.startswith("nesterov")} == {0.3}
    doubled = Grid(steps=(1, 1, 3, 3), step_sizes=(None, 0.25, 0.25), tolerances=(0.5, 0.5))
    assert doubled.settings(EquilibriumMatching()) == settings
    assert len({setting.family for setting in settings}) == 1 + 3 * 2 * 2


def test_step_sizes_are_in_units_of_the_slope() -> None:
    dynamics = EquilibriumMatching("truncated", gradient_scale=4.0)
    assert Setting("nesterov", 2, 0.5).arguments(dynamics)["step_size"] == pytest.approx(0.5 / 20.0)
    assert Setting("nesterov", 2).arguments(dynamics)["step_size"] is None
    grid = Grid(steps=(1, 3), samplers=["gradient_descent"], step_sizes=(), tolerances=(), descents=(0.8,))
    (setting,) = grid.settings(dynamics)
    assert setting == Setting("gradient_descent", 3, descent=0.8)
    assert setting.arguments(dynamics)["step_size"] == pytest.approx([0.25, 0.4 / 20.0, 0.4 / 20.0])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"descents": [0.0]}, "descent is 0.0"),
        ({"tolerances": [-1.0]}, "tolerance is -1.0"),
        ({"momenta": [1.0]}, "momentum is 1.0"),
        ({"samplers": ["euler"]}, "EquilibriumMatching"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(given: dict[str, Any], named: str) -> None:
    assert named in refusal(Grid(**given).settings, EquilibriumMatching())


def test_what_is_measured_is_what_decode_gives() -> None:
    model, images = model_of(), pixels()
    seen: list[Tensor] = []
    told: list[int] = []

    def distance(estimate: Tensor, x: Tensor) -> Tensor:
        seen.append(estimate)
        return (estimate - x).square().flatten(1).mean(dim=1)

    found = measure_sampling({"m": model}, images, SMALL, 2, rounds=2, lpips=distance, advance=told.append)
    assert [entry.setting for entry in found] == SMALL.settings(model.dynamics)
    assert [len(part) for part in seen] == [2, 2, 1] * len(found)
    assert sum(told) == 2 * len(found)
    with torch.inference_mode():
        z = model.encode(to_model_range(images)).latent_dist.mode()
        for entry in found:
            output = model.decode(z, **entry.setting.arguments(model.dynamics))
            decoded = to_uint8(output.sample)
            pairs = list(zip(images, decoded, strict=True))
            assert entry.qualities["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 5, abs=0.02)
            assert entry.qualities["ssim"] == pytest.approx(sum(ssim(*pair) for pair in pairs) / 5, abs=1e-3)
            errors = (to_model_range(decoded) - to_model_range(images)).square()
            assert entry.qualities["lpips"] == pytest.approx(float(errors.mean()), rel=1e-2)
            counts = output.num_evaluations
            assert (entry.fewest, entry.most) == (int(counts.min()), int(counts.max()))
            assert entry.evaluations == pytest.approx(float(counts.double().mean()))
            assert entry.residual_rms == pytest.approx(float(output.residual_rms.median()), rel=1e-3)
            assert entry.seconds is not None
            assert entry.ratio is not None
            assert 0.0 < entry.seconds.low <= entry.seconds.high
    assert found[0].setting.sampler == "one_step"
    assert found[0].ratio == Spread(1.0, 1.0, 1.0)


def test_images_that_diverge_are_counted_and_without_one_step_there_is_no_ratio() -> None:
    model = model_of()
    model.dynamics.field_of = lambda x, prediction, level: 3.0 * x  # grows by 1.9 · 3 - 1 a step
    grid = Grid(steps=(6,), samplers=["gradient_descent"], step_sizes=(1.9,), tolerances=())
    (found,) = measure_sampling({"m": model}, pixels(2), grid, rounds=1)
    assert found.diverged == 2
    assert found.ratio is None


def test_the_cheapest_that_reaches_a_quality_is_needed() -> None:
    first = [measured("fm", 1, 10.0, "one_step"), measured("fm", 4, 12.0), measured("fm", 8, 14.0)]
    points = ((2, 12.5), (3, 14.0), (9, 15.0))
    second = [measured("eqm", 1, 11.0, "one_step"), *(measured("eqm", *point) for point in points)]
    found = {entry.target: entry for entry in evaluations_needed(first, second, targets=6)}
    assert sorted(found) == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    assert [entry.first and entry.first.evaluations for entry in found.values()] == [1, 4, 4, 8, 8, None]
    assert [entry.second and entry.second.evaluations for entry in found.values()] == [1, 1, 2, 3, 3, 9]
    assert found[14.0].fewer == pytest.approx(1 - 3 / 8)
    assert found[15.0].fewer is None


def test_of_lpips_less_is_better() -> None:
    def of(evaluations: float, value: float) -> Measurement:
        return Measurement("m", Setting("euler", 1), {"lpips": value}, evaluations)

    found = evaluations_needed([of(1, 0.5), of(2, 0.3)], [of(1, 0.4)], "lpips", targets=3)
    assert [entry.target for entry in found] == [0.5, 0.4, 0.3]
    assert [entry.second and entry.second.evaluations for entry in found] == [1, 1, None]
