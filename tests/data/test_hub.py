"""Hugging Face data sets, from files that the test writes."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from broken_samples import broken_contents, encoded, image_array, write_images

from dc_ssdae.data.hub import HubDataset
from dc_ssdae.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(contents: list[bytes | None], column: str = "image") -> datasets.Dataset:
    images = [None if content is None else {"bytes": content, "path": None} for content in contents]
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({column: images, "label": list(range(len(images)))}, features=features)


def whole(count: int = 3) -> datasets.Dataset:
    return rows([encoded(image_array(number)) for number in range(count)])


def check(dataset: HubDataset, count: int = 3) -> None:
    assert len(dataset) == count
    for index in range(count):
        np.testing.assert_array_equal(dataset.read(index)[0].permute(1, 2, 0).numpy(), image_array(index))


def test_parquet(tmp_path: Path) -> None:
    whole().to_parquet(tmp_path / "x.parquet")
    dataset = HubDataset("parquet", data_files=str(tmp_path / "x.parquet"))
    check(dataset)
    assert dataset.name(2) == "parquet[2]"
    check(pickle.loads(pickle.dumps(dataset)))


def test_save_to_disk_with_and_without_splits(tmp_path: Path) -> None:
    whole().save_to_disk(tmp_path / "one")
    check(HubDataset(str(tmp_path / "one")))
    datasets.DatasetDict({"train": whole(2), "test": whole(3)}).save_to_disk(tmp_path / "several")
    check(HubDataset(str(tmp_path / "several"), split="test"))
    with pytest.raises(InputError, match=r"unknown split.*'tset'.*did you mean 'test'"):
        HubDataset(str(tmp_path / "several"), split="tset")
    with pytest.raises(InputError, match="no use for name"):
        HubDataset(str(tmp_path / "one"), name="default")


def test_images_beside_the_table(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", 3)
    dataset = HubDataset("imagefolder", data_dir=str(tmp_path / "images"))
    check(dataset)
    paths[1].unlink()
    with pytest.raises(InputError, match=r"imagefolder\[1\]: .*image_001.png.*No such file"):
        dataset.read(1)


def test_every_broken_image_is_named_alone(tmp_path: Path) -> None:
    contents = broken_contents()
    rows([*contents.values(), None, encoded(image_array())]).save_to_disk(tmp_path / "disk")
    dataset = HubDataset(str(tmp_path / "disk"))
    for index in range(len(contents) + 1):
        with pytest.raises(InputError) as caught:
            dataset.read(index)
        assert f"{dataset.name(index)!r}" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert dataset.read(len(contents) + 1)[0].shape == (3, 24, 32)


def test_the_image_column(tmp_path: Path) -> None:
    rows([encoded(image_array())], column="picture").save_to_disk(tmp_path / "disk")
    assert HubDataset(str(tmp_path / "disk"), image_column="picture").read(0)[0].shape == (3, 24, 32)
    with pytest.raises(InputError, match=r"unknown image column.*'image'; accepted: label, picture"):
        HubDataset(str(tmp_path / "disk"))
    with pytest.raises(InputError, match=r"column 'label' .* has no images"):
        HubDataset(str(tmp_path / "disk"), image_column="label")


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        HubDataset(str(tmp_path / "missing"))
    assert len(str(caught.value).splitlines()) == 1
    assert "missing" in str(caught.value)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be loaded"):
        HubDataset("parquet", data_files=str(tmp_path / "x.parquet"))
    whole(1).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="no data"):
        HubDataset("parquet", data_files=str(tmp_path / "empty.parquet"))
