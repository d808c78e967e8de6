"""A folder of image files, at any depth, as a data set."""

import logging
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from dc_ssdae.data.images import IMAGE_EXTENSIONS, read_bytes, read_image_bytes
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.errors import InputError

logger = logging.getLogger(__name__)

COMPANIONS = frozenset(
    (".cls", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".py", ".safetensors")
) | {".sh", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
"""Suffixes of what usually lies beside images; such files are passed over without a word."""

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_HELD_OUT = frozenset({"val", "valid", "validation", "test", "testing", "dev", "eval", "holdout"})


class ImageFolder:
    """All image files under a folder, in the order of their relative paths, character by character.

    Hidden files and folders are passed over; links are followed, but not in a circle. What has an image's extension
    is in the data set whether it can be read or not. An image's class is the folder that it lies in.

    Args:
        root: the folder: of class folders, of images, or of both.

    Attributes:
        classes: names of the class folders, relative to the root, in order; the labels are their places.

    Raises:
        InputError: there is no such folder, a folder in it cannot be listed, or there is no image in it.
    """

    def __init__(self, root: str) -> None:
        self.root = os.fspath(root)
        images, others = list_folder(self.root)
        if not images:
            looked = f"looked for files that end in .{', .'.join(IMAGE_EXTENSIONS)}, at any depth"
            found = name_counts(others)
            raise InputError(f"there are no images in {self.root!r}; {looked}{found and f'; found {found}'}")
        folders = {name.rpartition("/")[0] for name in images}
        warn_of(self.root, others, folders)
        self._names = NameTable.of(sorted(images))
        self.classes = sorted(folders - {""})

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self._names[index])

    def relative_name(self, index: int) -> str:
        """The file's path in the folder, with forward slashes."""
        return self._names[index]

    def names_sha256(self) -> str:
        """The SHA-256 of all relative names."""
        return self._names.sha256()

    def file_states(self) -> Iterator[tuple[int, int] | None]:
        """Size and modification time of each file, None where it is gone: they tell a file that was replaced."""
        for index in range(len(self)):
            try:
                status = os.stat(self.name(index))
                yield status.st_size, status.st_mtime_ns
            except OSError:
                yield None

    def read(self, index: int) -> tuple[Tensor, int]:
        """Read an image.

        Returns:
            uint8 (3, H, W), upright RGB; and the number of the image's class folder, -1 if it lies in none.

        Raises:
            InputError: it cannot be read, for whatever reason.
        """
        image = read_image_bytes(self.read_bytes(index), self.name(index), interleaved=True)
        folder = self._names[index].rpartition("/")[0]
        return image.pixels, bisect_left(self.classes, folder) if folder else -1

    def read_bytes(self, index: int) -> bytes:
        """The file's content.

        Raises:
            InputError: it cannot be read.
        """
        return read_bytes(self.name(index))


def number_classes(sources: Iterable[object]) -> None:
    """Let a class have one number in all parts of a data set: those that are folders get the classes of all of them."""
    folders = [source for source in sources if isinstance(source, ImageFolder)]
    classes = sorted({name for folder in folders for name in folder.classes})
    for folder in folders:
        folder.classes = classes


def list_folder(root: str) -> tuple[list[str], Counter[str]]:
    """List the files under a folder, at any depth.

    Returns:
        The paths of files with one of `IMAGE_EXTENSIONS`, in upper or lower case, relative to the folder, with forward
        slashes, in no certain order; and how many other files there are, by suffix.

    Raises:
        InputError: there is no such folder, or a folder in it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename!r}: {error.strerror or error}") from error

    images: list[str] = []
    others: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        relative = os.path.relpath(folder, root)
        parts = [] if relative == "." else relative.split(os.sep)
        above = [os.path.join(root, *parts[:depth]) for depth in range(len(parts) + 1)]
        for name in list(subfolders):
            path = os.path.join(folder, name)
            leads_back = os.path.islink(path) and any(os.path.samefile(path, other) for other in above)
            if name.startswith(".") or leads_back:
                subfolders.remove(name)
        for name in files:
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                images.append("/".join([*parts, name]))
            elif not name.startswith("."):
                others[os.path.splitext(name)[1].lower() or "without a suffix"] += 1
    return images, others


def name_counts(others: Counter[str]) -> str:
    """Name the suffixes of files that are passed over, with their numbers; nothing where all are known companions."""
    return ", ".join(f"{count} {kind}" for kind, count in others.most_common() if kind not in COMPANIONS and count > 0)


def warn_of(root: str, others: Counter[str], parts: Collection[str]) -> None:
    """Say which files a data set passes over, and which of its parts were perhaps meant to be kept out of it.

    Args:
        root: of the data set.
        others: how many files are passed over, by suffix.
        parts: names of folders or shards. Nothing is said of "Val", "val2017" or "DIV2K_valid_HR" if all are like that.
    """
    if missed := name_counts(others):
        logger.warning("%r: files passed over: %s; images end in .%s", root, missed, ", .".join(IMAGE_EXTENSIONS))
    words = {name: [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)] for name in parts}
    held_out = sorted(name for name in parts if not _HELD_OUT.isdisjoint(words[name]))
    if 0 < len(held_out) < len(parts):
        found = ", ".join(map(repr, held_out[:8]))
        logger.warning("%r is one data set; if %s are for validation, name them as data.validation", root, found)
