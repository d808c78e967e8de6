"""Tar shards: random access, damage of every kind, manifests, and shards from URLs."""

import functools
import gzip
import http.server
import json
import logging
import multiprocessing
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from broken_samples import broken_contents, check_refusals, encoded, image_array, write_images, write_tar
from tiny_models import refusal
from webdataset.writer import TarWriter

from dc_ssdae.data import shards as shards_module
from dc_ssdae.data.packing import PackSettings, pack
from dc_ssdae.data.shards import Shards, fetch, scan_tar
from dc_ssdae.errors import InputError


def write_shard(path: Path, first: int, count: int) -> Path:
    """Write numbered images, each with its number as its label."""
    members = {}
    for number in range(first, first + count):
        members[f"{number:04d}.cls"] = str(number).encode()
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


def check(shards: Shards, numbers: list[int], first_label: int = 0) -> None:
    assert len(shards) == sum(shards.blocks) == len(numbers)
    for index in np.random.default_rng(0).permutation(len(numbers)):
        pixels, label = shards.read(int(index))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), image_array(numbers[index]))
        assert label == shards.label(int(index)) == numbers[index] - first_label


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
    write_tar(tmp_path / "x.tar", {f"0.{side}.png": encoded(image_array(0)) for side in ("left", "right")})
    assert "'0.right.png' is the second image" in refusal(Shards, str(tmp_path))
    assert Shards(str(tmp_path), extensions=["right.png"]).relative_name(0) == "x.tar/0.right.png"
    assert Shards(str(tmp_path), extensions="left.png").relative_name(0) == "x.tar/0.left.png"


def test_what_tells_changed_shards(folder: Path, packed: Path) -> None:
    shards, with_manifest = Shards(str(folder)), Shards(str(packed))
    states, known, names = list(shards.file_states()), list(with_manifest.file_states()), shards.names_sha256()
    assert names.startswith("609bd5dcc16c2923")  # which checkpoints hold
    assert len(states) == len(known) == 3
    os.utime(folder / "000001.tar", ns=(0, 0))
    os.utime(packed / "000001.tar", ns=(0, 0))
    assert [before == now for before, now in zip(states, shards.file_states(), strict=True)] == [True, False, True]
    assert list(with_manifest.file_states()) == known, "the manifest knows the content"
    (folder / "000002.tar").rename(folder / "000003.tar")
    assert Shards(str(folder)).names_sha256() != names


def _sum(shards: Shards, index: int) -> int:
    return int(shards.read(index)[0].sum())


def test_threads_pickling_and_forked_processes(folder: Path) -> None:
    shards = Shards(str(folder))
    expected = [int(image_array(number).sum()) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(functools.partial(_sum, shards), list(range(6)) * 20)) == expected * 20
    assert [_sum(pickle.loads(pickle.dumps(shards)), index) for index in range(6)] == expected
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(functools.partial(_sum, shards), range(6)) == expected


# --- what is broken ---


def test_every_broken_image_is_named_alone(tmp_path: Path) -> None:
    names = {
        f"{number:02d}.{name.rpartition('.')[2]}": data for number, (name, data) in enumerate(broken_contents().items())
    }
    with tarfile.open(write_tar(tmp_path / "x.tar", {**names, "50.png": encoded(image_array(5))}), "a") as archive:
        for name, kind in (("98.png", tarfile.SYMTYPE), ("99.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere.png"
            archive.addfile(member)
    shards = Shards(str(tmp_path))
    assert len(shards) == len(names) + 3 >= 14
    assert shards.read(len(names))[0].shape == (3, 24, 32)
    check_refusals(shards, {*range(len(shards))} - {len(names)})


def test_a_shard_cut_short_anywhere_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = write_shard(tmp_path / "whole.tar", 0, 3).read_bytes()
    (*_, last), (*_, size) = scan_tar(str(tmp_path / "whole.tar"))[1:3]
    end = int(last + size + -size % tarfile.BLOCKSIZE)
    path = tmp_path / "x.tar"
    for length in [*range(0, end, 97), *range(512, end, 512), end]:
        path.write_bytes(content[:length])
        caplog.clear()
        try:
            scan_tar(str(path))
        except InputError as error:
            assert [str(path) in str(error), len(str(error).splitlines())] == [True, 1]  # noqa: PT017
        else:  # cut between two members, which the end mark alone can tell
            assert f"{str(path)!r} has no end mark; it may have been cut short" in caplog.text
            assert length % tarfile.BLOCKSIZE == 0


def header(size: bytes) -> bytes:
    """A tar whose one member's header states a size in base 256."""
    content = bytearray(tarfile.TarInfo("0.png").tobuf())
    content[124:136] = size
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    return bytes(content) + bytes(1024)


NO_TARS = {
    "empty": b"",
    "text": b"text " * 300,
    "gzip": gzip.compress(bytes(20_000), mtime=0),
    "noise": np.random.default_rng(0).bytes(4096),
    "huge size": header(b"\x80" + b"\0" * 5 + b"\1" + b"\0" * 5),
    "absurd size": header(b"\x80" + b"\xff" * 11),
    "negative size": header(b"\xff" * 10 + b"\xfc\0"),
}


@pytest.mark.parametrize("content", NO_TARS.values(), ids=NO_TARS)
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "x.tar" in refusal(Shards, str(tmp_path))


def test_damaged_missing_and_empty_shards(folder: Path, tmp_path: Path) -> None:
    assert "000003.tar" in refusal(Shards, f"{folder}/{{000000..000003}}.tar")
    assert "write {000..127}" in refusal(Shards, f"{folder}/*.tar")
    assert "cannot be expanded" in refusal(Shards, f"{folder}/{{0..1.tar")
    (tmp_path / "none").mkdir()
    assert "*.tar" in refusal(Shards, str(tmp_path / "none"))
    write_tar(tmp_path / "none" / "x.tar", {})
    assert "no images" in refusal(Shards, str(tmp_path / "none"))
    path = folder / "000000.tar"
    content, at = bytearray(path.read_bytes()), int(scan_tar(str(path)).offsets[1]) - 512
    content[at : at + 512] = np.random.default_rng(0).bytes(512)  # which tarfile takes for the end
    path.write_bytes(content)
    assert f"000000.tar' as a tar without compression: there is no header at byte {at}" in refusal(Shards, str(folder))


def test_a_shard_cut_or_removed_after_opening(folder: Path) -> None:
    shards = Shards(str(folder))
    shards.read(0)
    with open(folder / "000000.tar", "r+b") as file:
        file.truncate(600)
    assert "0 of its" in refusal(shards.read, 2)
    (folder / "000001.tar").unlink()
    with pytest.raises(FileNotFoundError):  # no image is broken: the run must end
        shards.read(3)


# --- manifests ---


def test_the_index_is_that_of_the_headers(packed: Path) -> None:
    with_index = Shards(str(packed))
    check(with_index, list(range(7)))
    check(Shards(f"{packed}/{{000001..000002}}.tar"), [3, 4, 5, 6])
    check(Shards([f"{packed}/000002.tar", f"{packed}/000000.tar"]), [6, 0, 1, 2])
    assert with_index.classes == [f"{number:02d}" for number in range(7)]
    (packed / "manifest.json").rename(packed / "moved.json")
    without = Shards(str(packed))
    check(without, list(range(7)))
    assert without.classes == []
    assert with_index.names_sha256() == without.names_sha256()
    (packed / "moved.json").rename(packed / "manifest.json")
    for path in packed.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    shards = Shards(str(packed))  # reads no shard
    assert "damaged, or not an image" in refusal(shards.read, 0)


def test_a_folder_that_does_not_fit_its_manifest(packed: Path) -> None:
    manifest, shard, index = packed / "manifest.json", packed / "000001.tar", packed / "index.safetensors"

    def refused_with(path: Path, content: bytes | None, told: str, error: type[Exception] = InputError) -> None:
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        with pytest.raises(error, match=told):
            Shards(str(packed))
        path.unlink(missing_ok=True) if kept is None else path.write_bytes(kept)

    refused_with(shard, shard.read_bytes()[:-512], "000001.tar' is not the one in the manifest.json")
    refused_with(shard, None, "'000001.tar', which manifest.json lists, is not in")
    refused_with(packed / "extra.tar", shard.read_bytes(), "extra.tar' is not the one in")
    refused_with(index, index.read_bytes()[:-1], "manifest.json. cannot be used")
    refused_with(index, None, "index.safetensors", FileNotFoundError)
    refused_with(manifest, manifest.read_bytes()[:50], "cannot be used")
    changes: list[Callable[[dict], object]] = [
        lambda content: content["shards"][0].update(images=9),
        lambda content: content["shards"][0].pop("bytes"),
        lambda content: content.update(shards=5),
        lambda content: content.update(classes=[5]),
    ]
    for change in changes:
        content = json.loads(manifest.read_bytes())
        change(content)
        refused_with(manifest, json.dumps(content).encode(), "manifest.json' cannot be used")
    manifest.write_text('{"of": "another program"}')
    check(Shards(str(packed)), list(range(7)))


# --- URLs ---


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and keeps the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_request(self, *_: object) -> None:
        self.server.asked.append(self.path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as running:
        yield running


def test_shards_with_a_manifest_are_fetched_when_first_read(packed: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with Server(tmp_path) as server:
        url = f"{server.url}/packed/{{000000..000002}}.tar"
        shards = Shards(url, cache=cache)
        assert sorted(server.asked) == ["/packed/index.safetensors", "/packed/manifest.json"]
        assert shards.read(4)[1] == 4
        assert server.asked[2:] == ["/packed/000001.tar"]
        check(shards, list(range(7)))
        check(Shards(url, cache=cache), list(range(7)))
        assert len(server.asked) == 6  # the manifest again, and nothing else
        assert shards.name(6).startswith(f"{server.url}/packed/000002.tar: ")
    check(Shards(url, cache=cache), list(range(7)))  # its host is down


def test_shards_without_a_manifest_are_fetched_at_once_and_said_so(
    folder: Path, packed: Path, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, cache = f"{server.url}/shards/{{000000..000002}}.tar", str(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        shards = Shards(url, cache=cache)
    assert sum("fetching all shards" in record.message for record in caplog.records) == 1
    assert [path for path in server.asked if path.endswith(".tar")] == [f"/shards/00000{i}.tar" for i in range(3)]
    check(shards, list(range(6)))
    asked = len(server.asked)
    check(Shards(url, cache=cache), list(range(6)))
    assert server.asked[asked:] == ["/shards/manifest.json"]
    check(Shards(f"{server.url}/packed/000001.tar", cache=cache), [3, 4, 5])  # of the same name in another folder


def test_a_shard_packed_anew_is_fetched_anew(packed: Path, server: Server, tmp_path: Path) -> None:
    url, cache = f"{server.url}/packed/000000.tar", str(tmp_path / "cache")
    check(Shards(url, cache=cache), [0, 1, 2])
    for path in packed.iterdir():
        path.unlink()
    write_packed(tmp_path, 5, first=20)
    check(Shards(url, cache=cache), [20, 21, 22], first_label=20)


def test_what_cannot_be_fetched_is_no_broken_image(
    packed: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    for url in (f"{server.url}/elsewhere/0.tar", f"pipe:cat {tmp_path}/missing.tar", "s3://bucket/0.tar"):
        with pytest.raises(OSError, match=f"cannot fetch {url}"):
            Shards(url, cache=cache)
    shards = Shards(f"{server.url}/packed/{{000000..000002}}.tar", cache=cache)
    with open(packed / "000001.tar", "ab") as file:
        file.write(b"more")
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


def _open_and_sum(url: str, cache: str) -> int:
    shards = Shards(url, cache=cache)
    return sum(_sum(shards, index) for index in range(len(shards)))


def test_several_processes_fetch_each_shard_once(folder: Path, server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/shards/{{000000..000002}}.tar"
    with multiprocessing.get_context("fork").Pool(4) as processes:
        sums = processes.starmap(_open_and_sum, [(url, str(tmp_path / "cache"))] * 4)
    assert sums == [sum(int(image_array(number).sum()) for number in range(6))] * 4
    fetched = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(fetched) == [f"/shards/00000{i}.tar" for i in range(3)]


def test_commands_and_left_overs_of_a_killed_fetch(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    url = f"pipe:cat {folder}/{{000000..000001}}.tar"
    check(Shards(url, cache=str(cache)), [0, 1, 2, 3])
    for cached in list(cache.rglob("shard.tar")):
        cached.rename(cached.with_name(".shard.tar.partial"))
    check(Shards(url, cache=str(cache)), [0, 1, 2, 3])
    assert not list(cache.rglob("*.partial"))


def test_without_webdataset_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset.tariterators", None)
    assert "pip install 'dc-ssdae[data]'" in refusal(Shards, str(folder))
