"""A data set of Hugging Face's `datasets` library, from its hub or from a local folder."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dc_ssdae.data.images import read_image, read_image_bytes
from dc_ssdae.data.optional import import_optional
from dc_ssdae.errors import InputError, unknown_name


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
        self._column = image_column
        if _written_by_save_to_disk(path):
            given = {"name": name, "data_files": data_files, "data_dir": data_dir}
            for setting, value in given.items():
                if value is not None:
                    raise InputError(f"{path!r} was written by save_to_disk, which has no use for {setting}")
            rows = self._load(lambda: datasets.load_from_disk(path))
            if isinstance(rows, Mapping):
                if split not in rows:
                    raise unknown_name(f"split of {path}", split, list(rows))
                rows = rows[split]
        else:
            rows = self._load(
                lambda: datasets.load_dataset(
                    path, name, split=split, data_files=data_files, data_dir=data_dir, cache_dir=cache_dir
                )
            )
        if image_column not in rows.features:
            raise unknown_name(f"image column of {path}", image_column, list(rows.features))
        if not isinstance(rows.features[image_column], datasets.Image):
            raise InputError(
                f"column {image_column!r} of {path!r} has no images: its type is {rows.features[image_column]}"
            )
        if not len(rows):
            raise InputError(f"split {split!r} of the data set {path!r} is empty")
        self._label_column = _label_column(path, rows.features, label_column)
        feature = None if self._label_column is None else rows.features[self._label_column]
        self.classes: list[str] = list(getattr(feature, "names", None) or [])
        # Images are decoded here and not by the library, so that one that is broken is met alone, by its index.
        columns = [image_column] if self._label_column is None else [image_column, self._label_column]
        self._rows = rows.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))

    def _load(self, load: Any) -> Any:
        try:
            return load()
        except Exception as error:
            # The library raises dozens of types, some from the readers of files below it.
            detail = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the data set {self._path!r} cannot be loaded: {detail}") from error

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
        name = self.name(index)
        try:
            columns = self._rows[int(index)]
        except Exception as error:
            raise InputError(f"cannot read image {name!r}: {' '.join(str(error).split())}") from error
        row, label = columns[self._column], columns.get(self._label_column)
        label = -1 if label is None else max(-1, label)
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise InputError(f"cannot read image {name!r}: the row has no image")
        if row["bytes"] is None:
            try:
                return read_image(row["path"], interleaved=True).pixels, label
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        return read_image_bytes(row["bytes"], name, interleaved=True).pixels, label


def _label_column(path: str, features: Mapping[str, Any], wanted: str | None) -> str | None:
    """The column of labels among a table's columns."""
    if wanted is not None and wanted not in features:
        raise unknown_name(f"label column of {path}", wanted, list(features))
    for name in ("label", "labels") if wanted is None else (wanted,):
        if "int" in str(getattr(features.get(name), "dtype", "")):
            return name
    if wanted is not None:
        raise InputError(f"column {wanted!r} of {path!r} has no labels: its type is {features[wanted]}")
    return None


def _written_by_save_to_disk(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
