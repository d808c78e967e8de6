"""The demo's photos: which they are, that the splits stay apart, and what happens without scikit-image."""

import socket
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from dc_ssdae.data.sample_photos import SamplePhotos, sample_photos
from dc_ssdae.errors import InputError

SHAPES = {
    "train": [(3, 512, 512), (3, 500, 741), (3, 500, 741), (3, 512, 512)],
    "held_out": [(3, 300, 451), (3, 400, 600), (3, 427, 640)],
}
NAMES = {
    "train": ["astronaut", "motorcycle_left", "motorcycle_right", "ihc"],  # with both of the stereo pair
    "held_out": ["chelsea", "coffee", "rocket"],
}


@pytest.mark.parametrize("split", SHAPES)
def test_photos_come_whole_and_in_colour(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image carries the photos")
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a photo was looked for on the network"))
    photos = sample_photos(split)
    assert [tuple(photo.pixels.shape) for photo in photos] == SHAPES[split]
    assert [photo.name for photo in photos] == NAMES[split]
    if split == "held_out":
        assert torch.equal(photos[0].pixels, torch.from_numpy(data.chelsea()).permute(2, 0, 1))
    source = SamplePhotos(split)
    expected = [(p.name, p.pixels[order]) for p in photos for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1])]
    assert [source.name(index) for index in range(len(source))] == [name for name, _ in expected]
    assert all(torch.equal(source.read(index)[0], pixels) for index, (_, pixels) in enumerate(expected))


@pytest.mark.parametrize("installed", [False, True])
def test_without_scikit_image_or_its_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    (tmp_path / "__init__.py").touch()
    spec = spec_from_file_location("skimage", tmp_path / "__init__.py")
    assert spec is not None
    empty = module_from_spec(spec) if installed else None  # None makes `import skimage` fail
    monkeypatch.setitem(sys.modules, "skimage", empty)
    with pytest.raises(InputError, match=r"pip install 'dc-ssdae\[demo\]'") as caught:
        sample_photos("train")
    assert len(str(caught.value).splitlines()) == 1
