"""Where a model comes from: what is known of its training and its evaluations, kept in config.json and told in words.

It may come from a stranger's config.json and goes into model cards and terminals: every text is one short line.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints
from urllib.parse import urlsplit

from dc_ssdae.errors import as_json, check_names, check_type, wrong_value
from dc_ssdae.settings import check_value, setting

PARTS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
"""What may be untrained."""

IN_TRAINING = "training"
"""The protocol's name of evaluations within a training run, which are there to watch the run."""

LONGEST_TEXT = 200
LONGEST_LIST = 1000
SPLITS = ("train", "validation", "val", "test")
"""Names of folders that say nothing without the one above."""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A dataclass that config.json holds as a mapping; a field that is None is left out there."""

    @classmethod
    def from_mapping(cls, given: Any, name: str = "provenance") -> Self:
        """Check a mapping, and make a record of it.

        Args:
            given: values by the names of the fields, as JSON has them; null is as good as left out.
            name: of the mapping, for messages.

        Raises:
            InputError: a key is unknown or missing; or a value is of the wrong type, too long, or no single line.
        """
        check_type(name, given, Mapping)
        check_names(f"key of {name}", given, [entry.name for entry in fields(cls)])
        hints, values = get_type_hints(cls), {}
        for entry in fields(cls):
            label = f"{name}.{entry.name}"
            value = as_json(label, given.get(entry.name))
            if not _is_short(value):
                raise wrong_value(label, value, f"a line of 1 to {LONGEST_TEXT} characters, a finite number, or a list")
            record = entry.metadata.get("record")
            if record is not None and isinstance(value, dict):
                value = {key: record.from_mapping(item, f"{label}.{key}") for key, item in value.items()}
            elif record is not None and isinstance(value, list):
                value = [record.from_mapping(item, f"{label}[{place}]") for place, item in enumerate(value)]
            values[entry.name] = check_value(label, value, hints[entry.name], entry.metadata)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """What is known, as config.json holds it."""
        return asdict(self, dict_factory=lambda pairs: {key: value for key, value in pairs if value not in (None, [])})

    def facts(self, quote: Callable[[str], str] = str) -> list[tuple[str, str]]:
        """What is known in words, but for other records: pairs of a label and a text, in the order of the fields.

        Args:
            quote: makes what may be a stranger's text safe for where it goes.
        """
        found = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if "record" not in entry.metadata and value not in (None, [], {}):
                label = entry.metadata.get("label", entry.name.replace("_", " "))
                found.append((label, _in_words(value, quote)))
        return found


@dataclass(frozen=True, kw_only=True)
class Metric(_Record):
    """A measured value.

    Args:
        value: of the metric.
        low: lower end of the interval of 95 %.
        high: its upper end.
        note: what makes the value incomparable with others.
    """

    value: float
    low: float | None = None
    high: float | None = None
    note: str | None = None

    def __str__(self) -> str:
        """The value with its interval, if it has one, to five digits."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:.5g} to {self.high:.5g})"
        return f"{self.value:.5g}{interval}"


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Record):
    """What is known of one evaluation of a model.

    Args:
        protocol: its name; "training" for evaluations within a training run.
        data: name of the images, no path.
        images: how many were measured.
        image_size: side of the images in pixels.
        step: of the training.
        dtype: that the model computed in, where that is not float32.
        decoding: the settings of `DCSSDAE.decode`; nothing for one step.
        metrics: by name.
    """

    protocol: str
    data: str
    images: int = setting(at_least=0)
    image_size: int | None = setting(None, at_least=0)
    step: int | None = setting(None, at_least=0)
    dtype: str | None = None
    decoding: dict[str, str | float | list[float]] | None = None
    metrics: dict[str, Metric] = setting(record=Metric)


@dataclass(frozen=True, kw_only=True)
class Provenance(_Record):
    """What is known of a model's origin.

    Args:
        preset: the preset's name.
        changes: names of the settings that differ from it.
        data: name of the training data, no path.
        images: how many it has.
        image_size: side of the crops in pixels.
        steps: of the training.
        batch_size: images per step.
        initialised_from: name of the model whose weights the training started from.
        teacher: name of the model that was distilled.
        source: of a converted checkpoint.
        untrained: the parts with random weights.
        random_backbones: names of the loss terms whose backbone had random weights.
        license: of the weights.
        version: of this package.
        evaluations: as `Evaluation` has them.
    """

    preset: str | None = None
    changes: list[str] | None = setting(None, label="settings changed in it")
    data: str | None = None
    images: int | None = setting(None, at_least=0)
    image_size: int | None = setting(None, at_least=0)
    steps: int | None = setting(None, at_least=0)
    batch_size: int | None = setting(None, at_least=0, label="images per step")
    initialised_from: str | None = None
    teacher: str | None = setting(None, label="distilled from")
    source: str | None = setting(None, label="converted from")
    untrained: list[Literal["encoder", "decoder"]] | None = setting(None, label="with random weights, not trained")
    random_backbones: list[str] | None = setting(None, label="loss terms with random backbones, which teach nothing")
    license: str | None = setting(None, label="licence of the weights")
    version: str | None = setting(None, label="version of dc-ssdae")
    evaluations: list[Evaluation] | None = setting(None, record=Evaluation)

    def with_evaluation(self, evaluation: Evaluation) -> "Provenance":
        """Add an evaluation, in the place of an earlier one of the same protocol, data, image size and decoding."""

        def kind(entry: Evaluation) -> tuple[Any, ...]:
            return entry.protocol, entry.data, entry.image_size, entry.decoding or {}

        kept = [entry for entry in self.evaluations or () if kind(entry) != kind(evaluation)]
        return replace(self, evaluations=[*kept, evaluation])


def short_name(text: str) -> str | None:
    """Make a name that a provenance takes of any text; None where nothing of it can be shown."""
    shown = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return (shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…") or None


def name_of_path(path: str | Path) -> str | None:
    """Name a data set or a model by the last part of its path or URL, so that no local path gets into a model card.

    Args:
        path: of any kind; of a folder that is called like anybody's train/ or model/, the part above tells more.
    """
    text = urlsplit(str(path)).path if "://" in str(path) else os.path.abspath(os.path.expanduser(path))
    parts = [part for part in text.split("/") if part]
    parts = parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts
    return short_name("/".join(parts[-2:] if parts[-1:] and parts[-1] in SPLITS else parts[-1:]))


def _in_words(value: Any, quote: Callable[[str], str]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{quote(name)} {_in_words(item, quote)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_in_words(item, quote) for item in value)
    return quote(value) if isinstance(value, str) else f"{value:,}"


def _is_short(value: Any, depth: int = 4) -> bool:
    """Whether it is a short line, a finite number, or a short list or mapping of such."""
    if isinstance(value, str):
        return value.strip() != "" and len(value) <= LONGEST_TEXT and value.isprintable()
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    items = [*value, *value.values()] if isinstance(value, dict) else value or []
    return depth > 0 and len(items) <= LONGEST_LIST and all(_is_short(item, depth - 1) for item in items)
