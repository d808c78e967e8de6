"""`dc-ssdae latents`: encodes a data set into safetensors shards of latents."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dc_ssdae.cli.common import complain, load_model, main_first, say_part, select_device
from dc_ssdae.cli.options import BatchOptions, DType, ModelOptions, ShardOptions
from dc_ssdae.errors import InputError
from dc_ssdae.settings import LARGEST_SEED, setting

if TYPE_CHECKING:
    from dc_ssdae.data.sources import ImageSource


@dataclass(kw_only=True)
class Options(ModelOptions, BatchOptions, ShardOptions):
    """Encode a data set once into shards of latents, for training on latents.

    Writes OUT/000000.safetensors and so on, with the tensors latents (N, c, h, w), not normalised, and labels (N,), and
    manifest.json with latent statistics. Read them by dc_ssdae.data.latents.LatentDataset, or by code that reads
    LightningDiT's features. If interrupted, the same command continues where it stopped. To use several processes:
    torchrun --nproc_per_node N -m dc_ssdae latents ...

    Args:
        data: images to encode: a folder of images or shards, which may have subfolders train/ and validation/; a
            pattern of shards; or a YAML file with a section data, such as the config.yaml of a training run.
        out: folder to write to; it is created if it does not exist. If the data have train/ and validation/, the shards
            go to OUT/train and OUT/validation.
        store: what to store of the encoder's Gaussian: its mean, one sample, or its mean and standard deviation, which
            take twice the space and let a reader draw new samples in each epoch.
        flip: also store the latent of the mirrored image, which takes twice the space.
        seed: seed of --store sample; by default 0.
        store_dtype: dtype of the stored latents; by default the same as --dtype.
        split: encode only this part of the data.
        images: largest number of images per part, spread evenly over it; by default all.
        workers: number of processes that read images, per encoding process; by default one per core except one, at most
            8.
    """

    data: str = setting(positional=True, metavar="DATA")
    out: Path = setting(positional=True, metavar="OUT")
    store: Literal["mean", "sample", "mean_std"] = "mean"
    flip: bool = False
    seed: int | None = setting(None, at_least=0, at_most=LARGEST_SEED, metavar="S")
    store_dtype: DType | None = setting(None, name="--store-dtype")
    split: Literal["train", "validation"] | None = None
    images: int | None = setting(None, at_least=1, metavar="N")


def run(options: Options) -> None:
    """Encode the images."""
    if options.seed is not None and options.store != "sample":
        raise InputError(f"--seed is for --store sample; {options.store} is not random")
    device = select_device(options.device)
    from dc_ssdae.data.encode_latents import LatentEncoder, LatentSettings, encode_latents
    from dc_ssdae.data.loader import default_workers
    from dc_ssdae.distributed import Processes
    from dc_ssdae.provenance import name_of_path

    processes = Processes.join(device)
    options.device = str(processes.device)
    seed, store_dtype = options.seed or 0, options.store_dtype or options.dtype
    settings = LatentSettings(options.size, options.store, options.flip, seed, store_dtype, options.shard_size)
    parts = processes.together(lambda: _open_parts(options))
    model = main_first(processes, lambda: load_model(options))
    # Files that others read tell no local path.
    name = (name_of_path(options.model) or "model") if Path(options.model).is_dir() else options.model
    encoder, report = LatentEncoder.of(model, name), partial(complain, options.program)
    workers = default_workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    work: dict[str, Any] = {"workers": workers, "limit": options.images, "batch_size": options.batch}
    work |= options.given("workers", "max_broken_share")
    manifests = encode_latents(parts, options.out, encoder, settings, processes=processes, report=report, **work)
    for part, manifest in manifests.items() if processes.is_main else ():
        unlabelled = manifest["unlabelled"]
        remark = f"; {unlabelled} without a label (-1)" if unlabelled else ""
        say_part(part, options.out / part, manifest, remark)


def _open_parts(options: Options) -> "dict[str, ImageSource]":
    """Open the images of each part, by its name, which is "" if the data has no parts."""
    data, split = options.data, options.split
    from dc_ssdae.classes import importing_from
    from dc_ssdae.data.resumable import check_places
    from dc_ssdae.data.sources import check_runs_nothing, open_sources
    from dc_ssdae.presets import read_yaml
    from dc_ssdae.training.config import DataConfig

    section: Any = {"root": data}
    if data.endswith((".yaml", ".yml")):
        section = read_yaml(Path(data)).get("data")
        if not isinstance(section, dict):
            raise InputError(f"{data} has no section data, as a run's config.yaml has, with root or dataset")
        check_runs_nothing(list(section.values()), Path(data))
    named = DataConfig(**{name: section.get(name) for name in ("root", "dataset", "validation", "cache")})
    if named.root is not None:
        check_places(os.path.expanduser(named.root), options.out)
    with importing_from(Path.cwd()):
        sources = open_sources(named.root, named.dataset, named.validation, options.cache or named.cache)
    found = {"": sources.train} if sources.validation is None else sources._asdict()
    if split is not None and split not in found:
        raise InputError(f"--split is {split}, but the data are not divided into parts")
    return {name: source for name, source in found.items() if split in (None, name)}
