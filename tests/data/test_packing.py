"""Packing: what is in the shards, that killing changes nothing, and what is refused."""

import hashlib
import io
import json
import multiprocessing
import os
import select
import signal
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
    assert sources.validation is not None
    assert [sources.train.read(index)[1] for index in range(5)] == [0, 0, 0, 1, 1]
    assert [sources.validation.read(index)[1] for index in range(3)] == [1, 1, 2]
    samples = webdataset.WebDataset(f"{folder}/{{000000..000002}}.tar", shardshuffle=False).decode("rgb8")
    assert [label for _, label in samples.to_tuple("png", "cls")] == [0, 0, 0, 1, 1]


def test_large_images_are_resized_and_small_ones_kept(tmp_path: Path) -> None:
    root, exif = tmp_path / "source", Image.Exif()
    root.mkdir()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(image_array(1, 60, 90)).save(root / "a.png", exif=exif)
    (root / "b.JPEG").write_bytes(encoded(image_array(2), "PNG"))  # a PNG by another name, as ImageNet has
    (root / "c.bmp").write_bytes(encoded(image_array(3), "BMP"))
    (root / "d.webp").write_bytes(encoded(image_array(4), "WEBP"))
    manifest, _ = packed(root, tmp_path / "out", PackSettings(size=40, format="png", quality=None, shuffle=False))
    members = contents(tmp_path / "out")
    assert list(members) == ["00000000-a.png", "00000001-b.png", "00000002-c.png", "00000003-d.webp"]
    assert manifest["kept"] == 2
    assert members["00000001-b.png"] == (root / "b.JPEG").read_bytes()
    upright, shards = read_image(root / "a.png").pixels, Shards(str(tmp_path / "out"))
    assert shards.read(0)[0].equal(resize_shorter_side(upright, 40))
    np.testing.assert_array_equal(shards.read(2)[0].permute(1, 2, 0).numpy(), image_array(3))
    packed(root, tmp_path / "whole", PackSettings(size=None, shuffle=False))
    assert contents(tmp_path / "whole")["00000000-a.png"] == (root / "a.png").read_bytes()


@pytest.mark.parametrize(("kind", "opened"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats_and_quality(tmp_path: Path, kind: Any, opened: str) -> None:
    write_images(tmp_path / "source", 1, suffix=".bmp")
    sizes = []
    for quality in (None,) if kind == "png" else (30, 95):
        packed(tmp_path / "source", tmp_path / f"out_{quality}", PackSettings(format=kind, quality=quality))
        content = contents(tmp_path / f"out_{quality}")[f"00000000-image_000.{kind}"]
        sizes.append(len(content))
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == opened
            difference = np.array(image).astype(int) - image_array(0)
            if kind == "jpg":
                assert image.layer[0][1:3] == image.layer[1][1:3]  # type: ignore[attr-defined]  # colours not halved
        assert np.abs(difference).max() <= (0 if kind == "png" else 60)
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
    first: list[str] = []
    with pytest.raises(InputError, match=f"[0-9]+ of {5 + len(broken)} images .* 0\\.1 .*--max-broken-share"):
        pack(str(root), out, settings, report=first.append)
    finished = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert len(finished) > 2
    with pytest.raises(InputError, match="not finished"):
        Shards(f"{out}/000000.tar")
    os.truncate(out / "000000.tar", 100)
    manifest, lines = packed(root, out, settings, max_broken_share=0.9)
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))][1 : len(finished)] == finished[1:]
    assert sorted(entry["name"] for entry in manifest["broken"]) == [str(root / name) for name in broken]
    assert [entry["reason"] for entry in manifest["broken"]] == first + lines
    assert all(str(root / name) in "".join(first + lines) for name in broken)
    assert len(Shards(str(out))) == manifest["images"] == 5
    assert packed(root, out, settings)[1] == [f"{str(out)!r} is finished already; nothing to do"]
    for path in (root / "0").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="every image is broken"):
        packed(root / "0", tmp_path / "none", max_broken_share=1.0)


# --- interrupted ---


def test_several_processes_tell_the_same_and_leave_random_numbers_alone(divided: Path, tmp_path: Path) -> None:
    (divided / "train" / "bird" / "broken.png").write_bytes(b"x")
    settings, state = PackSettings(size=16, shard_size=2), torch.get_rng_state()
    lines = [packed(divided, tmp_path / f"{n}", settings, max_broken_share=0.5, workers=n)[1] for n in (1, 2)]
    assert (lines[0], len(lines[0])) == (lines[1], 1)
    assert torch.get_rng_state().equal(state)
    with pytest.raises(InputError, match=r"^1 of 6 images are broken"):
        packed(divided, tmp_path / "refused", settings, workers=2)


def test_ended_between_any_two_writes_it_goes_on_to_the_same_bytes(
    divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PackSettings(size=16, shard_size=2)
    assert instants_with_equal_ends(lambda out: packed(divided, out, settings), tmp_path, monkeypatch) > 40


def pack_alone(source: Path, out: Path, settings: PackSettings, workers: int) -> None:
    torch.set_num_threads(1)  # those of the process it was forked from are not there
    packed(source, out, settings, workers=workers)


@pytest.mark.parametrize(("workers", "instants"), [(1, (1, 5, 13)), (2, (3,))])
def test_killed_with_sigkill_it_goes_on_to_the_same_bytes(
    tmp_path: Path, workers: int, instants: tuple[int, ...]
) -> None:
    source, out, settings = tmp_path / "noise", tmp_path / "out", PackSettings(size=128, shard_size=2)
    source.mkdir()
    for number in range(48):
        noise = np.random.default_rng(number).integers(0, 256, (400, 500, 3), dtype=np.uint8)
        Image.fromarray(noise).save(source / f"{number:03d}.jpg")
    packed(source, tmp_path / "whole", settings)
    for shards in instants:
        alive, held = os.pipe()  # every process holds an end
        process = multiprocessing.get_context("fork").Process(target=pack_alone, args=(source, out, settings, workers))
        process.start()
        os.close(held)
        while len(list(out.glob("*.tar"))) < shards and process.exitcode is None:
            process.join(0.005)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        assert select.select([alive], [], [], 60)[0], "a worker is left"
        os.close(alive)
    packed(source, out, settings, workers=workers)
    assert digests(out) == digests(tmp_path / "whole")


# --- what is refused ---


def refusal(source: Path, target: Path, settings: PackSettings | None = None) -> str:
    with pytest.raises(InputError) as caught:
        packed(source, target, settings)
    return str(caught.value)


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_or_images_in_one_destination(divided: Path, tmp_path: Path, finished: bool) -> None:
    out, image = tmp_path / "out", divided / "train" / "bird" / "image_000.png"
    if finished:
        packed(divided, out)
    else:
        image.write_bytes(b"")
        assert "1 of 5 images are broken" in refusal(divided, out)
    assert "begun with size 256, not 128" in refusal(divided, out, PackSettings(size=128))
    assert "begun with shuffle True, not False" in refusal(divided, out, PackSettings(shuffle=False))
    content, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    for changed, moment in ((content + b"\0", times), (content, (0, 0))):
        image.write_bytes(changed)
        os.utime(image, ns=moment)
        assert "different files" in refusal(divided, out)
    os.utime(image, ns=times)
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


@pytest.mark.parametrize("settings", [{"size": 0}, {"shard_size": 0}, {"format": "jpeg"}, {"quality": None}])
def test_settings_are_checked(settings: dict) -> None:
    with pytest.raises(InputError) as caught:
        PackSettings(**settings)
    assert caught.value.field == next(iter(settings))
