"""The sampling study: what is swept, what is measured of it, and what two models need for the same quality."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.decoding import INTEGRATORS, SAMPLERS
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.evaluation.metrics import psnr, ssim
from dc_ssdae.evaluation.sampling_study import (
    Grid,
    Measurement,
    Needed,
    Setting,
    evaluations_needed,
    measure_sampling,
    pareto,
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


class TestGrid:
    def test_each_dynamics_has_its_samplers(self) -> None:
        descents = {setting.sampler for setting in SMALL.settings(EquilibriumMatching())}
        assert descents == {name for name in SAMPLERS if name not in INTEGRATORS}
        integrations = [setting for setting in SMALL.settings(FlowMatching()) if setting.sampler != "one_step"]
        assert integrations == [Setting(name, steps) for name in INTEGRATORS for steps in (1, 3)]
        assert Grid(samplers=["one_step"]).settings(EquilibriumMatching()) == [Setting("one_step", 1)]

    def test_it_is_the_product_and_nothing_twice(self) -> None:
        settings = SMALL.settings(EquilibriumMatching())
        descent = [setting for setting in settings if setting.sampler == "gradient_descent"]
        assert descent == [
            Setting("gradient_descent", 1),
            Setting("gradient_descent", 3),
            Setting("gradient_descent", 3, None, None, 0.5),
            Setting("gradient_descent", 1, 0.25),
            Setting("gradient_descent", 3, 0.25),
            Setting("gradient_descent", 3, 0.25, None, 0.5),
        ]
        doubled = Grid(steps=(1, 1, 3, 3), step_sizes=(None, 0.25, 0.25), tolerances=(0.5, 0.5))
        assert doubled.settings(EquilibriumMatching()) == settings

    def test_step_sizes_are_in_units_of_the_slope(self) -> None:
        dynamics = EquilibriumMatching("truncated", gradient_scale=4.0)
        assert Setting("nesterov", 2, 0.5).arguments(dynamics)["step_size"] == pytest.approx(0.5 / 20.0)
        assert Setting("nesterov", 2).arguments(dynamics)["step_size"] is None

    def test_other_ways_to_descend_after_the_landing(self) -> None:
        dynamics = EquilibriumMatching("truncated", gradient_scale=4.0)
        grid = Grid(steps=(1, 3), samplers=["gradient_descent"], step_sizes=(), tolerances=(), descents=(0.8,))
        (setting,) = grid.settings(dynamics)
        assert setting == Setting("gradient_descent", 3, descent=0.8)
        assert setting.arguments(dynamics)["step_size"] == pytest.approx([0.25, 0.4 / 20.0, 0.4 / 20.0])
        assert "then 0.8/L" in setting.family

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"descents": [0.0]}, "descent is 0.0"),
            ({"tolerances": [-1.0]}, "tolerance is -1.0"),
            ({"momenta": [1.0]}, "momentum is 1.0"),
            ({"step_sizes": [0.0]}, "step_size is 0.0"),
            ({"samplers": ["euler"]}, "EquilibriumMatching has none of these samplers"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, given: dict[str, Any], named: str) -> None:
        with pytest.raises(InputError) as caught:
            Grid(**given).settings(EquilibriumMatching())
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


class TestMeasuring:
    def test_it_is_what_decode_gives(self) -> None:
        model, images = model_of(), pixels()
        found = measure_sampling({"m": model}, images, SMALL, batch=2, rounds=1)
        assert [entry.setting for entry in found] == SMALL.settings(model.dynamics)
        with torch.inference_mode():
            z = model.encode(to_model_range(images)).latent_dist.mode()
            for entry in found:
                output = model.decode(z, **entry.setting.arguments(model.dynamics))
                decoded = [to_uint8(image) for image in output.sample]
                pairs = list(zip(images, decoded, strict=True))
                assert entry.qualities["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 5, abs=0.02)
                assert entry.qualities["ssim"] == pytest.approx(sum(ssim(*pair) for pair in pairs) / 5, abs=1e-3)
                counts = output.num_evaluations
                assert (entry.fewest, entry.most) == (int(counts.min()), int(counts.max()))
                assert entry.evaluations == pytest.approx(float(counts.double().mean()))
                assert entry.residual_rms == pytest.approx(float(output.residual_rms.median()), rel=1e-3)

    def test_rounds_are_timed_and_compared_with_one_step(self) -> None:
        told: list[int] = []
        found = measure_sampling({"m": model_of()}, pixels(2), SMALL, rounds=2, advance=told.append)
        assert sum(told) == 2 * len(found)
        for entry in found:
            assert entry.seconds is not None
            assert entry.ratio is not None
            assert entry.seconds.low > 0.0
        assert found[0].setting.sampler == "one_step"
        assert found[0].ratio == Spread(1.0, 1.0, 1.0)

    def test_without_one_step_there_is_no_ratio(self) -> None:
        found = measure_sampling({"m": model_of()}, pixels(2), Grid(steps=(2,), samplers=["nesterov"]), rounds=1)
        assert all(entry.ratio is None for entry in found)

    def test_lpips_is_a_mean_over_images_of_the_rounded_pictures(self) -> None:
        seen: list[Tensor] = []

        def distance(estimate: Tensor, x: Tensor) -> Tensor:
            seen.append(estimate)
            return (estimate - x).square().flatten(1).mean(dim=1)

        model, images = model_of(), pixels(3)
        (found,) = measure_sampling({"m": model}, images, Grid(samplers=["one_step"]), 2, 1, lpips=distance)
        assert [len(part) for part in seen] == [2, 1]
        levels = (torch.cat(seen) + 1.0) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0.0)
        expected = (torch.cat(seen) - to_model_range(images)).square().flatten(1).mean(dim=1).mean()
        assert found.qualities["lpips"] == pytest.approx(float(expected), rel=1e-5)

    def test_images_that_diverge_are_counted_and_not_fatal(self) -> None:
        model = model_of()
        model.dynamics.field_of = lambda x, prediction, level: 3.0 * x  # grows by 1.9 · 3 - 1 a step
        grid = Grid(steps=(6,), samplers=["gradient_descent"], step_sizes=(1.9,), tolerances=())
        (found,) = measure_sampling({"m": model}, pixels(2), grid, rounds=1)
        assert found.diverged == 2


class TestNeeded:
    def test_the_cheapest_that_reaches_it(self) -> None:
        first = [measured("fm", 1, 10.0, "one_step"), measured("fm", 4, 12.0), measured("fm", 8, 14.0)]
        second = [
            measured("eqm", 1, 11.0, "one_step"),
            measured("eqm", 2, 12.5),
            measured("eqm", 3, 14.0),
            measured("eqm", 9, 15.0),
        ]
        found = {entry.target: entry for entry in evaluations_needed(first, second, targets=6)}
        assert sorted(found) == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
        pairs = {
            target: (entry.first and entry.first.evaluations, entry.second and entry.second.evaluations)
            for target, entry in found.items()
        }
        assert pairs == {10.0: (1, 1), 11.0: (4, 1), 12.0: (4, 2), 13.0: (8, 3), 14.0: (8, 3), 15.0: (None, 9)}
        assert found[14.0].fewer == pytest.approx(1 - 3 / 8)
        assert found[15.0].fewer is None

    def test_of_lpips_less_is_better(self) -> None:
        def of(evaluations: float, value: float) -> Measurement:
            return Measurement("m", Setting("euler", 1), {"lpips": value}, evaluations)

        found = evaluations_needed([of(1, 0.5), of(2, 0.3)], [of(1, 0.4)], "lpips", targets=3)
        assert [entry.target for entry in found] == [0.5, 0.4, 0.3]
        assert [entry.second and entry.second.evaluations for entry in found] == [1, 1, None]

    def test_more_is_told_as_such(self) -> None:
        assert Needed(12.0, measured("fm", 2, 12.0), measured("eqm", 5, 12.0)).fewer == -1.5
        assert Needed(13.0, None, measured("eqm", 5, 13.0)).fewer is None

    def test_the_front_has_what_nothing_beats(self) -> None:
        points = [measured("m", *point) for point in ((1, 10.0), (2, 9.0), (2, 12.0), (3, 12.0), (4, 13.0))]
        front = pareto(points, "psnr", lambda entry: entry.evaluations)
        assert [(entry.evaluations, entry.qualities["psnr"]) for entry in front] == [(1, 10.0), (2, 12.0), (4, 13.0)]
