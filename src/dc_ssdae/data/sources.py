"""Where training and validation images come from: folders, shards, hub data sets, and a user's own classes."""

import inspect
import logging
import operator
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dc_ssdae.classes import import_class
from dc_ssdae.data.folder import ImageFolder, is_held_out, list_folder, number_classes, suffix, warn_of
from dc_ssdae.data.hub import HubDataset
from dc_ssdae.data.images import read_image_bytes, read_pillow_image
from dc_ssdae.data.shard_cache import WEB, is_url
from dc_ssdae.data.shard_index import check_finished
from dc_ssdae.data.shards import Shards, tar_files
from dc_ssdae.errors import InputError, check_type, unknown_name

logger = logging.getLogger(__name__)

BUILT_IN_SOURCES: Mapping[str, type] = {"ImageFolder": ImageFolder, "Shards": Shards, "HubDataset": HubDataset}

_PARTS = {"train": ("train", "training"), "validation": ("validation", "val", "valid")}
"""Names of a data set's parts and, in lower case, of their folders."""


class ImageSource(Protocol):
    """Random access to images and their labels by index; can be pickled for worker processes.

    One in which some orders of reading cost less than others may also have `blocks`: lengths of consecutive runs of
    images that are cheap to read together.
    """

    @property
    def classes(self) -> list[str]:
        """Names of the classes that the labels number; empty where they are not known."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages: its path, "shard.tar: member", or "dataset[12]"."""
        ...

    def read(self, index: int) -> tuple[Tensor, int]:
        """Read an image, uint8 (3, H, W), upright RGB, and its label, -1 where it is not known.

        Raises:
            InputError: the image is broken; one line that names it.
        """
        ...


class ImageSources(NamedTuple):
    """The images to train on, and those to evaluate on if there are any."""

    train: ImageSource
    validation: ImageSource | None


def open_sources(
    root: str | None,
    dataset: Mapping[str, Any] | None,
    validation: str | Mapping[str, Any] | None,
    cache: str | None,
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
    in_root, found = None, None
    if dataset is not None:
        train = _build(dataset, cache)
    else:
        assert root is not None
        root = os.path.expanduser(root)
        parts = split_folders(root)
        train, in_root = open_path(parts.get("train", root), cache), parts.get("validation")
    if isinstance(validation, Mapping):
        found = _build(validation, cache)
    elif validation is not None:
        found = open_path(os.path.expanduser(validation), cache)
    elif in_root is not None:
        found = open_path(in_root, cache)
    number_classes([train, found])
    return ImageSources(train, found)


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
        check_finished(path)
        shards = tar_files(path)
        if not shards:
            return ImageFolder(path)
        listing = list_folder(path)
        if listing.images:
            raise InputError(
                f"{path!r} holds shards ({os.path.basename(shards[0])!r}) and images ({listing.images[0]!r}); "
                "which of them are meant? Move the others elsewhere"
            )
        held_out = [name for name in map(os.path.basename, shards) if is_held_out(name)]
        others = listing.others - Counter({".tar": len(shards)})
        warn_of(path, others, held_out if len(held_out) < len(shards) else [])
        return Shards(path, cache=cache)
    if is_url(path) or path.endswith(".tar") or "{" in path or path.startswith("file:"):
        return Shards(path, cache=cache)
    if os.path.exists(path):
        packed = "; unpack it, or decompress it to a .tar" if suffix(path).startswith(".tar") else ""
        raise InputError(f"{path!r} is neither a folder nor a shard that ends in .tar{packed}")
    raise InputError(
        f"there is no folder {path!r}; shards are named by a folder, a .tar, or a pattern with {{000..127}}"
    )


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
            raise InputError(
                f"{file} reads images by the command {part!r}; if you trust it, give it on the command line"
            )


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
    parts: dict[str, str] = {}
    for part, names in _PARTS.items():
        found = [name for name in folders if name.lower() in names]
        if len(found) > 1:
            both = " and ".join(f"{name}/" for name in found)
            raise InputError(f"{root!r} holds both {both}; keep one of them, or name it in data.{part}")
        if found:
            parts[part] = os.path.join(root, found[0])
    read = [os.path.basename(path) for path in parts.values()]
    if read and "train" not in parts:
        raise InputError(f"{root!r} holds {read[0]}/ but no train/; which images are to be trained on?")
    others = [name for name in folders if not name.startswith(".") and name not in read]
    if read and others:
        logger.warning("%r: only %s read; left out: %s", root, " and ".join(read), ", ".join(others[:10]))
    return parts


def _build(component: Mapping[str, Any], cache: str | None) -> ImageSource:
    """Build a data set from {class_path, init_args}."""
    class_path = component.get("class_path")
    settings = dict(component.get("init_args") or {})
    if not isinstance(class_path, str):
        raise InputError(f"a data set is named by class_path, not by {class_path!r}")
    if "." not in class_path:
        if class_path not in BUILT_IN_SOURCES:
            own = "; a class of your own is named as module.Class"
            raise InputError(f"{unknown_name('data set', class_path, BUILT_IN_SOURCES)}{own}")
        kind = BUILT_IN_SOURCES[class_path]
        _check_settings(class_path, kind, settings)
        if kind is Shards:
            settings.setdefault("cache", cache)
        source: ImageSource = kind(**settings)
        return source
    return _adapt(_make(class_path, import_class(class_path), settings), class_path)


def _check_settings(class_path: str, kind: type, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters
    hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    for name, value in settings.items():
        if name not in parameters:
            raise unknown_name(f"setting of {class_path}", name, parameters)
        check_type(f"{name} of {class_path}", value, hints[name])
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in settings:
            raise InputError(f"{class_path} needs init_args.{name}")


def _make(class_path: str, kind: Any, settings: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(kind).bind(**settings)
    except TypeError as error:
        raise InputError(f"init_args of {class_path} do not fit: {error}") from error
    except ValueError:  # a class written in C may have no signature to look at
        pass
    try:
        return kind(**settings)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{class_path} cannot be built from its init_args: {_told(error)}") from error


def _adapt(dataset: Any, class_path: str) -> ImageSource:
    """Make a source of a user's object."""
    try:
        length = len(dataset)
    except TypeError as error:
        raise InputError(f"{class_path} has no __len__; a run's order needs it") from error
    if length < 1:
        raise InputError(f"{class_path} has no images: its length is {length}")
    has_names = callable(getattr(dataset, "read", None)) and callable(getattr(dataset, "name", None))
    if not has_names and not hasattr(dataset, "__getitem__"):
        raise InputError(f"{class_path} has neither __getitem__ nor read and name; one of them gives the images")
    return _Items(dataset, class_path.rpartition(".")[2], has_names)


class _Items:
    """A user's data set: with `read` and `name`, or map-style, as torchvision's and Hugging Face's are."""

    def __init__(self, dataset: Any, label: str, has_names: bool) -> None:
        self._dataset = dataset
        self._label = label
        self._has_names = has_names
        self.blocks = getattr(dataset, "blocks", [len(dataset)])
        classes = getattr(dataset, "classes", ())
        are_names = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
        self.classes = [str(name) for name in classes] if are_names else []

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return str(self._dataset.name(index)) if self._has_names else f"{self._label}[{index}]"

    def read(self, index: int) -> tuple[Tensor, int]:
        try:
            item = self._dataset.read(index) if self._has_names else self._dataset[index]
        except InputError:
            raise
        except Exception as error:  # the user's code meets broken images with whatever its decoder raises
            raise InputError(f"cannot read image {self.name(index)!r}: {_told(error)}") from error
        return _pixels(item, self.name(index)), _label(item)


def _label(item: Any) -> int:
    """Find the label in a data set's item: a whole number from 0, else -1."""
    if isinstance(item, Mapping):
        label = item.get("label", item.get("labels"))
    else:
        label = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
    try:
        number = operator.index(label)  # of Python, NumPy or PyTorch
    except (TypeError, ValueError):
        return -1
    return number if 0 <= number < 2**63 else -1


def _pixels(item: Any, name: str) -> Tensor:
    """Find the image in a data set's item."""
    if isinstance(item, Mapping):
        if set(item) == {"bytes", "path"} and isinstance(item["bytes"], bytes):  # undecoded, in Hugging Face's way
            return read_image_bytes(item["bytes"], name).pixels
        item = item["image"] if "image" in item else next(iter(item.values()), None)
        return _pixels(item, name) if isinstance(item, Mapping) else _one_image(item, name)
    if isinstance(item, tuple | list):
        item = item[0] if item else None
    return _one_image(item, name)


def _one_image(image: Any, name: str) -> Tensor:
    if isinstance(image, Image.Image):
        return read_pillow_image(image, name).pixels
    pixels = image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
    is_tensor = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == 3
    if is_tensor and pixels.shape[0] == 3 and pixels.numel():
        return pixels.as_subclass(Tensor).detach().cpu()
    found = type(image).__name__
    if isinstance(image, Tensor | np.ndarray):
        found = f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
    raise InputError(
        f"cannot read image {name!r}: it is {found}; it must be a Pillow image, a uint8 tensor (3, H, W) or "
        "a uint8 array (H, W, 3), or an item that begins with one"
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
