"""Images to shards of latents: in parallel over processes, resumable, and the same bytes however it was interrupted."""

import hashlib
import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from dc_ssdae.data.folder import number_classes
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.latents import LATENTS, Store, StoredDtype, tensor_names
from dc_ssdae.data.loader import BrokenImage, ValidationImage, ValidationImages, enlarged_caveat, validation_loader
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.resumable import ShardWriter, identify, write_parts
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, advising_on_memory, counted
from dc_ssdae.latent import DiagonalGaussian, LatentMoments
from dc_ssdae.model_folder import NOT_MEASURED
from dc_ssdae.randomness import named_generator
from dc_ssdae.settings import check_settings, setting

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE


@dataclass(frozen=True)
class LatentSettings:
    """What decides the content of the shards, besides the images and the encoder.

    Args:
        size: side in pixels of the square that is cut from an image's centre, after resizing by the shorter side.
        store: "mean" of the encoder's Gaussian, a "sample" of it, or "mean_std", its mean and standard deviation.
        flip: store the mirrored image's latent too.
        seed: of the samples.
        store_dtype: dtype of the latents in the shards.
        shard_size: images per shard, at most.

    Raises:
        InputError: a setting is unknown or out of range.
    """

    size: int = setting(256, at_least=1)
    store: Store = "mean"
    flip: bool = False
    seed: int = setting(0, at_least=0)
    store_dtype: StoredDtype = "float32"
    shard_size: int = setting(1000, at_least=1)

    def __post_init__(self) -> None:
        check_settings(self, "")


@dataclass(frozen=True)
class LatentEncoder:
    """An encoder of any kind, and what identifies it.

    Args:
        encode: maps uint8 (B, 3, S, S) on the CPU to the Gaussian over (B, c, S/f, S/f), on any device.
        name: what to call the encoder.
        sha256: of everything that the latents depend on, as hexadecimal digits.
        downsample_factor: f.
        latent_channels: c.
        compute_dtype: what the encoder computes in, "float32" for example.
        scaling: scaling_factor, shift_factor, latents_mean and latents_std in the model's config, which pipelines
            undo; nothing stored depends on them.
    """

    encode: Callable[[Tensor], DiagonalGaussian]
    name: str
    sha256: str
    downsample_factor: int
    latent_channels: int
    compute_dtype: str
    scaling: Mapping[str, Any] = field(default_factory=NOT_MEASURED.copy)

    @classmethod
    def of(cls, model: "DCSSDAE", name: str) -> "LatentEncoder":
        """Encode with a model, on its device and in its dtype.

        Args:
            model: in eval mode.
            name: what to call the model.
        """

        def encode(pixels: Tensor) -> DiagonalGaussian:
            with torch.inference_mode():
                return model.encode(to_model_range(pixels.to(model.device))).latent_dist

        config, dtype = model.config, str(model.dtype).removeprefix("torch.")
        scaling = {name: config[name] for name in NOT_MEASURED}
        return cls(encode, name, _sha256(model), config.downsample_factor, config.latent_channels, dtype, scaling)


def _sha256(model: "DCSSDAE") -> str:
    """Hash everything that a model's latents depend on: settings and weights of its encoder, not its decoder."""
    config = {name: model.config[name] for name in ("encoder", "latent_channels", "downsample_factor")}
    return hash_network(config, model.encoder.state_dict())


def hash_network(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Hash settings and weights, to hexadecimal digits of SHA-256."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class LatentWriter(ShardWriter):
    """Encodes the images of one part into shards.

    Args:
        images: to encode, in this order.
        encoder: encodes the images.
        settings: what is stored.
        workers: processes that read images; 0 reads in this one.
    """

    images: ValidationImages
    encoder: LatentEncoder
    settings: LatentSettings
    workers: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the work: the settings, the encoder and the images."""
        is_random, names = self.settings.store == "sample", map(self.images.name, range(self.total))
        return {
            **{name: value for name, value in asdict(self.settings).items() if name != "seed" or is_random},
            "compute_dtype": self.encoder.compute_dtype,
            "model_sha256": self.encoder.sha256,
            "images": self.total,
            **identify(self.images.source, "".join(f"{name}\0" for name in names).encode("utf-8", "surrogateescape")),
        }

    def read(self, places: Sequence[int]) -> Iterator[list[ValidationImage]]:
        """Read images in batches, none of which reaches over the end of a shard."""
        return validation_loader(self.images, places, self.batch_size, self.workers, self.shard_size)

    def write(self, path: Path, images: Iterable[Any], advance: Callable[[int], object]) -> dict[str, Any]:
        """Encode the images of a shard, and write it; gives its report."""
        latents: dict[str, list[Tensor]] = defaultdict(list)
        moments = LatentMoments(self.encoder.latent_channels)
        kept: list[tuple[str, int]] = []
        broken: list[BrokenImage] = []
        enlarged = 0
        for batch in images:
            pixels = torch.stack([image.pixels for image in batch])
            names = [self.images.name(image.place) for image in batch]
            # Broken images are encoded too, so that the others do not depend on them, and then dropped.
            whole = [row for row, image in enumerate(batch) if image.broken is None]
            for flipped, variant in enumerate(tensor_names(self.settings.store, self.settings.flip)):
                stored = [tensor[whole] for tensor in self._encode(pixels, names, bool(flipped))]
                moments.add(DiagonalGaussian(stored[0], 2.0 * stored[1].double().log() if stored[1:] else None))
                for name, tensor in zip(variant, stored, strict=True):
                    latents[name].append(tensor)
            kept += [(names[row], batch[row].label) for row in whole]
            broken += [image.broken for image in batch if image.broken is not None]
            enlarged += sum(image.enlarged for image in batch)
            advance(len(batch))
        table = NameTable.of(name for name, _ in kept)
        tensors = {name: torch.cat(parts) for name, parts in latents.items()}
        tensors["labels"] = torch.tensor([label for _, label in kept], dtype=torch.int64)
        tensors |= {"name_characters": torch.tensor(table.characters), "name_ends": torch.tensor(table.ends)}
        # One entry of metadata alone: the library writes several in an order that changes from run to run.
        path.write_bytes(save(tensors, {"format": LATENTS.manifest_format}))
        report = {"images": len(kept), "unlabelled": sum(label < 0 for _, label in kept), "broken": broken}
        return {**report, "moments": moments.state().tolist(), "enlarged": enlarged}

    def _encode(self, pixels: Tensor, names: Sequence[str], flipped: bool) -> list[Tensor]:
        """Compute what is stored of a batch, on the CPU: the latents and, if stored, their standard deviations."""
        settings = self.settings
        with advising_on_memory(f" with {counted(len(pixels), 'image')} at a time; try fewer, or another dtype"):
            posterior = self.encoder.encode(pixels.flip(-1) if flipped else pixels)
        tensors = [posterior.mean]
        if settings.store != "mean" and posterior.logvar is None:
            raise InputError("this model's encoder gives no variance to store or sample from; store the mean", "store")
        if settings.store == "sample":
            suffix = "\0flipped" if flipped else ""
            tensors = [posterior.sample([named_generator(settings.seed, name + suffix) for name in names])]
        elif posterior.logvar is not None and settings.store == "mean_std":
            tensors.append(torch.exp(0.5 * posterior.logvar.float()))
        stored = [tensor.to(getattr(torch, settings.store_dtype)).cpu() for tensor in tensors]
        for name, *latent in zip(names, *stored, strict=True):
            if not all(tensor.isfinite().all() for tensor in latent):
                raise InputError(f"the latent of {name!r} is infinite or NaN as {settings.store_dtype}", "store_dtype")
        return stored

    def content(self, reports: Sequence[dict[str, Any]], broken: Sequence[dict[str, str]]) -> dict[str, Any]:
        """What the manifest states of the model, the latents and the images."""
        encoder, moments = self.encoder, torch.tensor([report["moments"] for report in reports], dtype=torch.float64)
        model = {name: getattr(encoder, name) for name in ("name", "sha256", "downsample_factor", "latent_channels")}
        return {
            "model": {**model, **encoder.scaling},
            "written_with": {name: importlib.metadata.version(name) for name in ("dc-ssdae", "torch", "torchvision")},
            "latent_shape": [encoder.latent_channels, *2 * [self.settings.size // encoder.downsample_factor]],
            **{key: sum(report[key] for report in reports) for key in ("images", "unlabelled", "enlarged")},
            "classes": self.images.source.classes,
            "broken": broken,
            "statistics": LatentMoments.from_states(moments).statistics().settings(),
        }


def encode_latents(
    parts: Mapping[str, ImageSource],
    destination: str | Path,
    encoder: LatentEncoder,
    settings: LatentSettings,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    processes: Processes | None = None,
    max_broken_share: float = 0.1,
    report: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Encode images into shards, `000000.safetensors` and so on, with a manifest: what `LatentDataset` reads.

    A shard holds the tensors `latents` (N, c, h, w), as the encoder gives them, `labels` int64 (N,), -1 where not
    known, and perhaps `latents_flip`, `latents_std` and `latents_flip_std`. Several processes each write their share
    of the shards. After an interruption, the same call skips the shards that are finished, and leaves the same bytes
    as an uninterrupted run with the same batch size. The manifest is written last.

    Args:
        parts: the images of each part, which becomes a folder of the destination; "" is the destination itself.
        destination: the folder to write to; made if need be, and otherwise empty or begun by this function.
        encoder: encodes the images.
        settings: what is stored.
        limit: images per part, at most, evenly spread over it.
        batch_size: images encoded at a time.
        workers: processes that read images, for each process that encodes; 0 reads in that one.
        processes: that share the work and see the same files; None is this one alone.
        max_broken_share: the largest share of the images of a part that may be broken.
        report: gets a line for each broken image, and other messages.

    Returns:
        The manifest of each part, by the part's name: the content of its manifest.json.

    Raises:
        InputError: the settings do not fit the encoder, the destination holds something else or was begun with other
            settings, too many images are broken, or a latent is not finite. All processes raise it.
        OSError: something cannot be written.
    """
    processes = processes or Processes()
    if settings.size % encoder.downsample_factor:
        raise InputError(f"size {settings.size} is no multiple of this model's f = {encoder.downsample_factor}", "size")
    number_classes(parts.values())
    writers = {}
    for name, source in parts.items():
        images = ValidationImages(source, settings.size, len(source) if limit is None else limit)
        work = Path(destination, name), len(images), settings.shard_size, batch_size, max_broken_share, report
        writers[name] = LatentWriter(LATENTS, *work, images, encoder, settings, workers)
    manifests = write_parts(LATENTS, Path(destination), writers, processes)
    for name, manifest in manifests.items() if processes.is_main else ():
        lines = enlarged_caveat(manifest.get("enlarged", 0), manifest["images"], settings.size)
        if not encoder.scaling.items() <= manifest["model"].items():
            lines.append("manifest.json keeps the scaling from then; the model's has changed since")
        for line in lines:
            report(f"{name}: {line}" if name else line)
    return manifests
