"""Latents that `dc-ssdae latents` wrote, as a data set for training loops."""

import json
import math
import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from dc_ssdae.data.latent_manifest import LatentManifest, LatentShardRecord, tensor_names
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.resumable import MANIFEST_FILE
from dc_ssdae.errors import InputError, check_at_least, check_type, unknown_name
from dc_ssdae.files import check_file, sha256
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.randomness import image_generator

Normalisation = Literal["channels", "global", "scaling", "shift_and_scaling"]
NORMALISATIONS = ("channels", "global", "scaling", "shift_and_scaling")

OPEN_SHARDS = 64
"""Shards that a thread keeps open."""

_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {**{name: getattr(torch, dtype) for dtype, name in _STORED.items()}, "I64": torch.int64, "U8": torch.uint8}


class Latent(NamedTuple):
    """What a training loop gets of an image; a loader's collation makes a batch of the same fields.

    latent: (c, h, w) float32.
    label: number of its class, -1 where it is not known.
    place: of the image in the data set, its index.
    flipped: whether it is of the mirrored image.
    """

    latent: Tensor
    label: int
    place: int
    flipped: bool


class StoredLatent(NamedTuple):
    """What the shards hold of an image, in the dtype they hold it in; None for what is not stored.

    name: of the image in the data set that was encoded.
    label: number of its class, -1 where it is not known.
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


class _Place(NamedTuple):
    """Where a tensor lies in a shard: its type, as the file names it, its shape, and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class _Shard(NamedTuple):
    """A shard that is open: where its tensors lie in its file, its labels and its images' names."""

    file: FileIO
    places: dict[str, _Place]
    labels: Tensor
    names: NameTable


class LatentDataset(Dataset[Latent]):
    """Latents by index, for `torch.utils.data.DataLoader`: read in any order, without loading the shards.

    Which images are mirrored, and the noise of samples, follow from seed, epoch and index alone, however many workers
    read: call `set_epoch` before each epoch. It also reaches workers that live on (`persistent_workers=True`).

    Args:
        folder: that `dc-ssdae latents` wrote, of one part.
        flip: take the mirrored image's latent half of the time; None does so where it is stored.
        sample: sample from the encoder's Gaussian; None does so where mean and standard deviation are stored.
        normalise: with the statistics of these latents, "channels" is (z - latents_mean) / latents_std channel by
            channel, "global" is (z - shift_factor) · scaling_factor; with the numbers of the model's config, which a
            pipeline undoes, "scaling" is z · scaling_factor, "shift_and_scaling" is (z - shift_factor) ·
            scaling_factor; None leaves latents as the encoder gives them.
        seed: of mirroring and sampling.

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
        self.folder = Path(folder)
        check_type("flip", flip, bool | None)
        check_type("sample", sample, bool | None)
        check_at_least(0, seed=seed)
        if normalise is not None and normalise not in NORMALISATIONS:
            raise unknown_name("normalisation", normalise, NORMALISATIONS)
        self.manifest = manifest = LatentManifest.read(self.folder)
        if flip and not manifest.flip:
            raise InputError(
                f"{str(self.folder)!r} holds no mirrored images; encode again with --flip, or leave flip out"
            )
        if sample and manifest.store != "mean_std":
            raise InputError(
                f"{str(self.folder)!r} holds the {manifest.store} of each latent, which cannot be sampled from; encode "
                "again with --store mean_std, or leave sample out"
            )
        for shard in manifest.shards:
            self._check_size(shard)
        self.flip = manifest.flip if flip is None else flip
        self.sample = manifest.store == "mean_std" if sample is None else sample
        self.seed = seed
        self._ends = np.cumsum([shard.images for shard in manifest.shards])
        self._normalisation = None if normalise is None else _shift_and_scale(manifest, normalise)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._opened = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def classes(self) -> list[str]:
        """Names of the classes that the labels number; none where they are not known."""
        return self.manifest.classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of a latent."""
        return self.manifest.shape

    @property
    def statistics(self) -> LatentStatistics:
        """Mean and standard deviation of the latents before they are normalised."""
        return self.manifest.statistics

    def set_epoch(self, epoch: int) -> None:
        """Mirror and sample anew, as it is done in this epoch, from 0; in workers too.

        Raises:
            InputError: the epoch is negative.
        """
        check_at_least(0, epoch=epoch)
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Latent:
        shard, row = self._find(index)
        generator = image_generator(self.seed, int(self._epoch), int(index))
        # Drawn whether it is used or not, so that the noise does not depend on mirroring.
        flipped = bool(torch.rand((), generator=generator) < 0.5) and self.flip
        latent, *std = (self._tensor(shard, name, row) for name in tensor_names(self.manifest.store, flipped))
        z = latent.float()
        if self.sample:
            z = z + std[0].float() * torch.randn(self.latent_shape, generator=generator)
        return Latent(self.normalise(z), self._label(shard, row), int(index), flipped)

    def stored(self, index: int) -> StoredLatent:
        """All that is on the disk of an image, neither mirrored nor sampled nor normalised here."""
        shard, row = self._find(index)
        store, flip = self.manifest.store, self.manifest.flip
        variants = [tensor_names(store, flipped) for flipped in ((False, True) if flip else (False,))]
        tensors = {name: self._tensor(shard, name, row) for names in variants for name in names}
        name, label = self._open(shard).names[row], self._label(shard, row)
        ordered = [tensors.get(key) for key in ("latents_std", "latents_flip", "latents_flip_std")]
        return StoredLatent(name, label, tensors["latents"], *ordered)

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise latents (..., c, h, w) in the way that this data set was asked for."""
        if self._normalisation is None:
            return latents
        shift, scale = (number.to(latents) for number in self._normalisation)
        return (latents - shift) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`: latents (..., c, h, w) as the encoder gives them, for `decode`."""
        if self._normalisation is None:
            return latents
        shift, scale = (number.to(latents) for number in self._normalisation)
        return latents / scale + shift

    def verify(self) -> None:
        """Compare every shard's content with the manifest; takes as long as reading all of it.

        Raises:
            InputError: names the first shard that is damaged.
        """
        for shard in self.manifest.shards:
            self._check_size(shard)
            path = self.folder / shard.name
            if sha256(path) != shard.sha256:
                raise InputError(f"shard {str(path)!r} is damaged: its SHA-256 is not that of {MANIFEST_FILE}")

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of an image, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} latents, none at {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index) - (int(self._ends[shard - 1]) if shard else 0)

    def _label(self, shard: int, row: int) -> int:
        return int(self._open(shard).labels[row])

    def _tensor(self, shard: int, name: str, row: int) -> Tensor:
        opened = self._open(shard)
        return _read(opened.file, opened.places[name], row)

    def _open(self, number: int) -> _Shard:
        # Of each thread its own, so that none closes what another reads.
        shards: OrderedDict[int, _Shard] | None = getattr(self._opened, "shards", None)
        if shards is None:
            shards = self._opened.shards = OrderedDict()
        if number in shards:
            shards.move_to_end(number)
            return shards[number]
        shard = shards[number] = self._read_shard(self.manifest.shards[number])
        if len(shards) > OPEN_SHARDS:
            shards.popitem(last=False)[1].file.close()
        return shard

    def _read_shard(self, record: LatentShardRecord) -> _Shard:
        manifest, path = self.manifest, self.folder / record.name
        self._check_size(record)
        variants = (False, True) if manifest.flip else (False,)
        latents = [name for flipped in variants for name in tensor_names(manifest.store, flipped)]
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            **dict.fromkeys(latents, ((record.images, *manifest.shape), _STORED[manifest.store_dtype])),
            **dict.fromkeys(("labels", "name_ends"), ((record.images,), "I64")),
        }
        # Read, not mapped into memory: a file that another program cuts short would kill the process that maps it.
        file = FileIO(path)
        try:
            with safe_open(path, framework="pt"):  # checks the header and its offsets, reads no tensor
                pass
            length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
            header = json.loads(os.pread(file.fileno(), length, 8))
            places = {
                name: _Place(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in ((name, header[name]) for name in (*expected, "name_characters"))
            }
        except (SafetensorError, OSError, ValueError, LookupError) as error:
            raise InputError(f"shard {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
        for name, (shape, dtype) in expected.items():
            found = places[name]
            if (found.shape, found.dtype) != (shape, dtype):
                raise InputError(
                    f"shard {str(path)!r} does not fit its {MANIFEST_FILE}: {name} is {found.dtype} of shape "
                    f"{found.shape}, not {dtype} of {shape}"
                )
        labels, ends, characters = (_read(file, places[name]) for name in ("labels", "name_ends", "name_characters"))
        return _Shard(file, places, labels, NameTable(characters.numpy(), ends.numpy()))

    def _check_size(self, shard: LatentShardRecord) -> None:
        path = self.folder / shard.name
        if path.exists():
            check_file(path)
        found = path.stat().st_size if path.is_file() else None
        if found != shard.bytes:
            what = "is missing" if found is None else f"has {found} bytes where {MANIFEST_FILE} says {shard.bytes}"
            raise InputError(f"shard {str(path)!r} {what}; encode the images again")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = threading.local()


def _read(file: FileIO, place: _Place, row: int | None = None) -> Tensor:
    """Read a tensor, or one row of it, into memory of its own."""
    shape = place.shape if row is None else place.shape[1:]
    dtype = _DTYPES[place.dtype]
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(os.pread(file.fileno(), size, place.start + (row or 0) * size))
    if len(data) < size:
        raise InputError(f"shard {str(file.name)!r} has been cut short since it was opened; encode the images again")
    return torch.frombuffer(data, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def _shift_and_scale(manifest: LatentManifest, normalise: Normalisation) -> tuple[Tensor, Tensor]:
    """What is subtracted from latents, and what they are then multiplied by, to be normalised: (c, 1, 1) or ()."""
    statistics, model = manifest.statistics, manifest.scaling
    if normalise in ("scaling", "shift_and_scaling"):
        shift = model.shift_factor if normalise == "shift_and_scaling" else 0.0
        return torch.tensor(float(shift)), torch.tensor(float(model.scaling_factor))
    if normalise == "global":
        return torch.tensor(statistics.shift_factor), torch.tensor(statistics.scaling_factor)
    std = torch.tensor(statistics.std, dtype=torch.float64)
    scale = 1.0 / torch.where(std > 0, std, 1.0)
    return torch.tensor(statistics.mean).view(-1, 1, 1), scale.view(-1, 1, 1)
