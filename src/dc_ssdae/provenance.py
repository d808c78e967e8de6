"""Where a model comes from: what is known of its training and its evaluations, kept in config.json and told in words.

It may come from a stranger's config.json and goes into model cards and terminals: every text is one short line.
"""

import os
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints
from urllib.parse import urlsplit

from dc_ssdae.errors import InputError, as_json, check_names, check_type, counted
from dc_ssdae.settings import check_value, is_required, setting

PARTS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
"""What may be untrained."""

IN_TRAINING = "training"
"""The protocol's name of evaluations within a training run, which are there to watch the run."""

TITLES: Mapping[str, str] = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "dreamsim": "DreamSim",
    "rfid": "rFID",
    "rfdd": "rFDD",
    "mse": "MSE",
}
"""What people call metrics, with their units; another one goes by its own name."""

LONGEST_TEXT = 200
LONGEST_LIST = 1000
SPLITS = ("train", "validation", "val", "test")
"""Names of folders that say nothing without the one above."""

Quote = Callable[[str], str]
"""Makes a text safe for where it goes."""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A dataclass that config.json holds as a mapping; a field that is None is left out there."""

    @classmethod
    def from_mapping(cls, given: Any, name: str = "provenance") -> Self:
        """Check a mapping, and make a record of it.

        Args:
            given: values by the names of the fields, as JSON has them.
            name: of the mapping, for messages.

        Raises:
            InputError: a key is unknown or missing; or a value is of the wrong type, too long, or no single line.
        """
        check_type(name, given, Mapping)
        known, hints = {entry.name: entry for entry in fields(cls)}, get_type_hints(cls)
        check_names(f"key of {name}", given, known)
        for key, entry in known.items():
            if key not in given and is_required(entry):
                raise InputError(f"{name} lacks {key}")
        values = {}
        for key, value in given.items():
            label, limits = f"{name}.{key}", known[key].metadata
            records = limits.get("records")
            if records is not None and isinstance(value, Mapping):
                _check_short(label, list(value))
                value = {item: records.from_mapping(value[item], f"{label}.{item}") for item in value}
            elif records is not None and isinstance(value, list | tuple):
                value = [records.from_mapping(item, f"{label}[{place}]") for place, item in enumerate(value)]
            else:
                value = as_json(label, value)
                _check_short(label, value)
            values[key] = check_value(label, value, hints[key], limits)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """What is known, as config.json holds it."""
        return asdict(self, dict_factory=lambda pairs: {key: value for key, value in pairs if value is not None})


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
        has_interval = self.low is not None and self.high is not None
        return f"{self.value:.5g}" + (f" ({self.low:.5g} to {self.high:.5g})" if has_interval else "")


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
    metrics: dict[str, Metric] = setting(records=Metric)

    def __post_init__(self) -> None:
        known = {name: self.metrics[name] for name in TITLES if name in self.metrics}
        object.__setattr__(self, "metrics", {**known, **self.metrics})

    @property
    def has_intervals(self) -> bool:
        """Whether any metric has one."""
        return any(metric.low is not None for metric in self.metrics.values())

    def replaces(self, other: "Evaluation") -> bool:
        """Whether another evaluation has the same protocol, data, image size and decoding."""
        same = all(getattr(self, name) == getattr(other, name) for name in ("protocol", "data", "image_size"))
        return same and (self.decoding or {}) == (other.decoding or {})

    def title(self, quote: Quote = str) -> str:
        """Say how the evaluation was made: its protocol, images and decoding.

        Args:
            quote: for what may be a stranger's text.
        """
        parts = ["during training" if self.protocol == IN_TRAINING else f"protocol {quote(self.protocol)}"]
        if self.step is not None:
            parts.append(f"after {counted(self.step, 'step')}")
        parts.append(f"{counted(self.images, 'image')} of {quote(self.data)}")
        if self.image_size is not None:
            parts.append(f"{self.image_size}×{self.image_size} px")
        if self.dtype is not None:
            parts.append(quote(self.dtype))
        settings = []
        for name, value in (self.decoding or {}).items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            settings.append(f"{quote(name)} {quote(text)}")
        return ", ".join([*parts, f"decoded with {', '.join(settings)}" if settings else "decoded in one step"])


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
    changes: list[str] | None = None
    data: str | None = None
    images: int | None = setting(None, at_least=0)
    image_size: int | None = setting(None, at_least=0)
    steps: int | None = setting(None, at_least=0)
    batch_size: int | None = setting(None, at_least=0)
    initialised_from: str | None = None
    teacher: str | None = None
    source: str | None = None
    untrained: list[Literal["encoder", "decoder"]] | None = None
    random_backbones: list[str] | None = None
    license: str | None = None
    version: str | None = None
    evaluations: list[Evaluation] | None = setting(None, records=Evaluation)

    @property
    def is_untrained(self) -> bool:
        """Whether all weights are known to be random."""
        return set(PARTS) <= set(self.untrained or ())

    def with_evaluation(self, evaluation: Evaluation) -> "Provenance":
        """Add an evaluation, in the place of an earlier one of the same protocol, data, image size and decoding."""
        kept = [entry for entry in self.evaluations or () if not evaluation.replaces(entry)]
        return replace(self, evaluations=[*kept, evaluation])

    def training_lines(self, quote: Quote = str) -> list[tuple[str, str]]:
        """Say what is known of the training: pairs of what and how, without what is not known.

        Args:
            quote: for what may be a stranger's text.
        """

        text = {key: quote(value) for key, value in vars(self).items() if isinstance(value, str)}
        untrained = f"the {self.untrained[0]}, whose weights are random" if self.untrained else None
        *others, last = map(quote, self.changes or [""])
        changed = f", with {', '.join(others)}{' and ' if others else ''}{last} changed" if self.changes else ""
        images = counted(self.images, "image") if self.images else ""
        size = f"crops of {self.image_size}×{self.image_size} px" if self.image_size else ""
        steps = counted(self.steps, "step") if self.steps is not None else ""
        batch = f"{'of' if steps else 'batches of'} {counted(self.batch_size, 'image')}" if self.batch_size else ""
        backbones = ", ".join(map(quote, self.random_backbones or ()))
        lines = {
            "untrained": "all of it: the weights are random" if self.is_untrained else untrained,
            "preset": self.preset and text["preset"] + changed,
            "converted from": text.get("source"),
            "started from": text.get("initialised_from"),
            "distilled from": text.get("teacher"),
            "training data": ", ".join(filter(None, [text.get("data"), images, size])),
            "training": " ".join(filter(None, [steps, batch])),
            "caution": backbones and f"loss terms with random backbones, which teach nothing: {backbones}",
            "licence of the weights": text.get("license"),
            "written by": self.version and f"dc-ssdae {text['version']}",
        }
        return [(what, how) for what, how in lines.items() if how]


def short_name(text: str) -> str | None:
    """Make a name that a provenance takes of any text; None where nothing of it can be shown."""
    shown = "".join(sign if sign.isprintable() else " " for sign in text)
    shown = " ".join(shown.split())
    return (shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…") or None


def name_of_path(path: str | Path) -> str | None:
    """Name a data set or a model by the last part of its path or URL, so that no local path gets into a model card.

    Args:
        path: of any kind; of a folder that is called like anybody's train/ or model/, the part above tells more.
    """
    text = str(path)
    text = urlsplit(text).path if "://" in text else os.path.abspath(os.path.expanduser(text))
    parts = [part for part in text.split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":
        parts.pop()
    return short_name("/".join(parts[-2:] if parts[-1:] and parts[-1] in SPLITS else parts[-1:]))


def _check_short(name: str, value: Any) -> None:
    if not _is_short(value):
        raise InputError(
            f"{name} is {' '.join(reprlib.repr(value).split())}; it must be a line of 1 to {LONGEST_TEXT} printable "
            f"characters, a finite number, or a list or mapping of at most {LONGEST_LIST} of them"
        )


def _is_short(value: Any, depth: int = 3) -> bool:
    """Whether it is a short line, a finite number, or a short list or mapping of such."""
    if isinstance(value, str):
        return value.strip() != "" and len(value) <= LONGEST_TEXT and value.isprintable()
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    items = [*value, *value.values()] if isinstance(value, dict) else value or []
    return depth > 0 and len(items) <= LONGEST_LIST and all(_is_short(item, depth - 1) for item in items)
