"""Packing: what is in the shards, that killing changes nothing, and what is refused."""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from broken_samples import broken_contents, encoded, image_array, write_broken_files, write_images, write_tar
from filelock import FileLock
from PIL import Image

from dc_ssdae.data import pack as pack_module
from dc_ssdae.data.images import read_image
from dc_ssdae.data.pack import PackedPart, pack
from dc_ssdae.data.pack_shard import PackSettings
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.sources import open_sources
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.errors import InputError


def packed(
    source: Path, target: Path, settings: PackSettings | None = None, **options: Any
) -> tuple[list[PackedPart], list[str]]:
    lines: list[str] = []
    parts = pack(str(source), target, settings or PackSettings(), report=lines.append, **options)
    return parts, lines


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Name and content of every member of a folder's shards, read by tarfile alone."""
    members = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
    return members


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """train/ with two classes and val/ with a third and one of them; 5 and 3 images."""
    root = tmp_path / "source"
    write_images(root / "train" / "bird", 3)
    write_images(root / "train" / "cat", 2, first=3)
    write_images(root / "val" / "cat", 2, first=5)
    write_images(root / "val" / "dog", 1, first=7)
    return root


# --- what is written ---


def test_parts_classes_and_names_are_kept(divided: Path, tmp_path: Path) -> None:
    parts, lines = packed(divided, tmp_path / "out", PackSettings(shard_size=2, shuffle=False))
    assert lines == []
    train, validation = parts
    assert train == PackedPart("train", tmp_path / "out" / "train", 5, 3, 5, 0)
    assert validation == PackedPart("validation", tmp_path / "out" / "validation", 3, 2, 3, 0)
    members = dict(contents(train.folder))
    assert list(members) == [
        f"{place:08d}-image_{place:03d}.{extension}" for place in range(5) for extension in ("cls", "png")
    ]
    assert members["00000003-image_003.cls"] == b"1"
    assert members["00000003-image_003.png"] == (divided / "train" / "cat" / "image_003.png").read_bytes()
    assert dict(contents(validation.folder))["00000002-image_007.cls"] == b"2"
    for part in parts:
        assert json.loads((part.folder / "manifest.json").read_bytes())["classes"] == ["bird", "cat", "dog"]
    sources = open_sources(str(tmp_path / "out"), None, None, None)
    for source, numbers in ((sources.train, range(5)), (sources.validation, range(5, 8))):
        assert source is not None
        for index, number in enumerate(numbers):
            np.testing.assert_array_equal(source.read(index)[0].permute(1, 2, 0).numpy(), image_array(number))


def test_webdataset_reads_the_shards(divided: Path, tmp_path: Path) -> None:
    packed(divided, tmp_path / "out", PackSettings(shard_size=2, shuffle=False))
    urls = f"{tmp_path}/out/train/{{000000..000002}}.tar"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert [label for _, label in samples] == [0, 0, 0, 1, 1]
    for number, (array, _) in enumerate(samples):
        np.testing.assert_array_equal(array, image_array(number))


def test_headers_hold_nothing_of_the_day_or_the_user(divided: Path, tmp_path: Path) -> None:
    packed(divided, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_large_images_are_resized_and_small_ones_kept(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    large = image_array(1, 60, 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(large).save(root / "a.png", exif=exif)
    Image.fromarray(large).save(root / "b.bmp")
    (root / "c.JPEG").write_bytes(encoded(image_array(2), "PNG"))  # a PNG by another name, as ImageNet has
    (root / "d.bmp").write_bytes(encoded(image_array(3), "BMP"))
    (root / "e.webp").write_bytes(encoded(image_array(4), "WEBP"))
    [part], _ = packed(root, tmp_path / "out", PackSettings(size=40, format="png", quality=None, shuffle=False))
    members = dict(contents(tmp_path / "out"))
    assert list(members) == ["00000000-a.png", "00000001-b.png", "00000002-c.png", "00000003-d.png", "00000004-e.webp"]
    assert (part.images, part.kept) == (5, 2)
    shards = Shards(str(tmp_path / "out"))
    upright = read_image(root / "a.png").pixels
    assert upright.shape == (3, 90, 60)
    assert shards.read(0)[0].equal(resize_shorter_side(upright, 40))
    assert shards.read(1)[0].equal(resize_shorter_side(torch.from_numpy(large).permute(2, 0, 1), 40))
    assert members["00000002-c.png"] == (root / "c.JPEG").read_bytes()
    np.testing.assert_array_equal(shards.read(3)[0].permute(1, 2, 0).numpy(), image_array(3))
    assert members["00000004-e.webp"] == (root / "e.webp").read_bytes()


def test_without_a_size_nothing_is_resized(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    content = encoded(image_array(0, 300, 400), "JPEG", quality=80)
    (root / "a.jpg").write_bytes(content)
    packed(root, tmp_path / "out", PackSettings(size=None))
    assert contents(tmp_path / "out") == [("00000000-a.jpg", content)]


@pytest.mark.parametrize(("kind", "opened"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats_and_quality(tmp_path: Path, kind: Any, opened: str) -> None:
    write_images(tmp_path / "source", 1, suffix=".bmp")
    sizes = []
    for quality in (None,) if kind == "png" else (30, 95):
        out = tmp_path / f"out_{quality}"
        packed(tmp_path / "source", out, PackSettings(format=kind, quality=quality))
        [(name, content)] = contents(out)
        assert name == f"00000000-image_000.{kind}"
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == opened
            if kind == "jpg":
                assert image.layer[0][1:3] == image.layer[1][1:3]  # type: ignore[attr-defined]  # colours not halved
            difference = np.array(image).astype(int) - image_array(0)
        assert np.abs(difference).max() <= (0 if kind == "png" else 60)
        sizes.append(len(content))
    assert sizes == sorted(set(sizes))


def test_shuffling_spreads_classes_and_depends_on_names_alone(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for name in ("a", "b", "c", "d"):
        write_images(root / name, 12)
    packed(root, tmp_path / "out", PackSettings(shard_size=12))
    packed(root, tmp_path / "sorted", PackSettings(shard_size=12, shuffle=False))
    for folder, least in (("out", 3), ("sorted", 1)):
        for path in sorted((tmp_path / folder).glob("*.tar")):
            with tarfile.open(path) as archive:
                labels = {archive.extractfile(member).read() for member in archive if member.name.endswith("cls")}  # type: ignore[union-attr]
            assert (len(labels) >= least) if folder == "out" else (len(labels) == 1)
    images = sorted(content for name, content in contents(tmp_path / "out") if name.endswith("png"))
    assert images == sorted(path.read_bytes() for path in root.rglob("*.png"))


def test_keys_are_unique_and_plain(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    names = ["a.b.png", "a_b.png", "ä ö.png", "x" * 200 + ".png", "a.png", "a.webp", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        (root / name).write_bytes(encoded(image_array(), "WEBP" if name.endswith("webp") else "PNG", lossless=True))
    [part], _ = packed(root, tmp_path / "out")
    keys = [name.rpartition(".")[0] for name, _ in contents(tmp_path / "out")]
    assert part.images == len(set(keys)) == len(names)
    assert all(key.isascii() and "." not in key and len(key) < 80 for key in keys)


def test_the_manifest_says_what_is_there(divided: Path, tmp_path: Path) -> None:
    packed(divided, tmp_path / "out", PackSettings(shard_size=2))
    folder = tmp_path / "out" / "train"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["images"], manifest["kept"], manifest["broken"]) == (5, 5, [])
    assert [shard["images"] for shard in manifest["shards"]] == [2, 2, 1]
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert manifest["settings"]["size"] == 256
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"00000{i}.tar" for i in range(3)),
        "index.safetensors",
        "manifest.json",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "validation"]


def test_shards_can_be_packed_again(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_tar(
        tmp_path / "source" / "a.tar", {f"{number}.png": encoded(image_array(number, 80, 80)) for number in range(3)}
    )
    [part], lines = packed(tmp_path / "source", tmp_path / "out", PackSettings(size=64, shuffle=False))
    assert part.images == 3
    assert "labels too, are left out" in lines[0]
    assert [name for name, _ in contents(tmp_path / "out")] == [f"{number:08d}-{number}.jpg" for number in range(3)]


# --- broken images ---


def test_broken_images_are_left_out_named_once_and_listed(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    broken = write_broken_files(root)
    write_images(root, 5)
    [part], lines = packed(root, tmp_path / "out", PackSettings(shard_size=4), max_broken_share=0.9)
    assert (part.images, part.broken) == (5, len(broken))
    assert len(lines) == len(broken)
    for name in broken:
        [line] = [line for line in lines if repr(str(root / name)) in line]
        assert len(line.splitlines()) == 1
    listed = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["broken"]
    assert sorted(entry["name"] for entry in listed) == [str(root / name) for name in broken]
    assert {entry["reason"] for entry in listed} == set(lines)
    assert len(Shards(str(tmp_path / "out"))) == 5


def test_too_many_broken_images_end_it_and_a_larger_share_goes_on(tmp_path: Path) -> None:
    write_images(tmp_path / "source", 9)
    (tmp_path / "source" / "x.png").write_bytes(broken_contents()["text.png"])
    (tmp_path / "source" / "y.png").write_bytes(b"")
    source, out = tmp_path / "source", tmp_path / "out"
    with pytest.raises(InputError, match=r"2 of 11 images .* 0\.1 .*--max-broken-share"):
        packed(source, out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(InputError, match="not finished"):
        open_sources(str(out), None, None, None)
    [part], lines = packed(source, out, max_broken_share=2 / 11)
    assert (part.images, part.broken) == (9, 2)
    assert lines == []  # named already


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match="every image is broken"):
        packed(tmp_path / "source", tmp_path / "out", max_broken_share=1.0)


# --- going on ---


def test_several_processes_write_the_same_bytes(divided: Path, tmp_path: Path) -> None:
    (divided / "train" / "bird" / "broken.png").write_bytes(b"x")
    settings = PackSettings(size=16, shard_size=2)
    _, one = packed(divided, tmp_path / "one", settings, max_broken_share=0.5)
    _, two = packed(divided, tmp_path / "two", settings, max_broken_share=0.5, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert one == two
    assert len(one) == 1


class Killed(BaseException):
    pass


class Countdown:
    """Lets the calls that change the disk fail once `left` of them are done; None lets all through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for name in ("replace", "fsync", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, functools.partial(self._call, getattr(os, name)))

    def _call(self, original: Callable, *arguments: Any, **options: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed
        return original(*arguments, **options)


def test_ended_between_any_two_writes_it_goes_on_to_the_same_bytes(
    divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PackSettings(size=16, shard_size=2)
    packed(divided, tmp_path / "whole", settings)
    expected = digests(tmp_path / "whole")
    countdown = Countdown(monkeypatch)
    for instant in range(1000):
        out = tmp_path / f"out_{instant}"
        countdown.left = instant
        try:
            packed(divided, out, settings)
            break
        except Killed:
            countdown.left = None
            packed(divided, out, settings)
            assert digests(out) == expected
    assert 40 < instant < 999


def test_finished_shards_are_not_written_again(divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PackSettings(size=16, shard_size=1)
    write = pack_module.write_shard
    written: list[tuple[str, int]] = []

    def interrupted(job: Any, number: int, advance: Any) -> Any:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append((job.folder.name, number))
        return write(job, number, advance)

    monkeypatch.setattr(pack_module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed(divided, tmp_path / "out", settings)
    first = list(written)
    monkeypatch.setattr(
        pack_module,
        "write_shard",
        lambda job, number, advance: written.append((job.folder.name, number)) or write(job, number, advance),
    )
    packed(divided, tmp_path / "out", settings)
    assert len(written) == len(set(written)) == 8
    assert written[:4] == first
    _, lines = packed(divided, tmp_path / "out", settings)
    assert len(written) == 8
    assert [line.partition(" is ")[2] for line in lines] == ["finished already; nothing to do"] * 2


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """48 images that take a while."""
    root = tmp_path / "noise"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(48):
        Image.fromarray(rng.integers(0, 256, (400, 500, 3), dtype=np.uint8)).save(root / f"{number:03d}.jpg")
    return root


def kill(running: Any, shards: int, out: Path) -> None:
    """End a process that packs with SIGKILL, once it has written so many shards."""
    while len(list(out.glob("*.tar"))) < shards and running.exitcode is None:
        running.join(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert len(list(out.glob("*.tar"))) >= shards
    assert not (out / "manifest.json").exists()


def pack_alone(source: Path, out: Path, settings: PackSettings) -> None:
    torch.set_num_threads(1)  # those of the process it was forked from are not there
    packed(source, out, settings)


def test_killed_with_sigkill_it_goes_on_to_the_same_bytes(noise: Path, tmp_path: Path) -> None:
    settings, out = PackSettings(size=128, shard_size=2), tmp_path / "out"
    packed(noise, tmp_path / "whole", settings)
    context = multiprocessing.get_context("fork")
    for shards in (1, 5, 13):
        process = context.Process(target=pack_alone, args=(noise, out, settings))
        process.start()
        kill(process, shards, out)
    packed(noise, out, settings)
    assert digests(out) == digests(tmp_path / "whole")


class Command(subprocess.Popen):
    """A command, with the names that `kill` uses; joined when its workers, too, have left its standard error."""

    @property
    def exitcode(self) -> int | None:
        return self.poll()

    def join(self, seconds: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(seconds) if seconds else self.communicate(timeout=60)


@pytest.mark.slow
def test_the_command_and_its_workers_killed_many_times(noise: Path, tmp_path: Path) -> None:
    settings, out = PackSettings(size=128, shard_size=2), tmp_path / "out"
    packed(noise, tmp_path / "whole", settings)
    words = [sys.executable, "-m", "dc_ssdae", "pack", noise, out, "--size", "128", "--shard-size", "2", "--workers"]
    for shards in range(1, 20, 3):
        with Command([*map(str, words), str(1 + shards % 2)], stderr=subprocess.PIPE) as process:
            kill(process, shards, out)
            assert process.stderr is not None
            assert process.stderr.closed  # no worker is left
    packed(noise, out, settings)
    assert digests(out) == digests(tmp_path / "whole")


# --- what is refused ---


def refusal(source: Path, target: Path, settings: PackSettings | None = None) -> str:
    with pytest.raises(InputError) as caught:
        packed(source, target, settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_or_images_in_one_destination(
    divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        if not finished:
            patched.setattr(pack_module, "_finish", lambda *_: pytest.fail("ended here"))
        try:
            packed(divided, out)
        except BaseException:
            assert not finished
    assert "begun with size 256, not 128" in refusal(divided, out, PackSettings(size=128))
    assert "begun with shuffle True, not False" in refusal(divided, out, PackSettings(shuffle=False))
    assert "begun with format jpg, not webp" in refusal(divided, out, PackSettings(format="webp"))
    image = next((divided / "train" / "bird").iterdir())
    content, status = image.read_bytes(), image.stat()
    image.write_bytes(content + b"\0")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "have changed since" in refusal(divided, out), "its size"
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "have changed since" in refusal(divided, out), "its time"
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    write_images(divided / "train" / "bird", 1, first=9)
    assert "from other images" in refusal(divided, out)


def test_a_finished_destination_that_was_damaged(divided: Path, tmp_path: Path) -> None:
    packed(divided, tmp_path / "out")
    (tmp_path / "out" / "train" / "000000.tar").unlink()
    assert "000000.tar' is missing or damaged" in refusal(divided, tmp_path / "out")


def test_destinations_that_must_not_be(divided: Path, tmp_path: Path) -> None:
    assert "lies in the source" in refusal(divided, divided / "packed")
    assert "lies in the source" in refusal(divided, divided)
    os.symlink(divided, tmp_path / "link")
    assert "lies in the source" in refusal(divided, tmp_path / "link" / "packed")
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal(divided, tmp_path / "file")
    for source, place in ((divided, "other/train"), (divided / "train", "another")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "thesis.tex").write_text("")
        assert "holds 'thesis.tex'" in refusal(source, tmp_path / place.partition("/")[0])
        assert (tmp_path / place / "thesis.tex").exists()
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    (tmp_path / "foreign" / "train" / "manifest.json").write_text("{}")
    assert "not written by dc-ssdae pack" in refusal(divided, tmp_path / "foreign")
    assert not (divided / "packed").exists()


def test_two_at_once(divided: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".pack.lock"):
        assert "another dc-ssdae pack" in refusal(divided, tmp_path / "out")
    packed(divided, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 0}, "size is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"format": "jpeg"}, "did you mean 'jpg'"),
        ({"format": "png"}, "takes no quality"),
        ({"quality": None}, "needs a quality"),
        ({"quality": 101}, "from 1 to 100"),
        ({"quality": 0}, "from 1 to 100"),
    ],
)
def test_settings_are_checked(settings: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        PackSettings(**settings)
