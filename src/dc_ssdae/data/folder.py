"""A folder of image files, at any depth, as a data set."""

import os
import stat
from collections.abc import Iterator, Sequence

from torch import Tensor

from dc_ssdae.data.images import IMAGE_EXTENSIONS, read_image
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.errors import InputError


class ImageFolder:
    """All image files under a folder, in the order of their relative paths, character by character.

    Hidden files and folders are passed over; links are followed, but not in a circle. What has an image's extension
    is in the data set whether it can be read or not.

    Args:
        root: the folder: of class folders, of images, or of both.

    Raises:
        InputError: there is no such folder, a folder in it cannot be listed, or there is no image in it.
    """

    def __init__(self, root: str) -> None:
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            what = "is not a folder" if os.path.exists(self.root) else "does not exist"
            raise InputError(f"the image folder {self.root!r} {what}")
        self._names = NameTable.of(sorted(image_files(self.root)))
        if not len(self._names):
            raise InputError(no_images(self.root))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def blocks(self) -> Sequence[int]:
        """One block: in whatever order files are read, it costs the same."""
        return [len(self)]

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self._names[index])

    def relative_name(self, index: int) -> str:
        """The file's path in the folder, with forward slashes."""
        return self._names[index]

    def read(self, index: int) -> Tensor:
        """Read an image.

        Returns:
            uint8 (3, H, W), upright RGB.

        Raises:
            InputError: it cannot be read, for whatever reason.
        """
        return read_image(self.name(index)).pixels

    def read_bytes(self, index: int) -> bytes:
        """The file's content.

        Raises:
            InputError: it cannot be read.
        """
        path = self.name(index)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
                raise InputError(f"cannot read image {path!r}: it is not a regular file")
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise InputError(f"cannot read image {path!r}: {error.strerror or error}") from error


def image_files(root: str) -> Iterator[str]:
    """List the image files under a folder in no certain order, as relative paths with forward slashes.

    Args:
        root: the folder.

    Yields:
        Paths with one of `IMAGE_EXTENSIONS`, in whatever case; among them folders named like images that hold none,
        and links to nothing.

    Raises:
        InputError: a folder cannot be listed.
    """
    return _image_files(root, "", (_identity(os.stat(root)),))


def _image_files(folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
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
                yield name
            continue
        identity = _identity(entry.stat())
        if identity in ancestors:  # a link back to a folder that this one lies in
            continue
        empty = True
        for file in _image_files(entry.path, f"{name}/", (*ancestors, identity)):
            empty = False
            yield file
        if empty and _named_as_image(entry.name):
            yield name


def no_images(root: str) -> str:
    """Say that a folder holds no images, and what was looked for."""
    return (
        f"there are no images in {root!r}; looked for files that end in .{', .'.join(IMAGE_EXTENSIONS)}, at any depth"
    )


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
