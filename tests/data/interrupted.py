"""Ending a command between any two of its changes of the disk, and running it again."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """What ends the command."""


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def instants_with_equal_ends(write: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Write to a new folder, ended at each change of the disk in turn, then again, to the same bytes; counts them."""
    write(folder / "whole")
    left: list[float] = [float("inf")]

    def call(original: Callable, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*arguments, **options)

    for name in ("replace", "fsync", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, functools.partial(call, getattr(os, name)))
    for instant in range(1000):
        out = folder / f"out_{instant}"
        left[0] = instant
        try:
            write(out)
            return instant
        except Killed:
            left[0] = float("inf")
            write(out)
            assert digests(out) == digests(folder / "whole")
    raise AssertionError("it does not end")
