"""The demo's photos: which they are, that the splits stay apart, and what happens without scikit-image."""

import importlib.util
import socket
import sys
from pathlib import Path

import pytest
import torch

from dc_ssdae.data.sample_photos import SamplePhotos, sample_photos
from dc_ssdae.errors import InputError

SHAPES = {
    "train": {
        "astronaut": (3, 512, 512),
        "motorcycle_left": (3, 500, 741),
        "motorcycle_right": (3, 500, 741),
        "ihc": (3, 512, 512),
    },
    "held_out": {"chelsea": (3, 300, 451), "coffee": (3, 400, 600), "rocket": (3, 427, 640)},
}


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a photo was looked for on the network")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("split", SHAPES)
def test_photos_come_whole_and_in_colour(split: str) -> None:
    pytest.importorskip("skimage", reason="scikit-image carries the photos")
    photos = sample_photos(split)
    assert {photo.name: tuple(photo.pixels.shape) for photo in photos} == SHAPES[split]
    assert [photo.name for photo in photos] == list(SHAPES[split])
    for photo in photos:
        assert photo.pixels.dtype == torch.uint8
        values = photo.pixels.float()
        assert float(values.std()) > 20  # a photo, not a flat area
        assert float((values[0] - values[2]).abs().mean()) > 3  # in colour


def test_splits_are_disjoint_and_the_stereo_pair_stays_together() -> None:
    pytest.importorskip("skimage", reason="scikit-image carries the photos")
    train = {photo.name for photo in sample_photos("train")}
    held_out = {photo.name for photo in sample_photos("held_out")}
    assert not train & held_out
    assert {"motorcycle_left", "motorcycle_right"} <= train


def test_pixels_are_those_that_scikit_image_reads() -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image carries the photos")
    photo = next(photo for photo in sample_photos("held_out") if photo.name == "chelsea")
    assert torch.equal(photo.pixels, torch.from_numpy(data.chelsea()).permute(2, 0, 1))


def test_the_demo_trains_on_each_photo_with_its_colours_and_with_exchanged_ones() -> None:
    pytest.importorskip("skimage", reason="scikit-image carries the photos")
    source, photos = SamplePhotos("train"), sample_photos("train")
    expected = [(p.name, p.pixels[order]) for p in photos for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1])]
    assert [source.name(index) for index in range(len(source))] == [name for name, _ in expected]
    assert all(torch.equal(source.read(index)[0], pixels) for index, (_, pixels) in enumerate(expected))


def test_unknown_split_lists_the_right_ones() -> None:
    with pytest.raises(InputError, match=r"'heldout'.*held_out, train"):
        sample_photos("heldout")


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)  # what makes `import skimage` fail
    with pytest.raises(InputError, match=r"pip install 'dc-ssdae\[demo\]'") as caught:
        sample_photos("train")
    assert len(str(caught.value).splitlines()) == 1


def test_with_a_scikit_image_that_lacks_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("skimage", tmp_path / "skimage" / "__init__.py")
    assert spec is not None
    monkeypatch.setitem(sys.modules, "skimage", importlib.util.module_from_spec(spec))
    with pytest.raises(InputError, match=r"astronaut\.png.*pip install 'dc-ssdae\[demo\]'") as caught:
        sample_photos("train")
    assert len(str(caught.value).splitlines()) == 1
