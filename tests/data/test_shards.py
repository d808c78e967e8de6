"""Tar shards: random access, damage of every kind, manifests, and shards from URLs."""

import functools
import gzip
import http.server
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from broken_samples import broken_contents, encoded, image_array, write_images, write_tar
from webdataset.writer import TarWriter

from dc_ssdae.data import shards as shards_module
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.shards import Shards, fetch, scan_tar
from dc_ssdae.errors import InputError

BROKEN = broken_contents()


def write_shard(path: Path, first: int, count: int) -> Path:
    """Write numbered images, each with its number as its label."""
    members = {}
    for number in range(first, first + count):
        members[f"{number:04d}.cls"] = b"%d" % number
        members[f"{number:04d}.png"] = encoded(image_array(number))
    return write_tar(path, members)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards without a manifest: 3, 1 and 2 images, numbered from 0."""
    path = tmp_path / "shards"
    path.mkdir()
    for shard, (first, count) in enumerate(((0, 3), (3, 1), (4, 2))):
        write_shard(path / f"{shard:06d}.tar", first, count)
    return path


def write_packed(tmp_path: Path, count: int = 7, first: int = 0) -> Path:
    for number in range(first, first + count):
        write_images(tmp_path / f"images{first}" / f"{number:02d}", 1, first=number)
    settings = PackSettings(shard_size=3, shuffle=False)
    pack(str(tmp_path / f"images{first}"), tmp_path / "packed", settings, report=lambda _: None)
    return tmp_path / "packed"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Seven images in three shards with a manifest, in order, each with its number as its label."""
    return write_packed(tmp_path)


def check(shards: Shards, numbers: list[int]) -> None:
    assert len(shards) == sum(shards.blocks) == len(numbers)
    for index in np.random.default_rng(0).permutation(len(numbers)):
        pixels, label = shards.read(int(index))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), image_array(numbers[index]))
        assert label == shards.label(int(index)) == numbers[index] % 20


def refusal(path: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        Shards(str(path))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- what is read ---


def test_images_and_labels_are_read_in_any_order(folder: Path) -> None:
    shards = Shards(str(folder))
    check(shards, list(range(6)))
    assert list(shards.blocks) == [3, 1, 2]
    assert shards.name(4) == f"{folder / '000002.tar'}: 0004.png"
    assert shards.relative_name(4) == "000002.tar/0004.png"
    check(Shards(f"{folder}/{{000000..000001}}.tar"), [0, 1, 2, 3])
    check(Shards([f"{folder}/000002.tar", f"{folder}/000000.tar"]), [4, 5, 0, 1, 2])
    check(Shards(f"file:{folder}/000001.tar"), [3])
    (folder / "odd{0..1}.tar").write_bytes((folder / "000001.tar").read_bytes())
    check(Shards(f"{folder}/odd{{0..1}}.tar"), [3])


def test_what_is_in_a_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [encoded(image_array(number)) for number in range(4)]
    long_name = "a_directory_with_a_long_name/" * 5 + "ä" * 30
    with open(tmp_path / "0.tar", "wb") as file, TarWriter(file, encoder=False) as writer:
        for number, key in enumerate(("000", "dir.with.dots/001", long_name)):
            writer.write({"__key__": key, "png": images[number], "cls": str(number).encode(), "mask.npy": b"\0"})
    others = {"dir/._0.png": b"hidden", "1.txt": b"alone", "2.heic": b"not read here", "readme": b"", ".x.png": b""}
    write_tar(tmp_path / "1.tar", {**others, "0.PNG": images[3], "0.CLS": b"3\n"})
    shards = Shards(str(tmp_path))
    check(shards, [0, 1, 2, 3])
    assert shards.name(2).endswith("ä.png")
    assert "1.tar': 3 of 4 samples have no image" in caplog.text
    labels = {"0.png": images[0], "1.cls": b"cat", "1.png": images[0], "2.cls": b"1" * 19, "2.png": images[0]}
    write_tar(tmp_path / "1.tar", labels)
    assert [Shards(str(tmp_path / "1.tar")).label(index) for index in range(3)] == [-1, -1, -1]


def test_two_images_in_a_sample_are_told_apart_by_extensions(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"0.{side}.png": encoded(image_array()) for side in ("left", "right")})
    assert "'0.right.png' is the second image" in refusal(tmp_path)
    for extensions in ("right.png", ["right.png"]):
        assert Shards(str(tmp_path), extensions).relative_name(0) == "x.tar/0.right.png"


def test_what_tells_changed_shards(folder: Path, packed: Path) -> None:
    shards, with_manifest = Shards(str(folder)), Shards(str(packed))
    states, known = list(shards.file_states()), list(with_manifest.file_states())
    for path in (folder, packed):
        os.utime(path / "000001.tar", ns=(0, 0))
    assert [before == now for before, now in zip(states, shards.file_states(), strict=True)] == [True, False, True]
    assert list(with_manifest.file_states()) == known, "the manifest knows the content"
    assert shards.names_sha256().startswith("609bd5dcc16c2923")  # which checkpoints hold


def _sum(shards: Shards, index: int) -> int:
    return int(shards.read(index)[0].sum())


def test_threads_pickling_forked_processes_and_more_shards_than_may_be_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "OPEN_FILES", 1)
    shards = Shards(str(folder))
    opened = len(os.listdir("/proc/self/fd"))
    expected = [int(image_array(number).sum()) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(functools.partial(_sum, shards), list(range(6)) * 100)) == expected * 100
    assert len(os.listdir("/proc/self/fd")) <= opened + 1
    assert [_sum(pickle.loads(pickle.dumps(shards)), index) for index in range(6)] == expected
    with multiprocessing.get_context("fork").Pool(2) as processes:  # inherits the open files
        assert processes.map(functools.partial(_sum, shards), range(6)) == expected


# --- what is broken ---


def test_every_broken_image_is_named_alone(tmp_path: Path) -> None:
    members = {f"{number:02d}.{name.rpartition('.')[2]}": data for number, (name, data) in enumerate(BROKEN.items())}
    with tarfile.open(write_tar(tmp_path / "x.tar", {**members, "50.png": encoded(image_array(50))}), "a") as archive:
        for name, kind in (("98.png", tarfile.SYMTYPE), ("99.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "50.png"
            archive.addfile(member)
    shards = Shards(str(tmp_path))
    assert shards.read(len(members))[0].shape == (3, 24, 32)
    for index in {*range(len(members) + 3)} - {len(members)}:
        with pytest.raises(InputError) as caught:
            shards.read(index)
        assert shards.name(index) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_shard_cut_short_anywhere_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = write_shard(tmp_path / "x.tar", 0, 3).read_bytes().rstrip(b"\0")
    ends = len(content) + -len(content) % tarfile.BLOCKSIZE
    for length in [*range(0, ends, 97), *range(512, ends + 1, 512)]:
        (tmp_path / "x.tar").write_bytes((content + bytes(512))[:length])
        caplog.clear()
        try:
            scan_tar(str(tmp_path / "x.tar"))
        except InputError as error:
            assert ["x.tar" in str(error), len(str(error).splitlines())] == [True, 1]  # noqa: PT017
        else:  # cut between two members, which the end mark alone can tell
            assert "x.tar' has no end mark; it may have been cut short" in caplog.text


def header(size: bytes) -> bytes:
    """A tar whose one member's header states a size in base 256."""
    content = bytearray(tarfile.TarInfo("0.png").tobuf())
    content[124:136] = size
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    return bytes(content) + bytes(1024)


NO_TARS = {
    "empty": b"",
    "gzip": gzip.compress(bytes(20_000), mtime=0),
    "noise": np.random.default_rng(0).bytes(4096),
    "absurd size": header(b"\x80" + b"\xff" * 11),
    "negative size": header(b"\xff" * 10 + b"\xfc\0"),
}


@pytest.mark.parametrize("content", NO_TARS.values(), ids=NO_TARS)
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "x.tar" in refusal(tmp_path)


def test_damaged_missing_and_empty_shards(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "none.tar", {})
    for pattern, told in (
        (f"{folder}/{{000000..000003}}.tar", "000003.tar"),
        (f"{folder}/*.tar", "write {000..127}"),
        (f"{folder}/{{0..1.tar", "cannot be expanded"),
        (tmp_path / "none.tar", "no images"),
    ):
        assert told in refusal(pattern)
    (tmp_path / "none").mkdir()
    assert "none/*.tar" in refusal(tmp_path / "none")
    path = folder / "000000.tar"
    content, at = bytearray(path.read_bytes()), int(scan_tar(str(path)).offsets[1]) - 512
    content[at : at + 512] = np.random.default_rng(0).bytes(512)  # which tarfile takes for the end
    path.write_bytes(content)
    assert f"000000.tar' as a tar without compression: there is no header at byte {at}" in refusal(folder)


def test_a_shard_cut_or_removed_after_opening(folder: Path) -> None:
    shards = Shards(str(folder))
    shards.read(0)
    with open(folder / "000000.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(InputError, match=r"000000\.tar: 0002\.png.* 0 of its"):
        shards.read(2)
    (folder / "000001.tar").unlink()
    with pytest.raises(FileNotFoundError):  # no image is broken: the run must end
        shards.read(3)


# --- manifests ---


def test_the_index_is_that_of_the_headers(packed: Path) -> None:
    with_index = Shards(str(packed))
    check(with_index, list(range(7)))
    check(Shards([f"{packed}/000002.tar", f"{packed}/000000.tar"]), [6, 0, 1, 2])
    assert with_index.classes == [f"{number:02d}" for number in range(7)]
    (packed / "manifest.json").write_text('{"of": "another program"}')
    without = Shards(str(packed))
    check(without, list(range(7)))
    assert without.classes == []
    assert with_index.names_sha256() == without.names_sha256()


def test_a_folder_that_does_not_fit_its_manifest(packed: Path) -> None:
    manifest, shard, index = packed / "manifest.json", packed / "000001.tar", packed / "index.safetensors"
    kept = {path: path.read_bytes() for path in (manifest, shard, index)}
    stated = kept[manifest]
    changes: list[tuple[Path, bytes | None, str]] = [
        (shard, kept[shard][:-512], "000001.tar' is not the one in the manifest.json"),
        (shard, None, "'000001.tar', which manifest.json lists, is not in"),
        (index, kept[index][:-1] + b"\1", "does not belong"),
        (manifest, stated[:50], "manifest.json' cannot be read"),
        (manifest, stated.replace(b'"bytes"', b'"size"'), "cannot be used"),
        (manifest, stated.replace(b'"images": 3', b'"images": 9'), "does not belong"),
        (manifest, stated.replace(b'"classes": [', b'"classes": [5, '), "cannot be used"),
        (manifest, stated.replace(b"000001.tar", b"000009.tar"), "000001.tar' is not the one in"),
    ]
    for path, content, told in changes:
        path.unlink() if content is None else path.write_bytes(content)
        assert told in refusal(packed)
        path.write_bytes(kept[path])


# --- URLs ---


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Gives the URL of a server and the paths that it was asked for."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
        server.shutdown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    with serving(tmp_path) as running:
        yield running


def test_shards_with_a_manifest_are_fetched_when_first_read(packed: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with serving(tmp_path) as (host, asked):
        url = f"{host}/packed/{{000000..000002}}.tar"
        shards = Shards(url, cache=cache)
        assert asked == ["/packed/manifest.json", "/packed/index.safetensors"]
        assert shards.read(4)[1] == 4
        assert asked[2:] == ["/packed/000001.tar"]
        check(shards, list(range(7)))
        check(Shards(url, cache=cache), list(range(7)))
        assert len(asked) == 6  # the manifest again, and nothing else
        assert shards.name(6).startswith(f"{host}/packed/000002.tar: ")
    check(Shards(url, cache=cache), list(range(7)))  # its host is down


def _count(url: str, cache: str) -> int:
    return len(Shards(url, cache=cache))


def test_shards_without_a_manifest_are_fetched_at_once_and_once(
    folder: Path, packed: Path, server: tuple[str, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host, asked = server
    url, cache = f"{host}/shards/{{000000..000002}}.tar", str(tmp_path / "cache")
    with multiprocessing.get_context("fork").Pool(4) as processes:
        assert processes.starmap(_count, [(url, cache)] * 4) == [6] * 4
    assert sorted(path for path in asked if path.endswith(".tar")) == [f"/shards/00000{i}.tar" for i in range(3)]
    asked.clear()
    check(Shards(url, cache=cache), list(range(6)))
    assert asked == ["/shards/manifest.json"]
    assert [record.message for record in caplog.records if "fetching all shards" in record.message]
    check(Shards(f"{host}/packed/000001.tar", cache=cache), [3, 4, 5])  # of the same name in another folder


def test_a_shard_packed_anew_is_fetched_anew(packed: Path, server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, cache = f"{server[0]}/packed/000000.tar", str(tmp_path / "cache")
    check(Shards(url, cache=cache), [0, 1, 2])
    shutil.rmtree(packed)
    write_packed(tmp_path, 5, first=20)
    check(Shards(url, cache=cache), [20, 21, 22])


def test_what_cannot_be_fetched_is_no_broken_image(
    packed: Path, server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, cache = server[0], str(tmp_path / "cache")
    for url in (f"{host}/elsewhere/0.tar", f"pipe:cat {tmp_path}/missing.tar", "s3://bucket/0.tar"):
        with pytest.raises(OSError, match=f"cannot fetch {url}"):
            Shards(url, cache=cache)
    shards = Shards(f"{host}/packed/{{000000..000002}}.tar", cache=cache)
    (packed / "000001.tar").write_bytes(b"other")
    with pytest.raises(OSError, match="not what the manifest"):
        shards.read(3)
    (packed / "000002.tar").unlink()
    with pytest.raises(OSError, match="cannot fetch"):
        shards.read(6)
    assert shards.read(0)[1] == 0
    monkeypatch.setattr(shards_module, "STALL_SECONDS", 1)
    monkeypatch.setattr(shards_module, "RETRIES", 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/0.tar"
        with pytest.raises(OSError, match=f"cannot fetch {url} to .*(timed out|timeout|too slow)"):
            fetch(url, cache)
    assert not list(Path(cache).rglob("*.partial"))


def test_commands_and_left_overs_of_a_killed_fetch(folder: Path, tmp_path: Path) -> None:
    cache, url = tmp_path / "cache", f"pipe:cat {folder}/{{000000..000001}}.tar"
    check(Shards(url, cache=str(cache)), [0, 1, 2, 3])
    for cached in list(cache.rglob("shard.tar")):
        cached.rename(cached.with_name(".shard.tar.partial"))
    check(Shards(url, cache=str(cache)), [0, 1, 2, 3])
    assert not list(cache.rglob("*.partial"))


def test_without_webdataset_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    assert "pip install 'dc-ssdae[data]'" in refusal(folder)
