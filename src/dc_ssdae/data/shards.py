"""WebDataset tar shards as a data set with random access: their index, their manifest, and the cache for URLs."""

import contextlib
import glob
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from dc_ssdae import files
from dc_ssdae.data.images import IMAGE_EXTENSIONS, LARGEST_FILE, read_image_bytes
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.optional import import_optional
from dc_ssdae.data.resumable import MANIFEST_FILE, ShardCommand, read_json
from dc_ssdae.errors import InputError, check_type

logger = logging.getLogger(__name__)

INDEX_FILE = "index.safetensors"
_INDEX_TENSORS = ("name_characters", "name_ends", "offsets", "sizes")
PACK = ShardCommand("pack", "dc-ssdae shards", ".tar")

WEB = ("http://", "https://")
STALL_SECONDS, RETRIES = 60, 4
"""A download is started again, at most this often, when nothing has arrived for this long."""


class ShardIndex(NamedTuple):
    """The images of a shard, or of several, in order.

    names: of the members.
    offsets: int64 (N,), in bytes from the start of the shard.
    sizes: int64 (N,), in bytes; -1 for a link or a sparse file, which has no bytes of its own.
    labels: int64 (N,), -1 for an image without one; None if each image's label lies right before it, as `pack` writes.
    """

    names: NameTable
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None = None


class _Shard(NamedTuple):
    """A shard; its images are the rows of `table` from `start` on."""

    url: str
    images: int
    bytes: int | None
    sha256: str | None
    table: ShardIndex
    start: int = 0


class Shards:
    """Tar shards in WebDataset's convention: one image per sample, read in any order without unpacking.

    The places of the images come from the files that `dc-ssdae pack` leaves beside its shards, or else from the tars'
    headers. Shards from URLs are kept whole in a cache: with pack's files, each is fetched when one of its images is
    first read; without them, all are fetched at once. A cached shard is never looked for again at its source, unless
    the manifest there now lists another content.

    Args:
        urls: a folder with *.tar, or the path or URL of shards with WebDataset's {000..127}, or a list of such.
        extensions: which member of a sample is the image ("jpg", "left.png"); None takes the one with an image's
            extension.
        cache: folder for shards from URLs; None is ~/.cache/dc_ssdae/shards.

    Attributes:
        blocks: the number of images in each shard.
        classes: names of the classes that the labels number, as the manifests state them; none where they differ.

    Raises:
        InputError: a shard is missing or damaged, does not fit its manifest, or no shard holds an image.
        OSError: a URL cannot be fetched.
    """

    def __init__(
        self, urls: str | Sequence[str], extensions: Sequence[str] | None = None, cache: str | None = None
    ) -> None:
        extensions = [extensions] if isinstance(extensions, str) else extensions
        self._cache = cache
        self._shards: list[_Shard] = []
        folders: dict[str, tuple[list[str], dict[str, _Shard] | None]] = {}
        for pattern in [urls] if isinstance(urls, str) else urls:
            found = _shard_urls(os.fspath(pattern))
            for url in found:
                folder = sibling(url, MANIFEST_FILE)
                if folder not in folders:
                    folders[folder] = ([], None) if extensions else self._read_folder(folder)
                    if is_url(url) and folders[folder][1] is None:
                        logger.warning("fetching all shards to learn what is in them: %s …", url)
                self._shards.append(self._shard(url, folders[folder][1], extensions))
            missing = set(folders[folder][1] or ()) - set(map(_file_name, found)) if os.path.isdir(pattern) else ()
            if missing:
                raise InputError(f"shard {min(missing)!r}, which {MANIFEST_FILE} lists, is not in {pattern!r}")
        self.blocks = [shard.images for shard in self._shards]
        self._ends = np.cumsum(self.blocks, dtype=np.int64)
        if not sum(self.blocks):
            raise InputError(f"there are no images in the shards {urls!r}")
        classes = [names for names, _ in folders.values()]
        self.classes: list[str] = classes[0] if all(names == classes[0] for names in classes) else []

    def _read_folder(self, manifest_url: str) -> tuple[list[str], dict[str, _Shard] | None]:
        """Read what `pack` left beside shards: the classes, and the shards by name, None without its manifest."""
        path = manifest_url
        if is_url(manifest_url):
            # Shards of other programs have none. If the host is down, what was fetched before may be enough, and if it
            # is not, fetching a shard fails.
            with contextlib.suppress(OSError):
                fetch(manifest_url, self._cache, again=True)
            path = str(cached_file(manifest_url, self._cache))
        if not os.path.exists(path):
            PACK.check_finished(os.path.dirname(path))
            return [], None
        try:
            content = read_json(Path(path))
            if (content.get("format"), content.get("version")) != (PACK.manifest_format, 1):
                return [], None
            classes, sha256 = content.get("classes", []), content["index"]["sha256"]
            check_type("classes", classes, list[str])
            index = Path(self._path(sibling(manifest_url, INDEX_FILE), sha256)).read_bytes()
            characters, *columns = map(load(index).__getitem__, _INDEX_TENSORS)
            table = ShardIndex(NameTable(characters, columns[0]), *columns[1:])
            listed, start = {}, 0
            for shard in content["shards"]:
                listed[shard["name"]] = _Shard("", shard["images"], shard["bytes"], shard["sha256"], table, start)
                start += shard["images"]
            if hashlib.sha256(index).hexdigest() != sha256 or {len(column) for column in columns} != {start}:
                raise InputError(f"the {INDEX_FILE} beside it does not belong to it")
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            raise InputError(f"the manifest {path!r} cannot be used: {error}; pack the images again") from error
        return classes, listed

    def _shard(self, url: str, listed: dict[str, _Shard] | None, extensions: Sequence[str] | None) -> _Shard:
        if listed is None:
            table = scan_tar(self._path(url), extensions)
            return _Shard(url, len(table.names), None, None, table)
        shard = listed.get(_file_name(url))
        if shard is None or (not is_url(url) and os.path.getsize(url) != shard.bytes):
            raise InputError(f"shard {url!r} is not the one in the {MANIFEST_FILE} beside it, by name or size")
        return shard._replace(url=url)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """The shard's path or URL, and the image's name in it."""
        shard, row = self._find(index)
        return f"{shard.url}: {shard.table.names[row]}"

    def relative_name(self, index: int) -> str:
        """The shard's file name and the image's name in it, with a slash between them."""
        shard, row = self._find(index)
        return f"{_file_name(shard.url)}/{shard.table.names[row]}"

    def names_sha256(self) -> str:
        """The SHA-256 of the names of all shards and images."""
        shards = [(_file_name(shard.url), shard.images) for shard in self._shards]
        names = (shard.table.names[shard.start + row] for shard in self._shards for row in range(shard.images))
        return hashlib.sha256(f"{shards!a} {NameTable.of(names).sha256()}".encode()).hexdigest()

    def file_states(self) -> Iterator[object]:
        """What is known of each shard's content: its SHA-256, or size and time; only the size of one from a URL."""
        for shard in self._shards:
            status = None if shard.sha256 else os.stat(self._path(shard.url))
            yield (status.st_size, 0 if is_url(shard.url) else status.st_mtime_ns) if status else shard.sha256

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
        shard, row = self._find(index)
        size, subject = int(shard.table.sizes[row]), f"cannot read image {self.name(index)!r}"
        if not 0 <= size <= LARGEST_FILE:
            raise InputError(f"{subject}: it is a link or sparse, or larger than any image")
        data = self._pread(shard, size, int(shard.table.offsets[row]))
        if len(data) != size:
            raise InputError(f"{subject}: {len(data)} of its {size} bytes are there")
        return data

    def label(self, index: int) -> int:
        """The whole number in the member .cls of the image's sample, -1 where there is none; does not read the image.

        Raises:
            OSError: the image's shard is not there, or cannot be fetched.
        """
        shard, row = self._find(index)
        if shard.table.labels is not None:
            return int(shard.table.labels[row])
        start = max(0, int(shard.table.offsets[row]) - 3 * tarfile.BLOCKSIZE)
        member = self._pread(shard, 2 * tarfile.BLOCKSIZE, start)
        name = f"{_sample_key(shard.table.names[row])[0]}.cls".encode()
        return _as_label(member[tarfile.BLOCKSIZE :]) if member[:100].rstrip(b"\0") == name else -1

    def _find(self, index: int) -> tuple[_Shard, int]:
        """The shard of an image, and the image's place in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, int(index - self._ends[number]) + shard.images + shard.start

    def _pread(self, shard: _Shard, size: int, start: int) -> bytes:
        with open(self._path(shard.url, shard.sha256), "rb") as file:
            return os.pread(file.fileno(), size, start)

    def _path(self, url: str, sha256: str | None = None) -> str:
        """Where a file lies, once it has been fetched if it is from a URL."""
        return str(fetch(url, self._cache, sha256)) if is_url(url) else url


def tar_files(folder: str) -> list[str]:
    """The *.tar directly in a folder, in order, without hidden ones."""
    paths = glob.glob(os.path.join(glob.escape(folder), "*.tar"))
    return sorted(path for path in paths if not os.path.isdir(path))


def _shard_urls(pattern: str) -> list[str]:
    """Expand a folder or a pattern; what is local becomes a path."""
    if pattern.startswith("file:"):
        pattern = urllib.request.url2pathname(urllib.parse.urlsplit(pattern).path)
    if os.path.exists(pattern):
        urls = tar_files(pattern) if os.path.isdir(pattern) else [pattern]
    else:
        try:
            urls = import_optional("webdataset.shardlists").expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise InputError(f"the pattern of shards {pattern!r} cannot be expanded: {error}") from error
    missing = [url for url in urls or [f"{pattern}/*.tar"] if not is_url(url) and not os.path.isfile(url)]
    if missing:
        raise InputError(f"there is no shard {missing[0]!r}; write {{000..127}} for many")
    return urls


def scan_tar(path: str, extensions: Sequence[str] | None = None) -> ShardIndex:
    """Find the images and labels of a tar shard from its headers; the images themselves are not read.

    Members follow WebDataset: those that share a path up to their file name's first dot are one sample.

    Args:
        path: a tar that is not compressed.
        extensions: which member of a sample is the image, by what follows that first dot ("jpg", "left.png"); None
            takes the one that ends in an image's extension.

    Raises:
        InputError: the file is no tar, or damaged, or a sample has two images. One line that names it.
        OSError: it is not there.
    """
    wanted = {extension.lower().lstrip(".") for extension in extensions or ()}
    rows: list[tuple[str, str, int, int]] = []
    samples: set[str] = set()
    labels: dict[str, int] = {}
    try:
        files.check_file(path)
        with open(path, "rb") as file:
            archive = tarfile.TarFile(fileobj=file)
            for member in archive:
                if member.size < 0:  # tarfile would read the members before it again, without end
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                key, extension = _sample_key(member.name)
                if member.isdir() or member.name.rpartition("/")[2].startswith("."):
                    continue
                samples.add(key)
                if extension == "cls" and member.isreg():
                    file.seek(member.offset_data)
                    labels[key] = _as_label(file.read(min(member.size, tarfile.BLOCKSIZE)))
                if extension in wanted or (not wanted and extension.rpartition(".")[2] in IMAGE_EXTENSIONS):
                    if rows and key == rows[-1][0]:
                        second = f"{member.name!r} is the second image of sample {key!r}"
                        raise InputError(f"{second}, whose name ends at its first dot; choose by Shards' extensions")
                    size = member.size if member.isreg() and not member.issparse() else -1
                    rows.append((key, member.name, member.offset_data, size))
            file.seek(archive.offset)
            block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):  # which tarfile takes for the end
            raise tarfile.ReadError(f"there is no header at byte {archive.offset}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"cannot read shard {path!r} as a tar without compression: {error}") from error
    if not block:
        logger.warning("shard %r has no end mark; it may have been cut short", path)
    if len(samples) > len(rows):
        logger.warning("shard %r: %d of %d samples have no image", path, len(samples) - len(rows), len(samples))
    numbers = np.array([(offset, size, labels.get(key, -1)) for key, _, offset, size in rows], np.int64)
    return ShardIndex(NameTable.of(name for _, name, *_ in rows), *numbers.reshape(-1, 3).T)


def _sample_key(name: str) -> tuple[str, str]:
    """Split a member's name into its sample's key and, in lower case, what follows the file name's first dot."""
    key, extension = import_optional("webdataset.tariterators").base_plus_ext(name)
    return key or name, (extension or "").lower()


def _as_label(content: bytes) -> int:
    found = re.fullmatch(rb"\s*(\d{1,18})\s*\0*", content)  # 18 digits fit into 64 bits
    return int(found[1]) if found else -1


def write_index(table: ShardIndex, path: Path) -> str:
    """Write the index of a folder's shards, all in the manifest's order, and give the file's SHA-256."""
    tensors = (table.names.characters, table.names.ends, table.offsets, table.sizes)
    content = save(dict(zip(_INDEX_TENSORS, tensors, strict=True)))
    files.write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def is_url(text: str) -> bool:
    """Whether a shard's name has to be fetched: "scheme://…" or WebDataset's "pipe:command"."""
    return text.startswith("pipe:") or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


def _split(url: str) -> tuple[str, str, str]:
    """A path's or URL's folder with its slash, the file name, and a URL's query; a command is all folder."""
    if url.startswith("pipe:"):
        return url, "", ""
    place, mark, query = url.partition("?") if is_url(url) else (url, "", "")
    folder, slash, name = place.rpartition("/")
    return folder + slash, name, mark + query


def sibling(url: str, name: str) -> str:
    """The path or URL of another file in the same folder; nothing for a command, which has no folder."""
    folder, own_name, query = _split(url)
    return f"{folder}{name}{query}" if own_name else ""


def _file_name(url: str) -> str:
    return _split(url)[1] or url


def cached_file(url: str, cache: str | None, sha256: str | None = None) -> Path:
    """Where the cache has, or will have, what a URL gives.

    Args:
        url: of a shard, or of a file beside shards.
        cache: the cache's folder; None is ~/.cache/dc_ssdae/shards.
        sha256: of the content, if it is known: another content has another place.
    """
    folder, name, query = _split(url)
    content = f"{folder.removesuffix('/')}{query}\n{sha256}"
    key = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(cache or "~/.cache/dc_ssdae/shards").expanduser() / key / re.sub(r"[^\w.-]", "_", name or "shard.tar")


def fetch(url: str, cache: str | None, sha256: str | None = None, again: bool = False) -> Path:
    """Fetch a whole file into the cache, from the web with curl, else with WebDataset's `gopen`, unless it is there.

    It is written beside its place and renamed; of several processes one fetches, and the others wait for it.

    Args:
        url: what `is_url` accepts.
        cache: the cache's folder; None is ~/.cache/dc_ssdae/shards.
        sha256: of the content, if it is known.
        again: fetch it even if it is there.

    Returns:
        The file.

    Raises:
        OSError: it cannot be fetched, or is not what `sha256` says. Not an InputError, for no image is broken.
    """
    from filelock import FileLock

    path = cached_file(url, cache, sha256)
    if not again and path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if again or not path.is_file():
            try:
                # One name for all, because only the lock's holder writes it: a killed process leaves no second one.
                with files.written_beside(path, path.with_name(f".{path.name}.partial")) as beside:
                    _download(url, beside)
                    if sha256 is not None and files.sha256(beside) != sha256:
                        raise OSError("its content is not what the manifest beside it says")
            except (OSError, ValueError) as error:
                raise OSError(f"cannot fetch {url} to {path}: {' '.join(str(error).split())}") from error
    return path


def _download(url: str, path: Path) -> None:
    if not url.lower().startswith(WEB):
        with import_optional("webdataset.gopen").gopen(url) as stream, open(path, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        return
    # Not by gopen, which waits for ever for a host that has stopped sending, and puts the URL into a shell's line.
    options = ["--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30"]
    options += ["--retry", str(RETRIES), "--speed-limit", "1", "--speed-time", str(STALL_SECONDS)]
    done = subprocess.run(["curl", *options, "--output", path, "--", url], capture_output=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace") or f"curl ended with {done.returncode}")
