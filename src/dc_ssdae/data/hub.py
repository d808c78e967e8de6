"""Data sets of Hugging Face's `datasets` library, and reading the items of any map-style data set."""

import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dc_ssdae.data.images import read_bytes, read_image_bytes, reason
from dc_ssdae.data.optional import import_optional
from dc_ssdae.errors import InputError, check_names


class HubDataset:
    """A map-style data set of the `datasets` library with an image column.

    Args:
        path: of the hub ("user/name"), a folder or builder that `datasets.load_dataset` takes ("parquet",
            "imagefolder"), or a folder that `save_to_disk` wrote.
        split: which part.
        name: which configuration, where the data set has several.
        image_column: the column of type Image.
        data_files: as `load_dataset` takes it.
        data_dir: as `load_dataset` takes it.
        cache_dir: where `datasets` keeps what it fetches; None is its default.
        label_column: the column of whole numbers that are the labels; None takes "label" or "labels", if there is one.

    Raises:
        InputError: it cannot be loaded, or has no such split or column, or no rows.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        image_column: str = "image",
        data_files: str | list[str] | dict[str, Any] | None = None,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        label_column: str | None = None,
    ) -> None:
        datasets = import_optional("datasets")
        self._path = path
        files = {"name": name, "data_files": data_files, "data_dir": data_dir}
        saved = any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json"))
        if saved and any(files.values()):
            raise InputError(f"{path!r} was written by save_to_disk, which has no use for {', '.join(files)}")
        try:
            settings = {"split": split, "cache_dir": cache_dir, **files}
            rows = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, **settings)
        except Exception as error:  # of dozens of types, some from the readers of files below the library
            raise InputError(f"the data set {path!r} cannot be loaded: {reason(error)}") from error
        if isinstance(rows, Mapping):
            check_names(f"split of {path}", [split], rows)
            rows = rows[split]
        if not len(rows):
            raise InputError(f"split {split!r} of the data set {path!r} is empty")
        features = rows.features
        numbers = [key for key, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
        images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        check_names(f"image column of {path}", [image_column], images)
        check_names(f"label column of {path}", [label_column] if label_column else [], numbers)
        self._column = image_column
        self._label_column = label_column or next((key for key in ("label", "labels") if key in numbers), None)
        self.classes: list[str] = list(getattr(features.get(self._label_column), "names", ()))
        # Images are decoded here and not by the library, so that one that is broken is met alone, by its index.
        rows = rows.select_columns([image_column, *([self._label_column] if self._label_column else ())])
        self._rows = rows.cast_column(image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The data set's path, and the row."""
        return f"{self._path}[{index}]"

    def file_states(self) -> Iterator[str | None]:
        """The library's fingerprint of the rows."""
        yield getattr(self._rows, "_fingerprint", None)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Read an image.

        Returns:
            uint8 (3, H, W), upright RGB; and the label, -1 where the row has none.

        Raises:
            InputError: it cannot be read, for whatever reason.
        """
        return read_item(self._item, int(index), self.name(index))

    def _item(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        return row[self._column], row.get(self._label_column)


def read_item(get: Callable[[int], Any], index: int, name: str) -> tuple[Tensor, int]:
    """Read an item of a data set, in any of the forms that data sets give.

    Args:
        get: gives an image, or a pair or mapping of an image and its label.
        index: of the item.
        name: what to call it in messages.

    Returns:
        uint8 (3, H, W), and the label, -1 where there is none.

    Raises:
        InputError: it cannot be read, for whatever reason, or is of another form.
    """
    try:
        item = get(index)
    except InputError:
        raise
    except Exception as error:  # the user's code meets broken images with whatever its decoder raises
        raise InputError(f"cannot read image {name!r}: {reason(error)}") from error
    if isinstance(item, Mapping):
        item = item.get("image", next(iter(item.values()), None)), item.get("label", item.get("labels"))
    image, label, *_ = (*item, None, None) if isinstance(item, tuple | list) else (item, None)
    try:
        number = max(-1, operator.index(label))
    except (TypeError, ValueError):
        number = -1
    return _as_pixels(image, name), number


def _as_pixels(image: Any, name: str) -> Tensor:
    """An image in any of the forms that data sets give, as uint8 (3, H, W)."""
    if isinstance(image, Mapping):  # undecoded, as Hugging Face has it
        path = image.get("path")
        image = read_bytes(path) if path and image.get("bytes") is None else image.get("bytes")
    if isinstance(image, bytes | Image.Image):
        return read_image_bytes(image, name, interleaved=True).pixels
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[:-2] == (3,) and image.numel():
        return image.as_subclass(Tensor).detach().cpu()
    found = f"{getattr(image, 'dtype', type(image).__name__)} of shape {tuple(getattr(image, 'shape', ()))}"
    wanted = "a Pillow image, a uint8 tensor (3, H, W) or array (H, W, 3), or a pair or mapping of one and its label"
    raise InputError(f"cannot read image {name!r}: it is {found}; it must be {wanted}")
