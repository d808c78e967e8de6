"""A folder of image files, at any depth, as a data set."""

import logging
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from dc_ssdae.data.images import IMAGE_EXTENSIONS, check_image_file, read_image
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.errors import InputError

logger = logging.getLogger(__name__)

COMPANIONS = frozenset(
    f".{kind}"
    for kind in ("cls", "csv", "db", "htm", "html", "ini", "json", "jsonl", "log", "md", "py", "safetensors", "sh")
) | {".tsv", ".txt", ".xml", ".yaml", ".yml"}
"""Suffixes of what usually lies beside images; such files are passed over without a word."""

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
        if not os.path.isdir(self.root):
            what = "is not a folder" if os.path.exists(self.root) else "does not exist"
            raise InputError(f"the image folder {self.root!r} {what}")
        listing = list_folder(self.root)
        if not listing.images:
            raise InputError(no_images(self.root, listing.others))
        inside = sum(listing.held_out.values())
        warn_of(self.root, listing.others, [*listing.held_out] if inside < len(listing.images) else [])
        self._names = NameTable.of(sorted(listing.images))
        self.classes = sorted({name.rpartition("/")[0] for name in listing.images} - {""})

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
        """Size and time of change of each file, None where it has gone: what tells a file that was replaced."""
        for index in range(len(self)):
            try:
                status = os.stat(self.name(index))
                yield status.st_size, status.st_mtime_ns
            except OSError:
                yield None

    def label(self, index: int) -> int:
        """The number of the image's class folder, -1 for an image that lies in none."""
        name = self._names[index].rpartition("/")[0]
        return bisect_left(self.classes, name) if name else -1

    def read(self, index: int) -> tuple[Tensor, int]:
        """Read an image.

        Returns:
            uint8 (3, H, W), upright RGB; and the label.

        Raises:
            InputError: it cannot be read, for whatever reason.
        """
        return read_image(self.name(index), interleaved=True).pixels, self.label(index)

    def read_bytes(self, index: int) -> bytes:
        """The file's content.

        Raises:
            InputError: it cannot be read.
        """
        path = self.name(index)
        check_image_file(path)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise InputError(f"cannot read image {path!r}: {error.strerror or error}") from error


def number_classes(sources: Iterable[object]) -> None:
    """Let a class have one number in all parts of a data set: those that are folders get the classes of all of them."""
    folders = [source for source in sources if isinstance(source, ImageFolder)]
    classes = sorted({name for folder in folders for name in folder.classes})
    for folder in folders:
        folder.classes = classes


class Listing(NamedTuple):
    """What lies under a folder.

    images: paths with one of `IMAGE_EXTENSIONS`, in whatever case, relative, with forward slashes, in no certain order;
        among them folders named like images that hold none, and links to nothing.
    others: how many other files there are, by suffix.
    held_out: folders with images whose names are those of validation or test images, and how many they hold.
    """

    images: list[str]
    others: Counter[str]
    held_out: dict[str, int]


def list_folder(root: str) -> Listing:
    """List the files under a folder, at any depth.

    Raises:
        InputError: a folder cannot be listed.
    """
    listing = Listing([], Counter(), {})
    _list(root, "", (_identity(os.stat(root)),), listing)
    return listing


def _list(folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...], listing: Listing) -> None:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise InputError(f"cannot list the folder {folder!r}: {error.strerror or error}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        if not _is_folder(entry):
            if _named_as_image(entry.name):
                listing.images.append(name)
            else:
                listing.others[suffix(entry.name)] += 1
            continue
        identity = _identity(entry.stat())
        if identity in ancestors:  # a link back to a folder that this one lies in
            continue
        before = len(listing.images)
        _list(entry.path, f"{name}/", (*ancestors, identity), listing)
        count = len(listing.images) - before
        if is_held_out(entry.name) and count:
            listing.held_out[name] = count
        if not count and _named_as_image(entry.name):
            listing.images.append(name)


def suffix(name: str) -> str:
    """A file's suffix in lower case, with its dot; that of .tar.gz is the whole of it."""
    found = re.search(r"(\.tar)?\.\w{1,12}$", name.lower())
    return found[0] if found else "(no suffix)"


def is_held_out(name: str) -> bool:
    """Whether a folder's or a shard's name is one of validation or test images: "Val", "val2017", "DIV2K_valid_HR"."""
    return not _HELD_OUT.isdisjoint(word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name))


def name_counts(others: Counter[str]) -> str:
    """Name the suffixes of files that are passed over, with their numbers; nothing where all are known companions."""
    missed = [(kind, count) for kind, count in others.most_common() if kind not in COMPANIONS and count > 0]
    more = f" and {len(missed) - 8} other kinds" if len(missed) > 8 else ""
    return ", ".join(f"{count} {kind}" for kind, count in missed[:8]) + more


def warn_of(root: str, others: Counter[str], held_out: Sequence[str]) -> None:
    """Say which files a data set passes over, and which of its images were perhaps meant to be kept out of it."""
    if missed := name_counts(others):
        logger.warning("%r: files passed over: %s; images end in .%s", root, missed, ", .".join(IMAGE_EXTENSIONS))
    if held_out:
        logger.warning(
            "%r is read as one data set, with %s, named like validation or test images; if they are, keep them apart: "
            "in train/ and validation/, or by data.root and data.validation",
            root,
            ", ".join(map(repr, sorted(held_out)[:8])),
        )


def no_images(root: str, others: Counter[str]) -> str:
    """Say that a folder holds no images, what was looked for, and what is there."""
    looked = f"looked for files that end in .{', .'.join(IMAGE_EXTENSIONS)}, at any depth"
    missed = name_counts(others)
    return f"there are no images in {root!r}; {looked}" + (f"; found {missed}" if missed else "")


def _named_as_image(name: str) -> bool:
    _, dot, extension = name.rpartition(".")
    return bool(dot) and extension.lower() in IMAGE_EXTENSIONS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
