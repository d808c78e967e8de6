"""Where a model comes from: what is known of its training and its evaluations, kept in config.json and told in words.

It may come from a stranger's config.json and goes into model cards and terminals: every text is one short line.
"""

import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dc_ssdae.errors import InputError, counted, unknown_name

PARTS = ("encoder", "decoder")
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
LONGEST_LIST = 64
LARGEST_COUNT = 2**63 - 1
SPLITS = ("train", "validation", "val", "test")
"""Names of folders that say nothing without the one above."""

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")

_SOURCES = {"source": "converted from", "initialised_from": "started from", "teacher": "distilled from"}

Quote = Callable[[str], str]
"""Makes a text safe for where it goes."""


def check_provenance(given: Any) -> dict[str, Any] | None:
    """Check the setting `provenance` of a model, and give it as plain data.

    Args:
        given: None, or a mapping with any of these keys: `preset`, the preset's name; `changes`, names of the settings
            that differ from it; `data`, name of the training data, no path; `images`, how many it has; `image_size`
            of the crops in pixels; `steps` and `batch_size` of the training; `initialised_from` and `teacher`, names
            of models; `source`, of a converted checkpoint; `untrained`, the parts with random weights;
            `random_backbones`, loss terms whose backbone had them; `license` of the weights; `version` of this package;
            `evaluations`, as `check_evaluation` takes them.

    Raises:
        InputError: a key is unknown, or a value is of the wrong type, too long, or no single line.
    """
    return None if given is None else _checked_mapping("provenance", given, _KEYS)


def check_evaluation(name: str, given: Any) -> dict[str, Any]:
    """Check what is known of one evaluation, and give it as plain data.

    Args:
        name: for messages.
        given: a mapping with `protocol`, `data`, `images` (how many) and `metrics`: by name a mapping with `value` and
            perhaps `low`, `high` (the interval of 95 %) and `note`; and perhaps `image_size` in pixels, `step` of the
            training, `dtype`, and `decoding`, the settings of `DCSSDAE.decode`.

    Raises:
        InputError: as `check_provenance`; or one of the first four is missing.
    """
    return _checked_mapping(name, given, _EVALUATION_KEYS, ("protocol", "data", "images", "metrics"))


def with_evaluation(provenance: Mapping[str, Any] | None, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Add an evaluation, in the place of an earlier one of the same protocol, data, image size and decoding."""

    def identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["protocol"], entry["data"], entry.get("image_size"), entry.get("decoding") or {}

    before = (provenance or {}).get("evaluations", [])
    kept = [entry for entry in before if identity(entry) != identity(evaluation)]
    return {**(provenance or {}), "evaluations": [*kept, dict(evaluation)]}


def is_untrained(provenance: Mapping[str, Any] | None) -> bool:
    """Whether all weights are known to be random."""
    return set(PARTS) <= set((provenance or {}).get("untrained", ()))


def short_name(text: str) -> str | None:
    """Make a name that `check_provenance` accepts of any text; None where nothing of it can be shown."""
    shown = "".join(sign if sign.isprintable() else " " for sign in text)
    shown = " ".join(shown.split())
    return (shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…") or None


def name_of_path(path: str | Path) -> str | None:
    """Name a data set or a model by the last part of its path or URL, so that no local path gets into a model card.

    Args:
        path: of any kind; of a folder that is called like anybody's train/ or model/, the part above tells more.
    """
    text = str(path)
    if "://" in text:
        text = re.split(r"[?#]", text.partition("://")[2])[0].partition("/")[2]
        parts = [part for part in text.split("/") if part]
    else:
        parts = [part for part in Path(os.path.abspath(os.path.expanduser(text))).parts if part != os.sep]
    if len(parts) > 1 and parts[-1] == "model":
        parts.pop()
    return short_name("/".join(parts[-2:] if parts[-1:] and parts[-1] in SPLITS else parts[-1:]))


def training_lines(provenance: Mapping[str, Any], quote: Quote = str) -> list[tuple[str, str]]:
    """Say what is known of the training: pairs of what and how, without what is not known.

    Args:
        provenance: checked.
        quote: for what may be a stranger's text.
    """

    def named(key: str) -> list[str]:
        return [quote(text) for text in provenance.get(key, ())]

    lines: list[tuple[str, str]] = []
    untrained = [part for part in PARTS if part in provenance.get("untrained", ())]
    if is_untrained(provenance):
        lines.append(("untrained", "all of it: the weights are random"))
    elif untrained:
        lines.append(("untrained", f"the {untrained[0]}, whose weights are random"))
    if "preset" in provenance:
        changes = named("changes")
        changed = f", with {_listed(changes)} changed" if changes else ""
        lines.append(("preset", f"{quote(provenance['preset'])}{changed}"))
    lines += [(label, quote(provenance[key])) for key, label in _SOURCES.items() if key in provenance]
    data = [quote(provenance["data"])] if "data" in provenance else []
    if "images" in provenance:
        data.append(counted(provenance["images"], "image"))
    if "image_size" in provenance:
        data.append(f"crops of {provenance['image_size']}×{provenance['image_size']} px")
    if data:
        lines.append(("training data", ", ".join(data)))
    steps = [counted(provenance["steps"], "step")] if "steps" in provenance else []
    if "batch_size" in provenance:
        steps.append(f"{'of' if steps else 'batches of'} {counted(provenance['batch_size'], 'image')}")
    if steps:
        lines.append(("training", " ".join(steps)))
    if names := named("random_backbones"):
        lines.append(("caution", f"loss terms with random backbones, which teach nothing: {', '.join(names)}"))
    if "license" in provenance:
        lines.append(("licence of the weights", quote(provenance["license"])))
    if "version" in provenance:
        lines.append(("written by", f"dc-ssdae {quote(provenance['version'])}"))
    return lines


def evaluation_title(evaluation: Mapping[str, Any], quote: Quote = str) -> str:
    """Say how an evaluation was made: its protocol, images and decoding.

    Args:
        evaluation: checked.
        quote: for what may be a stranger's text.
    """
    in_training = evaluation["protocol"] == IN_TRAINING
    parts = ["during training" if in_training else f"protocol {quote(evaluation['protocol'])}"]
    if "step" in evaluation:
        parts.append(f"after {counted(evaluation['step'], 'step')}")
    parts.append(f"{counted(evaluation['images'], 'image')} of {quote(evaluation['data'])}")
    if "image_size" in evaluation:
        parts.append(f"{evaluation['image_size']}×{evaluation['image_size']} px")
    if "dtype" in evaluation:
        parts.append(quote(evaluation["dtype"]))
    settings = [f"{quote(name)} {quote(_shown(value))}" for name, value in evaluation.get("decoding", {}).items()]
    return ", ".join([*parts, f"decoded with {', '.join(settings)}" if settings else "decoded in one step"])


def metric_text(metric: Mapping[str, Any]) -> str:
    """Spell a measured value with its interval, if it has one, to five digits."""
    interval = f" ({metric['low']:.5g} to {metric['high']:.5g})" if {"low", "high"} <= metric.keys() else ""
    return f"{metric['value']:.5g}{interval}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


Check = Callable[[str, Any], Any]


def _wrong(name: str, value: Any, wanted: str) -> InputError:
    # A stranger's value may be of any size and depth.
    return InputError(f"{name} is {' '.join(reprlib.repr(value).split())}; it must be {wanted}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_TEXT or not value.isprintable():
        raise _wrong(name, value, f"a line of 1 to {LONGEST_TEXT} printable characters")
    return value


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _wrong(name, value, "a name of 1 to 64 letters, digits and -_.@")
    return value


def _licence(name: str, value: Any) -> str:
    # Other ones make the hub refuse the whole card.
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", value):
        raise _wrong(name, value, "a licence as the hub names it, in small letters, such as apache-2.0")
    return value


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_COUNT:
        raise _wrong(name, value, "a whole number from 0 on")
    return value


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, int) and abs(value) > LARGEST_COUNT) or not math.isfinite(value):
        raise _wrong(name, value, "a finite number")
    return float(value)


def _part(name: str, value: Any) -> str:
    if value not in PARTS:
        raise _wrong(name, value, " or ".join(PARTS))
    return str(value)


def _list_of(check: Check, longest: int = LONGEST_LIST) -> Check:
    def checked(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) > longest:
            raise _wrong(name, value, f"a list of {longest} at most")
        return [check(f"{name}[{place}]", item) for place, item in enumerate(value)]

    return checked


def _mapping_of(check: Check) -> Check:
    def checked(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or len(value) > LONGEST_LIST:
            raise _wrong(name, value, f"a mapping with {LONGEST_LIST} names at most")
        return {_name(f"a name in {name}", key): check(f"{name}.{key}", item) for key, item in value.items()}

    return checked


def _decoding_value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return _name(name, value)
    if isinstance(value, list | tuple):
        return _list_of(_number, 1000)(name, value)
    return _count(name, value) if isinstance(value, int) else _number(name, value)


def _metric(name: str, value: Any) -> dict[str, Any]:
    checks = {"value": _number, "low": _number, "high": _number, "note": _text}
    return _checked_mapping(name, value, checks, ("value",))


def _metrics(name: str, value: Any) -> dict[str, Any]:
    found = _mapping_of(_metric)(name, value)
    return {metric: found[metric] for metric in sorted(found, key=lambda key: [*TITLES, key].index(key))}


def _checked_mapping(
    name: str, value: Any, checks: Mapping[str, Check], required: Sequence[str] = ()
) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping")
    for key in value:
        if key not in checks:
            raise unknown_name(f"key of {name}", key if isinstance(key, str) and len(key) < 100 else "…", checks)
    for key in required:
        if key not in value:
            raise InputError(f"{name} lacks {key}")
    return {key: check(f"{name}.{key}", value[key]) for key, check in checks.items() if key in value}


_EVALUATION_KEYS: Mapping[str, Check] = {
    "protocol": _text,
    "data": _text,
    "images": _count,
    "image_size": _count,
    "step": _count,
    "dtype": _name,
    "decoding": _mapping_of(_decoding_value),
    "metrics": _metrics,
}

_KEYS: Mapping[str, Check] = {
    "preset": _text,
    "changes": _list_of(_text),
    "data": _text,
    "images": _count,
    "image_size": _count,
    "steps": _count,
    "batch_size": _count,
    "initialised_from": _text,
    "teacher": _text,
    "source": _text,
    "untrained": _list_of(_part),
    "random_backbones": _list_of(_text),
    "license": _licence,
    "version": _text,
    "evaluations": _list_of(check_evaluation),
}
