"""The sampling study: what is swept, what is measured of it, and what two models need for the same quality."""

import json
from pathlib import Path
from typing import Any

import pytest
import sampling
import torch
from sampling import Grid, Measurement, SamplingStudy, Setting, evaluations_needed, measure_sampling
from tiny_models import refusal, tiny
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.data.images import to_model_range, to_uint8, write_png
from dc_ssdae.decoding import INTEGRATORS, SAMPLERS
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.evaluation.metrics import psnr, ssim
from dc_ssdae.timing import Spread, describe_machine

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
        ({"descents": [0.0]}, "descent 0.0"),
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

    def of(evaluations: float, value: float) -> Measurement:
        return Measurement("m", Setting("euler", 1), {"lpips": value}, evaluations)

    lpips = evaluations_needed([of(1, 0.5), of(2, 0.3)], [of(1, 0.4)], "lpips", targets=3)  # less is better
    assert [entry.target for entry in lpips] == [0.5, 0.4, 0.3]
    assert [entry.second and entry.second.evaluations for entry in lpips] == [1, 1, None]


def test_reports_say_what_was_measured_and_what_is_needed() -> None:
    measurements = []
    for better, model in enumerate(("fm", "<eqm>")):
        for sampler, steps, tolerance in (("one_step", 1, None), ("euler", 4, None), ("euler", 4, 0.5)):
            seconds = Spread(0.01 * steps, 0.009, 0.05)
            qualities = {"psnr": 20.0 + better + 0.1 * steps}
            setting = Setting(sampler, steps, tolerance=tolerance)
            measurements.append(Measurement(model, setting, qualities, steps, seconds=seconds, ratio=seconds))
    study = SamplingStudy(measurements, ("fm", "<eqm>"), ["a note"], describe_machine())
    content = json.loads(study.as_json())
    expected = {"model": "fm", "sampler": "euler", "num_steps": 4, "psnr": 20.4, "evaluations": 4}
    assert content["measurements"][1].items() >= expected.items()
    assert content["needed"]["psnr"][-1]["models"][0] is None
    assert "| 20.4 | 4 (euler) | 1 (one_step) | 75 % |" in study.as_markdown()
    page = study.as_page(study.as_picture()).decode()
    assert all(text in page for text in ("&lt;eqm&gt;", "75 %", "a note"))


def test_a_command_measures_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("eqm", "EquilibriumMatching"), ("fm", "FlowMatching")):
        tiny(dynamics={"class_path": kind}).save_pretrained(tmp_path / name)
    for name, images in (("train/0", pixels(1)), ("validation/1", pixels(1))):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        write_png(images[0], tmp_path / f"photos/{name}.png")
    given = f"--model {tmp_path}/eqm --baseline {tmp_path}/fm --data {tmp_path}/photos --size 16 --out {tmp_path}/out"
    words = f"{given} --device cpu --steps 1,2 --step_sizes default,0.25 --tolerances 0.5 --rounds 1".split()
    sampling.run(CommandParser(sampling.Options, sampling.PROGRAM).parse(words))
    content = json.loads((tmp_path / "out/study.json").read_text(encoding="utf-8"))
    assert {row["model"] for row in content["measurements"]} == {"eqm", "fm"}
    assert "1 image of 16 px" in content["notes"][0]
    assert (tmp_path / "out/table.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert "--overwrite" in refusal(sampling.run, CommandParser(sampling.Options, sampling.PROGRAM).parse(words))
