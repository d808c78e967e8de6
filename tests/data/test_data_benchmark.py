"""The benchmark of the input pipeline."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dc_ssdae.data.benchmark import measure_data, packed
from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.errors import InputError
from dc_ssdae.timing import Spread


class Recording:
    """A source of grey images that notes what is read; or one without a good image."""

    classes = ()

    def __init__(self, length: int, is_broken: bool = False) -> None:
        self.length = length
        self.is_broken = is_broken
        self.blocks = [length // 2, length - length // 2]
        self.indices: list[int] = []

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Tensor, int]:
        self.indices.append(index)
        if self.is_broken:
            raise InputError(f"image {index} cannot be read")
        return torch.full((3, 16, 16), index, dtype=torch.uint8), -1


def test_sources_are_read_at_the_same_indices() -> None:
    long, short = Recording(50), Recording(12)
    figures = measure_data([("long", long), ("short", short)], 8, 1.0, 0.001)
    assert max(long.indices) < 12
    assert sorted(long.indices) == sorted(short.indices)
    # Up to the rounds, which alternate, one source follows the other.
    assert long.indices[: figures["images"]] == short.indices[: figures["images"]]
    assert [source["images"] for source in figures["sources"]] == [50, 12]
    with pytest.raises(InputError, match="cannot be read"):
        measure_data([("bad", Recording(3, is_broken=True))], 8, 1.0, 0.001)


def test_a_folder_and_the_same_files_packed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (40, 44, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "0-broken.png").write_bytes(b"no image")
    before, folder, told = sorted(os.listdir(tmp_path)), ImageFolder(str(tmp_path)), []
    with packed(folder, told.append) as shards:
        place = Path(shards.name(0).partition(": ")[0])
        assert [shards.read_bytes(i) for i in range(5)] == [folder.read_bytes(i) for i in range(1, 6)]
        figures = measure_data([("folder", folder), ("shards", shards)], 32, 2.0, 0.05, workers=(1,))
        with pytest.raises(InputError, match="only a folder of images can be packed"), packed(shards, pytest.fail):
            pass
    assert (place.exists(), sorted(os.listdir(tmp_path))) == (False, before)
    assert ["0-broken.png" in line for line in told] == [True]
    sources = figures["sources"]
    assert [(source["name"], source["images"]) for source in sources] == [("folder", 6), ("shards", 5)]
    assert [[Path(image["name"]).name for image in source["broken"]] for source in sources] == [["0-broken.png"], []]
    for source in sources:
        assert [*source["stages"], *source["loader"]] == ["read", "sample", "1"]
        for rate in (*source["stages"].values(), *source["loader"].values()):
            assert 0.0 < rate["images_per_second"].low <= rate["images_per_second"].high
            assert source["name"] == "shards" or rate["ratio"] == Spread(1.0, 1.0, 1.0)
