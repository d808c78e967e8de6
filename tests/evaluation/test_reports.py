"""What reports say of made-up results: JSON, Markdown, CSV, pictures, pages, whatever models and files are called."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_samples import (
    BROKEN,
    FAILED,
    FAR,
    LABELS,
    MACHINE,
    NAMES,
    REASON,
    SIDE,
    STRANGE,
    Page,
    arena_of,
    as_seen,
    candidate_of,
    decibels,
    entry_of,
    report_of,
    shown_of,
    suite_of,
)

from dc_ssdae.evaluation.arena import Entry
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.curves import COLOURS
from dc_ssdae.evaluation.estimates import METRICS, Estimate
from dc_ssdae.evaluation.evaluate import BITS, EvaluationSettings
from dc_ssdae.evaluation.metric_networks import NOT_ASKED
from dc_ssdae.evaluation.protocol import PROTOCOLS
from dc_ssdae.evaluation.reconstruction import PhotoResult
from dc_ssdae.evaluation.report.caveats import ENOUGH_IMAGES
from dc_ssdae.evaluation.report.demo import demo_page
from dc_ssdae.evaluation.report.pictures import Point, front

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # as there is no duck in DejaVu Sans


def strict(text: str) -> Any:
    """Read JSON as its standard has it, without NaN and infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """The rows of each table by the heads of their columns; all are as long as the head."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE):
        rows = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines.splitlines()
        ]
        heads, rule, *rest = rows
        assert set(rule) <= {":---", "---:"}
        found.append([dict(zip(heads, row, strict=True)) for row in rest])
    return found


def bullets(markdown: str) -> list[str]:
    return re.findall(r"^- (.*)$", markdown, re.MULTILINE)


def open_picture(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "PNG"
    return picture.convert("RGB")


class TestArena:
    def test_json_has_every_column_in_every_row(self) -> None:
        table = strict(arena_of().as_json())
        assert table["columns"]["model"] == ""
        assert {name: table["columns"][name] for name in METRICS} == {name: i.unit for name, i in METRICS.items()}
        assert [row["model"] for row in table["rows"]] == list(LABELS)
        for row in table["rows"]:
            assert row.keys() - {"failed", "remarks"} == table["columns"].keys()
            for name in table["columns"].keys() - {"model"}:
                cell = row[name]
                assert (cell["value"] is not None) or (cell["low"], cell["high"]) == (None, None)
                assert (cell["value"] is not None) or cell["reason"].strip()
        assert (table["protocol"]["name"], table["protocol"]["images"]) == ("dcae", 7)
        assert table["speed"] == {"batch": 4, "rounds": 2, "dtype": "float32", "interval": "quartiles"}
        assert (table["machine"], table["command"]) == (MACHINE, "dc-ssdae <a> b")
        assert table["caveats"] == arena_of().caveats()

    def test_json_has_the_figures_or_the_reason(self) -> None:
        rows = {row["model"]: row for row in strict(arena_of().as_json())["rows"]}
        ours, jpeg, lossless = rows["ours"], rows["jpeg:50"], rows["lossless"]
        assert ours["ssim"] == {"value": 0.5, "low": 0.45, "high": 0.55}
        assert ours["decode"] == {"value": 10_000.0, "low": 9_000.0, "high": 11_000.0}
        names = ("latent_shape", "tokens", "compression", "parameters", "memory", "evaluations")
        assert [ours[name]["value"] for name in names] == [[16, 8, 8], 64, 3.0, 2.5, 3.0, 1.0]
        assert rows["random"]["tokens"]["value"] == 64
        assert jpeg["bits_per_pixel"]["value"] == 1.5
        reasons = {
            "tokens": "it has no latent",
            "parameters": "it has none, or they are not known",
            "evaluations": "not counted",
        }
        assert {name: jpeg[name]["reason"] for name in reasons} == reasons
        assert ours["bits_per_pixel"]["reason"] == "it writes no files"
        assert (ours["dreamsim"]["reason"], ours["rfdd"]["reason"]) == (f"there is no {FAR}", NOT_ASKED)
        assert lossless["psnr"] == {"value": None, "low": None, "high": None, "reason": "infinite"}
        assert lossless["encode"]["reason"] == "not apart from decoding"
        assert lossless["decode"] == {"value": 9.0, "low": None, "high": None, "note": "all"}
        assert rows[FAILED]["failed"] == f"ZeroDivisionError: {FAR}"
        assert rows[FAILED]["psnr"] == {"value": None, "low": None, "high": None, "reason": "failed"}

    def test_markdown_has_a_row_for_each(self) -> None:
        (rows,) = tables(arena_of().as_markdown())
        found = dict(zip(LABELS, rows, strict=True))
        assert found["ours"]["PSNR (dB)"] == "20.00 (18.00 to 22.00)"
        assert found["ours"]["latent (c×h×w)"] == "16×8×8"
        assert found["ours"]["decode (images/s)"] == "10,000.0 (9,000.0 to 11,000.0)"
        assert found["lossless"]["PSNR (dB)"] == "∞"
        assert found["jpeg:50"]["tokens (per image)"] == "–"
        assert found["random"]["model"] == "random (random weights)"
        assert found[FAILED]["model"] == f"{FAILED} (failed: ZeroDivisionError: {FAR})"
        assert "DreamSim" not in found["ours"]

    def test_markdown_says_what_a_reader_must_know(self) -> None:
        report = arena_of()
        lines = bullets(report.as_markdown())
        assert {*report.caveats(), f"No DreamSim: there is no {FAR}.", *PROTOCOLS["dcae"].sentences(SIDE)} <= {*lines}
        assert lines[-1] == "Measured on a processor, 2 cores, 1 thread, PyTorch 2, Python 3."
        assert any("medians of 2 rounds" in line and "a batch of 4" in line for line in lines)
        assert "1 rounds" not in arena_of(rounds=1).as_markdown()

    def test_images_are_only_called_spread_where_there_is_a_limit(self) -> None:
        """Seven of eight were measured because one is broken, not because they were chosen evenly spread."""
        text = arena_of().as_markdown()
        assert "all 8 images of some/<data>; 1 image of them cannot be read" in text
        assert "evenly spread" not in text
        limited = replace(arena_of(), total=1234).as_markdown()
        assert "8 of the 1,234 images of some/<data>, evenly spread; 1 image" in limited

    def test_it_says_how_our_models_decode(self) -> None:
        report = arena_of(decoding={"num_steps": 3, "sampler": "nesterov"})
        assert "models of this package decoded with num_steps 3, sampler nesterov." in report.as_markdown()
        assert strict(report.as_json())["protocol"]["decoding"] == {"num_steps": 3, "sampler": "nesterov"}

    def test_the_page_has_every_label_at_every_picture(self) -> None:
        report = arena_of()
        page = Page(report.as_page(report.as_picture()))
        assert page.heads[0] == "Autoencoder arena"
        for entry in report.entries:
            assert page.texts.count(as_seen(entry.label)) == 4, "three pictures and the table"
        assert [head for head in page.heads if head in map(as_seen, NAMES)] == [as_seen(NAMES[i]) for i in (0, 2, 4)]
        ours, random = report.entries[0].shown[2], report.entries[3].shown[0]
        assert {decibels(ours), "∞ dB", f"{decibels(random)}, {RANDOM_WEIGHTS}"} <= {*page.texts}
        pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
        assert len(pictures) == 3 * len(LABELS) + 1, "an original more, the one that failed less, and the costs"
        expected = io.BytesIO()
        Image.fromarray(ours.output.permute(1, 2, 0).numpy()).save(expected, "PNG", optimize=True)
        assert f"data:image/png;base64,{base64.b64encode(expected.getvalue()).decode()}" in pictures
        assert {*report.caveats(), *report.missing(), *report.protocol(), report.command} <= {*page.texts}
        assert page.texts.count(f"failed: ZeroDivisionError: {FAR}") == 4
        assert any(text.startswith("5 of 6 autoencoders reconstructed the same 7 images") for text in page.texts)

    def test_an_arena_in_which_all_failed_is_still_a_page(self) -> None:
        report = arena_of([Entry(FAILED, candidate_of(), failed="why")])
        assert "failed: why" in Page(report.as_page(report.as_picture())).texts


class TestArenaPicture:
    @pytest.mark.parametrize(
        "models",
        [
            [entry_of("no tokens and random", remarks=[RANDOM_WEIGHTS])],
            [entry_of(label, shape=(3, 8, 8)) for label in ("_hidden", "$x^{", "two\nlines", "long" * 40, "\udce9")],
            [entry_of(str(place), is_baseline=True) for place in range(14)],
        ],
    )
    def test_it_is_a_png(self, models: list[Entry]) -> None:
        picture = open_picture(arena_of(models).as_picture())
        assert picture.width > 1000
        assert len(picture.getcolors(2**24) or []) > 10

    def test_every_model_that_finished_has_its_colour_and_random_ones_a_paler_one(self) -> None:
        drawn = {colour for _, colour in open_picture(arena_of().as_picture()).getcolors(2**24) or []}
        finished = [label for label in LABELS if label != FAILED]
        colours = [tuple(bytes.fromhex(colour.removeprefix("#"))) for colour in COLOURS]
        found = {label: colour in drawn for label, colour in zip(finished, colours, strict=False)}
        assert found == {label: label != "random" for label in finished}

    def test_the_front_has_what_nothing_beats(self) -> None:
        points = [Point(q, c, math.nan) for c, q in ((1, 10.0), (2, 9.0), (2, 12.0), (3, 12.0), (4, 13.0))]
        cheap = front(points, 1, more_cost=False, more_quality=True)
        assert [(p.first, p.quality) for p in cheap] == [(1, 10.0), (2, 12.0), (4, 13.0)]
        fast = front(points, 1, more_cost=True, more_quality=False)
        assert [(p.first, p.quality) for p in fast] == [(4, 13.0), (3, 12.0), (2, 9.0)]
        assert front(points, 2, more_cost=True, more_quality=True) == []


class TestEvaluation:
    def test_json_has_every_metric(self) -> None:
        report = report_of()
        content = strict(report.as_json())
        assert content["model"] == STRANGE
        assert list(content["metrics"]) == list(METRICS)
        assert content["metrics"]["ssim"] == {"value": 0.5, "low": 0.45, "high": 0.55, "unit": ""}
        assert content["metrics"]["dreamsim"]["reason"] == f"there is no {FAR}"
        assert content["others"]["kl"] == {"value": 500.0, "low": 450.0, "high": 550.0, "unit": "nats per image"}
        assert (content["images"], content["broken"]) == (7, {f"/somewhere/{NAMES[BROKEN]}": REASON})
        assert (content["latent_shape"], content["latent"]["std"]) == ([3, 8, 8], [1.0, 0.5, 2.0])
        assert (content["protocol"]["name"], content["protocol"]["dtype"]) == ("dcae", "float32")
        assert content["caveats"] == report.caveats()

    def test_markdown_has_a_row_for_each_value(self) -> None:
        report = report_of()
        assert report.entries[0].evaluation is not None
        report.entries[0].evaluation.metrics["rfid"] = Estimate(reason="one image | is too few")
        (rows,) = tables(report.as_markdown())
        assert [tuple(row.values()) for row in rows] == [
            ("PSNR (dB)", "20.00 (18.00 to 22.00)"),
            ("SSIM", "0.5000 (0.4500 to 0.5500)"),
            ("LPIPS", "0.1000 (0.0900 to 0.1100)"),
            ("rFID", "– (one image | is too few)"),
            ("KL (nats per image)", "500.0 (450.0 to 550.0)"),
        ]

    def test_markdown_says_what_a_reader_must_know(self) -> None:
        report = report_of(dtype="bfloat16")
        text, lines = report.as_markdown(), bullets(report.as_markdown())
        assert text.startswith(f"# {STRANGE}\n")
        assert {*report.caveats(), f"No DreamSim: there is no {FAR}.", *PROTOCOLS["dcae"].sentences(SIDE)} <= {*lines}
        assert "Networks computed in bfloat16." in lines
        assert "3×8×8 (c×h×w) at 32 px: 16.0 image values for each latent value, 64 positions." in lines
        assert any(line.startswith("Active channels: 2 of 3") for line in lines)
        assert "KL from N(0, 1): 1.000 nats per latent value." in lines
        found = report.evaluation
        assert found.latent is not None
        found.latent = replace(found.latent, kl=None)
        assert "No KL: the encoder is deterministic." in report.as_markdown()
        found.latent = None
        assert "## Latent" not in report.as_markdown()

    def test_the_csv_has_the_exact_values_of_each_image(self) -> None:
        found = report_of().evaluation
        found.values["psnr"][1] = math.inf
        found.values[BITS] = np.full(len(NAMES), math.nan)
        report = report_of(entry_of(STRANGE))
        report.entries[0].evaluation = found
        text = report.as_csv().encode("utf-8", "backslashreplace").decode("utf-8")
        head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        assert head == ["place", "name", "psnr", "ssim", "lpips", "mse", "kl", "broken"]
        assert [row[:2] for row in rows] == [[str(place), as_seen(name)] for place, name in enumerate(NAMES)]
        assert [row[-1] for row in rows] == [as_seen(REASON) if place == BROKEN else "" for place in range(len(NAMES))]
        for column, name in enumerate(head[2:-1], 2):
            values = [float(row[column] or "nan") for row in rows]
            np.testing.assert_array_equal(values, found.values[name])

    @pytest.mark.parametrize(
        ("noted", "left_out", "metric"),
        [
            ((), (), "lpips"),
            (("lpips",), (), "psnr"),
            (("lpips",), ("psnr",), "ssim"),
            (("lpips",), ("psnr", "ssim"), "lpips"),
            ((), ("lpips", "psnr", "ssim"), None),
        ],
    )
    def test_images_are_ranked_by_the_best_metric_that_can_be_trusted(
        self, noted: tuple[str, ...], left_out: tuple[str, ...], metric: str | None
    ) -> None:
        suite = suite_of(notes=dict.fromkeys(noted, "its network has random weights"))
        for name in left_out:
            del suite.images[name]
            suite.missing[name] = NOT_ASKED
        report = report_of(suite=suite)
        assert report.ranking == metric
        upwards = [3, 1, 5, 0, 7, 4, 2]  # places of the images by their values; 6 is broken
        assert report.ranked() == {"lpips": upwards[::-1], None: []}.get(metric, upwards)
        shown = shown_of(9.0, tuple(report.ranked()[:2]))
        page = Page(report.as_page([*shown.values()], [*shown.values()][::-1]))
        heads = page.heads[1 : page.heads.index("Figures")]
        names = [as_seen(image.name) for image in shown.values()]
        assert heads == (["Worst images", *names, "Best images", *names[::-1]] if metric else [])
        if metric:
            order = ("highest", "lowest") if metric == "lpips" else ("lowest", "highest")
            assert [f"2 of 7, by {METRICS[metric].title}, {word} first." in page.texts for word in order] == [True] * 2

    def test_the_page_says_what_a_reader_must_know(self) -> None:
        report = report_of()
        report.entries[0].candidate.remarks = [RANDOM_WEIGHTS]
        found = report.evaluation
        page = Page(report.as_page([*shown_of(9.0, (1, 5)).values()], []))
        assert page.heads[0] == f"Evaluation of {as_seen(STRANGE)}"
        assert {as_seen(NAMES[1]), as_seen(NAMES[5])} <= {*page.heads}
        for line in (*report.caveats(), *report.missing(), *report.protocol(), *report.latent_lines(), report.command):
            assert as_seen(line) in page.texts
        assert as_seen(REASON) in page.texts
        lead = "PSNR 20.00 dB, SSIM 0.5000, LPIPS 0.1000, rFID 10.000 on 7 images of 32×32 px (random weights)."
        assert lead in page.texts
        values = {name: found.values[name][5] for name in ("psnr", "ssim", "lpips")}
        assert "PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, LPIPS {lpips:.4f}".format(**values) in page.texts


def caveats(images: int = ENOUGH_IMAGES, enlarged: int = 0, remarks: Any = (), **given: Any) -> list[str]:
    entry = entry_of("a", remarks=[*remarks])
    assert entry.evaluation is not None
    entry.evaluation.images, entry.evaluation.enlarged = images, enlarged
    return report_of(entry, **given).caveats()


def test_what_may_not_be_compared() -> None:
    last = "Compare only with figures of the protocol dcae at 32 px."
    assert caveats() == [last]
    settings = EvaluationSettings(PROTOCOLS["rae"], 256)
    assert caveats(settings=settings) == ["Compare only with figures of the protocol rae at 256 px."]
    for start, change in (
        ("Compare rFID only over 9,999 images", {"images": ENOUGH_IMAGES - 1}),
        ("3 of 10,000 images were smaller than 32 px", {"enlarged": 3}),
        ("Quality means nothing", {"remarks": [RANDOM_WEIGHTS]}),
    ):
        first, second = caveats(**change)
        assert first.startswith(start)
        assert second == last
    notes = {"lpips": "its network is new", "rfid": "so is this"}
    assert caveats(suite=suite_of(notes=notes)) == ["LPIPS: its network is new.", "rFID: so is this.", last]


def test_the_arenas_caveats_are_of_those_that_finished() -> None:
    random, few, protocol, speed = arena_of().caveats()
    assert random.startswith("Quality means nothing for random (")
    assert few.startswith("Compare rFID only over 7 images")
    assert "protocol dcae" in protocol
    assert speed.startswith("Compare speed and memory only within this table")
    failed = Entry("a", candidate_of([RANDOM_WEIGHTS]), failed="why")
    without = entry_of("c")
    assert without.evaluation is not None
    without.evaluation.metrics["rfid"] = Estimate(reason="too few")
    assert not any(word in line for word in (RANDOM_WEIGHTS, "rFID") for line in arena_of([failed, without]).caveats())
    assert any("rFID" in line for line in arena_of([without, entry_of("b")]).caveats())


def test_the_demo_has_both_models_and_says_how_they_compare(tmp_path: Path) -> None:
    steps = ('{"step": 1, "loss/total": 0.5}\n', '{"step": 2, "loss/total": 0.4}\n')
    (tmp_path / "metrics.jsonl").write_text("".join(steps))
    original = torch.full((3, 16, 24), 90, dtype=torch.uint8)
    figures = {"psnr": 30.0, "psnr_bicubic": 28.0, "ssim": 0.9, "ssim_bicubic": 0.8, "encode_ms": 5.0}
    shipped = [PhotoResult(name, original, original + 9, original, figures) for name in ("a", "<b>")]
    trained = [result._replace(figures={**figures, "psnr": 25.0}) for result in shipped]
    page = Page(demo_page(shipped, trained, tmp_path, "<facts>"))
    texts = "".join(page.texts)
    above = texts.index("30.0 dB on photos it has not seen, 2.0 dB above bicubic")
    assert above < texts.index("25.0 dB on photos it has not seen, 3.0 dB below bicubic")
    assert [page.heads.count(name) for name in ("a", "<b>")] == [2, 2]
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert labels.count("<b>: reconstruction") == 2
    assert {"25.00 dB, SSIM 0.900", "<facts>"} <= {*page.texts}
