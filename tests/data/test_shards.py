"""Tar shards: random access, damage of every kind, manifests, and shards from URLs."""

import functools
import gzip
import http.server
import io
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from broken_samples import broken_contents, encoded, image_array, write_images, write_tar
from webdataset.writer import TarWriter

from dc_ssdae.data import shard_cache
from dc_ssdae.data import shards as shards_module
from dc_ssdae.data.pack import pack
from dc_ssdae.data.pack_shard import PackSettings
from dc_ssdae.data.shard_index import MANIFEST_FILE, scan_tar
from dc_ssdae.data.shards import Shards
from dc_ssdae.errors import InputError


def members(first: int, count: int, extension: str = "png") -> dict[str, bytes]:
    content = {}
    for number in range(first, first + count):
        content[f"{number:04d}.cls"] = b"7"
        content[f"{number:04d}.{extension}"] = encoded(image_array(number))
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards without a manifest: 3, 1 and 2 images, numbered from 0."""
    path = tmp_path / "shards"
    path.mkdir()
    for shard, (first, count) in enumerate(((0, 3), (3, 1), (4, 2))):
        write_tar(path / f"{shard:06d}.tar", members(first, count))
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Seven images in three shards with a manifest, in order."""
    write_images(tmp_path / "images", 7)
    pack(
        str(tmp_path / "images"), tmp_path / "packed", PackSettings(shard_size=3, shuffle=False), report=lambda _: None
    )
    return tmp_path / "packed"


def check(shards: Shards, numbers: list[int]) -> None:
    assert len(shards) == sum(shards.blocks) == len(numbers)
    for index in np.random.default_rng(0).permutation(len(numbers)):
        expected = image_array(numbers[index])
        np.testing.assert_array_equal(shards.read(int(index))[0].permute(1, 2, 0).numpy(), expected)


def refusal(path: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        Shards(str(path))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "shard" in message
    return message


# --- what is read ---


def test_images_are_read_in_any_order(folder: Path) -> None:
    shards = Shards(str(folder))
    check(shards, list(range(6)))
    assert list(shards.blocks) == [3, 1, 2]
    assert shards.name(4) == f"{folder / '000002.tar'}: 0004.png"
    assert shards.relative_name(4) == "000002.tar/0004.png"
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            shards.name(outside)


def test_patterns_single_shards_and_lists(folder: Path) -> None:
    check(Shards(f"{folder}/{{000000..000001}}.tar"), [0, 1, 2, 3])
    check(Shards(f"{folder}/000002.tar"), [4, 5])
    check(Shards([f"{folder}/000002.tar", f"{folder}/000000.tar"]), [4, 5, 0, 1, 2])
    check(Shards(f"file:{folder}/000001.tar"), [3])
    (folder / "odd{0..1}.tar").write_bytes((folder / "000001.tar").read_bytes())
    check(Shards(f"{folder}/odd{{0..1}}.tar"), [3])


def test_samples_that_webdataset_writes(tmp_path: Path) -> None:
    long_name = "a_directory_with_a_long_name/" * 5 + "ä" * 30
    with open(tmp_path / "x.tar", "wb") as file, TarWriter(file, encoder=False) as writer:
        for number, key in enumerate(("000", "dir.with.dots/001", long_name)):
            writer.write({"__key__": key, "png": encoded(image_array(number)), "json": b"{}", "mask.npy": b"\0"})
    shards = Shards(str(tmp_path))
    check(shards, [0, 1, 2])
    assert shards.name(2).endswith("ä.png")


def test_what_is_no_image_member(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = encoded(image_array(1))
    content = {
        "dir/._0.png": b"left by another system",
        "0.PNG": image,
        "1.txt": b"alone",
        "2.heic": b"not read here",
        "2.json": b"{}",
        "readme": b"",
        ".x.png": b"",
    }
    write_tar(tmp_path / "x.tar", content)
    check(Shards(str(tmp_path)), [1])
    assert "3 of 4 samples have no image: " in caplog.text
    for told in ("1 .heic", "1 .txt", "1 (no suffix)"):
        assert told in caplog.text


def test_two_images_in_a_sample_are_told_apart_by_extensions(tmp_path: Path) -> None:
    content = {"0.left.png": encoded(image_array(0)), "0.right.png": encoded(image_array(1))}
    write_tar(tmp_path / "x.tar", content)
    assert "'0.left.png' and '0.right.png'" in refusal(tmp_path)
    check(Shards(str(tmp_path), extensions=["right.png"]), [1])
    write_tar(tmp_path / "x.tar", {f"IMG 2023.01.0{day}.png": encoded(image_array(day)) for day in (5, 6)})
    assert "first dot" in refusal(tmp_path)
    write_tar(tmp_path / "x.tar", content)
    check(Shards(str(tmp_path), extensions="left.png"), [0])


def test_what_tells_changed_shards(folder: Path, packed: Path) -> None:
    shards, with_manifest = Shards(str(folder)), Shards(str(packed))
    states, known, names = list(shards.file_states()), list(with_manifest.file_states()), shards.names_sha256()
    assert len(states) == len(known) == 3
    os.utime(folder / "000001.tar", ns=(0, 0))
    os.utime(packed / "000001.tar", ns=(0, 0))
    assert [before == now for before, now in zip(states, shards.file_states(), strict=True)] == [True, False, True]
    assert list(with_manifest.file_states()) == known, "the manifest knows the content"
    assert Shards(str(folder)).names_sha256() == names
    (folder / "000002.tar").rename(folder / "000003.tar")
    assert Shards(str(folder)).names_sha256() != names


def test_more_shards_than_may_be_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_FILES", 1)
    shards = Shards(str(folder))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    check(shards, list(range(6)))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def _sum(shards: Shards, index: int) -> int:
    return int(shards.read(index)[0].sum())


def test_threads_pickling_and_forked_processes(folder: Path) -> None:
    shards = Shards(str(folder))
    expected = [int(image_array(number).sum()) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(functools.partial(_sum, shards), list(range(6)) * 20)) == expected * 20
    assert [_sum(pickle.loads(pickle.dumps(shards)), index) for index in range(6)] == expected
    with multiprocessing.get_context("fork").Pool(2) as processes:  # inherits the open files
        assert processes.map(functools.partial(_sum, shards), range(6)) == expected


# --- what is broken ---


def test_every_broken_image_is_named_alone(tmp_path: Path) -> None:
    content = {
        f"{number:02d}.{name.rpartition('.')[2]}": data for number, (name, data) in enumerate(broken_contents().items())
    }
    write_tar(tmp_path / "x.tar", {**content, "99.png": encoded(image_array(5))})
    shards = Shards(str(tmp_path))
    assert len(shards) == len(content) + 1 >= 11
    for index, name in enumerate(content):
        with pytest.raises(InputError) as caught:
            shards.read(index)
        assert f"{tmp_path / 'x.tar'}: {name}" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    np.testing.assert_array_equal(shards.read(len(content))[0].permute(1, 2, 0).numpy(), image_array(5))


def test_links_in_a_tar_are_broken_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE)):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "elsewhere.png"
            archive.addfile(member)
    shards = Shards(str(tmp_path))
    for index in range(2):
        with pytest.raises(InputError, match=rf"{index}\.png.*link"):
            shards.read(index)


def test_a_shard_cut_short_anywhere_is_refused_or_its_last_image_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_tar(tmp_path / "whole.tar", members(0, 3))
    content = whole.read_bytes()
    index = scan_tar(str(whole))
    end = int(index.offsets[2] + index.sizes[2])
    path = tmp_path / "cut" / "x.tar"
    path.parent.mkdir()
    outcomes = set()
    for length in [*range(0, end, 97), *range(512, end, 512), end]:
        path.write_bytes(content[:length])
        caplog.clear()
        try:
            shards = Shards(str(path))
        except InputError as error:
            problem = str(error)
            assert [str(path) in problem, len(problem.splitlines())] == [True, 1]
            outcomes.add("refused")
            continue
        for place in range(len(shards) - 1):
            assert shards.read(place)[0].shape == (3, 24, 32)
        try:
            shards.read(len(shards) - 1)
            outcomes.add("told")
        except InputError as error:
            assert shards.name(len(shards) - 1) in str(error)  # noqa: PT017
            outcomes.add("last image")
        # The end mark alone may be missing without a loss.
        assert any("cut short" in record.message and str(path) in record.message for record in caplog.records)
    assert outcomes == {"refused", "told", "last image"}


def test_damage_in_the_middle_is_not_taken_for_the_end(folder: Path) -> None:
    path = folder / "000000.tar"
    content = bytearray(path.read_bytes())
    header = int(scan_tar(str(path)).offsets[1]) - 512
    content[header : header + 512] = np.random.default_rng(0).bytes(512)
    path.write_bytes(content)
    message = refusal(folder)
    assert "000000.tar" in message
    assert f"byte {header}" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"text " * 300, gzip.compress(bytes(20_000), mtime=0), np.random.default_rng(0).bytes(4096)],
    ids=["empty", "text", "gzip", "noise"],
)
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "x.tar" in refusal(tmp_path)


def test_missing_shards_and_empty_ones(folder: Path, tmp_path: Path) -> None:
    assert "000003.tar" in refusal(f"{folder}/{{000000..000003}}.tar")
    assert "write {000..127}" in refusal(f"{folder}/*.tar")
    for pattern in ("{0..99999999999}.tar", "{0..9999}/{0..9999}.tar", "0.tar::{-99999999999..0}.tar"):
        assert "names more than" in refusal(f"{folder}/{pattern}")
    assert "000.tar" in refusal(f"{folder}/{{000..999}}.tar::{folder}/{{0000..9999}}.tar")
    assert "2 times" in refusal(f"{folder}/000000.tar::{folder}/00000{{0,1}}.tar")
    (tmp_path / "none").mkdir()
    assert "looked for *.tar" in refusal(tmp_path / "none")
    write_tar(tmp_path / "none" / "x.tar", {})
    assert "no images" in refusal(tmp_path / "none")
    assert "cannot be expanded" in refusal(f"{folder}/{{0..1.tar")
    assert "cannot be expanded" in refusal(f"{folder}/${{NOT_SET}}.tar")


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
    check(Shards(str(packed)), list(range(7)))
    with_index = Shards(str(packed))
    (packed / MANIFEST_FILE).unlink()
    without = Shards(str(packed))
    assert [with_index.name(i) for i in range(7)] == [without.name(i) for i in range(7)]
    assert [with_index.read_bytes(i) for i in range(7)] == [without.read_bytes(i) for i in range(7)]
    assert with_index.blocks == without.blocks == [3, 3, 1]


def test_opening_with_an_index_reads_no_shard(packed: Path) -> None:
    for path in packed.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    shards = Shards(str(packed))
    assert len(shards) == 7
    with pytest.raises(InputError, match="damaged, or not an image"):
        shards.read(0)


def test_a_part_of_the_shards(packed: Path) -> None:
    check(Shards(f"{packed}/{{000001..000002}}.tar"), [3, 4, 5, 6])
    check(Shards([f"{packed}/000002.tar", f"{packed}/000000.tar"]), [6, 0, 1, 2])


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_that_does_not_fit_its_manifest(packed: Path) -> None:
    shard = packed / "000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    assert "000001.tar" in refusal(packed)
    shard.unlink()
    assert "'000001.tar'" in refusal(packed)
    shard.write_bytes(content)
    (packed / "extra.tar").write_bytes(content)
    assert "not in the manifest.json" in refusal(packed)
    (packed / "extra.tar").unlink()
    index = packed / "index.safetensors"
    kept = index.read_bytes()
    index.write_bytes(kept[:-1])
    with pytest.raises(InputError, match="does not belong"):
        Shards(str(packed))
    index.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        Shards(str(packed))
    index.write_bytes(kept)
    check(Shards(str(packed)), list(range(7)))


def test_damaged_and_foreign_manifests(packed: Path) -> None:
    path = packed / MANIFEST_FILE
    kept = path.read_bytes()
    for change, message in (
        (lambda content: content.update(version=2), "version 2"),
        (lambda content: content["shards"][0].pop("bytes"), "damaged"),
        (lambda content: content.update(shards=5), "damaged"),
        (lambda content: content["shards"][0].update(images=9), "as many images"),
    ):
        path.write_bytes(kept)
        _edit(path, change)
        with pytest.raises(InputError, match=message):
            Shards(str(packed))
    path.write_bytes(kept[:50])
    with pytest.raises(InputError, match="cannot be read"):
        Shards(str(packed))
    path.write_text('{"of": "another program"}')
    check(Shards(str(packed)), list(range(7)))


# --- URLs ---


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and keeps the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_shards_with_a_manifest_are_fetched_when_first_read(packed: Path, server: Server, tmp_path: Path) -> None:
    url, cache = f"{server.url}/packed/{{000000..000002}}.tar", str(tmp_path / "cache")
    shards = Shards(url, cache=cache)
    assert len(shards) == 7
    assert sorted(server.asked) == ["/packed/index.safetensors", "/packed/manifest.json"]
    np.testing.assert_array_equal(shards.read(4)[0].permute(1, 2, 0).numpy(), image_array(4))
    assert server.asked[2:] == ["/packed/000001.tar"]
    check(shards, list(range(7)))
    check(Shards(url, cache=cache), list(range(7)))
    assert len(server.asked) == 6  # the manifest again, and nothing else
    assert shards.name(6).startswith(f"{server.url}/packed/000002.tar: ")
    assert not list(Path(cache).rglob("*.partial"))


def test_shards_without_a_manifest_are_fetched_at_once_and_said_so(
    folder: Path, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, cache = f"{server.url}/shards/{{000000..000002}}.tar", str(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        shards = Shards(url, cache=cache)
    assert sum("fetching 3 shards" in record.message for record in caplog.records) == 1
    assert [path for path in server.asked if path.endswith(".tar")] == [f"/shards/00000{i}.tar" for i in range(3)]
    check(shards, list(range(6)))
    asked = len(server.asked)
    check(Shards(url, cache=cache), list(range(6)))
    assert server.asked[asked:] == ["/shards/manifest.json"]


def test_shards_of_one_name_in_two_folders_do_not_mix(
    folder: Path, packed: Path, server: Server, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    check(Shards(f"{server.url}/shards/000001.tar", cache=cache), [3])
    check(Shards(f"{server.url}/packed/000001.tar", cache=cache), [3, 4, 5])


def test_a_shard_packed_anew_is_fetched_anew(packed: Path, server: Server, tmp_path: Path) -> None:
    url, cache = f"{server.url}/packed/000000.tar", str(tmp_path / "cache")
    check(Shards(url, cache=cache), [0, 1, 2])
    for path in packed.iterdir():
        path.unlink()
    write_images(tmp_path / "more", 5, first=20)
    pack(str(tmp_path / "more"), packed, PackSettings(shard_size=5, shuffle=False), report=lambda _: None)
    check(Shards(url, cache=cache), [20, 21, 22, 23, 24])


def test_a_cached_set_opens_while_its_host_is_down(packed: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with Server(tmp_path) as running:
        url = f"{running.url}/packed/{{000000..000002}}.tar"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        check(Shards(url, cache=cache), list(range(7)))
        running.shutdown()
        thread.join()
    check(Shards(url, cache=cache), list(range(7)))


def test_what_cannot_be_fetched_is_no_broken_image(packed: Path, server: Server, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(OSError, match=r"cannot fetch http.*/packed/000009\.tar"):
        Shards(f"{server.url}/elsewhere/packed/000009.tar", cache=cache)
    shards = Shards(f"{server.url}/packed/{{000000..000002}}.tar", cache=cache)
    with open(packed / "000001.tar", "ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match="not what the manifest"):
        shards.read(3)
    (packed / "000002.tar").unlink()
    with pytest.raises(OSError, match="cannot fetch"):
        shards.read(6)
    assert shards.read(0)[0].shape == (3, 24, 32)
    assert not list(Path(cache).rglob("*.partial"))


class StallingHandler(http.server.BaseHTTPRequestHandler):
    """Answers, and then sends nothing until its server is asked to end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.server.ended.wait()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


def test_a_host_that_stops_sending_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "STALL_SECONDS", 1)
    monkeypatch.setattr(shard_cache, "RETRIES", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StallingHandler) as server:
        server.ended = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = f"http://127.0.0.1:{server.server_port}/000000.tar"
        try:
            with pytest.raises(OSError, match=f"cannot fetch {url} to .*(timed out|timeout|too slow)"):
                shard_cache.fetch(url, str(tmp_path))
        finally:
            server.ended.set()  # type: ignore[attr-defined]
            server.shutdown()


def test_pipes_and_unknown_schemes(folder: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    check(Shards(f"pipe:cat {folder}/{{000000..000001}}.tar", cache=cache), [0, 1, 2, 3])
    with pytest.raises(OSError, match="cannot fetch pipe:cat"):
        Shards(f"pipe:cat {folder}/missing.tar", cache=cache)
    with pytest.raises(InputError, match=r"'s3://bucket/0\.tar'; accepted: .*pipe"):
        Shards("s3://bucket/0.tar", cache=cache)


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


def test_left_overs_of_a_killed_fetch_are_removed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    url = f"pipe:cat {folder}/000001.tar"
    check(Shards(url, cache=str(cache)), [3])
    [cached] = cache.rglob("shard.tar")
    cached.rename(cached.with_name(".shard.tar.partial"))
    check(Shards(url, cache=str(cache)), [3])
    assert not list(cache.rglob("*.partial"))


def test_without_webdataset_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset.tariterators", None)
    with pytest.raises(InputError, match=r"pip install 'dc-ssdae\[data\]'"):
        Shards(str(folder))


def test_an_unreadable_size_does_not_matter(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = 2**40
        archive.fileobj.write(member.tobuf())  # type: ignore[union-attr]
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    shards = Shards(str(tmp_path))
    with pytest.raises(InputError, match=r"0\.png"):
        shards.read(0)
