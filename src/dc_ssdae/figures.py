"""Figures as text."""

from collections.abc import Mapping
from typing import Any


def cells(figures: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Format figures, which may be nested, by their dotted names, without those that are None or empty.

    A spread is told by its median and quartiles.
    """
    found: dict[str, str] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping) and "median" in value:
            parts = [value["median"], value["low"], value["high"]]
            texts = [f"{part:,.0f}" if part >= 1000 else f"{part:.3g}" for part in parts]
            found[f"{prefix}{name}"] = "{} ({}..{})".format(*texts)
        elif isinstance(value, Mapping):
            found |= cells(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            found[f"{prefix}{name}"] = " ".join(cells(dict(enumerate(value))).values())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = f"{value:,.5g}" if isinstance(value, float) else f"{value:,}"
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return {name: text for name, text in found.items() if text}
