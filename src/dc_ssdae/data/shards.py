"""WebDataset tar shards as a data set with random access."""

import contextlib
import hashlib
import logging
import math
import os
import re
import tarfile
import threading
import urllib.parse
import urllib.request
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dc_ssdae.data.images import LARGEST_FILE, read_image_bytes
from dc_ssdae.data.optional import import_optional
from dc_ssdae.data.shard_cache import cached_file, check_scheme, fetch, is_url, sibling
from dc_ssdae.data.shard_index import (
    INDEX_FILE,
    MANIFEST_FILE,
    NOT_PLAIN,
    Manifest,
    ShardIndex,
    ShardRecord,
    check_finished,
    read_index,
    read_manifest,
    sample_key,
    scan_tar,
)
from dc_ssdae.errors import InputError, counted
from dc_ssdae.files import check_file

logger = logging.getLogger(__name__)

MOST_SHARDS = 10**6
"""A pattern that names more is a slip of the keyboard."""

OPEN_FILES = 96
"""Shards that a thread keeps open: more than the loader mixes, fewer than systems allow."""

_LONGEST_LABEL = 19
"""Bytes; so that it fits into 64 bits."""


class Shard(NamedTuple):
    """A shard: its path or `url`, and its `sha256` where a manifest states it."""

    url: str
    sha256: str | None


class Shards:
    """Tar shards in WebDataset's convention: one image a sample, read in any order without unpacking.

    Where the images lie is taken from the files that `dc-ssdae pack` leaves beside its shards, else from the tars'
    headers. Shards from URLs are kept whole in a cache: with pack's files each when an image of it is first
    read, without them all at once. A cached shard is never looked for again at its source, unless the manifest
    there now lists another content.

    Args:
        urls: a folder with *.tar, or the path or URL of shards with WebDataset's {000..127}, or a list of such.
        extensions: which member of a sample is the image ("jpg", "left.png"); None takes the one with an image's
            extension.
        cache: folder for shards from URLs; None is ~/.cache/dc_ssdae/shards.

    Raises:
        InputError: a shard is missing or damaged, does not fit its manifest, or no shard holds an image.
        OSError: a URL cannot be fetched.
    """

    def __init__(
        self, urls: str | Sequence[str], extensions: Sequence[str] | None = None, cache: str | None = None
    ) -> None:
        if isinstance(extensions, str):
            extensions = [extensions]
        self._cache = cache
        self._shards: list[Shard] = []
        self._classes: list[list[str]] = []
        parts: list[ShardIndex] = []
        for pattern in [urls] if isinstance(urls, str) else urls:
            for folder_shards in _by_folder(_shard_urls(os.fspath(pattern))):
                self._add_folder(folder_shards, parts, extensions)
        counts = [len(part.names) for part in parts]
        self._blocks = counts
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not sum(counts):
            raise InputError(f"there are no images in the shards {urls!r}")
        self._index = ShardIndex.join(parts)
        self._files = threading.local()

    def _add_folder(self, urls: Sequence[str], parts: list[ShardIndex], extensions: Sequence[str] | None) -> None:
        """Index the shards `urls` of one folder, through its manifest if it has one."""
        manifest, indices = (None, {}) if extensions is not None else self._read_manifest(urls)
        self._classes.append(manifest.classes if manifest else [])
        remote = is_url(urls[0])
        if remote and manifest is None:
            logger.warning("fetching %d shards to learn what is in them: %s …", len(urls), urls[0])
        records: dict[str, ShardRecord] = {shard.name: shard for shard in manifest.shards} if manifest else {}
        for url in urls:
            record = records.get(_file_name(url))
            if manifest is not None and record is None:
                raise InputError(f"shard {url!r} is not in the {MANIFEST_FILE} beside it, which lists {len(records)}")
            if record is None:
                parts.append(scan_tar(str(fetch(url, self._cache)) if remote else url, extensions))
            else:
                if not remote:
                    _check_size(url, record)
                parts.append(indices[record.name])
            self._shards.append(Shard(url, record.sha256 if record else None))

    def _read_manifest(self, urls: Sequence[str]) -> tuple[Manifest | None, dict[str, ShardIndex]]:
        """The manifest and index beside the shards of one folder."""
        url = urls[0]
        if not is_url(url):
            folder = os.path.dirname(url)
            manifest = read_manifest(os.path.join(folder, MANIFEST_FILE))
            if manifest is None:
                check_finished(folder)
                return None, {}
            return manifest, read_index(os.path.join(folder, INDEX_FILE), manifest)
        manifest_url, index_url = sibling(url, MANIFEST_FILE), sibling(url, INDEX_FILE)
        if manifest_url is None or index_url is None:
            return None, {}
        try:
            manifest_path = fetch(manifest_url, self._cache, again=True)
        except OSError:
            # Shards of other programs have none. If the host is down, what was fetched before may be enough, and
            # if not, fetching a shard tells.
            manifest_path = cached_file(manifest_url, self._cache)
        manifest = read_manifest(str(manifest_path))
        if manifest is None:
            return None, {}
        return manifest, read_index(str(fetch(index_url, self._cache, manifest.index_sha256)), manifest)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def blocks(self) -> Sequence[int]:
        """The number of images in each shard."""
        return self._blocks

    @property
    def classes(self) -> list[str]:
        """Names of the classes that the labels number, as the manifests tell them; none where they do not agree."""
        return self._classes[0] if all(names == self._classes[0] for names in self._classes) else []

    def name(self, index: int) -> str:
        """The shard's path or URL, and the image's name in it."""
        return f"{self._shards[self._shard_of(index)].url}: {self._index.names[index]}"

    def relative_name(self, index: int) -> str:
        """The shard's file name and the image's name in it, with a slash between them."""
        return f"{_file_name(self._shards[self._shard_of(index)].url)}/{self._index.names[index]}"

    def names_sha256(self) -> str:
        """The SHA-256 of the names of all shards and images."""
        shards = [(_file_name(shard.url), count) for shard, count in zip(self._shards, self._blocks, strict=True)]
        return hashlib.sha256(f"{shards!a} {self._index.names.sha256()}".encode()).hexdigest()

    def file_states(self) -> Iterator[object]:
        """What is known of each shard's content: its SHA-256, or size and time; of one from a URL the size alone."""
        for number, shard in enumerate(self._shards):
            if shard.sha256 is not None:
                yield shard.sha256
            else:
                status = os.stat(self._path(number))
                yield status.st_size, 0 if is_url(shard.url) else status.st_mtime_ns

    def read(self, index: int) -> tuple[Tensor, int]:
        """Read an image.

        Returns:
            uint8 (3, H, W), upright RGB; and the label.

        Raises:
            InputError: it cannot be read, for whatever reason.
            OSError: its shard is not there, or cannot be fetched.
        """
        data = self.read_bytes(index)
        return read_image_bytes(data, self.name(index), interleaved=True).pixels, self.label(index)

    def read_bytes(self, index: int) -> bytes:
        """The image's file as it is in the shard.

        Raises:
            InputError: it is not all there.
            OSError: its shard is not there, or cannot be fetched.
        """
        size = int(self._index.sizes[index])
        if size == NOT_PLAIN:
            raise InputError(f"cannot read image {self.name(index)!r}: it is a link or sparse, not plain bytes")
        if size > LARGEST_FILE:
            raise InputError(f"cannot read image {self.name(index)!r}: {size} bytes are more than an image has")
        file = self._open(self._shard_of(index))
        try:
            data = os.pread(file.fileno(), size, int(self._index.offsets[index]))
        except (OSError, OverflowError, MemoryError) as error:
            raise InputError(f"cannot read image {self.name(index)!r}: {error}") from error
        if len(data) != size:
            raise InputError(f"cannot read image {self.name(index)!r}: {len(data)} of its {size} bytes are there")
        return data

    def label(self, index: int) -> int:
        """The whole number in the member .cls beside the image, -1 where there is none.

        Raises:
            OSError: the image's shard is not there, or cannot be fetched.
        """
        number = self._shard_of(index)
        key, _ = sample_key(self._index.names[index])
        start = 0
        if index > (self._ends[number - 1] if number else 0):  # the members of a sample lie together
            end = int(self._index.offsets[index - 1]) + max(0, int(self._index.sizes[index - 1]))
            start = end + -end % tarfile.BLOCKSIZE
        with open(self._path(number), "rb") as file, contextlib.suppress(tarfile.TarError):
            file.seek(start)
            for member in tarfile.TarFile(fileobj=file):
                member_key, extension = sample_key(member.name)
                if member_key != key and member.offset > self._index.offsets[index]:
                    break
                if member_key == key is not None and extension == "cls" and member.isreg():
                    file.seek(member.offset_data)
                    digits = file.read(min(member.size, _LONGEST_LABEL)).strip()
                    return int(digits) if digits.isdigit() and len(digits) < _LONGEST_LABEL else -1
        return -1

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} images, none at {index}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def _open(self, number: int) -> FileIO:
        # Of each thread its own, so that none closes what another reads. A forked process shares the
        # open files of its parent, which does no harm: pread has no position.
        files: OrderedDict[int, FileIO] | None = getattr(self._files, "opened", None)
        if files is None:
            files = self._files.opened = OrderedDict()
        if number in files:
            files.move_to_end(number)
            return files[number]
        path = self._path(number)
        check_file(path)
        file = files[number] = FileIO(path)
        if len(files) > OPEN_FILES:
            files.popitem(last=False)[1].close()
        return file

    def _path(self, number: int) -> str:
        shard = self._shards[number]
        return str(fetch(shard.url, self._cache, shard.sha256)) if is_url(shard.url) else shard.url

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = threading.local()


def tar_files(folder: str) -> list[str]:
    """The *.tar directly in a folder, in order; hidden ones are passed over.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.path
                for entry in entries
                if entry.name.endswith(".tar") and not entry.name.startswith(".") and not entry.is_dir()
            )
    except OSError as error:
        raise InputError(f"cannot list the folder {folder!r}: {error.strerror or error}") from error


def _shard_urls(pattern: str) -> list[str]:
    """Expand a folder or a pattern; what is local becomes a path."""
    if pattern.startswith("file:"):
        pattern = urllib.request.url2pathname(urllib.parse.urlsplit(pattern).path)
    local = not is_url(pattern)
    if local and os.path.isdir(pattern):
        files = tar_files(pattern)
        manifest = read_manifest(os.path.join(pattern, MANIFEST_FILE))
        present = {os.path.basename(file) for file in files}
        missing = [shard.name for shard in manifest.shards if shard.name not in present] if manifest else []
        if missing:
            raise InputError(
                f"{counted(len(missing), 'shard')} of {MANIFEST_FILE} not found in {pattern!r}: {missing[0]!r} …"
            )
        if not files:
            raise InputError(f"there are no shards in {pattern!r}; looked for *.tar")
        return files
    urls = [pattern] if local and os.path.exists(pattern) else _expand(pattern)
    for url in urls:
        if local and not os.path.isfile(url):
            raise InputError(f"there is no shard {url!r}" + ("; write {000..127} for many" if "*" in url else ""))
        if not local:
            check_scheme(url)
    return urls


def _expand(pattern: str) -> list[str]:
    if not any(mark in pattern for mark in ("{", "::", "$")):
        return [pattern]
    expand_urls = import_optional("webdataset.shardlists").expand_urls
    for part in pattern.split("::"):
        ranges = re.findall(r"{(-?\d+)\.\.(-?\d+)", part)
        if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MOST_SHARDS:
            raise InputError(f"the pattern of shards {pattern!r} names more than {MOST_SHARDS} shards")
    try:
        urls = list(expand_urls(pattern))
    except (ValueError, AssertionError) as error:
        raise InputError(f"the pattern of shards {pattern!r} cannot be expanded: {error}") from error
    url, times = Counter(urls).most_common(1)[0]
    if times > 1:
        raise InputError(f"the pattern of shards {pattern!r} names {url!r} {times} times")
    return urls


def _by_folder(urls: Sequence[str]) -> list[list[str]]:
    """Put the shards of one folder together."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folder = (sibling(url, "") or url) if is_url(url) else os.path.dirname(url)
        folders.setdefault(folder, []).append(url)
    return list(folders.values())


def _file_name(url: str) -> str:
    if url.startswith("pipe:"):
        return url
    return os.path.basename(urllib.parse.urlsplit(url).path if is_url(url) else url)


def _check_size(path: str, record: ShardRecord) -> None:
    check_file(path)
    found = os.stat(path).st_size
    if found != record.bytes:
        raise InputError(
            f"shard {path!r} has {found} bytes where {MANIFEST_FILE} says {record.bytes}; it is damaged, pack it again"
        )
