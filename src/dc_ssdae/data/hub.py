"""A data set of Hugging Face's `datasets` library, from its hub or from a local folder."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dc_ssdae.data.images import read_bytes, read_image_bytes, reason
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
        files = {"name": name, "data_files": data_files, "data_dir": data_dir}
        saved = any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json"))
        if saved and any(files.values()):
            raise InputError(f"{path!r} was written by save_to_disk, which has no use for {', '.join(files)}")
        try:
            rows = (
                datasets.load_from_disk(path)
                if saved
                else datasets.load_dataset(path, split=split, cache_dir=cache_dir, **files)
            )
        except Exception as error:  # of dozens of types, some from the readers of files below the library
            raise InputError(f"the data set {path!r} cannot be loaded: {reason(error)}") from error
        if isinstance(rows, Mapping):
            if split not in rows:
                raise unknown_name(f"split of {path}", split, list(rows))
            rows = rows[split]
        if not len(rows):
            raise InputError(f"split {split!r} of the data set {path!r} is empty")
        features = rows.features
        numbers = [key for key, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
        if not isinstance(features.get(image_column), datasets.Image):
            images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
            raise unknown_name(f"image column of {path}", image_column, images)
        if label_column is not None and label_column not in numbers:
            raise unknown_name(f"label column of {path}", label_column, numbers)
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
        name = self.name(index)
        try:
            row = self._rows[int(index)]
        except Exception as error:
            raise InputError(f"cannot read image {name!r}: {reason(error)}") from error
        image, label = row[self._column] or {}, row.get(self._label_column)
        content = image.get("bytes")
        if content is None and image.get("path") is None:
            raise InputError(f"cannot read image {name!r}: the row has no image")
        content = read_bytes(image["path"]) if content is None else content
        return read_image_bytes(content, name, interleaved=True).pixels, -1 if label is None else max(-1, label)
