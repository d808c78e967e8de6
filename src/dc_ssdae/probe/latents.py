"""The latents that a probe trains on: those of a folder, without the ones that are held out, in the run's order."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dc_ssdae.data.latents import Latent, LatentDataset
from dc_ssdae.data.order import permutation
from dc_ssdae.errors import InputError
from dc_ssdae.probe.config import LatentsConfig

HELD_OUT, MOST_HELD_OUT = 10, 1000
"""Where there are no validation latents: every tenth is held out, at most so many."""

FEWEST_OF_A_CLASS = 10
"""A class of fewer training images counts as unlabelled, because its label would identify single images."""


@dataclass
class LatentSubset:
    """Some latents of a folder, normalised channel by channel with the statistics of the training folder.

    Args:
        dataset: the folder's.
        indices: of the latents, within the folder.
        classes: labels, within the folder, that the network is told, as 0, 1 and so on; it is told -1 for others.
    """

    dataset: LatentDataset
    indices: Sequence[int]
    classes: Sequence[int]

    def __post_init__(self) -> None:
        self._numbers = {label: number for number, label in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, place: int, epoch: int = 0) -> Latent:
        """Read a latent, mirrored or sampled as in an epoch."""
        latent = self.dataset.read(self.indices[place], epoch)
        return latent._replace(label=self._numbers.get(latent.label, -1))

    def class_name(self, label: int) -> str:
        """The name of a class that the network is told; empty for -1."""
        return "" if label < 0 else self.dataset.classes[self.classes[label]]

    def upright(self) -> "LatentSubset":
        """The same latents, none mirrored."""
        return replace(self, dataset=LatentDataset(self.dataset.folder, False, normalise="channels"))

    def names_sha256(self) -> str:
        """Hash what identifies the latents: their shards, and which of them."""
        shards = [shard["sha256"] for shard in self.dataset.manifest["shards"]]
        return hashlib.sha256(json.dumps([shards, list(self.indices)]).encode()).hexdigest()


class LatentSources(NamedTuple):
    """Training and validation latents, all normalised with the statistics of the training folder."""

    train: LatentSubset
    validation: LatentSubset


def open_latents(data: LatentsConfig) -> LatentSources:
    """Open the latents that a configuration names.

    Raises:
        InputError: a folder holds none, or they differ in shape; or there are too few.
    """
    train = LatentDataset(data.train, normalise="channels")
    kept: Sequence[int] = range(len(train))
    held_out: Sequence[int]
    validation = LatentDataset(data.train if data.validation is None else data.validation, False, normalise="channels")
    if data.validation is not None:
        validation.normalise_as(train)
        if validation.latent_shape != train.latent_shape:
            raise InputError(f"latents in {data.validation} are {validation.latent_shape}, not {train.latent_shape}")
        if validation.classes != train.classes:
            raise InputError(f"{data.validation} has other classes than {data.train}; encode both parts together")
        held_out = range(len(validation))
    else:
        count = min(MOST_HELD_OUT, len(train) // HELD_OUT)
        if count < 1:
            raise InputError(f"{data.train} has {len(train)} latents; a probe needs at least {HELD_OUT}", "data")
        held_out = [place * len(train) // count for place in range(count)]
        chosen = set(held_out)
        kept = [index for index in kept if index not in chosen]
    labels = train.labels()[torch.tensor(kept)]
    counts = torch.bincount(labels[labels >= 0], minlength=1)
    classes = (counts >= FEWEST_OF_A_CLASS).nonzero().flatten().tolist()
    return LatentSources(LatentSubset(train, kept, classes), LatentSubset(validation, held_out, classes))


class LatentBatch(NamedTuple):
    """Some latents of a step: (B, c, h, w) float32, labels and numbers of the draws, int64 (B,); none is broken."""

    latents: Tensor
    labels: Tensor
    draw: Tensor
    broken: tuple[()] = ()


@dataclass
class LatentSamples:
    """The latents of a run by their position among all that it draws, as `dc_ssdae.data.loader.Samples`.

    Args:
        source: the training latents.
        seed: of the run.
        batch_size: of the global batch.
    """

    source: LatentSubset
    seed: int
    batch_size: int
    workers_option: ClassVar[str] = "--workers"

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        epoch, place = divmod(position, len(self.source))
        index = int(permutation((len(self.source),), self.seed, epoch)[place])
        latent = self.source.read(index, epoch)
        return latent.latent, latent.label, position

    def collate(self, examples: Sequence[Any]) -> LatentBatch:
        """Make a batch."""
        return LatentBatch(*default_collate([*examples]))
