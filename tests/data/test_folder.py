"""Folders of images: what is listed, in which order, with which labels, and what a broken file says."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from broken_samples import check_refusals, image_array, write_broken_files, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import refusal

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import IMAGE_EXTENSIONS
from dc_ssdae.data.name_table import NameTable


def names_of(folder: ImageFolder) -> list[str]:
    return [folder.relative_name(index) for index in range(len(folder))]


def test_images_are_found_at_any_depth_and_read_in_order_with_their_class(tmp_path: Path) -> None:
    write_images(tmp_path / "b" / "deep", 2, first=0)
    write_images(tmp_path / "a", 2, first=2)
    write_images(tmp_path, 1, first=4)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    folder = pickle.loads(pickle.dumps(ImageFolder(str(tmp_path))))
    a, b = ("a/image_002.png", "a/image_003.png"), ("b/deep/image_000.png", "b/deep/image_001.png")
    assert names_of(folder) == [*a, *b, "image_004.png"]
    assert folder.classes == ["a", "b/deep"]
    assert folder.name(3) == str(tmp_path / "b" / "deep" / "image_001.png")
    for index, (number, label) in enumerate(((2, 0), (3, 0), (0, 1), (1, 1), (4, -1))):
        pixels, found = folder.read(index)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), image_array(number))
        assert found == label
        assert folder.read_bytes(index) == Path(folder.name(index)).read_bytes()


def test_order_is_that_of_code_points_and_every_extension_counts(tmp_path: Path) -> None:
    names = ["Z.png", "a.png", "B/1.png", "b/1.png", "a-b/1.png", "a/1.png", "ä.png", "10.png", "9.png"]
    names += [f"x.{extension.upper()}" for extension in IMAGE_EXTENSIONS]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_of(ImageFolder(str(tmp_path))) == sorted(names)


def test_files_that_are_passed_over_are_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ("a.heic", "b.HEIC", "no_suffix", "d/e.mov", "f.jpg.part", "quiet.txt", "quiet.json", ".hidden.heic")
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for path in (tmp_path / "missing", tmp_path / "a.heic", tmp_path / "d"):
        assert path.name in refusal(ImageFolder, str(path))
    assert "2 .heic" in refusal(ImageFolder, str(tmp_path))
    write_images(tmp_path, 1)
    ImageFolder(str(tmp_path))
    (message,) = caplog.messages
    assert all(told in message for told in ("2 .heic", "1 .mov", "1 without a suffix", "1 .part"))
    assert ".txt" not in message


@pytest.mark.parametrize("name", ["val2017", "DIV2K_valid_HR", "Test", "data/val"])
def test_folders_that_may_be_held_out_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for other in ("train2017", "valley", "contests", name, "train2017/.val"):
        write_images(tmp_path / other, 1)
    with caplog.at_level(logging.WARNING):
        ImageFolder(str(tmp_path))
        ImageFolder(str(tmp_path / name))  # alone, it is meant
    assert [f"if {name!r} are for validation" in message for message in caplog.messages] == [True]


def test_links_are_followed_but_not_in_a_circle_and_hidden_files_are_not(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    write_images(root / "a", 1, first=1)
    write_images(root / ".thumbnails", 2)
    (root / "._image_000.png").touch()
    os.symlink(tmp_path / "elsewhere", root / "linked")
    os.symlink(root, root / "a" / "back")
    os.symlink(root, tmp_path / "elsewhere" / "back")
    os.symlink(tmp_path / "elsewhere" / "image_000.png", root / "file.png")
    assert names_of(ImageFolder(str(root))) == ["a/image_001.png", "file.png", "linked/image_000.png"]


def test_every_broken_file_is_named_in_one_line(tmp_path: Path) -> None:
    broken = write_broken_files(tmp_path)
    (last,) = write_images(tmp_path, 1, first=999)
    folder = ImageFolder(str(tmp_path))
    assert names_of(folder) == sorted([*broken, last.name])
    last.unlink()
    check_refusals(folder, range(len(folder)))
    with pytest.raises(IndexError):
        folder.name(len(folder))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_name_table_gives_back_what_it_got(names: list[str]) -> None:
    names = [*names, os.fsdecode(b"caf\xe9.jpg")]  # no UTF-8
    table = NameTable.of(names)
    assert [table[index] for index in range(len(table))] == names
    with pytest.raises(IndexError):
        table[len(names)]
