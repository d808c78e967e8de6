"""One safetensors shard of latents: what decides it, its bytes, and the report that says it is finished."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.latent_manifest import (
    LATENTS_FORMAT,
    SHARD_SUFFIX,
    STORED_DTYPES,
    STORES,
    ModelScaling,
    Store,
    tensor_names,
)
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.resumable import ShardCommand, to_json
from dc_ssdae.errors import InputError, check_at_least, counted, is_out_of_memory, unknown_name
from dc_ssdae.files import write_whole
from dc_ssdae.latent import DiagonalGaussian, LatentMoments
from dc_ssdae.randomness import named_generator

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

LATENTS = ShardCommand("latents", LATENTS_FORMAT, SHARD_SUFFIX)

StoredDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class LatentSettings:
    """What decides the shards' content, besides the images and the encoder.

    Args:
        size: side in pixels of the square that is cut from an image's centre, after resizing by the shorter side.
        store: "mean" of the encoder's Gaussian, a "sample" of it, or "mean_std", its mean and standard deviation.
        flip: store the mirrored image's latent too.
        seed: of the samples.
        store_dtype: of the latents in the shards.
        shard_size: images in a shard, at most.

    Raises:
        InputError: a setting is unknown or out of range.
    """

    size: int = 256
    store: Store = "mean"
    flip: bool = False
    seed: int = 0
    store_dtype: StoredDtype = "float32"
    shard_size: int = 1000

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise unknown_name("way to store latents", self.store, STORES)
        if self.store_dtype not in STORED_DTYPES:
            raise unknown_name("dtype of stored latents", self.store_dtype, STORED_DTYPES)
        check_at_least(1, size=self.size, shard_size=self.shard_size)
        check_at_least(0, seed=self.seed)


@dataclass(frozen=True)
class LatentEncoder:
    """What encodes, and by what to know it again.

    Args:
        encode: uint8 (B, 3, S, S) on the CPU to the Gaussian over (B, c, S/f, S/f), on any device.
        name: what to call it.
        sha256: of all that its latents depend on, as hexadecimal digits.
        downsample_factor: f.
        latent_channels: c.
        compute_dtype: what it computes in, "float32" for example.
        scaling: what its config says of the latents' scaling; nothing stored depends on it.
    """

    encode: Callable[[Tensor], DiagonalGaussian]
    name: str
    sha256: str
    downsample_factor: int
    latent_channels: int
    compute_dtype: str
    scaling: ModelScaling = field(default_factory=ModelScaling)

    @classmethod
    def of(cls, model: "DCSSDAE", name: str) -> "LatentEncoder":
        """Encode with a model, on its device and in its dtype.

        Args:
            model: in eval mode.
            name: what to call it.
        """

        def encode(pixels: Tensor) -> DiagonalGaussian:
            with torch.inference_mode():
                return model.encode(to_model_range(pixels.to(model.device))).latent_dist

        config, dtype = model.config, str(model.dtype).removeprefix("torch.")
        scaling = ModelScaling(config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std)
        factor, channels = int(config.downsample_factor), int(config.latent_channels)
        return cls(encode, name, encoder_sha256(model), factor, channels, dtype, scaling)

    def latent_shape(self, settings: LatentSettings) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latents that it will give, found by encoding a black image.

        Raises:
            InputError: the settings do not fit the encoder.
        """
        factor, size = self.downsample_factor, settings.size
        if size % factor:
            larger = size + -size % factor
            raise InputError(f"size {size} is no multiple of this model's f = {factor}; {larger} is")
        posterior = self.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        if posterior.logvar is None and settings.store != "mean":
            raise InputError(f"this model's encoder gives no variance, which {settings.store!r} needs; store the mean")
        channels, height, width = posterior.mean.shape[1:]
        return channels, height, width


def encoder_sha256(model: "DCSSDAE") -> str:
    """The SHA-256 of all that a model's latents depend on: settings and weights of its encoder, not its decoder."""
    config = {name: model.config[name] for name in ("encoder", "latent_channels", "downsample_factor")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentShardReport(NamedTuple):
    """A finished shard; kept beside the shards until all are done, so that a killed run goes on from there.

    unlabelled: how many of its images have no label.
    moments: of its latents, as numbers, from `LatentMoments.state`.
    enlarged: how many of its images were smaller than what is encoded.
    """

    bytes: int
    sha256: str
    images: int
    unlabelled: int
    broken: list[tuple[str, str]]
    moments: list[float]
    enlarged: int = 0


class ImageBatch(NamedTuple):
    """Images of one shard: `pixels` uint8 (B, 3, S, S), blank where the image is broken, else its reason is None.

    `enlarged`: how many were smaller than S.
    """

    pixels: Tensor
    labels: list[int]
    names: list[str]
    broken: list[str | None]
    enlarged: int = 0


class LatentShard:
    """Gathers the latents of one shard's images batch by batch, and writes them.

    Args:
        folder: where to.
        number: of the shard.
        encoder: encodes the images.
        settings: what is stored.
    """

    def __init__(self, folder: Path, number: int, encoder: LatentEncoder, settings: LatentSettings) -> None:
        self._folder, self._number = folder, number
        self._encoder, self._settings = encoder, settings
        self._latents: dict[str, list[Tensor]] = {
            name: [] for flipped in _variants(settings) for name in tensor_names(settings.store, flipped)
        }
        self._names: list[str] = []
        self._labels: list[int] = []
        self._broken: list[tuple[str, str]] = []
        self._enlarged = 0
        self._moments = LatentMoments(encoder.latent_channels)

    def add(self, batch: ImageBatch) -> None:
        """Encode a batch; broken images are encoded too, so that the others do not depend on them, and dropped.

        Raises:
            InputError: a latent is not finite, or memory does not suffice.
        """
        kept = [place for place, reason in enumerate(batch.broken) if reason is None]
        names = [batch.names[place] for place in kept]
        for flipped in _variants(self._settings):
            pixels = batch.pixels.flip(-1) if flipped else batch.pixels
            try:
                tensors = self._encode(pixels, batch.names, flipped)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                fewer = f"out of memory with {counted(len(pixels), 'image')} at a time; try fewer, or another dtype"
                raise InputError(fewer) from error
            stored = [tensor[kept] for tensor in tensors]
            self._check_finite(stored, names)
            for name, tensor in zip(tensor_names(self._settings.store, flipped), stored, strict=True):
                self._latents[name].append(tensor)
            logvar = 2.0 * stored[1].double().log() if len(stored) > 1 else None
            self._moments.add(DiagonalGaussian(stored[0], logvar))
        self._enlarged += batch.enlarged
        self._names += names
        self._labels += [batch.labels[place] for place in kept]
        self._broken += [
            (name, reason) for name, reason in zip(batch.names, batch.broken, strict=True) if reason is not None
        ]

    def write(self) -> LatentShardReport:
        """Write the shard, whole or not at all, and its report.

        Raises:
            OSError: it cannot be written.
        """
        table = NameTable.of(self._names)
        tensors = {
            **{name: torch.cat(parts) for name, parts in self._latents.items()},
            "labels": torch.tensor(self._labels, dtype=torch.int64),
            "name_characters": torch.tensor(table.characters),
            "name_ends": torch.tensor(table.ends),
        }
        # One entry alone: the library writes several in an order that changes from run to run.
        content = save(tensors, {"format": LATENTS_FORMAT})
        unlabelled = sum(label < 0 for label in self._labels)
        shard = LatentShardReport(
            len(content),
            hashlib.sha256(content).hexdigest(),
            len(self._names),
            unlabelled,
            self._broken,
            self._moments.state().tolist(),
            self._enlarged,
        )
        # A shard is finished when both are there and the report states its size.
        write_whole(LATENTS.report_path(self._folder, self._number), to_json(shard._asdict()))
        write_whole(LATENTS.shard_path(self._folder, self._number), content)
        return shard

    def _encode(self, pixels: Tensor, names: Sequence[str], flipped: bool) -> list[Tensor]:
        """What is stored of some images, on the CPU: a latent, and its standard deviation if that is stored."""
        settings = self._settings
        posterior = self._encoder.encode(pixels)
        if settings.store == "sample":
            tensors = [posterior.sample([noise_generator(settings.seed, name, flipped) for name in names])]
        elif posterior.logvar is not None and settings.store == "mean_std":
            tensors = [posterior.mean, torch.exp(0.5 * posterior.logvar.float())]
        else:
            tensors = [posterior.mean]
        dtype = getattr(torch, settings.store_dtype)
        return [tensor.to(dtype).cpu() for tensor in tensors]

    def _check_finite(self, stored: Sequence[Tensor], names: Sequence[str]) -> None:
        for tensor in stored:
            finite = tensor.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                name = names[int((~finite).nonzero()[0])]
                raise InputError(
                    f"the latent of {name!r} is infinite or NaN as {self._settings.store_dtype}, computed in "
                    f"{self._encoder.compute_dtype}"
                )


def noise_generator(seed: int, name: str, flipped: bool) -> torch.Generator:
    """Make the generator of the noise that an image's stored sample is drawn with.

    Args:
        seed: of the data set.
        name: of the image.
        flipped: whether the image is mirrored.
    """
    return named_generator(seed, f"{name}\0flipped" if flipped else name)


def read_latent_report(folder: Path, number: int) -> LatentShardReport | None:
    """The report of a shard that is finished."""
    content: dict[str, Any] | None = LATENTS.read_report(folder, number)
    if content is None:
        return None
    found = LatentShardReport(**content)
    return found._replace(broken=[(name, reason) for name, reason in found.broken])


def _variants(settings: LatentSettings) -> tuple[bool, ...]:
    """Whether mirrored, for each time that an image is encoded."""
    return (False, True) if settings.flip else (False,)
