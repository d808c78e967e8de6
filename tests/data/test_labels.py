"""Labels: what counts as one, and where each kind of data set has them."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from broken_samples import encoded, image_array, write_images, write_tar
from PIL import Image

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.hub import HubDataset
from dc_ssdae.data.labels import as_label, folder_classes, folder_labels, names_of_classes
from dc_ssdae.data.pack import pack
from dc_ssdae.data.pack_shard import PackSettings
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.sources import ImageSource, open_sources, read_labelled
from dc_ssdae.errors import InputError


def labels_of(source: ImageSource) -> list[int]:
    return [read_labelled(source, index)[1] for index in range(len(source))]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((value, 7) for value in (7, np.int32(7), np.array(7), np.array([7]), torch.tensor(7), torch.tensor([7]))),
        *((value, 7) for value in ("7", b"7", " 7\n", b"007")),
        (0, 0),
        (2**63 - 1, 2**63 - 1),
        *((value, -1) for value in (-3, "-3", 2**63, str(2**63), "9" * 30, None, "", "cat", b"\xff", "7.0", "٣")),
        *((value, -1) for value in (True, np.bool_(True), torch.tensor(True), 7.0, torch.tensor(7.0), [7])),
        *((value, -1) for value in (torch.tensor([1, 2]), np.zeros(0, np.int64), torch.tensor(7.0).bfloat16())),
    ],
)
def test_what_is_a_label(value: object, label: int) -> None:
    found = as_label(value)
    assert (type(found), found) == (int, label)


def test_folders_have_one_number_for_a_class_in_all_parts(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 2)
    write_images(tmp_path / "train" / "deep" / "dog", 1)
    write_images(tmp_path / "validation" / "bird", 1)
    write_images(tmp_path / "validation", 1)
    parts = [ImageFolder(str(tmp_path / name)) for name in ("train", "validation")]
    classes = folder_classes([*parts, "no folder"])
    assert classes == ["bird", "cat", "deep/dog"]
    assert [folder_labels(part, classes).tolist() for part in parts] == [[1, 1, 2], [0, -1]]


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
            "pair": (IMAGE, np.int64(3)), "list": [IMAGE, 3], "mapping": {"image": IMAGE, "label": 3},
            "labels": {"image": IMAGE, "labels": 3}, "alone": IMAGE, "single": (IMAGE,), "text": (IMAGE, "three"),
        }[self.kind]

class Source:
    classes = ["bird"]
    def __len__(self):
        return 1
    def name(self, index):
        return "x"
    def read(self, index):
        import torch
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

class Labelled(Source):
    def label(self, index):
        return 4
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


@pytest.mark.parametrize("kind", ["pair", "list", "mapping", "labels"])
def test_users_items_tell_their_label_after_the_image(own: Any, kind: str) -> None:
    source = own("Items", kind=kind)
    assert labels_of(source) == [3]
    assert source._dataset.read_items == 1  # an image is not decoded a second time for its label
    assert names_of_classes(source.classes) == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["alone", "single", "text"])
def test_users_items_without_a_label(own: Any, kind: str) -> None:
    assert labels_of(own("Items", kind=kind)) == [-1]


def test_users_sources_may_have_labels(own: Any) -> None:
    assert labels_of(own("Source")) == [-1]
    assert labels_of(own("Labelled")) == [4]
    assert names_of_classes(own("Labelled").classes) == ["bird"]


@pytest.mark.parametrize("classes", [None, "cat", 3, ["cat", 3], [("cat", "tom")]])
def test_what_are_no_names_of_classes(classes: object) -> None:
    assert names_of_classes(classes) == []


def test_prepared_images_are_read_as_before(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 1)
    pixels, label = read_labelled(ImageFolder(str(tmp_path)), 0)
    assert label == -1
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.array(Image.open(paths[0])))
