"""What reports say of small real runs: JSON, Markdown, CSV and pages, whatever models and files are called."""

import base64
import csv
import gc
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny
from torch import Tensor
from torch.nn import functional as F

from dc_ssdae import DiagonalGaussian, InputError
from dc_ssdae.evaluation.arena import run_arena
from dc_ssdae.evaluation.arena_report import ArenaReport
from dc_ssdae.evaluation.candidates import (
    RANDOM_WEIGHTS,
    BicubicCandidate,
    Candidate,
    CodecCandidate,
    OurCandidate,
    PythonCandidate,
)
from dc_ssdae.evaluation.caveats import ENOUGH_IMAGES, caveats, missing_lines, protocol_lines
from dc_ssdae.evaluation.curves import COLOURS
from dc_ssdae.evaluation.estimates import METRICS, Estimate, pooled_psnr
from dc_ssdae.evaluation.evaluate import EvaluationSettings, evaluate, reconstruct_places
from dc_ssdae.evaluation.evaluation_report import EvaluationReport
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.metric_networks import MetricSuite, load_metrics
from dc_ssdae.evaluation.metrics import psnr
from dc_ssdae.evaluation.protocol import PROTOCOLS
from dc_ssdae.evaluation.viewer import Table

CPU = torch.device("cpu")
SIDE = 32
NAMES = (
    "plain.png",
    '<script>alert("1 & 2")</script>.png',
    "quote\".png' onload='x",
    "🦆/$photos ${x}.png",
    "undecodable\udce9\udcff.png",
    "comma, and; semicolon\nand a new line.png",
    "broken & <b>missing</b>.png",
    "last|one.png",
)
"""Of the images."""

BROKEN = 6
REASON = f"cannot read {NAMES[BROKEN]!r}: no | file"
STRANGE = '<b>&"c"|d_e*🦆\udce9$x'
"""A label with what HTML, Markdown, matplotlib and UTF-8 treat apart."""

MACHINE: dict[str, Any] = {
    "cpu": "a processor",
    "cores": 2,
    "threads": 1,
    "torch": "2",
    "python": "3",
    "device": "cpu",
    "device_name": None,
}
FAR = 'a | "bad" <i>thing</i> & more'


pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # as there is no duck in DejaVu Sans


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """These images are too small for more than one thread to be of use, and libraries too large to be collected."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arena_of({"resizing": lambda: BicubicCandidate(2)}).as_picture()  # imports what is imported late
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# --- images, metrics, candidates ---


class Source:
    """Images in memory with names of all kinds; the later, the more detail they have. One of them is broken."""

    def __init__(self, broken: bool = True) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return len(NAMES)

    @property
    def blocks(self) -> Sequence[int]:
        return [len(self)]

    def name(self, index: int) -> str:
        return f"/somewhere/{NAMES[index]}"

    def relative_name(self, index: int) -> str:
        return NAMES[index]

    def read(self, index: int) -> tuple[Tensor, int]:
        if self.broken and index == BROKEN:
            raise InputError(REASON)
        generator = torch.Generator().manual_seed(index)
        # Not in the order of their places: 3 and 5 have no common divisor with 8.
        grain = torch.randn(3, SIDE, SIDE, generator=generator) * (4 + 3 * (5 * index % 8))
        return (128 + grain).round().clamp(0, 255).to(torch.uint8), -1


def colours(pixels: Tensor) -> Tensor:
    """Mean and spread of each colour: (B, 6)."""
    values = pixels.double().div(255.0).flatten(2)
    return torch.cat([values.mean(dim=2), values.std(dim=2)], dim=1)


def far(reference: Tensor, images: Tensor) -> Tensor:
    """A distance of images, less is better: by how much their brightest values differ."""
    return (reference.double() - images.double()).abs().flatten(1).amax(dim=1) / 255.0


def suite_of(protocol: str = "dcae") -> MetricSuite:
    """PSNR and SSIM, and an "LPIPS" and an "rFID" of pixels."""
    suite = load_metrics(PROTOCOLS[protocol], CPU, ("psnr", "ssim", "dreamsim"))
    suite.images["lpips"] = far
    suite.distances["rfid"] = FrechetDistance(colours, 6, replicates=3)
    suite.files = {"lpips": "far.pth, SHA-256 0123", "rfid": "random weights"}
    suite.missing = {"dreamsim": f"there is no {FAR}", "rfdd": "not asked for"}
    return suite


class Pooling:
    """A Gaussian over the colours of patches."""

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean = F.avg_pool2d(x, 4)
        return DiagonalGaussian(mean, mean - 3)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=4.0)


def pooling() -> Candidate:
    return PythonCandidate(Pooling(), "pooling")


def random() -> Candidate:
    candidate = pooling()
    candidate.remarks.append(RANDOM_WEIGHTS)
    return candidate


def blurring() -> Candidate:
    return PythonCandidate(lambda x: F.avg_pool2d(x, 3, stride=1, padding=1), "blurring")


def lossless() -> Candidate:
    return PythonCandidate(lambda x: x, "lossless")


def failing() -> Candidate:
    def reconstruct(x: Tensor) -> Tensor:
        raise ZeroDivisionError(FAR)

    return PythonCandidate(reconstruct, "failing")


ALL: Mapping[str, Callable[[], Candidate]] = {
    "pooling": pooling,
    STRANGE.replace("\udce9", ""): blurring,
    "fails|<u>": failing,
    "random": random,
    "jpeg:50": lambda: CodecCandidate("jpeg", 50),
    "bicubic:4": lambda: BicubicCandidate(4),
    "lossless": lossless,
    "ours": lambda: OurCandidate(tiny()),
}
FAILED = "fails|<u>"


def arena_of(
    openers: Mapping[str, Callable[[], Candidate]],
    suite: MetricSuite | None = None,
    limit: int | None = None,
    broken: bool = True,
    **given: Any,
) -> ArenaReport:
    suite = suite or suite_of()
    settings = EvaluationSettings(PROTOCOLS["dcae"], SIDE, 4)
    source = Source(broken)
    candidates = {label: opener() for label, opener in openers.items()}
    entries = run_arena(candidates, settings.images(source, limit), suite, settings, CPU, rounds=2, show=4)
    report = ArenaReport(
        entries=entries,
        settings=settings,
        suite=suite,
        data="some/<data>",
        total=len(source),
        machine=MACHINE,
        command="dc-ssdae a b",
        dtype="float32",
        rounds=2,
    )
    return replace(report, **given)


def evaluation_of(
    candidate: Candidate,
    label: str = "a model",
    protocol: str = "dcae",
    suite: MetricSuite | None = None,
    broken: bool = True,
    limit: int | None = None,
    **given: Any,
) -> EvaluationReport:
    suite = suite or suite_of(protocol)
    settings = EvaluationSettings(PROTOCOLS[protocol], SIDE, 4)
    images = settings.images(Source(broken), limit)
    found = evaluate(candidate, images, suite, settings, CPU)
    report = EvaluationReport(
        label=label,
        remarks=candidate.remarks,
        evaluation=found,
        settings=settings,
        suite=suite,
        data="some/<data>",
        total=len(images),
        machine=MACHINE,
        command="dc-ssdae eval <x>",
        dtype="float32",
    )
    return replace(report, **given)


def page_of(report: EvaluationReport, candidate: Candidate, show: int = 3) -> "Page":
    images = report.settings.images(Source())
    ranked = report.ranked()
    worst, best = (
        reconstruct_places(candidate, images, places[:show], report.settings, CPU) for places in (ranked, ranked[::-1])
    )
    return Page(report.as_page(worst, best))


@pytest.fixture(scope="module")
def arena() -> ArenaReport:
    torch.manual_seed(0)
    return arena_of(ALL)


@pytest.fixture(scope="module")
def evaluation() -> EvaluationReport:
    return evaluation_of(pooling(), STRANGE)


# --- reading what was written ---


def strict(text: str) -> Any:
    """Read JSON as its standard has it, without NaN and infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def tables(markdown: str) -> list[list[list[str]]]:
    """The cells of each table, by rows without the line below the head; all rows are as long as the head."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE):
        rows = []
        for line in lines.splitlines():
            assert line.startswith("|")
            assert line.endswith("|")
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        assert set(rows[1]) == {"---"}
        assert len({len(row) for row in rows}) == 1, lines
        found.append([rows[0], *rows[2:]])
    return found


VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """A page, of which every tag is closed where it should be, and which needs nothing from elsewhere.

    Attributes:
        texts: all that a reader sees, in pieces.
        heads: texts of h1, h2 and h3.
        attributes: of all tags, by their names.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.content = content.decode("utf-8")
        self.open: list[str] = []
        self.texts: list[str] = []
        self.heads: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.feed(self.content)
        self.close()
        assert self.open == []
        self._check_that_it_stands_alone()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            assert not (self.open and self.open[-1] == "p"), f"{tag} in a paragraph"
            self.open.append(tag)
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in ("h1", "h2", "h3"):
            self.heads.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.heads[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def _check_that_it_stands_alone(self) -> None:
        assert "http://" not in self.content
        assert "https://" not in self.content
        assert "@import" not in self.content
        sources = [value for _, name, value in self.attributes if name in ("src", "href", "srcset", "data", "action")]
        urls = [*sources, *re.findall(r"url\(\"?([^)]*)", self.content)]
        assert urls
        assert all(url is not None and url.startswith("data:") for url in urls)
        assert self.tags.count("script") == 1
        assert {name for _, name, _ in self.attributes if name.startswith("on")} == set()


@pytest.fixture(scope="module")
def arena_page(arena: ArenaReport) -> Page:
    return Page(arena.as_page(arena.as_picture()))


@pytest.fixture(scope="module")
def evaluation_page(evaluation: EvaluationReport) -> Page:
    return page_of(evaluation, pooling(), show=len(NAMES))


def as_seen(text: str) -> str:
    """As UTF-8 has it: what could not be decoded is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def open_picture(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    assert picture.format == "PNG"
    return picture


# --- the arena ---


class TestArenaJson:
    def test_every_row_has_every_column(self, arena: ArenaReport) -> None:
        table = strict(arena.as_json())
        assert [row["model"] for row in table["rows"]] == list(ALL)
        assert table["columns"]["model"] == ""
        assert {name: table["columns"][name] for name in METRICS} == {name: i.unit for name, i in METRICS.items()}
        assert all(isinstance(unit, str) for unit in table["columns"].values())
        for row in table["rows"]:
            assert row.keys() - {"failed", "remarks"} == table["columns"].keys()
            for name in table["columns"].keys() - {"model"}:
                cell = row[name]
                assert {"value", "low", "high"} <= cell.keys()
                if cell["value"] is None:
                    assert cell["reason"].strip()
                    assert (cell["low"], cell["high"]) == (None, None)

    def test_figures_are_those_that_were_measured(self, arena: ArenaReport) -> None:
        rows = {row["model"]: row for row in strict(arena.as_json())["rows"]}
        for entry in arena.entries:
            row = rows[entry.label]
            assert row["remarks"] == entry.remarks
            if entry.failed is not None:
                continue
            assert entry.evaluation is not None
            assert entry.decode is not None
            for name in ("ssim", "lpips", "rfid"):
                estimate = entry.evaluation.metrics[name]
                assert row[name] == {"value": estimate.value, "low": estimate.low, "high": estimate.high}
            decode = {"value": entry.decode.median, "low": entry.decode.low, "high": entry.decode.high}
            assert decode.items() <= row["decode"].items()
        assert rows["pooling"]["psnr"]["low"] < rows["pooling"]["psnr"]["value"] < rows["pooling"]["psnr"]["high"]

    def test_what_follows_from_the_latent(self, arena: ArenaReport) -> None:
        rows = {row["model"]: row for row in strict(arena.as_json())["rows"]}
        names = ("latent_shape", "tokens", "compression")
        found = {label: [row[name]["value"] for name in names] for label, row in rows.items()}
        assert found["pooling"] == [[3, 8, 8], 64, 16.0]
        assert found["ours"] == [[4, 4, 4], 16, 48.0]
        assert found["jpeg:50"] == found["lossless"] == [None, None, None]
        assert rows["jpeg:50"]["tokens"]["reason"] == "it has no latent"
        assert rows["jpeg:50"]["bits_per_pixel"]["value"] > 0
        assert rows["pooling"]["bits_per_pixel"]["reason"] == "it writes no files"
        assert rows["ours"]["evaluations"]["value"] == 1
        assert rows["pooling"]["evaluations"]["reason"] == "not counted"
        count = sum(parameter.numel() for parameter in tiny().parameters())
        assert rows["ours"]["parameters"]["value"] == pytest.approx(count / 1e6)
        assert rows["bicubic:4"]["parameters"]["value"] == 0
        assert rows["pooling"]["parameters"]["reason"] == "not known"

    def test_a_function_has_one_speed_for_both(self, arena: ArenaReport) -> None:
        (row,) = (row for row in strict(arena.as_json())["rows"] if row["model"] == "lossless")
        assert row["encode"] == {"value": None, "low": None, "high": None, "reason": "not apart from decoding"}
        assert row["decode"]["value"] > 0
        assert row["decode"]["note"] == "encoding and decoding in one"

    def test_missing_metrics_have_their_reason(self, arena: ArenaReport) -> None:
        for row in strict(arena.as_json())["rows"]:
            if row["model"] != FAILED:
                assert row["dreamsim"]["reason"] == f"there is no {FAR}"
                assert row["rfdd"]["reason"] == "not asked for"

    def test_an_infinite_psnr_is_null_and_called_infinite(self, arena: ArenaReport) -> None:
        (row,) = (row for row in strict(arena.as_json())["rows"] if row["model"] == "lossless")
        assert row["psnr"] == {"value": None, "low": None, "high": None, "reason": "infinite"}
        assert row["ssim"]["value"] == pytest.approx(1.0)

    def test_a_failed_row_has_its_reason_and_no_values(self, arena: ArenaReport) -> None:
        table = strict(arena.as_json())
        (failed,) = (row for row in table["rows"] if "failed" in row)
        assert failed["model"] == FAILED
        assert failed["failed"] == f"ZeroDivisionError: {FAR}"
        cells = [failed[name] for name in table["columns"] if name != "model"]
        assert all(cell == {"value": None, "low": None, "high": None, "reason": "failed"} for cell in cells)

    def test_it_says_how_it_came_about(self, arena: ArenaReport) -> None:
        table = strict(arena.as_json())
        assert table["protocol"]["name"] == "dcae"
        assert table["protocol"]["size"] == SIDE
        assert table["protocol"]["images"] == len(NAMES) - 1
        assert table["protocol"]["weights"] == arena.suite.files
        assert table["speed"] == {"batch": 4, "rounds": 2, "dtype": "float32", "interval": "quartiles"}
        assert table["machine"] == MACHINE
        assert table["command"] == "dc-ssdae a b"
        assert table["caveats"] == arena.caveats()

    def test_one_that_failed_after_its_quality_was_measured_has_no_values(self) -> None:
        calls = itertools.count()

        def tired(x: Tensor) -> Tensor:
            if next(calls) > 3:
                raise RuntimeError("tired")
            return x

        report = arena_of({"tired": lambda: PythonCandidate(tired, "tired"), "pooling": pooling})
        assert report.entries[0].evaluation is not None
        tired_row, other = strict(report.as_json())["rows"]
        assert tired_row["failed"] == "RuntimeError: tired"
        assert tired_row["psnr"]["value"] is None
        assert other["psnr"]["value"] is not None
        page = Page(report.as_page(report.as_picture()))
        assert "failed: RuntimeError: tired" in page.text


class TestArenaMarkdown:
    def test_the_table_has_a_row_for_each(self, arena: ArenaReport) -> None:
        (rows,) = tables(arena.as_markdown())
        head, *rest = rows
        assert head[0] == "model"
        assert head[1:5] == ["PSNR (dB)", "SSIM", "LPIPS", "rFID"]
        assert "DreamSim" not in head
        names = [row[0].replace("\\|", "|").split(" (")[0] for row in rest]
        assert names == list(ALL)
        found = {name: dict(zip(head, row, strict=True)) for name, row in zip(names, rest, strict=True)}
        assert found["lossless"]["PSNR (dB)"] == "∞"
        assert found["jpeg:50"]["tokens (per image)"] == "–"
        assert found["pooling"]["latent (c×h×w)"] == "3×8×8"
        assert found["random"]["model"] == "random (random weights)"
        escaped = FAR.replace("|", "\\|")
        assert found[FAILED]["PSNR (dB)"] == f"failed: ZeroDivisionError: {escaped}"
        psnr_ = arena.entries[0].evaluation.metrics["psnr"]  # type: ignore[union-attr]
        assert found["pooling"]["PSNR (dB)"] == f"{psnr_.value:.2f} ({psnr_.low:.2f} to {psnr_.high:.2f})"

    def test_it_says_what_may_not_be_compared_and_how_it_was_measured(self, arena: ArenaReport) -> None:
        lines = arena.as_markdown().splitlines()
        bullets = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
        assert set(arena.caveats()) <= set(bullets)
        assert f"No DreamSim: there is no {FAR}." in bullets
        assert set(PROTOCOLS["dcae"].sentences(SIDE)) <= set(bullets)
        assert bullets[-1] == "Measured on a processor, 2 cores, 1 thread, PyTorch 2, Python 3."
        assert any(
            line.startswith("Speed: medians of 2 rounds") and "a batch of 4, float32" in line for line in bullets
        )

    def test_it_says_that_images_could_not_be_read(self, arena: ArenaReport) -> None:
        """Seven of eight were measured because one is broken, not because they were chosen evenly spread."""
        assert re.search(r"\b1 image.* cannot be read", arena.as_markdown())

    def test_it_says_how_our_models_decode(self) -> None:
        report = arena_of({"pooling": pooling}, decoding={"num_steps": 3, "sampler": "nesterov"})
        line = "- Models of this package decode with num_steps 3, sampler nesterov."
        assert line in report.as_markdown().splitlines()
        assert strict(report.as_json())["protocol"]["decoding"] == {"num_steps": 3, "sampler": "nesterov"}
        assert "decode with" not in replace(report, decoding={}).as_markdown()

    def test_images_are_only_called_spread_where_there_is_a_limit(self) -> None:
        report = arena_of({"pooling": pooling}, limit=4, broken=False)
        assert "4 of the 8 images of some/<data>, evenly spread" in report.as_markdown()
        report = arena_of({"pooling": pooling}, broken=False)
        assert "all 8 images of some/<data>" in report.as_markdown()
        assert "evenly spread" not in report.as_markdown()


PICTURES: Mapping[str, Mapping[str, Callable[[], Candidate]]] = {
    "one": {"pooling": pooling},
    "all random": {"random": random, "another": random},
    "no tokens": {"blurring": blurring, "jpeg": lambda: CodecCandidate("jpeg", 50)},
    "baselines alone": {"bicubic:2": lambda: BicubicCandidate(2), "webp": lambda: CodecCandidate("webp", 50)},
    "lossless": {"lossless": lossless},
    "one that failed": {"fails": failing, "pooling": pooling},
    "strange": {"_hidden": pooling, "$x^{": pooling, "two\nlines": pooling, "🦆": pooling, "long" * 40: pooling},
    "undecodable": {"\udce9": pooling},
    "more than there are colours": {str(place): blurring for place in range(14)},
}


class TestArenaPicture:
    @pytest.mark.parametrize("name", PICTURES)
    def test_it_is_a_png(self, name: str) -> None:
        picture = open_picture(arena_of(PICTURES[name]).as_picture())
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 10

    def test_it_has_a_row_for_each_quality(self) -> None:
        three = open_picture(arena_of({"pooling": pooling}).as_picture())
        suite = load_metrics(PROTOCOLS["dcae"], CPU, ("psnr",))
        one = open_picture(arena_of({"pooling": pooling}, suite).as_picture())
        assert three.height > 2 * one.height

    def test_every_model_that_finished_has_its_colour_and_random_ones_a_paler_one(self, arena: ArenaReport) -> None:
        pixels = open_picture(arena.as_picture()).convert("RGB")
        drawn = {colour for _, colour in pixels.getcolors(2**24) or []}
        finished = [entry.label for entry in arena.entries if entry.failed is None]
        colours_ = [tuple(bytes.fromhex(colour.removeprefix("#"))) for colour in COLOURS]
        found = {label: colour in drawn for label, colour in zip(finished, colours_, strict=False)}
        assert found == {label: label != "random" for label in finished}


class TestArenaPage:
    def test_every_label_is_in_the_table_and_at_every_picture(self, arena_page: Page) -> None:
        assert arena_page.heads[0] == "Autoencoder arena"
        for label in ALL:
            # Four pictures, of images 0, 2 and 4 (6 is broken), and the table.
            assert sum(text == label for text in arena_page.texts) >= 4, label
        photos = [head for head in arena_page.heads if head in map(as_seen, NAMES)]
        assert photos == [as_seen(NAMES[place]) for place in (0, 2, 4)]

    def test_captions_have_the_psnr_of_the_picture(self, arena: ArenaReport, arena_page: Page) -> None:
        first = arena.entries[0].shown[2]
        assert f"{psnr(first.original, first.output):.2f} dB" in arena_page.texts
        assert "∞ dB" in arena_page.texts
        assert any(text.endswith(f"dB, {RANDOM_WEIGHTS}") for text in arena_page.texts)

    def test_pictures_are_those_that_were_shown(self, arena: ArenaReport, arena_page: Page) -> None:
        pictures = [value for tag, name, value in arena_page.attributes if tag == "img" and name == "src"]
        finished = [entry for entry in arena.entries if entry.failed is None]
        assert len(pictures) == 3 * len(finished) + 1
        first = arena.entries[0].shown[0].output
        expected = io.BytesIO()
        Image.fromarray(first.permute(1, 2, 0).numpy()).save(expected, "PNG", optimize=True)
        assert pictures[0] == f"data:image/png;base64,{base64.b64encode(expected.getvalue()).decode()}"

    def test_it_says_what_a_reader_must_know(self, arena: ArenaReport, arena_page: Page) -> None:
        for line in (*arena.caveats(), *missing_lines(arena.suite), *PROTOCOLS["dcae"].sentences(SIDE)):
            assert line in arena_page.texts
        assert f"failed: ZeroDivisionError: {FAR}" in arena_page.texts
        assert "7 of 8 autoencoders reconstructed the same 7 images of 32×32 px; fails|<u> failed." in arena_page.texts
        assert "dc-ssdae a b" in arena_page.texts

    def test_an_arena_in_which_all_failed_is_still_a_page(self) -> None:
        report = arena_of({FAILED: failing})
        page = Page(report.as_page(report.as_picture()))
        assert f"failed: ZeroDivisionError: {FAR}" in page.texts
        assert strict(report.as_json())["rows"][0]["failed"] == f"ZeroDivisionError: {FAR}"

    def test_labels_that_cannot_be_decoded_are_escaped(self) -> None:
        report = arena_of({STRANGE: pooling})
        page = Page(report.as_page(arena_of({"pooling": pooling}).as_picture()))
        assert as_seen(STRANGE) in page.texts
        assert strict(report.as_json())["rows"][0]["model"] == STRANGE
        (rows,) = tables(report.as_markdown())
        assert rows[1][0] == STRANGE.replace("|", "\\|")


# --- one model ---


class TestEvaluationJson:
    def test_it_is_strict_and_has_every_metric(self, evaluation: EvaluationReport) -> None:
        content = strict(evaluation.as_json())
        assert content["model"] == STRANGE
        assert list(content["metrics"]) == list(METRICS)
        for name, cell in content["metrics"].items():
            assert cell["unit"] == METRICS[name].unit
            if name in ("dreamsim", "rfdd"):
                assert cell["value"] is None
                assert cell["reason"] == evaluation.suite.missing[name]
            else:
                assert cell["low"] < cell["value"] < cell["high"]
        assert content["images"] == len(NAMES) - 1
        assert content["broken"] == {f"/somewhere/{NAMES[BROKEN]}": REASON}
        assert content["latent_shape"] == [3, 8, 8]
        assert content["others"]["kl"]["unit"] == "nats per image"
        assert len(content["latent"]["mean"]) == 3
        assert content["protocol"]["name"] == "dcae"
        assert content["caveats"] == evaluation.caveats()

    def test_notes_stand_with_their_metric(self) -> None:
        suite = suite_of()
        suite.notes["lpips"] = "its network is strange"
        report = evaluation_of(pooling(), suite=suite)
        assert strict(report.as_json())["metrics"]["lpips"]["note"] == "its network is strange"
        assert "LPIPS: its network is strange." in report.caveats()

    def test_an_infinite_psnr_is_null_and_called_infinite(self) -> None:
        report = evaluation_of(lossless())
        cell = strict(report.as_json())["metrics"]["psnr"]
        assert cell == {"value": None, "low": None, "high": None, "reason": "infinite", "unit": "dB"}
        (rows,) = tables(report.as_markdown())
        assert ["PSNR (more is better)", "∞ dB", ""] in rows
        page = page_of(report, lossless())
        assert "∞ dB" in page.text
        assert not re.search(r"\binf\b", page.text)


def test_a_metric_without_a_value_keeps_its_cell_everywhere() -> None:
    """Of one image there is no distance; and two lossless models have an infinite PSNR alone."""
    reason = "a distance between sets needs at least two images"
    report = evaluation_of(pooling(), limit=1, broken=False)
    assert strict(report.as_json())["metrics"]["rfid"]["reason"] == reason
    (rows,) = tables(report.as_markdown())
    assert ["rFID (less is better)", f"– ({reason})", ""] in rows
    page = page_of(report, pooling())
    assert {"rFID", reason} <= set(page.texts)

    both = arena_of({"one": lossless, "two": lossless}, limit=1, broken=False)
    (rows,) = tables(both.as_markdown())
    found = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [row["rFID"] for row in found] == 2 * [f"– ({reason})"]
    assert [row["PSNR (dB)"] for row in found] == 2 * ["∞"]
    assert reason in Page(both.as_page(both.as_picture())).texts


class TestEvaluationMarkdown:
    def test_the_table_has_a_row_for_each_value(self, evaluation: EvaluationReport) -> None:
        (rows,) = tables(evaluation.as_markdown())
        head, *rest = rows
        assert head == ["metric", "value", "95 % interval"]
        assert [row[0] for row in rest] == [
            "PSNR (more is better)",
            "SSIM (more is better)",
            "LPIPS (less is better)",
            "DreamSim (less is better)",
            "rFID (less is better)",
            "KL",
        ]
        assert rest[3][1:] == [f"– (there is no {FAR})".replace("|", "\\|"), ""]
        found = evaluation.evaluation.metrics["ssim"]
        assert rest[1][1:] == [f"{found.value:.4f}", f"{found.low:.4f} to {found.high:.4f}"]
        assert rest[5][1].endswith(" nats per image")

    def test_it_says_what_a_reader_must_know(self, evaluation: EvaluationReport) -> None:
        lines = evaluation.as_markdown().splitlines()
        assert lines[0] == f"# {STRANGE}"
        expected = [*evaluation.caveats(), *PROTOCOLS["dcae"].sentences(SIDE)]
        assert {f"- {line}" for line in expected} <= set(lines)
        assert "- Model computed in float32." in lines
        assert "- Measured on a processor, 2 cores, 1 thread, PyTorch 2, Python 3." in lines
        assert any("cannot be read" in line for line in lines)

    def test_it_says_how_the_model_decodes(self) -> None:
        report = evaluation_of(OurCandidate(tiny(), {"num_steps": 2}), decoding={"num_steps": 2})
        assert "- Model computed in float32; decoded with num_steps 2." in report.as_markdown().splitlines()
        assert strict(report.as_json())["protocol"]["decoding"] == {"num_steps": 2}
        (rows,) = tables(report.as_markdown())
        assert ["evaluations", "2.00 of the decoder, per image", ""] in rows

    def test_a_latent_is_described(self, evaluation: EvaluationReport) -> None:
        text = evaluation.as_markdown()
        assert "3×8×8 (c×h×w) at 32 px: 16.0 image values for each latent value, 64 positions." in text
        latent = evaluation.evaluation.latent
        assert latent is not None
        assert f"Active channels: {latent.active_channels} of 3" in text
        assert latent.kl is not None
        assert f"KL from N(0, 1): {sum(latent.kl) / 192:.3f} nats per latent value." in text
        assert "No KL: the encoder is deterministic." in evaluation_of(BicubicCandidate(4)).as_markdown()
        assert "## Latent" not in evaluation_of(CodecCandidate("jpeg", 50)).as_markdown()


def lines_of(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    """Head and rows of images.csv as it lies on disk."""
    text = report.as_csv().encode("utf-8", "backslashreplace").decode("utf-8")
    head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    return head, rows


class TestImagesCsv:
    def test_there_is_a_line_for_each_image(self, evaluation: EvaluationReport) -> None:
        head, rows = lines_of(evaluation)
        assert head == ["place", "name", "psnr", "ssim", "lpips", "mse", "kl", "broken"]
        assert [row[0] for row in rows] == [str(place) for place in range(len(NAMES))]
        assert [row[1] for row in rows] == [as_seen(name) for name in NAMES]
        assert all(len(row) == len(head) for row in rows)
        assert rows[BROKEN][2:] == ["", "", "", "", "", as_seen(REASON)]
        assert [row[-1] for place, row in enumerate(rows) if place != BROKEN] == [""] * (len(NAMES) - 1)

    def test_values_are_exact_and_their_mean_is_the_reports(self, evaluation: EvaluationReport) -> None:
        head, rows = lines_of(evaluation)
        content = strict(evaluation.as_json())
        for column, name in enumerate(head[2:-1], 2):
            values = [float(row[column]) for row in rows if row[column]]
            measured = evaluation.evaluation.values[name]
            assert values == measured[~np.isnan(measured)].tolist()
            if name != "mse":
                expected = (content["metrics"] | content["others"])[name]["value"]
                assert np.mean(values) == pytest.approx(expected, rel=1e-12)

    def test_a_pooled_psnr_follows_from_the_squared_errors(self) -> None:
        report = evaluation_of(pooling(), protocol="original")
        head, rows = lines_of(report)
        errors = np.array([float(row[head.index("mse")]) for row in rows if row[head.index("mse")]])
        assert len(errors) == len(NAMES) - 1
        assert strict(report.as_json())["metrics"]["psnr"]["value"] == pytest.approx(pooled_psnr(errors), rel=1e-12)

    def test_infinite_values_are_infinite(self) -> None:
        head, rows = lines_of(evaluation_of(lossless()))
        values = [float(row[head.index("psnr")]) for place, row in enumerate(rows) if place != BROKEN]
        assert values == [math.inf] * (len(NAMES) - 1)

    def test_columns_are_those_that_have_values(self) -> None:
        assert lines_of(evaluation_of(CodecCandidate("jpeg", 50)))[0][-2] == "bits_per_pixel"
        assert lines_of(evaluation_of(OurCandidate(tiny())))[0][-3:] == ["kl", "evaluations", "broken"]
        assert lines_of(evaluation_of(blurring()))[0][-2] == "mse"


class TestRanking:
    def with_notes(self, *noted: str, without: Sequence[str] = ()) -> EvaluationReport:
        suite = suite_of()
        suite.notes = dict.fromkeys(noted, "its network has random weights")
        for name in without:
            del suite.images[name]
            suite.missing[name] = "not asked for"
        return evaluation_of(pooling(), suite=suite)

    def test_it_is_by_the_best_metric_that_can_be_trusted(self) -> None:
        assert self.with_notes().ranking == "lpips"
        assert self.with_notes("lpips").ranking == "psnr"
        assert self.with_notes("lpips", without=["psnr"]).ranking == "ssim"
        assert self.with_notes("lpips", without=["psnr", "ssim"]).ranking == "lpips"

    def test_without_a_metric_of_single_images_there_is_none(self) -> None:
        report = self.with_notes(without=["lpips", "psnr", "ssim"])
        assert report.ranking is None
        assert report.ranked() == []
        page = Page(report.as_page([], []))
        assert "Worst images" not in page.heads
        assert "Figures" in page.heads

    @pytest.mark.parametrize(("noted", "metric"), [((), "lpips"), (("lpips",), "psnr")])
    def test_the_worst_come_first(self, noted: Sequence[str], metric: str) -> None:
        report = self.with_notes(*noted)
        assert report.ranking == metric
        values = report.evaluation.values[metric]
        ranked = report.ranked()
        assert sorted(ranked) == [place for place in range(len(NAMES)) if place != BROKEN]
        assert ranked != sorted(ranked)
        in_order = [values[place] for place in ranked]
        assert in_order == sorted(in_order, reverse=metric == "lpips")
        assert in_order[0] != in_order[-1]

    @pytest.mark.parametrize(
        ("noted", "words"), [((), ("LPIPS, highest", "LPIPS, lowest")), (("lpips",), ("PSNR, lowest", "PSNR, highest"))]
    )
    def test_the_page_shows_them_in_that_order(self, noted: Sequence[str], words: tuple[str, str]) -> None:
        report = self.with_notes(*noted)
        page = page_of(report, pooling())
        names = [as_seen(NAMES[place]) for place in report.ranked()]
        heads = page.heads[page.heads.index("Worst images") : page.heads.index("Figures")]
        assert heads == ["Worst images", *names[:3], "Best images", *names[::-1][:3]]
        assert f"3 of 7, by {words[0]} first." in page.texts
        assert f"3 of 7, by {words[1]} first." in page.texts


class TestEvaluationPage:
    def test_label_and_names_are_escaped(self, evaluation_page: Page) -> None:
        assert evaluation_page.heads[0] == f"Evaluation of {as_seen(STRANGE)}"
        for place, name in enumerate(NAMES):
            assert evaluation_page.heads.count(as_seen(name)) == (0 if place == BROKEN else 2), name

    def test_it_says_what_a_reader_must_know(self, evaluation: EvaluationReport, evaluation_page: Page) -> None:
        for line in (*evaluation.caveats(), f"there is no {FAR}", *PROTOCOLS["dcae"].sentences(SIDE)):
            assert line in evaluation_page.texts
        assert as_seen(REASON) in evaluation_page.texts
        assert "dc-ssdae eval <x>" in evaluation_page.texts
        found = evaluation.evaluation.metrics["psnr"]
        assert f"PSNR {found.value:.2f} dB, " in evaluation_page.text
        assert "on 7 images of 32×32 px." in evaluation_page.text

    def test_captions_have_the_values_of_the_image(self, evaluation: EvaluationReport, evaluation_page: Page) -> None:
        for place in range(len(NAMES)):
            if place != BROKEN:
                values = evaluation.evaluation.values
                parts = [f"PSNR {values['psnr'][place]:.2f} dB", f"SSIM {values['ssim'][place]:.4f}"]
                caption = ", ".join([*parts, f"LPIPS {values['lpips'][place]:.4f}"])
                assert evaluation_page.texts.count(caption) == 2

    def test_random_weights_are_told(self) -> None:
        report = evaluation_of(random(), "mine")
        page = page_of(report, random())
        assert "px (random weights)." in page.text
        assert "mine has random weights: cost and shape can be compared, quality means nothing." in page.texts

    def test_many_channels_are_left_to_the_json(self) -> None:
        class Wide:
            def encode(self, x: Tensor) -> Tensor:
                return F.pixel_unshuffle(x, 4)

            def decode(self, z: Tensor) -> Tensor:
                return F.pixel_shuffle(z, 4)

        report = evaluation_of(PythonCandidate(Wide(), "wide"))
        page = page_of(report, PythonCandidate(Wide(), "wide"))
        assert "report.json has mean, standard deviation and KL of all 48 channels." in page.texts
        assert len(strict(report.as_json())["latent"]["std"]) == 48


# --- what may not be compared ---


def said(
    images: int = 20_000,
    random_models: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
    distances: Mapping[str, float | None] | None = None,
    protocol: str = "dcae",
    size: int = 64,
) -> list[str]:
    """The caveats of one model with such distances."""
    suite = MetricSuite(notes=dict(notes or {}))
    metrics = {name: Estimate(reason="not asked for") for name in METRICS}
    for name, value in (distances or {}).items():
        suite.distances[name] = FrechetDistance(colours, 6, 0)
        metrics[name] = Estimate(value, reason=None if value is not None else "too few")
    settings = EvaluationSettings(PROTOCOLS[protocol], size)
    return caveats(settings, suite, [metrics], images, random_models)


def always(size: int = 64, protocol: str = "dcae") -> str:
    return (
        f"Figures are of {size} px images under the protocol {protocol}: not comparable with those of another size or "
        "protocol."
    )


class TestCaveats:
    def test_size_and_protocol_are_always_said(self) -> None:
        assert said() == [always()]
        assert said(protocol="rae", size=256) == [always(256, "rae")]

    @pytest.mark.parametrize(("enlarged", "start"), [(3, "3 of 20,000 images"), (20_000, "20,000 of 20,000 images")])
    def test_images_that_were_enlarged_are_said(self, enlarged: int, start: str) -> None:
        settings = EvaluationSettings(PROTOCOLS["dcae"], 64)
        first, last = caveats(settings, MetricSuite(), [], 20_000, enlarged=enlarged)
        assert first.startswith(start)
        assert "64 px" in first
        assert last == always()

    def test_random_weights_are_said_of_those_that_have_them(self) -> None:
        one, both = said(random_models=["a"]), said(random_models=["a", "b"])
        assert one == ["a has random weights: cost and shape can be compared, quality means nothing.", always()]
        assert both[0] == "a, b have random weights: cost and shape can be compared, quality means nothing."
        assert both[1:] == [always()]

    def test_notes_are_said_with_their_metric(self) -> None:
        notes = {"lpips": "its network is new", "rfid": "so is this"}
        assert said(notes=notes) == ["LPIPS: its network is new.", "rFID: so is this.", always()]

    @pytest.mark.parametrize(
        ("images", "distances", "start"),
        [
            (ENOUGH_IMAGES - 1, {"rfid": 1.0}, "rFID of 9,999 images: these distances fall as images are added"),
            (ENOUGH_IMAGES - 1, {"rfid": 0.0}, "rFID of 9,999 images"),
            (30, {"rfid": 1.0, "rfdd": 2.0}, "rFID and rFDD of 30 images"),
            (30, {"rfid": None, "rfdd": 2.0}, "rFDD of 30 images"),
            (30, {"rfid": None}, None),
            (30, {}, None),
            (ENOUGH_IMAGES, {"rfid": 1.0, "rfdd": 2.0}, None),
        ],
    )
    def test_few_images_are_said_of_distances_that_have_a_value(
        self, images: int, distances: Mapping[str, float | None], start: str | None
    ) -> None:
        found = said(images, distances=distances)
        if start is None:
            assert found == [always()]
        else:
            first, last = found
            assert first.startswith(start)
            assert f"with those of the same {images:,}; published ones are of 50,000." in first
            assert last == always()

    def test_one_model_with_a_value_is_enough(self) -> None:
        suite = suite_of()
        settings = EvaluationSettings(PROTOCOLS["dcae"], 64)
        without = {name: Estimate(reason="failed") for name in METRICS}
        assert len(caveats(settings, suite, [without, without], 8)) == 1
        assert len(caveats(settings, suite, [without, {**without, "rfid": Estimate(1.0)}], 8)) == 2
        assert len(caveats(settings, suite, [], 8)) == 1

    def test_the_arena_says_them_of_those_that_finished(self, arena: ArenaReport) -> None:
        found = arena.caveats()
        assert found[0] == "random has random weights: cost and shape can be compared, quality means nothing."
        assert found[1].startswith("rFID of 7 images: ")
        assert found[2] == always(SIDE)
        assert found[3].startswith("Speed and memory are of this machine")
        assert len(found) == 4

        def random_and_failing() -> Candidate:
            candidate = failing()
            candidate.remarks.append(RANDOM_WEIGHTS)
            return candidate

        assert not any(RANDOM_WEIGHTS in line for line in arena_of({"a": random_and_failing, "b": pooling}).caveats())


class TestProtocolLines:
    def test_which_images(self) -> None:
        settings, suite = EvaluationSettings(PROTOCOLS["dcae"], 64), MetricSuite()
        all_of_them = protocol_lines(settings, suite, "photos", 1234, 0, 1234)
        assert all_of_them[0] == "Protocol dcae. Data: all 1,234 images of photos."
        some = protocol_lines(settings, suite, "photos", 100, 0, 1234)
        assert some[0] == "Protocol dcae. Data: 100 of the 1,234 images of photos, evenly spread."
        for lines in (all_of_them, some):
            assert lines[1:-1] == PROTOCOLS["dcae"].sentences(64)
            assert lines[-1].startswith("Intervals: 95 %")

    @pytest.mark.parametrize(
        ("broken", "sentence"),
        [
            (1, "1 image of them cannot be read: left out of everything."),
            (1100, "1,100 images of them cannot be read: left out of everything."),
        ],
    )
    def test_images_that_cannot_be_read_are_no_limit(self, broken: int, sentence: str) -> None:
        settings, suite = EvaluationSettings(PROTOCOLS["dcae"], 64), MetricSuite()
        all_of_them = protocol_lines(settings, suite, "photos", 1234 - broken, broken, 1234)
        assert all_of_them[:2] == ["Protocol dcae. Data: all 1,234 images of photos.", sentence]
        some = protocol_lines(settings, suite, "photos", 50, broken, 5000)
        assert some[0] == f"Protocol dcae. Data: {50 + broken:,} of the 5,000 images of photos, evenly spread."
        assert some[1] == sentence

    def test_networks_and_weights_are_named(self) -> None:
        lines = protocol_lines(EvaluationSettings(PROTOCOLS["dcae"], 64), suite_of(), "photos", 8, 0, 8)
        assert sum(line.startswith("rFID: Fréchet distance (torchmetrics) on features of Inc") for line in lines) == 1
        assert not any(line.startswith("rFDD") for line in lines)
        assert "Weights of LPIPS: far.pth, SHA-256 0123." in lines
        assert "Weights of rFID: random weights." in lines

    def test_what_was_not_asked_for_is_not_missed(self) -> None:
        assert missing_lines(suite_of()) == [f"No DreamSim: there is no {FAR}."]


class TestTable:
    def test_it_is_the_same_in_html_and_markdown(self) -> None:
        heads = [("a|b", "x"), ("<c>", ""), ("d", "")]
        rows = [[("1", "2"), ("<3>", "four|five"), ("6", "")], [("7\n8", ""), ("", ""), ("", "")]]
        table = Table(heads, rows, [None, "no | good"])
        assert tables(table.markdown()) == [
            [
                ["a\\|b (x)", "<c>", "d"],
                ["1 (2)", "<3> (four\\|five)", "6"],
                ["7 8", "failed: no \\| good", ""],
            ]
        ]
        assert table.html().count("<tr>") == 3
        assert "<td>&lt;3&gt;<small>four|five</small></td>" in table.html()
        assert '<td class="reason" colspan="2">failed: no | good</td>' in table.html()
