"""Where training and validation images come from: folders, shards, hub data sets, and a user's own classes."""

import logging
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dc_ssdae.classes import import_class
from dc_ssdae.data.folder import ImageFolder, list_folder, number_classes, warn_of
from dc_ssdae.data.hub import HubDataset, read_item
from dc_ssdae.data.images import reason
from dc_ssdae.data.shards import PACK, WEB, Shards, is_url, tar_files
from dc_ssdae.errors import InputError, unknown_name

logger = logging.getLogger(__name__)

BUILT_IN_SOURCES: Mapping[str, type] = {"ImageFolder": ImageFolder, "Shards": Shards, "HubDataset": HubDataset}

_PARTS = {"train": ("train", "training"), "validation": ("validation", "val", "valid")}
"""Names of a data set's parts and, in lower case, of their folders."""


class ImageSource(Protocol):
    """Random access to images and their labels by index; can be pickled for worker processes.

    `classes` are the names of what the labels number; empty where they are not known. `name(index)` is what to call an
    image in messages: its path, "shard.tar: member", or "dataset[12]". `read(index)` gives an image, uint8 (3, H, W),
    upright RGB, and its label, -1 where it is not known; or raises an InputError with one line that names the image.

    A source in which some orders of reading cost less than others may also have `blocks`: lengths of consecutive runs
    of images that are cheap to read together.
    """

    @property
    def classes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[Tensor, int]: ...


class ImageSources(NamedTuple):
    """The images to train on, and those to evaluate on if there are any."""

    train: ImageSource
    validation: ImageSource | None


def open_sources(
    root: str | None, dataset: Mapping[str, Any] | None, validation: str | Mapping[str, Any] | None, cache: str | None
) -> ImageSources:
    """Open the data sets that a configuration names.

    Args:
        root: a folder, a shard, or a pattern or URL of shards. A folder may hold train/ (or training/) and validation/
            (or val/, valid/), in whatever case; without train/ all of it is training data.
        dataset: in place of root, {class_path, init_args}: ImageFolder, Shards, HubDataset, or a class of the user's
            own as module.Class, whose objects have `__len__` and `__getitem__`, or `__len__`, `read` and `name`.
            Either gives an image, or an image and its label.
        validation: as root or as dataset; goes before what root holds.
        cache: folder for shards from URLs; None is ~/.cache/dc_ssdae/shards.

    Raises:
        InputError: what is named is not there, or cannot be used; one line that names it.
        OSError: a URL cannot be fetched.
    """
    if (root is None) == (dataset is None):
        raise InputError("either data.root or data.dataset must name the images" + (", not both" if root else ""))
    parts = {} if root is None else split_folders(os.path.expanduser(root))
    train = _open(dataset if root is None else parts.get("train", root), cache)
    held_out = validation or parts.get("validation")
    sources = ImageSources(train, _open(held_out, cache) if held_out else None)
    number_classes(sources)
    return sources


def open_path(path: str, cache: str | None) -> ImageSource:
    """Open a folder of images or of shards, or a shard, or a pattern or URL of shards.

    Args:
        path: what to open; all of it is one data set.
        cache: folder for shards from URLs; None is ~/.cache/dc_ssdae/shards.

    Raises:
        InputError: there is nothing of the kind, or it is damaged, or a folder holds both images and shards.
        OSError: a URL cannot be fetched.
    """
    if os.path.isdir(path):
        PACK.check_finished(path)
        shards = [os.path.basename(shard) for shard in tar_files(path)]
        if not shards:
            return ImageFolder(path)
        images, others = list_folder(path)
        if images:
            raise InputError(f"{path!r} holds both shards ({shards[0]!r}) and images ({images[0]!r}); separate them")
        del others[".tar"]
        warn_of(path, others, shards)
    elif not (is_url(path) or path.endswith(".tar") or "{" in path or path.startswith("file:")):
        raise InputError(f"{path!r} is no folder, .tar without compression, pattern like {{000..127}}.tar, or URL")
    return Shards(path, cache=cache)


def check_runs_nothing(data: object, file: Path) -> None:
    """Refuse shards that a command writes, in a file that somebody else may have written.

    Args:
        data: a value of a configuration's section data.
        file: where it stands.

    Raises:
        InputError: names the command.
    """
    if isinstance(data, Mapping) and data.get("class_path") != "HubDataset":  # its hf:// is no command
        data = list(data.values())
    for value in data if isinstance(data, list) else ():
        check_runs_nothing(value, file)
    for part in data.split("::") if isinstance(data, str) else ():
        if is_url(part) and not part.lower().startswith(WEB):
            raise InputError(f"{file} runs the command {part!r}; if you trust it, give it on the command line")


def split_folders(root: str) -> dict[str, str]:
    """Find the parts of a data set's folder, and say which of its folders are in neither.

    Args:
        root: a path or pattern.

    Returns:
        "train" and "validation" with their folders, as far as they are there; nothing where root is not divided.

    Raises:
        InputError: two folders could be the same part, or there are validation images but no train/.
    """
    if not os.path.isdir(root):
        return {}
    folders = sorted(name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name)))
    parts = {part: [name for name in folders if name.lower() in names] for part, names in _PARTS.items()}
    read = [name for found in parts.values() for name in found]
    for part, found in parts.items():
        if len(found) > 1:
            raise InputError(f"{root!r} holds both {'/ and '.join(found)}/; keep one, or name it in data.{part}")
    if read and not parts["train"]:
        raise InputError(f"{root!r} holds {read[0]}/ but no train/; which images are to be trained on?")
    others = [name for name in folders if not name.startswith(".") and name not in read]
    if read and others:
        logger.warning("%r: only %s read; left out: %s", root, " and ".join(read), ", ".join(others[:10]))
    return {part: os.path.join(root, *found) for part, found in parts.items() if found}


def _open(named: Any, cache: str | None) -> ImageSource:
    """Open what a configuration names: a path, or {class_path, init_args}."""
    if isinstance(named, str):
        return open_path(os.path.expanduser(named), cache)
    class_path, settings = named.get("class_path"), dict(named.get("init_args") or {})
    if class_path not in BUILT_IN_SOURCES and "." not in str(class_path):
        raise unknown_name("data set", class_path, [*BUILT_IN_SOURCES, "module.Class"])
    kind = BUILT_IN_SOURCES.get(class_path) or import_class(class_path)
    if kind is Shards:
        settings.setdefault("cache", cache)
    try:
        source = kind(**settings)
    except InputError:
        raise
    except Exception as error:
        accepted = f"; it takes {', '.join(signature(kind).parameters)}" if isinstance(error, TypeError) else ""
        raise InputError(f"{class_path} cannot be built from its init_args: {reason(error)}{accepted}") from error
    return source if class_path in BUILT_IN_SOURCES else _Items(source, class_path)


class _Items:
    """A user's data set: with `read` and `name`, or map-style, as torchvision's and Hugging Face's are."""

    def __init__(self, dataset: Any, class_path: str) -> None:
        self._dataset, self._class = dataset, class_path.rpartition(".")[2]
        self._has_names = hasattr(dataset, "read") and hasattr(dataset, "name")
        readable = self._has_names or hasattr(dataset, "__getitem__")
        if not (readable and hasattr(dataset, "__len__") and len(dataset)):
            raise InputError(f"{class_path} needs a __len__ above 0, and __getitem__ or read and name")
        self.blocks = getattr(dataset, "blocks", [len(dataset)])
        self.classes = [str(name) for name in getattr(dataset, "classes", ())]

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return str(self._dataset.name(index)) if self._has_names else f"{self._class}[{index}]"

    def read(self, index: int) -> tuple[Tensor, int]:
        return read_item(self._dataset.read if self._has_names else self._dataset.__getitem__, index, self.name(index))
