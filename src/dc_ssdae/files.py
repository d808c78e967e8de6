"""Files and folders that are written whole or not at all, and what must not be opened as a file of ours."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dc_ssdae.errors import InputError

GIT_LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one in Git's large file storage."""

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF)

GIT_LFS_ADVICE = "it is a Git LFS pointer, not the file itself; run git lfs pull in the repository that it comes from"


def check_file(path: str | Path) -> None:
    """Refuse what can be opened but not read as a file.

    Raises:
        InputError: it is a folder, a pipe or a device, whose reading may never end, or a Git LFS pointer.
        OSError: it is not there, or cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: it is {'a directory' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    if status.st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise InputError(f"{path}: {GIT_LFS_ADVICE}")


@contextlib.contextmanager
def naming(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Let an error of the system name `path` where it names no file, as on a full disk, or what is written for it."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, beside and str(beside)):
            error.filename = str(path)
        raise


def temporary_name(path: Path) -> Path:
    """A name of its own beside `path`, hidden, to write under before the rename."""
    return path.parent / f".{uuid.uuid4().hex}.partial"


def replace_link(link: Path, target: str | Path) -> None:
    """Make a symbolic link, or let it lead elsewhere, by one rename.

    Args:
        link: to make.
        target: relative to the link's folder, so that the folder can be moved.

    Raises:
        OSError: it cannot be made.
    """
    beside = temporary_name(link)
    beside.symlink_to(target, target_is_directory=True)
    os.replace(beside, link)
    sync(link.parent)


@contextlib.contextmanager
def written_beside(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Give the name to write a file under; at the end of the block it takes the file's place, unless something failed.

    Args:
        path: of the file; its folder exists.
        beside: a name in the same folder, for callers that clean up after killed processes; by default a new one.

    Raises:
        OSError: it cannot be written; names the file, also where the system does not, as on a full disk.
    """
    beside = beside or temporary_name(path)
    try:
        with naming(path, beside):
            yield beside
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError, ValueError):  # after the renaming there is nothing left to remove
            beside.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the permissions that it had or new files have, to outlast a power cut.

    Args:
        path: of the file; its folder is made if need be.
        content: of the file.

    Raises:
        OSError: it cannot be written; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():
            beside.chmod(path.stat().st_mode)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_whole` does; numbers that are not finite become null."""
    write_whole(path, f"{json.dumps(finite(value), indent=2, allow_nan=False)}\n".encode())


def finite(value: Any) -> Any:
    """Replace numbers that are not finite, in lists and mappings too, by None, because JSON has no others."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def folder_beside(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Give a new folder to fill and to move to `path`; what is left of it at the end of the block is removed.

    Args:
        path: of the folder; those above it are made if need be.
        beside: a name in the same folder, for callers that clean up after killed processes; by default a new one.

    Raises:
        OSError: the folder cannot be made.
    """
    beside = beside or temporary_name(path)
    beside.mkdir(parents=True)
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk, where the file system can.

    Raises:
        OSError: what was written cannot be kept; some file systems say only now that they are full.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Compute a file's checksum, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
