"""Files that are written whole, the errors of those that cannot be, and what is not opened as a file."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import make_images

from dc_ssdae.cli.latent_file import read_latent
from dc_ssdae.data.images import read_image
from dc_ssdae.data.latents import read_manifest
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.shards import Shards, scan_tar
from dc_ssdae.errors import InputError
from dc_ssdae.files import write_whole, written_beside
from dc_ssdae.model_folder import read_config
from dc_ssdae.weights import read_safetensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"

READERS = {
    "image": ("x.png", read_image),
    "tar": ("x.tar", lambda path: scan_tar(str(path))),
    "shards": ("x.tar", lambda path: Shards(str(path.parent))),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "weights": ("x.safetensors", read_safetensors),
    "latent": ("x.safetensors", read_latent),
    "config": ("config.json", lambda path: read_config(path.parent)),
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: as on a full disk, the system's error does not name the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, b"old")
    with pytest.raises(OSError, match="too large") as caught, largest_file(8):
        write_whole(path, bytes(100))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
    with pytest.raises(OSError, match="another") as caught, written_beside(path) as beside:
        (beside.write_bytes(b"half"), os.stat(tmp_path / "another"))
    assert caught.value.filename == str(tmp_path / "another")
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("workers", [1, 2])
def test_pack_names_the_shard_that_cannot_be_written(tmp_path: Path, workers: int) -> None:
    images = make_images(tmp_path / "images", 3)
    with pytest.raises(OSError, match="too large") as caught, largest_file(1500):
        pack(str(images), tmp_path / "out", PackSettings(size=None, shard_size=2), workers, report=lambda _: None)
    assert caught.value.filename == str(tmp_path / "out" / "000000.tar")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "Git LFS"])
def test_what_is_no_file_is_refused_by_its_name(tmp_path: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    else:
        path.write_bytes(POINTER)
    with pytest.raises(InputError) as caught:
        read(path)
    assert name in str(caught.value)
    assert ("git lfs pull" in str(caught.value)) == (kind == "Git LFS")
