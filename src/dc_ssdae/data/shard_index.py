"""Where the images of tar shards lie: found from the tars' headers, or kept in the files that `pack` adds to them."""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dc_ssdae.data.folder import COMPANIONS, suffix
from dc_ssdae.data.images import IMAGE_EXTENSIONS
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.optional import import_optional
from dc_ssdae.errors import InputError
from dc_ssdae.files import check_file, write_whole

logger = logging.getLogger(__name__)

MANIFEST_FILE, INDEX_FILE = "manifest.json", "index.safetensors"
UNFINISHED_FOLDER = ".pack"
"""Lies in a folder of shards while `pack` is at work there."""

MANIFEST_FORMAT, MANIFEST_VERSION = "dc-ssdae shards", 1

NOT_PLAIN = -1
"""Size of a member that is a link or sparse: it has no bytes of its own to read."""

_BLOCK = 512  # bytes; a tar is made of blocks


class ShardIndex(NamedTuple):
    """The images of one or more shards, in order.

    names: of the members.
    offsets: int64 (N,), in bytes from the start of the shard.
    sizes: int64 (N,), in bytes; `NOT_PLAIN` where there is nothing to read.
    """

    names: NameTable
    offsets: np.ndarray
    sizes: np.ndarray

    def part(self, start: int, stop: int) -> "ShardIndex":
        """The images from `start` to before `stop`."""
        ends = self.names.ends
        first = int(ends[start - 1]) if start else 0
        last = int(ends[stop - 1]) if stop else 0
        names = NameTable(self.names.characters[first:last], ends[start:stop] - first)
        return ShardIndex(names, self.offsets[start:stop], self.sizes[start:stop])

    @classmethod
    def join(cls, parts: Sequence["ShardIndex"]) -> "ShardIndex":
        """One index of several; at least one."""
        starts = np.cumsum([0] + [len(part.names.characters) for part in parts])
        ends = [part.names.ends + start for part, start in zip(parts, starts, strict=False)]
        names = NameTable(np.concatenate([part.names.characters for part in parts]), np.concatenate(ends))
        return cls(
            names, np.concatenate([part.offsets for part in parts]), np.concatenate([part.sizes for part in parts])
        )


class ShardRecord(NamedTuple):
    """A shard as the manifest states it: file `name`, number of `images`, size in `bytes`, and `sha256`."""

    name: str
    images: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What reading needs of a manifest: the `shards`, the SHA-256 of the index file, and the names of the classes."""

    shards: list[ShardRecord]
    index_sha256: str
    classes: list[str]


def scan_tar(path: str, extensions: Sequence[str] | None = None) -> ShardIndex:
    """Find the images of a tar shard from its headers; the images themselves are not read.

    Members follow WebDataset: those that share a path up to their file name's first dot are one sample. A member
    at the very end whose bytes are cut off is listed, for reading it tells what is wrong.

    Args:
        path: a tar that is not compressed.
        extensions: which member of a sample is the image, by what follows that first dot ("jpg", "left.png"); None
            takes the one that ends in an image's extension.

    Raises:
        InputError: the file is no tar, or damaged, or a sample has two images. One line that names it.
    """
    wanted = None if extensions is None else {extension.lower().lstrip(".") for extension in extensions}
    names: list[str] = []
    places: list[tuple[int, int]] = []
    with_image: set[str] = set()
    key_of_last_image = None
    keys: dict[str, str] = {}  # with the suffix of what each has beside the companions of images
    for member in _members(path):
        if member.name.rpartition("/")[2].startswith("."):
            continue
        key, extension = sample_key(member.name)
        if member.isdir():
            continue
        kind = suffix(member.name)
        if keys.setdefault(key or member.name, kind) in COMPANIONS:
            keys[key or member.name] = kind
        if (extension.rpartition(".")[2] not in IMAGE_EXTENSIONS) if wanted is None else (extension not in wanted):
            continue
        if key == key_of_last_image:
            raise InputError(
                f"shard {path!r}: sample {key!r} has two images, {names[-1]!r} and {member.name!r}; name the one to "
                "take in Shards' extensions. If they are two samples: WebDataset ends a sample's name at the first "
                "dot; rename the files without other dots, or unpack them and use dc-ssdae pack, which does"
            )
        key_of_last_image = key
        with_image.add(key or member.name)
        names.append(member.name)
        plain = member.isreg() and not member.issparse()
        places.append((member.offset_data, member.size if plain else NOT_PLAIN))
    if len(names) < len(keys):
        kinds = Counter(kind for key, kind in keys.items() if key not in with_image)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        logger.warning("shard %r: %d of %d samples have no image: %s", path, kinds.total(), len(keys), told)
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return ShardIndex(NameTable.of(names), offsets.copy(), sizes.copy())


def sample_key(name: str) -> tuple[str | None, str]:
    """Split a member's name into its sample's key, None for no sample's, and what follows the first dot, lower case."""
    key, extension = import_optional("webdataset.tariterators").base_plus_ext(name)
    return key, (extension or "").lower()


def _members(path: str) -> list[tarfile.TarInfo]:
    """Every member of a tar; unlike `tarfile` itself, which takes a damaged header for the end, refuses such a file."""
    subject = f"cannot read shard {path!r}"
    members: list[tarfile.TarInfo] = []
    try:
        check_file(path)
        length = os.path.getsize(path)
        with open(path, "rb") as file:
            try:
                archive = tarfile.TarFile(fileobj=file)
            except tarfile.ReadError as error:
                raise InputError(
                    f"{subject}: it is damaged, or not a tar file without compression ({error})"
                ) from error
            with archive:
                while True:
                    try:
                        member = archive.next()
                    except tarfile.ReadError as error:
                        if members and archive.offset > length:
                            logger.warning(
                                "shard %r is cut short inside %r; what followed is lost", path, members[-1].name
                            )
                            return members
                        raise InputError(f"{subject}: it is damaged at byte {archive.offset} ({error})") from error
                    if member is None:
                        break
                    members.append(member)
                file.seek(archive.offset)
                block = file.read(_BLOCK)
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{subject}: {getattr(error, 'strerror', None) or error}") from error
    if block.strip(b"\0") or 0 < len(block) < _BLOCK:
        raise InputError(f"{subject}: it is damaged, there is no tar header at byte {archive.offset}")
    if not block:
        logger.warning("shard %r has no end mark; it may have been cut short after %r", path, members[-1].name)
    return members


def read_manifest(path: str) -> Manifest | None:
    """Read a manifest that `pack` wrote.

    Returns:
        None where there is none, or one of some other program.

    Raises:
        InputError: it is damaged, or of a later version.
    """
    try:
        check_file(path)
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"the manifest {path!r} cannot be read ({error}); delete it to read the shards without"
        ) from error
    if not isinstance(content, dict) or content.get("format") != MANIFEST_FORMAT:
        return None
    if content.get("version") != MANIFEST_VERSION:
        raise InputError(
            f"the manifest {path!r} is of version {content.get('version')}; this dc-ssdae reads {MANIFEST_VERSION}"
        )
    try:
        shards = [
            ShardRecord(str(shard["name"]), int(shard["images"]), int(shard["bytes"]), str(shard["sha256"]))
            for shard in content["shards"]
        ]
        return Manifest(shards, str(content["index"]["sha256"]), [str(name) for name in content.get("classes", [])])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the manifest {path!r} is damaged ({error!r}); delete it to read the shards without"
        ) from error


def check_finished(folder: str) -> None:
    """Refuse a folder in which `pack` has begun and not finished.

    Raises:
        InputError: there it is at work, or was interrupted.
    """
    if os.path.isdir(os.path.join(folder, UNFINISHED_FOLDER)) and not os.path.exists(
        os.path.join(folder, MANIFEST_FILE)
    ):
        raise InputError(f"dc-ssdae pack has not finished with {folder!r}; run the same command again")


def write_index(index: ShardIndex, path: Path) -> str:
    """Write the index of a folder's shards.

    Args:
        index: of all shards, in the manifest's order.
        path: where to.

    Returns:
        The file's SHA-256.
    """
    from safetensors.numpy import save

    content = save(
        {
            "name_characters": index.names.characters,
            "name_ends": index.names.ends,
            "offsets": index.offsets,
            "sizes": index.sizes,
        }
    )
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def read_index(path: str, manifest: Manifest) -> dict[str, ShardIndex]:
    """Read what `write_index` wrote.

    Returns:
        The index of each of the manifest's shards, by its name.

    Raises:
        InputError: the file is missing or damaged, or does not belong to the manifest.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    subject = f"the index {path!r}"
    try:
        check_file(path)
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.index_sha256:
            raise InputError(f"{subject} does not belong to the {MANIFEST_FILE} beside it; pack the images again")
        arrays: dict[str, Any] = load(content)
        names = NameTable(arrays["name_characters"], arrays["name_ends"])
        whole = ShardIndex(names, arrays["offsets"], arrays["sizes"])
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{subject} cannot be read ({error})") from error
    ends = np.cumsum([shard.images for shard in manifest.shards], dtype=np.int64)
    if (ends[-1] if len(ends) else 0) != len(names):
        raise InputError(f"{subject} does not hold as many images as the {MANIFEST_FILE} beside it")
    return {
        shard.name: whole.part(int(end) - shard.images, int(end))
        for shard, end in zip(manifest.shards, ends, strict=True)
    }


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; none may be writing there."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
