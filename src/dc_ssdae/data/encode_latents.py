"""Images to shards of latents: in parallel over processes, resumable, and the same bytes however it was interrupted."""

import hashlib
import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import default_collate

from dc_ssdae.data.folder import number_classes
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.latents import LATENTS, LATENTS_FORMAT, LATENTS_VERSION, Store, StoredDtype, tensor_names
from dc_ssdae.data.loader import BrokenImage, ValidationImage, ValidationImages, enlarged_caveat, read_batches
from dc_ssdae.data.name_table import NameTable
from dc_ssdae.data.resumable import check_broken, files_sha256, to_json
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, advising_on_memory, counted
from dc_ssdae.files import write_whole
from dc_ssdae.latent import DiagonalGaussian, LatentMoments
from dc_ssdae.model_folder import NOT_MEASURED
from dc_ssdae.randomness import named_generator
from dc_ssdae.settings import check_settings, setting

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

Batch = tuple[Tensor, list[ValidationImage]]
"""Images of a shard: their pixels, and what else is known of each."""


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
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class LatentWriter:
    """Writes the shards of one part.

    Args:
        images: to encode, in this order.
        folder: to write to.
        encoder: encodes the images.
        settings: what is stored.
        max_broken_share: the largest share of broken images that is accepted.
        report: gets a line for each broken image.
    """

    images: ValidationImages
    folder: Path
    encoder: LatentEncoder
    settings: LatentSettings
    max_broken_share: float
    report: Callable[[str], None]

    @cached_property  # what is found before the images are read holds for all of them
    def identity(self) -> dict[str, Any]:
        """What identifies the work: the settings, the encoder and the images."""
        source, is_random = self.images.source, self.settings.store == "sample"
        return {
            **{name: value for name, value in asdict(self.settings).items() if name != "seed" or is_random},
            "compute_dtype": self.encoder.compute_dtype,
            "model_sha256": self.encoder.sha256,
            "images": len(self.images),
            "names_sha256": _text_sha256("".join(f"{self.images.name(place)}\0" for place in range(len(self.images)))),
            "files_sha256": files_sha256(source),
            "classes_sha256": _text_sha256("\0".join(source.classes)),
        }

    def begin(self) -> dict[str, Any] | None:
        """Prepare the folder; returns the manifest if the folder is finished already."""
        return LATENTS.begin(self.folder, self.identity)

    def reports(self) -> list[dict[str, Any] | None]:
        """The report of each shard, in order; None for a shard that is not finished."""
        count = -(-len(self.images) // self.settings.shard_size)
        return [LATENTS.read_report(self.folder, number) for number in range(count)]

    def write(self, numbers: Sequence[int], batch_size: int, workers: int, **bar: Any) -> Iterator[None]:
        """Write shards one by one, and report broken images; no batch reaches over the end of a shard."""
        from tqdm import tqdm

        places, size = range(len(self.images)), self.settings.shard_size
        shards = [places[number * size : (number + 1) * size] for number in numbers]
        batches = [list(shard[i : i + batch_size]) for shard in shards for i in range(0, len(shard), batch_size)]
        option, batch_bytes = self.images.workers_option, batch_size * 3 * self.images.image_size**2
        stream = read_batches(self.images, _collate, workers, option, batch_bytes, batch_sampler=batches)
        progress = tqdm(total=sum(map(len, shards)), unit="image", **bar)
        broken: list[BrokenImage] = []
        for number, shard in zip(numbers, shards, strict=True):
            broken += self._write_shard(number, islice(stream, -(-len(shard) // batch_size)), progress.update)
            check_broken(broken, len(self.images), self.max_broken_share)
            yield

    def _write_shard(self, number: int, batches: Iterable[Batch], advance: Callable[[int], Any]) -> list[BrokenImage]:
        """Encode the images of a shard, and write the shard and its report; returns the broken images."""
        latents: dict[str, list[Tensor]] = defaultdict(list)
        moments = LatentMoments(self.encoder.latent_channels)
        images: list[ValidationImage] = []
        for pixels, batch in batches:
            images += batch
            advance(len(batch))
            # Broken images are encoded too, so that the others do not depend on them, and then dropped.
            whole = [row for row, image in enumerate(batch) if image.broken is None]
            for flipped, variant in enumerate(tensor_names(self.settings.store, self.settings.flip)):
                stored = [tensor[whole] for tensor in self._encode(pixels, batch, bool(flipped))]
                moments.add(DiagonalGaussian(stored[0], 2.0 * stored[1].double().log() if stored[1:] else None))
                for name, tensor in zip(variant, stored, strict=True):
                    latents[name].append(tensor)
        kept = [image for image in images if image.broken is None]
        broken = [image.broken for image in images if image.broken is not None]
        for name, reason in broken:
            self.report(f"left out: {reason if name in reason else f'{name}: {reason}'}")
        table = NameTable.of(self.images.name(image.place) for image in kept)
        tensors = {name: torch.cat(parts) for name, parts in latents.items()}
        tensors["labels"] = torch.tensor([image.label for image in kept], dtype=torch.int64)
        tensors |= {"name_characters": torch.tensor(table.characters), "name_ends": torch.tensor(table.ends)}
        # One entry of metadata alone: the library writes several in an order that changes from run to run.
        content = save(tensors, {"format": LATENTS_FORMAT})
        report = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "images": len(kept),
            "unlabelled": sum(image.label < 0 for image in kept),
            "broken": broken,
            "moments": moments.state().tolist(),
            "enlarged": sum(image.enlarged for image in kept),
        }
        # A shard is finished when both are there and the report states its size.
        write_whole(LATENTS.report_path(self.folder, number), to_json(report))
        write_whole(LATENTS.shard_path(self.folder, number), content)
        return broken

    def _encode(self, pixels: Tensor, batch: Sequence[ValidationImage], flipped: bool) -> list[Tensor]:
        """Compute what is stored of a batch, on the CPU: the latents and, if stored, their standard deviations."""
        settings, names = self.settings, [self.images.name(image.place) for image in batch]
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

    def finish(self) -> dict[str, Any]:
        """Put the reports together and, as the last thing, write the manifest."""
        found = enumerate(self.reports())
        shards = [{"name": LATENTS.shard_path(self.folder, i).name, **report} for i, report in found if report]
        images = sum(shard["images"] for shard in shards)
        broken = [image for shard in shards for image in shard["broken"]]
        check_broken(broken, len(self.images), self.max_broken_share)
        if images + len(broken) < len(self.images):
            raise InputError(f"shards have gone from {str(self.folder)!r}; run the same command again")
        encoder, moments = self.encoder, torch.tensor([shard["moments"] for shard in shards], dtype=torch.float64)
        model = {name: getattr(encoder, name) for name in ("name", "sha256", "downsample_factor", "latent_channels")}
        manifest = {
            "format": LATENTS_FORMAT,
            "version": LATENTS_VERSION,
            "settings": self.identity,
            "model": {**model, **encoder.scaling},
            "written_with": {name: importlib.metadata.version(name) for name in ("dc-ssdae", "torch", "torchvision")},
            "latent_shape": [encoder.latent_channels, *2 * [self.settings.size // encoder.downsample_factor]],
            "images": images,
            "unlabelled": sum(shard["unlabelled"] for shard in shards),
            "enlarged": sum(shard["enlarged"] for shard in shards),
            "classes": self.images.source.classes,
            "broken": [{"name": name, "reason": reason} for name, reason in broken],
            "statistics": LatentMoments.from_states(moments).statistics().settings(),
            "shards": [{key: shard[key] for key in ("name", "images", "bytes", "sha256")} for shard in shards],
        }
        LATENTS.finish(self.folder, manifest)
        return manifest


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _collate(images: Sequence[ValidationImage]) -> Batch:
    """Make one tensor of the pixels: each takes a descriptor of its own on its way from a worker."""
    return default_collate([image.pixels for image in images]), [image._replace(pixels=None) for image in images]  # type: ignore[arg-type]


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
        writers[name] = LatentWriter(images, Path(destination, name), encoder, settings, max_broken_share, report)
    with ExitStack() as locked:
        processes.on_main(lambda: locked.enter_context(LATENTS.lock(Path(destination))))
        manifests: dict[str, Any] = processes.on_main(lambda: {name: writers[name].begin() for name in writers})
        for name, writer in writers.items():
            manifest, lines = manifests[name], []
            if manifest is None:
                missing = [number for number, done in enumerate(processes.on_main(writer.reports)) if done is None]
                own = [missing[place] for place in processes.share(len(missing))]
                shards = writer.write(own, batch_size, workers, desc=name, disable=None if processes.is_main else True)
                for _ in range(0, len(missing), processes.count):  # together: what fails in one process ends all
                    processes.together(partial(next, shards, None))
                manifest = manifests[name] = processes.on_main(writer.finish)
            else:
                lines = [f"{str(writer.folder)!r} is finished already; nothing to do"]
                if not encoder.scaling.items() <= manifest["model"].items():
                    lines[0] += "; manifest.json keeps the scaling from then; the model's has changed since"
            lines += enlarged_caveat(manifest.get("enlarged", 0), manifest["images"], settings.size)
            for line in lines if processes.is_main else ():
                report(f"{name}: {line}" if name else line)
    return manifests
