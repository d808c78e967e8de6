"""Hugging Face data sets, from files that the test writes."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from broken_samples import broken_contents, check_refusals, encoded, image_array, write_images
from tiny_models import refusal

from dc_ssdae.data.hub import HubDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(contents: list[bytes | None], image: str = "image", **columns: tuple[Any, list[Any]]) -> datasets.Dataset:
    """A table of images, and columns with their features and values."""
    images = [None if content is None else {"bytes": content, "path": None} for content in contents]
    features = {image: datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    values = {image: images, **{name: column for name, (_, column) in columns.items()}}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def whole(count: int = 3, **columns: tuple[Any, list[Any]]) -> datasets.Dataset:
    return rows([encoded(image_array(number)) for number in range(count)], **columns)


def check(dataset: HubDataset, labels: list[int]) -> None:
    assert len(dataset) == len(labels)
    for index, label in enumerate(labels):
        pixels, found = dataset.read(index)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), image_array(index))
        assert found == label


def test_parquet_and_images_beside_the_table(tmp_path: Path) -> None:
    whole().to_parquet(tmp_path / "x.parquet")
    dataset = HubDataset("parquet", data_files=str(tmp_path / "x.parquet"))
    check(pickle.loads(pickle.dumps(dataset)), [-1] * 3)
    assert (dataset.name(2), dataset.classes) == ("parquet[2]", [])
    paths = write_images(tmp_path / "images", 3)
    dataset = HubDataset("imagefolder", data_dir=str(tmp_path / "images"))
    check(dataset, [-1] * 3)
    paths[1].unlink()
    assert "image_001.png" in refusal(dataset.read, 1)


def test_save_to_disk_with_and_without_splits(tmp_path: Path) -> None:
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    whole().save_to_disk(one)
    check(HubDataset(one), [-1] * 3)
    datasets.DatasetDict({"train": whole(2), "test": whole(3)}).save_to_disk(several)
    check(HubDataset(several, split="test"), [-1] * 3)
    assert "'tset' (did you mean 'test'" in refusal(HubDataset, several, split="tset")
    assert "no use for name" in refusal(HubDataset, one, name="default")


def test_labels_are_whole_numbers_in_a_column(tmp_path: Path) -> None:
    number, text = datasets.Value("uint8"), datasets.Value("string")
    tables = {
        "names": {"label": (datasets.ClassLabel(names=["cat", "dog"]), [1, 0, None])},
        "numbers": {"labels": (datasets.Value("int32"), [5, 6, -3])},
        "texts": {"label": (text, ["a", "b", "c"]), "fine": (number, [1, 2, 3])},
    }
    for name, columns in tables.items():
        whole(**columns).save_to_disk(tmp_path / name)
    check(HubDataset(str(tmp_path / "names")), [1, 0, -1])
    assert HubDataset(str(tmp_path / "names")).classes == ["cat", "dog"]
    check(HubDataset(str(tmp_path / "numbers")), [5, 6, -1])
    check(HubDataset(str(tmp_path / "texts")), [-1] * 3)
    check(HubDataset(str(tmp_path / "texts"), label_column="fine"), [1, 2, 3])
    for wrong in ("fin", "label"):
        assert f"'{wrong}'" in refusal(HubDataset, str(tmp_path / "texts"), label_column=wrong)


def test_every_broken_image_is_named_alone(tmp_path: Path) -> None:
    contents = broken_contents()
    rows([*contents.values(), None, encoded(image_array())], image="picture").save_to_disk(tmp_path / "disk")
    dataset = HubDataset(str(tmp_path / "disk"), image_column="picture")
    check_refusals(dataset, range(len(contents) + 1))
    assert dataset.read(len(contents) + 1)[0].shape == (3, 24, 32)
    assert "'image'; accepted: picture" in refusal(HubDataset, str(tmp_path / "disk"))


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    for path, files in ((str(tmp_path / "missing"), None), ("parquet", str(tmp_path / "x.parquet"))):
        assert "cannot be loaded: " in refusal(HubDataset, path, data_files=files)
