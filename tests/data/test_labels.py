"""Labels: what counts as one, and where each kind of data set has them."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from broken_samples import encoded, image_array, write_images, write_tar

from dc_ssdae.data.hub import HubDataset
from dc_ssdae.data.pack import pack
from dc_ssdae.data.pack_shard import PackSettings
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.sources import ImageSource, open_sources
from dc_ssdae.errors import InputError


def labels_of(source: ImageSource) -> list[int]:
    return [source.read(index)[1] for index in range(len(source))]


def test_folders_have_one_number_for_a_class_in_all_parts(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 2)
    write_images(tmp_path / "train" / "deep" / "dog", 1)
    write_images(tmp_path / "validation" / "bird", 1)
    write_images(tmp_path / "validation", 1)
    sources = open_sources(str(tmp_path), None, None, None)
    assert sources.validation is not None
    assert sources.train.classes == sources.validation.classes == ["bird", "cat", "deep/dog"]
    assert (labels_of(sources.train), labels_of(sources.validation)) == ([1, 1, 2], [0, -1])


def test_tars_keep_labels_beside_the_image(tmp_path: Path) -> None:
    png = encoded(image_array())
    members = {
        "a.cls": b"3",
        "a.png": png,
        "b.png": png,  # has none
        "c.png": png,
        "c.cls": b"12\n",  # after the image
        "d.cls": b"cat",
        "d.png": png,
        "e.CLS": b"4",
        "e.json": b"{}",
        "e.png": png,
        "f.cls": b"1" * 100,
        "f.png": png,
    }
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", {"a.png": png, "a.cls": b"5"})
    shards = Shards(str(tmp_path))
    assert labels_of(shards) == [3, -1, 12, -1, 4, -1, 5]
    assert shards.classes == []
    again = pickle.loads(pickle.dumps(shards))
    assert [again.label(index) for index in (6, 0)] == [5, 3]


def test_packed_shards_keep_labels_and_the_names_of_classes(tmp_path: Path) -> None:
    for part, names in (("train", ("bird", "cat")), ("validation", ("cat", "dog"))):
        for number, name in enumerate(names):
            write_images(tmp_path / "source" / part / name, 2, first=2 * number)
    pack(str(tmp_path / "source"), tmp_path / "out", PackSettings(shard_size=3, shuffle=False))
    sources = open_sources(str(tmp_path / "out"), None, None, None)
    assert isinstance(sources.train, Shards)
    assert isinstance(sources.validation, Shards)
    assert labels_of(sources.train) == [0, 0, 1, 1]
    assert labels_of(sources.validation) == [1, 1, 2, 2]
    assert sources.train.classes == sources.validation.classes == ["bird", "cat", "dog"]
    (tmp_path / "out" / "train" / "manifest.json").rename(tmp_path / "moved.json")
    both = Shards([str(tmp_path / "out" / name) for name in ("train", "validation")])
    assert both.classes == []  # nothing says that the numbers mean the same


def table(path: Path, **columns: Any) -> HubDataset:
    features: dict[str, Any] = {"image": datasets.Image()}
    values: dict[str, Any] = {"image": [{"bytes": encoded(image_array()), "path": None}] * 3}
    for name, (feature, numbers) in columns.items():
        features[name], values[name] = feature, numbers
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).save_to_disk(path)
    return HubDataset(str(path))


def test_tables_have_a_column_of_labels(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    found = table(tmp_path / "names", label=(names, [1, 0, None]))
    assert (labels_of(found), found.classes) == ([1, 0, -1], ["cat", "dog"])
    found = table(tmp_path / "numbers", labels=(datasets.Value("int32"), [5, 6, -1]))
    assert (labels_of(found), found.classes) == ([5, 6, -1], [])
    text = datasets.Value("string")
    found = table(tmp_path / "texts", label=(text, ["a", "b", "c"]), fine=(datasets.Value("uint8"), [1, 2, 3]))
    assert (labels_of(found), found.classes) == ([-1, -1, -1], [])
    assert labels_of(HubDataset(str(tmp_path / "texts"), label_column="fine")) == [1, 2, 3]
    with pytest.raises(InputError, match=r"unknown label column .* 'fin' \(did you mean 'fine'"):
        HubDataset(str(tmp_path / "texts"), label_column="fin")
    with pytest.raises(InputError, match=r"column 'label' .* has no labels: its type is"):
        HubDataset(str(tmp_path / "texts"), label_column="label")


OWN = """
import numpy as np
import torch

IMAGE = np.zeros((8, 8, 3), np.uint8)

class Items:
    classes = ("cat", "dog")
    def __init__(self, kind):
        self.kind, self.read_items = kind, 0
    def __len__(self):
        return 1
    def __getitem__(self, index):
        self.read_items += 1
        return {
            "pair": (IMAGE, np.int64(3)), "tensor": [IMAGE, torch.tensor(3)],
            "list": [IMAGE, 3], "mapping": {"image": IMAGE, "label": 3},
            "labels": {"image": IMAGE, "labels": 3}, "alone": IMAGE, "single": (IMAGE,), "text": (IMAGE, "three"),
            "below": (IMAGE, -3), "float": (IMAGE, 3.0),
        }[self.kind]

class Source:
    classes = ["bird"]
    def __len__(self):
        return 1
    def name(self, index):
        return "x"
    def read(self, index):
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

class Labelled(Source):
    def read(self, index):
        return super().read(index), 4
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a class of a user's module."""
    (tmp_path / "labelled_data.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "labelled_data", raising=False)

    def opened(name: str, **settings: object) -> Any:
        component = {"class_path": f"labelled_data.{name}", "init_args": settings}
        return open_sources(None, component, None, None).train

    return opened


@pytest.mark.parametrize("kind", ["pair", "tensor", "list", "mapping", "labels"])
def test_users_items_tell_their_label_after_the_image(own: Any, kind: str) -> None:
    source = own("Items", kind=kind)
    assert labels_of(source) == [3]
    assert source._dataset.read_items == 1  # an image is not decoded a second time for its label
    assert source.classes == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["alone", "single", "text", "below", "float"])
def test_users_items_without_a_label(own: Any, kind: str) -> None:
    assert labels_of(own("Items", kind=kind)) == [-1]


def test_users_sources_may_have_labels(own: Any) -> None:
    assert labels_of(own("Source")) == [-1]
    assert labels_of(own("Labelled")) == [4]
    assert own("Labelled").classes == ["bird"]
