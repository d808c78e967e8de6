"""Which images a configuration means: divided roots, built-in and users' data sets, and every way to get it wrong."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_samples import encoded, image_array, write_images, write_tar
from PIL import Image

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.sources import ImageSource, open_path, open_sources
from dc_ssdae.errors import InputError


def numbers_of(source: ImageSource | None) -> list[int]:
    """The numbers of the images that `image_array` made."""
    assert source is not None
    known = {image_array(number).tobytes(): number for number in range(20)}
    return [known[source.read(index)[0].permute(1, 2, 0).numpy().tobytes()] for index in range(len(source))]


def refusal(**given: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_sources(**{"root": None, "dataset": None, "validation": None, "cache": None, **given})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def opened(root: Any = None, dataset: Any = None, validation: Any = None) -> tuple[list[int], list[int] | None]:
    sources = open_sources(str(root) if root else None, dataset, validation, None)
    return numbers_of(sources.train), numbers_of(sources.validation) if sources.validation else None


# --- root ---


@pytest.mark.parametrize(
    ("train", "name"), [("train", "validation"), ("train", "Val"), ("Train", "VALIDATION"), ("TRAINING", "valid")]
)
def test_a_divided_root(tmp_path: Path, train: str, name: str) -> None:
    write_images(tmp_path / train / "class_a", 2)
    write_images(tmp_path / train / "class_b", 1, first=2)
    write_images(tmp_path / name, 2, first=3)
    assert opened(tmp_path) == ([0, 1, 2], [3, 4])


@pytest.mark.parametrize("name", ["val2017", "DIV2K_valid_HR", "Test", "data/val"])
def test_folders_that_may_be_held_out_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for other in ("train2017", "valley", "contests"):
        write_images(tmp_path / other, 1)
    write_images(tmp_path / name, 1, first=1)
    write_images(tmp_path / "train2017" / ".val", 1)
    with caplog.at_level(logging.WARNING):
        open_path(str(tmp_path), None)
    assert [repr(name) in record.getMessage() for record in caplog.records] == [True]
    assert "valley" not in caplog.text
    caplog.clear()
    open_path(str(tmp_path / name), None)
    assert not caplog.records


def test_shards_that_may_be_held_out_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(("imagenet-train-000", "imagenet-validation-000")):
        write_tar(tmp_path / f"{name}.tar", {f"{number}.png": encoded(image_array(number))})
    (tmp_path / "more.tar.gz").write_bytes(b"")
    open_path(str(tmp_path), None)
    assert ["1 .tar.gz" in caplog.messages[0], "'imagenet-validation-000.tar'" in caplog.messages[1]] == [True, True]


def test_without_train_all_of_it_is_training_data(tmp_path: Path) -> None:
    write_images(tmp_path / "class_a", 1)
    write_images(tmp_path / "class_b", 1, first=1)
    write_images(tmp_path, 1, first=2)
    assert opened(tmp_path) == ([0, 1, 2], None)


def test_train_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "train", 2)
    assert opened(tmp_path) == ([0, 1], None)
    assert not caplog.records
    write_images(tmp_path / "test", 2, first=2)
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path) == ([0, 1], None)
    assert "left out: test" in caplog.text


def test_what_a_divided_root_must_not_be(tmp_path: Path) -> None:
    write_images(tmp_path / "val", 1)
    assert "val/ but no train/" in refusal(root=str(tmp_path))
    (tmp_path / "val").rename(tmp_path / "Val")
    assert "Val/ but no train/" in refusal(root=str(tmp_path))
    (tmp_path / "Val").rename(tmp_path / "val")
    (tmp_path / "train").mkdir()
    message = refusal(root=str(tmp_path))
    assert repr(str(tmp_path / "train")) in message
    assert ".jpg" in message
    write_images(tmp_path / "train", 1)
    (tmp_path / "validation").mkdir()
    assert "both val/ and validation/" in refusal(root=str(tmp_path))


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
    assert opened(f"pipe:cat {tmp_path}/train/000000.tar", validation=f"file:{tmp_path}/validation/000000.tar") == (
        [0],
        [1],
    )


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "images", 1)
    assert opened("~/images", validation="~/images") == ([0], [0])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_images_and_shards_in_one_folder_are_not_guessed_about(tmp_path: Path) -> None:
    write_tar(tmp_path / "archive.tar", {"a.png": encoded(image_array())})
    write_images(tmp_path / "class_a", 1)
    message = refusal(root=str(tmp_path))
    assert "'archive.tar'" in message
    assert "'class_a/image_000.png'" in message


def test_what_is_no_root(tmp_path: Path) -> None:
    assert "no folder" in refusal(root=str(tmp_path / "missing"))
    assert "no shard" in refusal(root=str(tmp_path / "missing.tar"))
    (tmp_path / "file.zip").write_bytes(b"")
    assert "neither a folder nor a shard" in refusal(root=str(tmp_path / "file.zip"))
    assert "looked for" in refusal(root=str(tmp_path))
    assert "must name the images" in refusal()
    assert "not both" in refusal(root="x", dataset={"class_path": "ImageFolder"})
    write_images(tmp_path / "ok", 1)
    assert "no folder" in refusal(root=str(tmp_path / "ok"), validation=str(tmp_path / "missing"))


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


def test_built_in_names(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    write_tar(tmp_path / "x.tar", {"a.png": encoded(image_array(3))})
    folder = {"class_path": "ImageFolder", "init_args": {"root": str(tmp_path / "images")}}
    shards = {"class_path": "Shards", "init_args": {"urls": [str(tmp_path / "x.tar")]}}
    sources = open_sources(None, folder, shards, None)
    assert isinstance(sources.train, ImageFolder)
    assert isinstance(sources.validation, Shards)
    assert (numbers_of(sources.train), numbers_of(sources.validation)) == ([0, 1], [3])


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
        ({"class_path": "ImageFolder"}, "needs init_args.root"),
        ({"class_path": "ImageFolder", "init_args": {"rot": "x"}}, "did you mean 'root'"),
        ({"class_path": "ImageFolder", "init_args": {"root": 5}}, "root of ImageFolder is 5"),
        ({"class_path": "Shards", "init_args": {"urls": {"a": 1}}}, "urls of Shards"),
        ({"class_path": "HubDataset", "init_args": {"path": "x", "split": False}}, "split of HubDataset is False"),
        ({"class_path": "no_such_module.Photos"}, "No module named 'no_such_module'"),
        ({"class_path": "own_data.Photoss"}, "did you mean 'Photos'"),
        ({"class_path": "own_data.CONSTANT"}, "is a int, not a class"),
        ({"class_path": "own_data.Photos"}, "missing a required argument: 'count'"),
        ({"class_path": "own_data.Photos", "init_args": {"count": 1, "kind": "array", "x": 1}}, "'x'"),
        ({"class_path": "own_data.Photos", "init_args": {"count": 0, "kind": "array"}}, "its length is 0"),
        ({"class_path": "own_data.Failing"}, "RuntimeError: no such disk"),
        ({"class_path": "own_data.Stream"}, "no __len__"),
        ({"class_path": "own_data.Sized"}, "neither __getitem__ nor read"),
        ({"class_path": "broken_module.Photos"}, "ZeroDivisionError"),
        ({"class_path": None}, "named by class_path"),
    ],
)
def test_what_is_no_data_set(own_modules: None, component: dict, told: str) -> None:
    assert told in refusal(dataset=component)


OWN_DATA = """
import numpy as np, torch
from PIL import Image
from broken_samples import encoded, image_array

CONSTANT = 5

class Photos:
    def __init__(self, count, kind):
        self.count, self.kind = count, kind
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        array = image_array(index)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        return {
            "array": array, "tensor": tensor, "pillow": Image.fromarray(array),
            "tuple": (Image.fromarray(array), 3), "list": [tensor, 3],
            "image": {"label": 3, "image": array}, "first": {"picture": tensor, "label": 3},
            "undecoded": {"image": {"bytes": encoded(array), "path": None}, "label": 3},
            "floats": tensor.float() / 255, "grey": tensor[:1], "wrong way": tensor.permute(1, 2, 0),
            "wrong array": array[..., 0], "empty": tensor[:, :0], "nothing": None, "empty tuple": (), "empty dict": {},
            "text": ("x.png", 3), "broken bytes": {"bytes": b"x", "path": None},
        }[self.kind]

class Source:
    def __len__(self):
        return 2
    def name(self, index):
        return f"picture {index}"
    def read(self, index):
        return torch.from_numpy(image_array(index)).permute(2, 0, 1)

class Raising(Photos):
    def __getitem__(self, index):
        raise OSError("cannot\\nidentify")

class Failing:
    def __init__(self):
        raise RuntimeError("no such disk")

class Stream:
    def __iter__(self):
        yield 1

class Sized:
    def __len__(self):
        return 3
"""


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules own_data and broken_module, outside the package."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_data.py").write_text(OWN_DATA)
    (folder / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("own_data", "broken_module"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)


def own(kind: str, count: int = 3, name: str = "Photos") -> ImageSource:
    component = {"class_path": f"own_data.{name}", "init_args": {"count": count, "kind": kind}}
    return open_sources(None, component, None, None).train


@pytest.mark.parametrize("kind", ["array", "tensor", "pillow", "tuple", "list", "image", "first", "undecoded"])
def test_users_data_sets_give_images_in_many_ways(own_modules: None, kind: str) -> None:
    source = own(kind)
    assert numbers_of(source) == [0, 1, 2]
    assert source.name(1) == "Photos[1]"
    assert source.read(0)[0].is_contiguous() or kind in ("tensor", "list", "first")
    assert numbers_of(pickle.loads(pickle.dumps(source))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("floats", "float32 of shape (3, 24, 32)"),
        ("grey", "uint8 of shape (1, 24, 32)"),
        ("wrong way", "uint8 of shape (24, 32, 3)"),
        ("wrong array", "uint8 of shape (24, 32)"),
        ("empty", "uint8 of shape (3, 0, 32)"),
        ("nothing", "NoneType"),
        ("empty tuple", "NoneType"),
        ("empty dict", "NoneType"),
        ("text", "it is str"),
        ("broken bytes", "not an image of these kinds"),
    ],
)
def test_items_without_an_image_are_broken_images(own_modules: None, kind: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        own(kind).read(2)
    assert told in str(caught.value)
    assert "'Photos[2]'" in str(caught.value)


def test_whatever_a_data_set_raises_is_a_broken_image(own_modules: None) -> None:
    with pytest.raises(InputError) as caught:
        own("array", name="Raising").read(1)
    assert str(caught.value) == "cannot read image 'Raising[1]': OSError: cannot identify"


def test_users_sources_have_names_of_their_own(own_modules: None) -> None:
    source = open_sources(None, {"class_path": "own_data.Source"}, None, None).train
    assert source.name(1) == "picture 1"
    assert numbers_of(pickle.loads(pickle.dumps(source))) == [0, 1]


def test_a_data_set_of_torchvision(tmp_path: Path) -> None:
    write_images(tmp_path / "class_a", 2)
    component = {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": str(tmp_path)}}
    source = open_sources(None, component, None, None).train
    assert numbers_of(source) == [0, 1]
    os.remove(tmp_path / "class_a" / "image_001.png")
    with pytest.raises(InputError, match=r"ImageFolder\[1\].*No such file"):
        source.read(1)


def test_greyscale_and_alpha_of_pillow_images_are_as_in_files() -> None:
    from dc_ssdae.data.images import read_pillow_image

    grey = Image.fromarray(image_array()[..., 0])
    assert read_pillow_image(grey, "x").pixels.equal(torch.from_numpy(np.array(grey)).expand(3, -1, -1))
    clear = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    assert read_pillow_image(clear, "x").pixels.eq(255).all()
