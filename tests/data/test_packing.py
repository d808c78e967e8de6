"""Packing: what is in the shards, that killing changes nothing, and what is refused."""

import functools
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from broken_samples import encoded, image_array, write_broken_files, write_images, write_tar
from filelock import FileLock
from interrupted import digests, instants_with_equal_ends
from PIL import Image
from tiny_models import refusal as refusal_of

from dc_ssdae.data.images import read_image
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.sources import open_sources
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.errors import InputError


def packed(source: Path, target: Path, settings: PackSettings | None = None, **options: Any) -> tuple[Any, list[str]]:
    """Pack images; gives the manifests, the only one by itself, and the lines that were reported."""
    lines: list[str] = []
    manifests = pack(str(source), target, settings or PackSettings(), report=lines.append, **options)
    return manifests.get("", manifests), lines


refusal = functools.partial(refusal_of, packed)


def contents(folder: Path) -> dict[str, bytes]:
    """Content of every member of a folder's shards by its name, read by tarfile alone."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                members[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return members


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """train/ with two classes and val/ with a third and one of them; 5 and 3 images."""
    root = tmp_path / "source"
    for folder, count, first in (("train/bird", 3, 0), ("train/cat", 2, 3), ("val/cat", 2, 5), ("val/dog", 1, 7)):
        write_images(root / folder, count, first=first)
    return root


# --- what is written ---


def test_parts_names_and_labels_are_kept(divided: Path, tmp_path: Path) -> None:
    manifests, lines = packed(divided, tmp_path / "out", PackSettings(shard_size=2, shuffle=False))
    assert (lines, list(manifests)) == ([], ["train", "validation"])
    folder = tmp_path / "out" / "train"
    assert sorted(contents(folder)) == [f"{n:08d}-image_{n:03d}.{kind}" for n in range(5) for kind in ("cls", "png")]
    assert contents(folder)["00000003-image_003.png"] == (divided / "train" / "cat" / "image_003.png").read_bytes()
    names = ["000000.tar", "000001.tar", "000002.tar", "index.safetensors", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "validation"]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest == manifests["train"]
    assert (manifest["images"], manifest["kept"], manifest["classes"]) == (5, 5, ["bird", "cat", "dog"])
    assert [shard["images"] for shard in manifest["shards"]] == [2, 2, 1]
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    sources = open_sources(str(tmp_path / "out"), None, None, None)
    for source, labels, first in ((sources.train, [0, 0, 0, 1, 1], 0), (sources.validation, [1, 1, 2], 5)):
        assert source is not None
        for index, label in enumerate(labels):
            pixels, found = source.read(index)
            np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), image_array(first + index))
            assert found == label
    samples = webdataset.WebDataset(f"{folder}/{{000000..000002}}.tar", shardshuffle=False).decode("rgb8")
    assert [label for _, label in samples.to_tuple("png", "cls")] == [0, 0, 0, 1, 1]


def test_large_images_are_resized_and_small_ones_kept(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    large, exif = image_array(1, 60, 90), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(large).save(root / "a.png", exif=exif)
    (root / "b.JPEG").write_bytes(encoded(image_array(2), "PNG"))  # a PNG by another name, as ImageNet has
    (root / "c.bmp").write_bytes(encoded(image_array(3), "BMP"))
    (root / "d.webp").write_bytes(encoded(image_array(4), "WEBP"))
    manifest, _ = packed(root, tmp_path / "out", PackSettings(size=40, format="png", quality=None, shuffle=False))
    members = contents(tmp_path / "out")
    assert list(members) == ["00000000-a.png", "00000001-b.png", "00000002-c.png", "00000003-d.webp"]
    assert (manifest["images"], manifest["kept"]) == (4, 2)
    shards = Shards(str(tmp_path / "out"))
    upright = read_image(root / "a.png").pixels
    assert upright.shape == (3, 90, 60)
    assert shards.read(0)[0].equal(resize_shorter_side(upright, 40))
    assert members["00000001-b.png"] == (root / "b.JPEG").read_bytes()
    np.testing.assert_array_equal(shards.read(2)[0].permute(1, 2, 0).numpy(), image_array(3))
    packed(root, tmp_path / "whole", PackSettings(size=None, shuffle=False))
    assert contents(tmp_path / "whole")["00000000-a.png"] == (root / "a.png").read_bytes()


@pytest.mark.parametrize(("kind", "opened"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats_and_quality(tmp_path: Path, kind: Any, opened: str) -> None:
    write_images(tmp_path / "source", 1, suffix=".bmp")
    sizes = []
    for quality in (None,) if kind == "png" else (30, 95):
        packed(tmp_path / "source", tmp_path / f"out_{quality}", PackSettings(format=kind, quality=quality))
        [(name, content)] = contents(tmp_path / f"out_{quality}").items()
        assert name == f"00000000-image_000.{kind}"
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == opened
            if kind == "jpg":
                assert image.layer[0][1:3] == image.layer[1][1:3]  # type: ignore[attr-defined]  # colours not halved
            difference = np.array(image).astype(int) - image_array(0)
        assert np.abs(difference).max() <= (0 if kind == "png" else 60)
        sizes.append(len(content))
    assert sizes == sorted(set(sizes))


def test_shuffling_spreads_classes_and_keys_are_unique_and_plain(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for name in ("a", "b", "c", "d"):
        write_images(root / name, 12)
    for name in ("a.b.png", "a_b.png", "ä ö.png", "x" * 200 + ".png", "a.png", "a.webp", os.fsdecode(b"caf\xe9.png")):
        (root / name).write_bytes(encoded(image_array(), "WEBP" if name.endswith("webp") else "PNG", lossless=True))
    packed(root, tmp_path / "out", PackSettings(shard_size=14))
    shards = Shards(str(tmp_path / "out"))
    for block in np.split(np.arange(55), [14, 28, 42])[:3]:
        assert len({shards.label(int(index)) for index in block}) >= 3
    images = {name: data for name, data in contents(tmp_path / "out").items() if not name.endswith("cls")}
    assert sorted(images.values()) == sorted(path.read_bytes() for path in root.rglob("*") if path.is_file())
    keys = {name.rpartition(".")[0] for name in images}
    assert len(keys) == 55
    assert all(key.isascii() and "." not in key and len(key) < 80 for key in keys)


def test_shards_can_be_packed_again_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    images = {f"{number}.png": encoded(image_array(number, 80, 80)) for number in range(3)}
    write_tar(tmp_path / "source" / "a.tar", {**images, "2.cls": b"7"})
    packed(tmp_path / "source", tmp_path / "out", PackSettings(size=64, shuffle=False))
    members = contents(tmp_path / "out")
    assert list(members) == ["00000000-0.jpg", "00000001-1.jpg", "00000002-2.cls", "00000002-2.jpg"]
    assert [Shards(str(tmp_path / "out")).label(index) for index in range(3)] == [-1, -1, 7]


# --- broken images ---


def test_broken_images_are_left_out_named_once_and_listed(tmp_path: Path) -> None:
    root, out, settings = tmp_path / "source", tmp_path / "out", PackSettings(shard_size=2, shuffle=False)
    root.mkdir()
    broken = write_broken_files(root)
    write_images(root / "0", 5)
    assert "--max-broken-share" in refusal(root, out, settings)
    finished = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert len(finished) > 2
    assert "not finished" in refusal_of(open_sources, str(out), None, None, None)
    _, first = packed(root, tmp_path / "other", settings, max_broken_share=0.9)
    manifest, lines = packed(root, out, settings, max_broken_share=0.9)
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))][: len(finished)] == finished
    assert lines == first[-len(lines) :]  # the others were named in the first attempt
    assert len(first) > len(lines)
    for name in broken:
        [line] = [line for line in first if repr(str(root / name)) in line]
        assert len(line.splitlines()) == 1
    assert sorted(entry["name"] for entry in manifest["broken"]) == [str(root / name) for name in broken]
    assert {f"left out: {entry['reason']}" for entry in manifest["broken"]} == set(first)
    assert len(Shards(str(out))) == manifest["images"] == 5
    _, lines = packed(root, out, settings)
    assert lines == [f"{str(out)!r} is finished already; nothing to do"]


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.png").write_bytes(b"")
    assert "every image is broken" in refusal(tmp_path / "source", tmp_path / "out", max_broken_share=1.0)


# --- interrupted ---


def test_several_processes_write_the_same_bytes_and_lines(divided: Path, tmp_path: Path) -> None:
    (divided / "train" / "bird" / "broken.png").write_bytes(b"x")
    settings = PackSettings(size=16, shard_size=2)
    state = torch.get_rng_state()
    _, one = packed(divided, tmp_path / "one", settings, max_broken_share=0.5)
    assert torch.get_rng_state().equal(state)
    _, two = packed(divided, tmp_path / "two", settings, max_broken_share=0.5, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert (one, len(one)) == (two, 1)
    assert refusal(divided, tmp_path / "three", settings, workers=2).startswith("1 of 6 images are broken")


def test_ended_between_any_two_writes_it_goes_on_to_the_same_bytes(
    divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PackSettings(size=16, shard_size=4)
    assert instants_with_equal_ends(lambda out: packed(divided, out, settings), tmp_path, monkeypatch) > 20


# --- what is refused ---


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_or_images_in_one_destination(divided: Path, tmp_path: Path, finished: bool) -> None:
    out, image = tmp_path / "out", divided / "train" / "bird" / "image_000.png"
    if not finished:
        image.write_bytes(b"")
        assert "1 of 5 images are broken" in refusal(divided, out)
    else:
        packed(divided, out)
    assert "begun with size 256, not 128" in refusal(divided, out, PackSettings(size=128))
    assert "begun with shuffle True, not False" in refusal(divided, out, PackSettings(shuffle=False))
    content, status = image.read_bytes(), image.stat()
    image.write_bytes(content + b"\0")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "different files" in refusal(divided, out), "its size"
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "different files" in refusal(divided, out), "its time"
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    image.rename(image.with_name("another.png"))
    assert "different names" in refusal(divided, out)


def test_destinations_that_must_not_be(divided: Path, tmp_path: Path) -> None:
    os.symlink(divided, tmp_path / "link")
    for inside in (divided / "packed", divided, tmp_path / "link" / "packed"):
        assert "lies in the source" in refusal(divided, inside)
    for source, place in ((divided, "other/train"), (divided / "train", "another")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "manifest.json").write_text("{}")
        assert "holds 'manifest.json'" in refusal(source, tmp_path / place.partition("/")[0])
    with FileLock(tmp_path / "out.lock"):
        (tmp_path / "out").mkdir()
        os.link(tmp_path / "out.lock", tmp_path / "out" / ".pack.lock")
        assert "another dc-ssdae pack" in refusal(divided, tmp_path / "out")
    packed(divided, tmp_path / "out")
    (tmp_path / "out" / "train" / "000000.tar").unlink()
    assert "000000.tar' is missing or damaged" in refusal(divided, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"), [("size", 0), ("shard_size", 0), ("format", "jpeg"), ("quality", None), ("quality", 101)]
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        PackSettings(**{name: value})
    assert caught.value.field == name
    assert "png" in refusal_of(PackSettings, format="png")
