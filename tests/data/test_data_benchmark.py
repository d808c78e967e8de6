"""The benchmark of the input pipeline."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dc_ssdae.data.benchmark import (
    measure_data,
    packed,
    training_images,
)
from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.errors import InputError
from dc_ssdae.timing import Spread


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five PNG of 40 by 44 pixels, and one file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (40, 44, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "1-broken.png").write_bytes(b"no image")
    return folder


class Recording:
    """A source of grey images that notes what is read."""

    def __init__(self, length: int, blocks: Sequence[int]) -> None:
        self.length = length
        self.blocks = blocks
        self.indices: list[int] = []

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Tensor, int]:
        self.indices.append(index)
        return torch.full((3, 16, 16), index, dtype=torch.uint8), -1


class Unreadable(Recording):
    """A source without one good image."""

    def read(self, index: int) -> tuple[Tensor, int]:
        raise InputError(f"image {index} cannot be read")


def test_sources_are_read_at_the_same_indices() -> None:
    long, short = Recording(50, [20, 30]), Recording(12, [12])
    figures = measure_data([("long", long), ("short", short)], 8, 1.0, 0.001)
    assert max(long.indices) < 12
    assert sorted(long.indices) == sorted(short.indices)
    # Up to the rounds, which alternate, one source follows the other.
    assert long.indices[: figures.images] == short.indices[: figures.images]
    assert [source.images for source in figures.sources] == [50, 12]
    assert figures.images >= 8


def test_data_figures_are_consistent_and_broken_images_are_told(photos: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        told: list[str] = []
        with packed(str(photos), told.append) as shards:
            sources = [("folder", ImageFolder(str(photos))), ("shards", shards)]
            figures = measure_data(sources, 32, 2.0, 0.05, workers=(1,))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    folder, shards_figures = figures.sources
    assert len(told) == 1
    assert "1-broken.png" in told[0]
    assert [Path(image["name"]).name for image in folder.broken] == ["1-broken.png"]
    assert shards_figures.broken == []
    assert (folder.images, shards_figures.images) == (6, 5)
    for source in figures.sources:
        assert list(source.stages) == ["read", "crop", "sample"]
        assert list(source.loader) == ["1"]
        for rate in (*source.stages.values(), *source.loader.values()):
            speed = rate.images_per_second
            assert 0.0 < speed.low <= speed.median <= speed.high
            assert 0.0 < rate.ratio.low <= rate.ratio.median <= rate.ratio.high
    for rate in (*folder.stages.values(), *folder.loader.values()):
        assert rate.ratio == Spread(1.0, 1.0, 1.0)


def test_a_source_without_a_good_image_is_refused() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match="cannot be read"):
        measure_data([("bad", Unreadable(3, [3]))], 8, 1.0, 0.001)
    assert torch.get_num_threads() == threads


def test_packed_shards_hold_the_files_bytes_in_order_and_are_removed(photos: Path) -> None:
    (photos / "1-broken.png").unlink()
    folder = ImageFolder(str(photos))
    with packed(str(photos), pytest.fail) as shards:
        place = Path(shards.name(0).partition(": ")[0])
        assert place.is_file()
        assert [shards.read_bytes(i) for i in range(5)] == [folder.read_bytes(i) for i in range(5)]  # type: ignore[attr-defined]
    assert not place.parent.parent.exists()
    assert sorted(os.listdir(photos)) == [f"{number}.png" for number in range(5)]


def test_what_cannot_be_packed_is_told(photos: Path) -> None:
    with packed(str(photos), lambda _: None) as shards:
        folder = Path(shards.name(0).partition(": ")[0]).parent
        with pytest.raises(InputError, match="only a folder of images can be packed"), packed(str(folder), pytest.fail):
            pass


def test_training_images_are_those_in_train(photos: Path, tmp_path: Path) -> None:
    assert training_images(str(photos)) == str(photos)
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set" / "train")
    assert training_images(str(tmp_path / "set")) == str(tmp_path / "set" / "train")
