"""What a probe's report says of made-up results: page, JSON, Markdown, and several probes in one table."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_samples import FAR, STRANGE, Page, as_seen

from dc_ssdae.evaluation.estimates import Estimate
from dc_ssdae.probe.report import Distance, Neighbours, ProbeReport, comparison_columns
from dc_ssdae.probe.spectrum import radial_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # as there is no duck in DejaVu Sans

ABOUT = {"data": FAR, "latent_shape": (4, 8, 8), "network": "S", "parameters": 5_300_000, "steps": 400, "patch": 1}


def distances(features: str = "SqueezeNet", is_stand_in: bool = True, scale: float = 1.0) -> list[Distance]:
    """Of reconstructions and of samples by two samplers, one of which stops by itself; one set has no distance."""

    def of(value: float, **given: Any) -> Distance:
        found = Estimate(scale * value, scale * value - 1, scale * value + 1) if value else Estimate(reason="too few")
        given = {"images": "samples", "count": 500, **given}
        return Distance(features=features, is_stand_in=is_stand_in, value=found, **given)

    return [
        of(10.0, images="reconstructions", count=300),
        *(of(value, sampler="Euler", num_steps=steps) for steps, value in ((50, 41.5), (4, 90.0), (2, 0.0))),
        of(40.25, sampler="adaptive <gradient> descent", num_steps=64, evaluations=17.5),
    ]


def picture(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3, 16, 16), dtype=torch.uint8)


def without_decoder(**given: Any) -> ProbeReport:
    """All that latents alone give."""
    known: dict[str, Any] = {
        "label": STRANGE,
        "about": ABOUT,
        "levels": [0.1, 0.5, 0.9],
        "field_loss": [0.75, 0.5, 0.25],
        "loss": Estimate(0.5, 0.45, 0.55),
        "clean_error": [0.01, 0.3, 0.95],
        "training_curve": [(step, 1.0 / step) for step in range(1, 40)],
        "validation_curve": [(20, 0.6), (40, 0.5)],
        "latent_spectrum": radial_spectrum(torch.randn(3, 4, 8, 8)),
        "image_spectrum": radial_spectrum(torch.randn(3, 1, 32, 32)),
        "caveats": ["Only <few> images."],
        "command": "dc-ssdae probe <a>",
    }
    return ProbeReport(**{**known, **given})


def whole(**given: Any) -> ProbeReport:
    """All that a decoder gives besides."""
    known: dict[str, Any] = {
        "distances": distances(),
        "samples": picture(6),
        "classes": [f"class <{place}>" for place in range(6)],
        "samples_by": "Euler",
        "references": picture(3),
        "neighbours": [Neighbours(picture(), picture(4), [0.125, 0.25, 0.375, 0.5]) for _ in range(2)],
        "copying": Estimate(0.875, 0.8, 0.95),
        "seconds_per_sample": 0.75,
    }
    return without_decoder(**{**known, **given})


def test_the_page_has_all_pictures_and_figures() -> None:
    page = Page(whole().as_page())
    text = " ".join(page.texts)
    assert page.heads[0] == as_seen(f"Probe of {STRANGE}")
    assert {"Samples", "Nearest training images", "Spectrum", "Training", "Settings"} <= {*page.heads}
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == 6 + 3 + 2 * 5 + 4
    shown = ("class <5>", "0.5000", "0.4500 to 0.5500", "40.25", "39.25 to 41.25", "10.00", "0.88", "0.375")
    for part in (*shown, "17.5 evaluations", "Only <few> images.", "5,300,000 parameters", "4×8×8", FAR, "too few"):
        assert part in text
    assert "Fréchet distance of SqueezeNet features" in text
    assert "FID" not in text.replace("never with FID", "")


def test_samples_are_a_picture_too() -> None:
    report = whole()
    with Image.open(io.BytesIO(report.as_picture())) as picture:
        assert picture.size == (6 * (16 + 2) + 2, 16 + 4)
        pixels = np.array(picture.crop((2, 2, 18, 18)))
    assert report.samples is not None
    assert (pixels == report.samples[0].permute(1, 2, 0).numpy()).all()


def test_without_a_decoder_the_page_says_why() -> None:
    report = without_decoder(
        no_samples="A <folder> of latents.", latent_spectrum=radial_spectrum(torch.ones(1, 4, 1, 1))
    )
    page = Page(report.as_page())
    assert "A <folder> of latents." in page.texts
    assert not {"Nearest training images", "Distance of the samples", "Spectrum"} & {*page.heads}
    assert [headline.title for headline in report.headlines()] == ["Validation loss"]
    assert "A <folder> of latents." in report.as_markdown()


def test_json_has_every_number() -> None:
    report = whole(field_loss=[0.75, float("inf"), 0.25])
    found = json.loads(report.as_json(), parse_constant=pytest.fail)
    assert found["field_loss"] == [0.75, None, 0.25]
    assert (found["levels"], found["clean_error"]) == (report.levels, report.clean_error)
    assert found["loss"] == {"value": 0.5, "low": 0.45, "high": 0.55}
    assert found["copying"]["value"] == 0.875
    assert found["about"] == {**ABOUT, "latent_shape": [4, 8, 8]}
    assert found["neighbours"] == [[0.125, 0.25, 0.375, 0.5]] * 2
    assert [row["value"]["value"] for row in found["distances"]] == [10.0, 41.5, 90.0, None, 40.25]
    assert found["distances"][-1].items() >= {"num_steps": 64, "evaluations": 17.5, "count": 500}.items()
    assert report.latent_spectrum is not None
    assert torch.tensor(found["spectra"]["latent"]["power"]).double().allclose(report.latent_spectrum.power)
    assert found["validation_curve"] == [[20, 0.6], [40, 0.5]]
    assert found["caveats"] == report.all_caveats()


def test_the_first_features_are_the_headline_and_only_inceptions_own_distance_is_fid() -> None:
    both = whole(distances=[*distances("Inception", False, 2.0), *distances()])
    loss, distance, copying = both.headlines()
    assert (loss.value, distance.title, distance.value, copying.value) == ("0.5000", "FID", "83.00", "0.88")
    assert "20.00" in distance.meaning
    assert "Euler, 50 steps" in distance.remark
    assert sum("SqueezeNet" in line for line in both.all_caveats()) == 1
    table = both.distance_table()
    assert len(table.rows) == 5
    assert len(table.lines()[0]) == 3
    replaced = replace(both.distances[0], is_stand_in=True)
    assert replaced.title == "Fréchet distance of Inception features"


def test_the_figures_of_several_probes_have_columns() -> None:
    first, second = whole(label="a"), without_decoder(label="b", loss=Estimate(0.25))
    columns = comparison_columns([first, second])
    assert columns["probe_samples"][:2] == ("Fréchet distance of SqueezeNet features", "samples, lower is better")
    assert first.figures().keys() == columns.keys()
    assert [first.figures()[name].value for name in columns] == [0.5, 41.5, 10.0, 0.875]
    assert second.figures() == {"probe_loss": Estimate(0.25)}
