"""Folders of images: what is listed, in which order, and what a broken file says."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from broken_samples import broken_contents, encoded, image_array, write_broken_files, write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import IMAGE_EXTENSIONS, read_image, read_image_bytes, read_pillow_image
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.errors import InputError


def names_of(folder: ImageFolder) -> list[str]:
    return [folder.relative_name(index) for index in range(len(folder))]


def test_images_are_found_at_any_depth_and_read_in_order(tmp_path: Path) -> None:
    write_images(tmp_path / "b" / "deep" / "deeper", 2, first=0)
    write_images(tmp_path / "a", 2, first=2)
    write_images(tmp_path, 1, first=4)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    folder = ImageFolder(str(tmp_path))
    assert names_of(folder) == [
        "a/image_002.png",
        "a/image_003.png",
        "b/deep/deeper/image_000.png",
        "b/deep/deeper/image_001.png",
        "image_004.png",
    ]
    assert len(folder) == 5
    assert folder.name(3) == str(tmp_path / "b" / "deep" / "deeper" / "image_001.png")
    for index, number in enumerate((2, 3, 0, 1, 4)):
        np.testing.assert_array_equal(folder.read(index)[0].permute(1, 2, 0).numpy(), image_array(number))
        assert read_image_bytes(folder.read_bytes(index), "x").pixels.equal(folder.read(index)[0])


def test_order_is_that_of_code_points_whatever_the_file_system_gives(tmp_path: Path) -> None:
    content = encoded(image_array())
    names = ["Z.png", "a.png", "B/1.png", "b/1.png", "a-b/1.png", "a/1.png", "ä.png", "10.png", "9.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert names_of(ImageFolder(str(tmp_path))) == sorted(names)


def test_every_extension_counts_in_whatever_case(tmp_path: Path) -> None:
    for extension in IMAGE_EXTENSIONS:
        (tmp_path / f"x.{extension.upper()}").write_bytes(b"")
    assert len(ImageFolder(str(tmp_path))) == len(IMAGE_EXTENSIONS)


def test_files_that_are_passed_over_are_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ("a.heic", "b.HEIC", "c.nef", "photos.tar.gz", "no_suffix", "d/e.mov", "f.jpg.part", "g.jpg~")
    for name in (*others, "quiet.txt", "quiet.json", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"2 \.heic"):
        ImageFolder(str(tmp_path))
    write_images(tmp_path, 1)
    ImageFolder(str(tmp_path))
    (message,) = caplog.messages
    for told in ("2 .heic", "1 .nef", "1 .tar.gz", "1 .mov", "2 (no suffix)", "1 .part"):
        assert told in message
    assert "quiet" not in message
    assert ".txt" not in message


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (path,) = tmp_path.iterdir()
    os.truncate(path, 30 * 2**30)
    folder = ImageFolder(str(tmp_path))
    for read in (folder.read, folder.read_bytes):
        with pytest.raises(InputError, match="32212254720 bytes"):
            read(0)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    write_images(tmp_path / ".thumbnails", 2)
    (tmp_path / "._image_000.png").write_bytes(b"left by another system")
    assert names_of(ImageFolder(str(tmp_path))) == ["image_000.png"]


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    write_images(root / "a", 1, first=1)
    os.symlink(tmp_path / "elsewhere", root / "linked")
    os.symlink(root, root / "a" / "back")
    os.symlink(tmp_path / "elsewhere" / "image_000.png", root / "file.png")
    assert names_of(ImageFolder(str(root))) == ["a/image_001.png", "file.png", "linked/image_000.png"]


def test_a_folder_named_like_an_image_is_a_folder_if_it_has_images(tmp_path: Path) -> None:
    write_images(tmp_path / "class.jpg", 1)
    (tmp_path / "empty.jpg").mkdir()
    assert names_of(ImageFolder(str(tmp_path))) == ["class.jpg/image_000.png", "empty.jpg"]


def test_what_is_no_folder_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        ImageFolder(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        ImageFolder(str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"no images in .*\.jpeg, \.jpg"):
        ImageFolder(str(tmp_path))


def test_every_broken_file_is_named_in_one_line(tmp_path: Path) -> None:
    broken = write_broken_files(tmp_path)
    assert len(broken) >= 15
    write_images(tmp_path, 1)
    folder = ImageFolder(str(tmp_path))
    assert names_of(folder) == sorted([*broken, "image_000.png"])
    for index, name in enumerate(names_of(folder)):
        if name == "image_000.png":
            assert folder.read(index)[0].shape == (3, 24, 32)
            continue
        with pytest.raises(InputError) as caught:
            folder.read(index)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert repr(folder.name(index)) in message


@pytest.mark.parametrize("name", ["dangling_link.jpg", "folder.jpg", "pipe.png"])
def test_bytes_of_what_is_no_file_are_refused(tmp_path: Path, name: str) -> None:
    write_broken_files(tmp_path)
    folder = ImageFolder(str(tmp_path))
    with pytest.raises(InputError, match=name):
        folder.read_bytes(names_of(folder).index(name))


def test_a_file_that_vanishes_is_a_broken_image(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 2)
    folder = ImageFolder(str(tmp_path))
    paths[0].unlink()
    with pytest.raises(InputError, match="No such file"):
        folder.read(0)
    with pytest.raises(IndexError):
        folder.name(2)


def test_a_folder_can_be_pickled_and_is_small(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    folder = pickle.loads(pickle.dumps(ImageFolder(str(tmp_path))))
    assert folder.read(2)[0].shape == (3, 24, 32)
    names = [f"n{number // 1300:08d}/n{number // 1300:08d}_{number}.JPEG" for number in range(20_000)]
    table = NameTable.of(names)
    listed = sys.getsizeof(names) + sum(map(sys.getsizeof, names))
    assert table.characters.nbytes + table.ends.nbytes < listed / 2
    assert [table[index] for index in (0, 1, 12_345, 19_999)] == [names[i] for i in (0, 1, 12_345, 19_999)]


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_name_table_gives_back_what_it_got(names: list[str]) -> None:
    table = NameTable.of(names)
    assert [table[index] for index in range(len(table))] == names
    for outside in (-1, len(names)):
        with pytest.raises(IndexError):
            table[outside]


def test_file_names_that_are_no_utf8_come_back() -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    assert NameTable.of(["a", odd, ""])[1] == odd


# --- the reader of bytes and of Pillow's images, beside that of files ---


@pytest.mark.parametrize("name", broken_contents())
def test_bytes_are_refused_as_the_file_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(broken_contents()[name])
    with pytest.raises(InputError) as of_file:
        read_image(path)
    with pytest.raises(InputError) as of_bytes:
        read_image_bytes(broken_contents()[name], str(path))
    # Pillow words a short read of a stream a little otherwise for some formats.
    assert str(of_bytes.value).partition("(")[0] == str(of_file.value).partition("(")[0]


def test_pillow_images_are_turned_upright_and_left_as_they_were(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.png"
    Image.fromarray(image_array()).save(path, exif=exif)
    expected = read_image(path).pixels
    with Image.open(path) as image:
        assert read_pillow_image(image, "x").pixels.equal(expected)
    with Image.open(path) as image:
        image.load()
        for _ in range(2):
            assert read_pillow_image(image, "x").pixels.equal(expected)
        assert image.size == (32, 24)
    with pytest.raises(InputError, match="'x': it has more pixels"):
        read_pillow_image(Image.new("1", (20_000, 20_000)), "x")
