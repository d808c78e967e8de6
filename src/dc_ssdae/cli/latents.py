"""`dc-ssdae latents`: a data set to safetensors shards of its latents, for training loops."""

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    DTYPES,
    add_batch_option,
    add_model_options,
    add_shard_options,
    add_size_option,
    add_workers_option,
    complain,
    load_model,
    say_part,
    select_device,
    told_by_one_process,
)
from dc_ssdae.cli.parser import LARGEST_SEED, CommandParser, file_path, filled, whole_number
from dc_ssdae.errors import InputError, check_type

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.data.sources import ImageSource
    from dc_ssdae.distributed import Processes

_YAML_SUFFIXES = (".yaml", ".yml")

_DATA_TYPES = {
    "root": str | None,
    "dataset": dict[str, Any] | None,
    "validation": str | dict[str, Any] | None,
    "cache": str | None,
}


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae latents",
        description="Encode a data set once: writes OUT/000000.safetensors and so on, with the tensors latents (N, c, "
        "h, w), as the encoder gives them, and labels (N,), and a manifest.json with their statistics. "
        "dc_ssdae.data.latents.LatentDataset reads them, and so does whatever reads LightningDiT's features. "
        "Interrupted at any time, the same command goes on where it stopped. Several processes share the shards: "
        "torchrun --nproc_per_node N -m dc_ssdae latents ...",
    )
    parser.add_argument(
        "data",
        type=filled,
        metavar="DATA",
        help="images, as data.root of a training run: a folder, perhaps with train/ and validation/, of images or "
        "shards; or a pattern of shards; or a YAML file whose section data names them, as a run's config.yaml",
    )
    parser.add_argument(
        "out",
        type=file_path,
        metavar="OUT",
        help="folder to write to; made if need be. Of data with train/ and validation/, OUT/train and OUT/validation",
    )
    add_model_options(parser)
    add_size_option(parser)
    parser.add_argument(
        "--store",
        choices=("mean", "sample", "mean_std"),
        default="mean",
        help="of the encoder's Gaussian, its mean, one sample, or mean and standard deviation, from which a reader "
        "samples anew each epoch, at twice the size (default mean)",
    )
    parser.add_argument("--flip", action="store_true", help="store the mirrored image's latent too, at twice the size")
    parser.add_argument("--seed", type=whole_number(0, LARGEST_SEED), metavar="S", help="of --store sample (default 0)")
    parser.add_argument(
        "--store-dtype", choices=DTYPES, help="of the latents in the shards (default: what --dtype computes in)"
    )
    parser.add_argument("--split", choices=("train", "validation"), help="encode this part of the data alone")
    parser.add_argument(
        "--images",
        type=whole_number(1),
        metavar="N",
        help="how many to encode of each part, at most, evenly spread over it (default: all)",
    )
    add_batch_option(parser)
    add_workers_option(parser, "processes that read images, for each that encodes")
    add_shard_options(parser)
    return parser


@told_by_one_process
def run(args: Namespace) -> int:
    """Encode the images; gives the exit code."""
    if args.seed is not None and args.store != "sample":
        raise InputError(f"--seed is for --store sample; {args.store} is not random")
    device = select_device(args.device)
    from dc_ssdae.data.encode_latents import encode_latents
    from dc_ssdae.data.latent_shard import LatentEncoder, LatentSettings
    from dc_ssdae.data.loader import default_workers
    from dc_ssdae.distributed import Processes

    processes = Processes.join(device)
    if processes.count > 1 and device.type == "cuda":
        args.device = str(processes.device)
    settings = LatentSettings(
        args.size, args.store, args.flip, args.seed or 0, args.store_dtype or args.dtype, args.shard_size
    )
    parts = processes.together(lambda: _open_parts(args.data, args.out, args.cache))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    done = encode_latents(
        parts,
        args.out,
        LatentEncoder.of(_load(args, processes), _model_name(args.model)),
        settings,
        only=args.split,
        limit=args.images,
        batch_size=args.batch,
        workers=default_workers(here) if args.workers is None else args.workers,
        processes=processes,
        max_broken_share=args.max_broken_share,
        report=lambda line: complain(args.program, line),
    )
    for part in done if processes.is_main else ():
        say_part(part, f"; {part.unlabelled} without a label (-1)" if part.unlabelled else "")
    return 0


def _load(args: Namespace, processes: "Processes") -> "DCSSDAE":
    """The model; what is to be downloaded, the main process downloads, and the others find."""
    first = processes.together(lambda: load_model(args) if processes.is_main else None)
    return processes.together(lambda: first or load_model(args))


def _model_name(model: str) -> str:
    """What to call the model where others read it: no local path."""
    from dc_ssdae.provenance import name_of_path

    return (name_of_path(model) or "model") if Path(model).is_dir() else model


def _open_parts(data: str, out: Path, cache: str | None) -> "dict[str, ImageSource]":
    """The images of each part, by its name; "" where the data is not divided."""
    from dc_ssdae.data.resumable import check_places
    from dc_ssdae.data.sources import check_runs_nothing, open_path, open_sources, split_folders

    if not data.endswith(_YAML_SUFFIXES):
        root = os.path.expanduser(data)
        check_places(root, out)
        return {name: open_path(folder, cache) for name, folder in (split_folders(root) or {"": root}).items()}
    from dc_ssdae.classes import importing_from
    from dc_ssdae.presets.plain_yaml import read_yaml

    section: Any = read_yaml(Path(data)).get("data")
    if not isinstance(section, dict):
        raise InputError(f"{data} has no section data; it names images by root or dataset, as a run's config.yaml does")
    named = {name: section.get(name) for name in _DATA_TYPES}
    for name, hint in _DATA_TYPES.items():
        check_type(f"data.{name} in {data}", named[name], hint)
        check_runs_nothing(named[name], Path(data))
    if named["root"] is not None:
        check_places(named["root"], out)
    with importing_from(Path.cwd()):
        sources = open_sources(named["root"], named["dataset"], named["validation"], cache or named["cache"])
    if sources.validation is None:
        return {"": sources.train}
    return {"train": sources.train, "validation": sources.validation}
