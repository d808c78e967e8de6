"""Which images a configuration means: divided roots, built-in and users' data sets, and every way to get it wrong."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from broken_samples import encoded, image_array, write_images, write_tar
from PIL import Image
from torch import Tensor

from dc_ssdae.data.sources import ImageSource, open_path, open_sources

HERE = __name__


def tensor_of(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


READ: dict[str, tuple[Callable[[np.ndarray], Any], int]] = {
    "array": (lambda array: array, -1),
    "tensor": (tensor_of, -1),
    "pillow": (Image.fromarray, -1),
    "alone": (lambda array: (tensor_of(array),), -1),
    "word": (lambda array: (array, "three"), -1),
    "below": (lambda array: (array, -3), -1),
    "number": (lambda array: (array, 3.0), -1),
    "tuple": (lambda array: (Image.fromarray(array), 3), 3),
    "numpy": (lambda array: (array, np.int64(3)), 3),
    "list": (lambda array: [tensor_of(array), torch.tensor([3])], 3),
    "image": (lambda array: {"labels": 3, "image": array}, 3),
    "first": (lambda array: {"picture": tensor_of(array), "label": 3}, 3),
    "undecoded": (lambda array: {"image": {"bytes": encoded(array), "path": None}, "label": 3}, 3),
}
"""Items of users' data sets, made of an image, and the label that each gives."""

REFUSED: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "floats": (lambda array: tensor_of(array).float() / 255, "float32 of shape (3, 24, 32)"),
    "grey": (lambda array: tensor_of(array)[:1], "uint8 of shape (1, 24, 32)"),
    "wrong way": (lambda array: torch.from_numpy(array), "uint8 of shape (24, 32, 3)"),
    "wrong array": (lambda array: array[..., 0], "uint8 of shape (24, 32)"),
    "empty": (lambda array: tensor_of(array)[:, :0], "uint8 of shape (3, 0, 32)"),
    "nothing": (lambda array: None, "NoneType"),
    "empty tuple": (lambda array: (), "NoneType"),
    "empty dict": (lambda array: {}, "NoneType"),
    "text": (lambda array: ("x.png", 3), "it is str"),
    "broken bytes": (lambda array: {"bytes": b"x", "path": None}, "not an image of these kinds"),
    "raising": (lambda array: os.stat("/no\nwhere"), "FileNotFoundError"),
}
"""Items that are broken images, and what is told of each."""


class Photos:
    """A user's data set; `kind` says what its items are."""

    classes = ("cat", "dog", "cow", "hen")

    def __init__(self, count: int, kind: str) -> None:
        self.count, self.kind = count, kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return (READ | REFUSED)[self.kind][0](image_array(index))


class Source:
    """A user's data set that names its images and reads them."""

    blocks = (1, 1)

    def __init__(self, label: int | None = None) -> None:
        self.label = label

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> Tensor | tuple[Tensor, int]:
        pixels = tensor_of(image_array(index))
        return pixels if self.label is None else (pixels, self.label)


class Failing:
    def __init__(self) -> None:
        raise RuntimeError("no such disk")


class Stream:
    def __iter__(self) -> Iterator[int]:
        yield 1


class Sized:
    def __len__(self) -> int:
        return 3


def numbers_of(source: ImageSource | None) -> list[int]:
    """The numbers of the images that `image_array` made."""
    assert source is not None
    known = {image_array(number).tobytes(): number for number in range(20)}
    return [known[source.read(index)[0].permute(1, 2, 0).numpy().tobytes()] for index in range(len(source))]


def labels_of(source: ImageSource) -> list[int]:
    return [source.read(index)[1] for index in range(len(source))]


def refusal(**given: Any) -> str:
    return tiny_models.refusal(open_sources, **{**dict.fromkeys(("root", "dataset", "validation", "cache")), **given})


def opened(root: Any = None, dataset: Any = None, validation: Any = None) -> tuple[list[int], list[int] | None]:
    sources = open_sources(str(root) if root else None, dataset, validation, None)
    return numbers_of(sources.train), numbers_of(sources.validation) if sources.validation else None


# --- root ---


@pytest.mark.parametrize(
    ("train", "name"), [("train", "validation"), ("train", "Val"), ("Train", "VALIDATION"), ("TRAINING", "valid")]
)
def test_a_divided_root(tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, name: str) -> None:
    write_images(tmp_path / train / "class_a", 1)
    write_images(tmp_path / train / "class_c", 1, first=1)
    assert opened(tmp_path) == ([0, 1], None)
    write_images(tmp_path / name / "class_b", 1, first=2)
    write_images(tmp_path / name, 1, first=3)
    assert opened(tmp_path) == ([0, 1], [2, 3])
    assert not caplog.records
    sources = open_sources(str(tmp_path), None, None, None)
    assert sources.validation is not None
    assert sources.train.classes == sources.validation.classes == ["class_a", "class_b", "class_c"]
    assert (labels_of(sources.train), labels_of(sources.validation)) == ([0, 2], [1, -1])
    (tmp_path / "test").mkdir()
    open_sources(str(tmp_path), None, None, None)
    assert ["left out: test" in message for message in caplog.messages] == [True]


def test_shards_that_may_be_held_out_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(("imagenet-train-000", "imagenet-validation-000")):
        write_tar(tmp_path / f"{name}.tar", {f"{number}.png": encoded(image_array(number))})
    (tmp_path / "more.tar.gz").write_bytes(b"")
    open_path(str(tmp_path), None)
    assert ["1 .gz" in caplog.messages[0], "'imagenet-validation-000.tar'" in caplog.messages[1]] == [True, True]


def test_what_a_divided_root_must_not_be(tmp_path: Path) -> None:
    write_images(tmp_path / "Val", 1)
    assert "Val/ but no train/" in refusal(root=str(tmp_path))
    (tmp_path / "train").mkdir()
    assert repr(str(tmp_path / "train")) in refusal(root=str(tmp_path))
    write_images(tmp_path / "train", 1)
    (tmp_path / "validation").mkdir()
    assert "both Val/ and validation/" in refusal(root=str(tmp_path))


def test_validation_of_its_own_goes_first(tmp_path: Path) -> None:
    write_images(tmp_path / "root" / "train", 1)
    write_images(tmp_path / "root" / "val", 1, first=1)
    write_images(tmp_path / "other", 1, first=2)
    other = str(tmp_path / "other")
    assert opened(tmp_path / "root", validation=other) == ([0], [2])
    component = {"class_path": "ImageFolder", "init_args": {"root": other}}
    assert opened(tmp_path / "root", validation=component) == ([0], [2])
    assert opened(dataset=component, validation=str(tmp_path / "root" / "train")) == ([2], [0])


def test_shards_as_root(tmp_path: Path) -> None:
    for part, number in (("train", 0), ("validation", 1)):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "000000.tar", {"a.png": encoded(image_array(number))})
    assert opened(tmp_path) == ([0], [1])
    assert opened(tmp_path / "train") == ([0], None)
    assert opened(tmp_path / "train" / "000000.tar") == ([0], None)
    write_images(tmp_path / "validation" / "unpacked.tar", 1)  # a folder is no shard
    assert "'unpacked.tar/image_000.png'" in refusal(root=str(tmp_path))
    os.remove(tmp_path / "validation" / "unpacked.tar" / "image_000.png")
    assert opened(f"{tmp_path}/{{train,validation}}/000000.tar") == ([0, 1], None)
    validation = f"file:{tmp_path}/validation/000000.tar"
    assert opened(f"pipe:cat {tmp_path}/train/000000.tar", validation=validation) == ([0], [1])


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "images", 1)
    assert opened("~/images", validation="~/images") == ([0], [0])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_what_is_no_root(tmp_path: Path) -> None:
    for name in ("missing", "missing.tar", "file.zip"):
        (tmp_path / "file.zip").touch()
        assert repr(str(tmp_path / name)) in refusal(root=str(tmp_path / name))
    assert "must name the images" in refusal()
    assert "not both" in refusal(root="x", dataset={"class_path": "ImageFolder"})
    write_images(tmp_path / "ok", 1)
    assert "missing" in refusal(root=str(tmp_path / "ok"), validation=str(tmp_path / "missing"))
    write_tar(tmp_path / "archive.tar", {"a.png": encoded(image_array())})
    message = refusal(root=str(tmp_path))  # which of both is meant is not guessed
    assert "'archive.tar'" in message
    assert "'ok/image_000.png'" in message


def test_a_folder_that_pack_has_not_finished_is_refused(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / part / ".pack").mkdir(parents=True)
    assert "not finished" in refusal(root=str(tmp_path))
    write_tar(tmp_path / "train" / "000000.tar", {"a.png": encoded(image_array())})
    assert "not finished" in refusal(root=str(tmp_path))
    assert "not finished" in refusal(root=f"{tmp_path}/train/{{000000..000000}}.tar")
    (tmp_path / "train" / "manifest.json").write_text("{}")
    assert "validation" in refusal(root=str(tmp_path))


# --- class_path ---


def test_the_cache_goes_to_shards_that_name_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": encoded(image_array(3))})
    for name, settings in (("general", {}), ("own", {"cache": str(tmp_path / "own")})):
        component = {"class_path": "Shards", "init_args": {"urls": f"pipe:cat {tmp_path}/x.tar", **settings}}
        open_sources(None, component, None, str(tmp_path / "general"))
        assert list((tmp_path / name).rglob("shard.tar"))
    open_path(f"pipe:cat {tmp_path}/x.tar", str(tmp_path / "third"))
    assert list((tmp_path / "third").rglob("shard.tar"))


@pytest.mark.parametrize(
    ("component", "told"),
    [
        ({"class_path": "ImageFoldr"}, "did you mean 'ImageFolder'"),
        ({"class_path": "ImageFolder"}, "'root'"),
        ({"class_path": "ImageFolder", "init_args": {"rot": "x"}}, "'rot'; it takes root"),
        ({"class_path": "ImageFolder", "init_args": {"root": 5}}, "not int"),
        ({"class_path": "no_such_module.Photos"}, "No module named 'no_such_module'"),
        ({"class_path": f"{HERE}.Photoss"}, "did you mean 'Photos'"),
        (
            {"class_path": f"{HERE}.Photos", "init_args": {"count": 1, "kind": "array", "x": 1}},
            "'x'; it takes count, kind",
        ),
        ({"class_path": f"{HERE}.Photos", "init_args": {"count": 0, "kind": "array"}}, "__len__ above 0"),
        ({"class_path": f"{HERE}.Failing"}, "RuntimeError: no such disk"),
        ({"class_path": f"{HERE}.Stream"}, "needs a __len__"),
        ({"class_path": f"{HERE}.Sized"}, "and __getitem__ or read and name"),
        ({"class_path": None}, "unknown data set None"),
    ],
)
def test_what_is_no_data_set(component: dict, told: str) -> None:
    assert told in refusal(dataset=component)


def own(name: str, **settings: object) -> ImageSource:
    return open_sources(None, {"class_path": f"{HERE}.{name}", "init_args": settings}, None, None).train


@pytest.mark.parametrize("kind", READ)
def test_users_data_sets_give_images_and_labels_in_many_ways(kind: str) -> None:
    source = pickle.loads(pickle.dumps(own("Photos", count=3, kind=kind)))
    assert (numbers_of(source), labels_of(source)) == ([0, 1, 2], [READ[kind][1]] * 3)
    assert (source.name(1), source.classes) == ("Photos[1]", ["cat", "dog", "cow", "hen"])


@pytest.mark.parametrize("kind", REFUSED)
def test_items_without_an_image_are_broken_images(kind: str) -> None:
    message = tiny_models.refusal(own("Photos", count=3, kind=kind).read, 2)
    assert REFUSED[kind][1] in message
    assert "'Photos[2]'" in message


def test_users_sources_have_names_of_their_own() -> None:
    for settings, label in (({}, -1), ({"label": 4}, 4)):
        source = pickle.loads(pickle.dumps(own("Source", **settings)))
        assert (numbers_of(source), labels_of(source)) == ([0, 1], [label] * 2)
        assert (source.name(1), source.classes, tuple(source.blocks)) == ("picture 1", [], (1, 1))


def test_a_data_set_of_torchvision(tmp_path: Path) -> None:
    write_images(tmp_path / "class_a", 2)
    component = {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": str(tmp_path)}}
    source = open_sources(None, component, None, None).train
    assert (numbers_of(source), labels_of(source), source.classes) == ([0, 1], [0, 0], ["class_a"])
    os.remove(tmp_path / "class_a" / "image_001.png")
    assert "ImageFolder[1]" in tiny_models.refusal(source.read, 1)
