"""Latents that `dc-ssdae latents` wrote: the manifest of a folder, and a data set for training loops."""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.resumable import MANIFEST_FILE, ShardCommand, read_json
from dc_ssdae.errors import InputError, check_type, counted, shown
from dc_ssdae.files import check_file, sha256
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.model_folder import NOT_MEASURED
from dc_ssdae.randomness import image_generator
from dc_ssdae.settings import check_value

LATENTS = ShardCommand("latents", "dc-ssdae latents", ".safetensors")

Store = Literal["mean", "sample", "mean_std"]
StoredDtype = Literal["float32", "float16", "bfloat16"]
Normalisation = Literal["channels", "global", "scaling", "shift_and_scaling"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8"}
"""How a shard's header names the dtypes of its tensors."""


class Latent(NamedTuple):
    """What a training loop gets per image; a loader's collation makes a batch of the same fields.

    latent: (c, h, w) float32.
    label: number of its class, -1 if not known.
    place: of the image in the data set, its index.
    flipped: whether the latent is of the mirrored image.
    """

    latent: Tensor
    label: int
    place: int
    flipped: bool


class StoredLatent(NamedTuple):
    """What the shards hold per image, in the dtype they hold it in; None for what is not stored.

    name: of the image in the data set that was encoded.
    label: number of its class, -1 if not known.
    latent: (c, h, w), mean of the encoder's Gaussian, or a sample of it.
    std: (c, h, w), the Gaussian's standard deviation.
    latent_flip: as latent, of the mirrored image.
    std_flip: as std, of the mirrored image.
    """

    name: str
    label: int
    latent: Tensor
    std: Tensor | None
    latent_flip: Tensor | None
    std_flip: Tensor | None


class LatentDataset(Dataset[Latent]):
    """Latents by index, for `torch.utils.data.DataLoader`: read in any order, without loading the shards.

    Which images are mirrored, and the noise of samples, follow from seed, epoch and index alone, however many workers
    read: call `set_epoch` before each epoch. It also reaches workers that live on (`persistent_workers=True`).

    Args:
        folder: that `dc-ssdae latents` wrote, of one part.
        flip: take the mirrored image's latent half of the time; None does so if it is stored.
        sample: sample from the encoder's Gaussian; None does so if mean and standard deviation are stored.
        normalise: with the statistics of these latents, "channels" is (z - latents_mean) / latents_std channel by
            channel, "global" is (z - shift_factor) · scaling_factor; with the numbers of the model's config, which a
            pipeline undoes, "scaling" is z · scaling_factor, "shift_and_scaling" is (z - shift_factor) ·
            scaling_factor; None leaves latents as the encoder gives them.
        seed: of mirroring and sampling.

    Attributes:
        manifest: the content of manifest.json.
        classes: names of the classes that the labels number; none if not known.
        latent_shape: (c, h, w) of a latent.
        statistics: mean and standard deviation of the latents before they are normalised.

    Raises:
        InputError: the folder is of something else, is not finished, or is damaged; or what is asked for is not stored.
    """

    def __init__(
        self,
        folder: str | Path,
        flip: bool | None = None,
        sample: bool | None = None,
        normalise: Normalisation | None = None,
        seed: int = 0,
    ) -> None:
        check_value("normalise", normalise, Normalisation | None, {})
        self.folder = Path(folder)
        self.seed = check_value("seed", seed, int, {"at_least": 0})
        self.manifest = manifest = read_manifest(self.folder)
        store, has_flip = manifest["settings"]["store"], manifest["settings"]["flip"]
        if (flip and not has_flip) or (sample and store != "mean_std"):
            had = f"was encoded with store {store} and flip {has_flip}"
            raise InputError(f"{str(folder)!r} {had}; flip needs --flip, and sample needs --store mean_std")
        self.flip = has_flip if flip is None else flip
        self.sample = store == "mean_std" if sample is None else sample
        self.classes: list[str] = manifest["classes"]
        self.latent_shape: tuple[int, ...] = tuple(manifest["latent_shape"])
        mean, std = (manifest["statistics"][name] for name in ("latents_mean", "latents_std"))
        self.statistics = LatentStatistics(mean, std, manifest["images"])
        self._ends = list(accumulate(shard["images"] for shard in manifest["shards"]))
        self._names = tensor_names(store, has_flip)
        self._shift, self._scale = self._normalisation(normalise)
        self._readers: dict[int, Callable[..., Tensor]] = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._ends[-1]

    def set_epoch(self, epoch: int) -> None:
        """Mirror and sample anew, as it is done in this epoch, from 0; in workers too.

        Raises:
            InputError: the epoch is negative.
        """
        self._epoch.fill_(check_value("epoch", epoch, int, {"at_least": 0}))

    def __getitem__(self, index: int) -> Latent:
        return self.read(index, int(self._epoch))

    def read(self, index: int, epoch: int) -> Latent:
        """Read a latent as it is in an epoch, whatever `set_epoch` said: mirrored or not, and with its noise."""
        read, row = self._find(index)
        generator = image_generator(self.seed, epoch, int(index))
        # Drawn whether it is used or not, so that the noise does not depend on mirroring.
        flipped = bool(torch.rand((), generator=generator) < 0.5) and self.flip
        latent, *std = (read(name, row) for name in self._names[flipped])
        z = latent.float()
        if self.sample:
            z = z + std[0].float() * torch.randn(self.latent_shape, generator=generator)
        return Latent(self.normalise(z), int(read("labels", row)), int(index), flipped)

    def labels(self) -> Tensor:
        """All labels, int64 (N,), without reading the latents."""
        readers = [self._find(end - 1)[0] for end in self._ends]
        return torch.cat([read("labels") for read in readers])

    def stored(self, index: int) -> StoredLatent:
        """All that is on the disk per image, neither mirrored nor sampled nor normalised here."""
        read, row = self._find(index)
        names = NameTable(read("name_characters").numpy(), read("name_ends").numpy())
        tensors = {name: read(name, row) for names in self._names for name in names}
        others = [tensors.get(name) for name in ("latents_std", "latents_flip", "latents_flip_std")]
        return StoredLatent(names[row], int(read("labels", row)), tensors["latents"], *others)

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise latents (..., c, h, w) in the way that this data set was asked for."""
        return (latents - self._shift.to(latents)) * self._scale.to(latents)

    def normalise_as(self, other: "LatentDataset") -> None:
        """Normalise with another data set's statistics from now on, as validation latents are with the training's."""
        self._shift, self._scale = other._shift, other._scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`: latents (..., c, h, w) as the encoder gives them, for `decode`."""
        return latents / self._scale.to(latents) + self._shift.to(latents)

    def verify(self) -> None:
        """Compare every shard's content with the manifest; takes as long as reading all of it.

        Raises:
            InputError: names the first shard that is damaged.
        """
        for shard in self.manifest["shards"]:
            if sha256(self.folder / shard["name"]) != shard["sha256"]:
                raise InputError(f"shard {shard['name']} is damaged: its SHA-256 is not that of {MANIFEST_FILE}")

    def _normalisation(self, normalise: Normalisation | None) -> tuple[Tensor, Tensor]:
        """Choose what is subtracted from latents, and what they are then multiplied by: (c, 1, 1) or ()."""
        if normalise == "channels":
            std = torch.tensor(self.statistics.std, dtype=torch.float64).view(-1, 1, 1)
            return torch.tensor(self.statistics.mean).view(-1, 1, 1), 1.0 / torch.where(std > 0, std, 1.0)
        known = {None: NOT_MEASURED, "global": self.statistics.settings()}
        numbers = known.get(normalise, self.manifest["model"])
        shift = 0.0 if normalise == "scaling" else numbers["shift_factor"]
        return torch.tensor(float(shift)), torch.tensor(float(numbers["scaling_factor"]))

    def _find(self, index: int) -> tuple[Callable[..., Tensor], int]:
        """Find the function that reads an image's shard, and the image's row in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} latents, none at {index}")
        number = bisect_right(self._ends, int(index))
        if number not in self._readers:
            self._readers[number] = _open_shard(self.folder, self.manifest, number)
        return self._readers[number], int(index) - (self._ends[number - 1] if number else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


def tensor_names(store: Store, flip: bool) -> list[list[str]]:
    """Name the tensors of latents and of stored standard deviations, per variant: the image and its mirror image."""
    variants = ("latents", "latents_flip") if flip else ("latents",)
    return [[name, f"{name}_std"] if store == "mean_std" else [name] for name in variants]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest that `dc-ssdae latents` writes last.

    Raises:
        InputError: there is none, or it is damaged, or of another program or version; or the folder is not finished.
    """
    path = folder / MANIFEST_FILE
    LATENTS.check_finished(folder)
    if not path.exists():
        raise InputError(f"{str(folder)!r} holds no latents: {MANIFEST_FILE} is missing; name a folder of one part")
    manifest = read_json(path)
    try:
        _check_manifest(manifest, folder)
    except (OSError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(f"the manifest {str(path)!r} cannot be used: {error}") from error
    return manifest


def _check_entries(content: Mapping[str, Any], **kinds: Any) -> None:
    for name, kind in kinds.items():
        check_value(name, content.get(name), kind, {"at_least": 0})


def _check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    section = dict[str, Any]
    _check_entries(manifest, format=Literal["dc-ssdae latents"], version=Literal[1])
    _check_entries(manifest, settings=section, model=section, statistics=section, shards=list[section])
    _check_entries(manifest["settings"], store=Store, store_dtype=StoredDtype, flip=bool)
    check_type("classes", manifest.get("classes"), list[str])
    channels, *_ = check_value("latent_shape", manifest.get("latent_shape"), tuple[int, int, int], {"at_least": 1})
    for numbers, kind in ((manifest["model"], list[float] | None), (manifest["statistics"], list[float])):
        check_value("scaling_factor", numbers.get("scaling_factor"), float, {"above": 0.0})
        check_value("shift_factor", numbers.get("shift_factor"), float, {})
        for name, limits in (("latents_mean", {}), ("latents_std", {"at_least": 0.0})):
            values = check_value(name, numbers.get(name), kind, limits)
            if values is not None and len(values) != channels:
                raise InputError(f"{name} has {counted(len(values), 'number')}, not {channels}", name)
    for shard in manifest["shards"]:
        _check_entries(shard, name=str, images=int, bytes=int, sha256=str)
        if not re.fullmatch(r"\d+\.safetensors", shard["name"], re.ASCII):
            raise InputError(f"{shard['name']!r} is not the name of a shard")
        check_file(folder / shard["name"])
        if not shard["images"] <= (folder / shard["name"]).stat().st_size == shard["bytes"]:
            raise InputError(f"shard {shard['name']} does not have {shard['bytes']} bytes; encode the images again")
    count = sum(shard["images"] for shard in manifest["shards"])
    if not 0 < count == manifest.get("images"):
        raise InputError(f"its shards have {counted(count, 'image')}, not {shown(manifest.get('images'))}")


def _open_shard(folder: Path, manifest: Mapping[str, Any], number: int) -> Callable[..., Tensor]:
    """Open a shard; returns a function that reads a tensor by its name, or one row, into memory of its own."""
    shard, settings = manifest["shards"][number], manifest["settings"]
    path, count = folder / shard["name"], shard["images"]
    latents = (settings["store_dtype"], [count, *manifest["latent_shape"]])
    expected: dict[str, tuple[str, list[int]]] = {
        **{name: latents for names in tensor_names(settings["store"], settings["flip"]) for name in names},
        **dict.fromkeys(("labels", "name_ends"), ("int64", [count])),
    }
    try:
        file = safe_open(path, framework="pt")  # maps the file into memory, and checks its header
        tensors = {name: file.get_slice(name) for name in (*expected, "name_characters")}
        expected["name_characters"] = ("uint8", [math.prod(tensors["name_characters"].get_shape())])
        for name, (dtype, shape) in expected.items():
            found, wanted = (tensors[name].get_dtype(), tensors[name].get_shape()), (_DTYPES[dtype], shape)
            if found != wanted:
                raise InputError(f"{name} is {found}, not {wanted} as {MANIFEST_FILE} says")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"shard {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error

    def read(name: str, row: int | None = None) -> Tensor:
        return tensors[name][slice(None) if row is None else row].clone()

    return read
