"""Made-up results for reports, with names of all kinds, and a reader of pages."""

import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dc_ssdae.data.loader import BrokenImage
from dc_ssdae.evaluation.arena import Entry
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.estimates import METRICS, Estimate
from dc_ssdae.evaluation.evaluate import BITS, EVALUATIONS, KL, Evaluation, EvaluationSettings, Reconstructed
from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.metric_networks import NOT_ASKED, MetricSuite
from dc_ssdae.evaluation.metrics import psnr
from dc_ssdae.evaluation.protocol import PROTOCOLS
from dc_ssdae.evaluation.report.arena import ArenaReport
from dc_ssdae.evaluation.report.evaluation import EvaluationReport
from dc_ssdae.evaluation.statistics import LatentProfile

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
BROKEN = 6
REASON = f"cannot read {NAMES[BROKEN]!r}: no | file"
STRANGE = '<b>&"c"|d_e*🦆\udce9$x'
"""A label with what HTML, Markdown, matplotlib and UTF-8 treat apart."""
FAR = 'a | "bad" <i>thing</i> & more'
FAILED = "fails|<u>"
LABELS = ("ours", STRANGE, FAILED, "random", "jpeg:50", "lossless")
MACHINE = {"cpu": "a processor", "cores": 2, "threads": 1, "torch": "2", "python": "3", "device": "cpu"}


def suite_of(**given: Any) -> MetricSuite:
    """PSNR, SSIM and LPIPS of images, and rFID; DreamSim cannot be taken, rFDD is not asked for."""
    images: Any = dict.fromkeys(("psnr", "ssim", "lpips", "mse"))
    distances = {"rfid": FrechetDistance(lambda images: images, 1, replicates=0)}
    missing = {"dreamsim": f"there is no {FAR}", "rfdd": NOT_ASKED}
    return MetricSuite(**{"images": images, "distances": distances, "missing": missing, **given})


def evaluation_of(values: Mapping[str, float], place: int = 0, **given: Any) -> Evaluation:
    """An evaluation in which image i has i times a tenth more than these values; those of sets are as they are."""
    per_image = {}
    for name in set(values) - {"rfid"}:
        per_image[name] = values[name] * (1 + 0.1 * np.array([3, 1, 7, 0, 5, 2, np.nan, 4]))
    found = {name: Estimate(value, 0.9 * value, 1.1 * value) for name, value in values.items()}
    missing = {"dreamsim": Estimate(reason=f"there is no {FAR}"), "rfdd": Estimate(reason=NOT_ASKED)}
    metrics = {name: found.get(name, missing.get(name, Estimate(reason="too few"))) for name in METRICS}
    others = {name: found[name] for name in (KL, BITS, EVALUATIONS) if name in found}
    broken = [BrokenImage(f"/somewhere/{NAMES[BROKEN]}", REASON)]
    return Evaluation(metrics, 7, list(NAMES), per_image, broken, [BROKEN], others=others, **given)


def shown_of(noise: float, places: tuple[int, ...] = (0, 2, 4)) -> dict[int, Reconstructed]:
    """Images, and the same with noise."""
    shown = {}
    for place in places:
        generator = torch.Generator().manual_seed(place)
        original = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator).byte()
        change = noise * torch.randn(3, SIDE, SIDE, generator=generator)
        shown[place] = Reconstructed(place, NAMES[place], original, (original + change).clamp(0, 255).byte())
    return shown


def entry_of(label: str, noise: float = 20.0, more: Mapping[str, float] | None = None, **given: Any) -> Entry:
    """A model that finished."""
    values = {"psnr": 30.0 - noise, "ssim": 0.5, "lpips": 0.01 * noise, "rfid": noise, **(more or {})}
    evaluation = evaluation_of(values, latent_shape=given.pop("shape", None))
    speed = Estimate(1000.0 * noise, 900.0 * noise, 1100.0 * noise)
    known: dict[str, Any] = {"encode": speed, "decode": speed, "memory": 3 * 2**20}
    candidate = candidate_of(
        **{name: given.pop(name) for name in ("remarks", "parameters", "is_baseline") & given.keys()}
    )
    return Entry(label, candidate, evaluation=evaluation, shown=shown_of(noise), **{**known, **given})


def candidate_of(remarks: Sequence[str] = (), parameters: int | None = None, is_baseline: bool = False) -> Any:
    """What a report asks a candidate."""
    return SimpleNamespace(remarks=[*remarks], is_baseline=is_baseline, count_parameters=lambda: parameters)


def entries() -> list[Entry]:
    """Models of all kinds, one of which failed."""
    return [
        entry_of("ours", 10.0, {KL: 500.0, EVALUATIONS: 1.0}, shape=(16, 8, 8), parameters=2_500_000),
        entry_of(STRANGE, 15.0, shape=(4, 8, 8)),
        Entry(FAILED, candidate_of(), failed=f"ZeroDivisionError: {FAR}"),
        entry_of("random", 60.0, remarks=[RANDOM_WEIGHTS], shape=(64, 8)),
        entry_of("jpeg:50", 20.0, {BITS: 1.5}, remarks=["codec"], is_baseline=True),
        entry_of("lossless", 0.0, {"psnr": float("inf")}, encode=None, decode=Estimate(9.0, note="all")),
    ]


def arena_of(models: list[Entry] | None = None, **given: Any) -> ArenaReport:
    """A report on these models, by default on those of `entries`."""
    return ArenaReport(entries=entries() if models is None else models, **about(), **{"rounds": 2, **given})


def report_of(model: Entry | None = None, **given: Any) -> EvaluationReport:
    """A report on one model."""
    entry = model or entry_of(STRANGE, 10.0, {"mse": 0.01, KL: 500.0}, shape=(3, 8, 8))
    assert entry.evaluation is not None
    entry.evaluation.latent = LatentProfile([0.0, 0.1, 0.2], [1.0, 0.5, 2.0], [96.0, 0.0, 96.0], 2.5, 2, 7)
    return EvaluationReport(entries=[entry], **{**about(), **given})


def about() -> dict[str, Any]:
    """What every report holds."""
    settings, suite = EvaluationSettings(PROTOCOLS["dcae"], SIDE, 4), suite_of()
    how = {"settings": settings, "suite": suite, "data": "some/<data>", "total": len(NAMES)}
    return {**how, "machine": MACHINE, "command": "dc-ssdae <a> b", "dtype": "float32"}


def as_seen(text: str) -> str:
    """As UTF-8 has it: what could not be decoded is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def decibels(shown: Reconstructed) -> str:
    """The PSNR of a picture as its caption has it."""
    return f"{Estimate(psnr(shown.original, shown.output)).text(2)} dB"


class Page(HTMLParser):
    """A page, of which every tag is closed where it should be, and which needs nothing from elsewhere.

    Attributes:
        texts: all that a reader sees, in pieces.
        heads: texts of h1, h2 and h3.
        attributes: tag, name and value of all.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.content = content.decode("utf-8")
        self.open: list[str] = []
        self.texts: list[str] = []
        self.heads: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(self.content)
        self.close()
        assert self.open == []
        sources = [value for _, name, value in self.attributes if name in ("src", "href", "srcset", "data", "action")]
        assert sources
        assert all(source is not None and source.startswith("data:") for source in sources)
        assert not re.search(r"https?://|@import|\bon\w+=[\"']", self.content.replace(as_seen(NAMES[2]), ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "input", "img", "br"):
            assert not (self.open and self.open[-1] == "p"), f"{tag} in a paragraph"
            self.open.append(tag)
        assert len({name for name, _ in attrs}) == len(attrs)
        assert tag != "img" or dict(attrs)["alt"]
        assert not any(name.startswith("on") for name, _ in attrs)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in ("h1", "h2", "h3"):
            self.heads.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            if self.open[-1] in ("h1", "h2", "h3"):
                self.heads[-1] += data
