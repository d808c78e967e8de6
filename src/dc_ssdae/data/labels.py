"""Labels of images: the number of a class, from 0, in whatever way a data set tells it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from dc_ssdae.data.folder import ImageFolder

UNKNOWN_LABEL = -1

_LARGEST_LABEL = 2**63 - 1


def as_label(value: object) -> int:
    """Read a label.

    Args:
        value: a whole number of Python, NumPy or PyTorch, or its digits as text or bytes.

    Returns:
        The number; `UNKNOWN_LABEL` for what is none, or is negative.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else None
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, str | bytes):
        digits = value.strip()
        value = int(digits) if digits.isdigit() and digits.isascii() and len(digits) < 20 else None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        return UNKNOWN_LABEL
    return int(value) if 0 <= value <= _LARGEST_LABEL else UNKNOWN_LABEL


def folder_classes(sources: Iterable[Any]) -> list[str]:
    """Names of the folders that images lie in, over all sources that are folders: a class has one number everywhere."""
    folders = [source for source in sources if isinstance(source, ImageFolder)]
    return sorted({_class_of(folder.relative_name(index)) for folder in folders for index in range(len(folder))} - {""})


def folder_labels(folder: ImageFolder, classes: Sequence[str]) -> np.ndarray:
    """The label of each image, by the folder it lies in.

    Args:
        folder: the images.
        classes: names of class folders; the labels are their places.

    Returns:
        int64 (N,), `UNKNOWN_LABEL` where an image lies in no class folder.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    names = (_class_of(folder.relative_name(index)) for index in range(len(folder)))
    return np.fromiter((numbers.get(name, UNKNOWN_LABEL) for name in names), dtype=np.int64, count=len(folder))


def names_of_classes(classes: object) -> list[str]:
    """The names of a data set's classes, where `classes` is a list of names; else none."""
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        return list(classes)
    return []


def _class_of(relative_name: str) -> str:
    return relative_name.rpartition("/")[0]
