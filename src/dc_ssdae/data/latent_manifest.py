"""What is in a folder of latents: the names of its tensors, and the manifest that `dc-ssdae latents` writes last."""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dc_ssdae.data.resumable import MANIFEST_FILE
from dc_ssdae.errors import InputError, check_type, counted
from dc_ssdae.files import check_file
from dc_ssdae.latent import LatentStatistics

Store = Literal["mean", "sample", "mean_std"]
STORES = ("mean", "sample", "mean_std")

STORED_DTYPES = ("float32", "float16", "bfloat16")
"""What latents may be stored in."""

LATENTS_FORMAT, LATENTS_VERSION = "dc-ssdae latents", 1
SHARD_SUFFIX = ".safetensors"


def tensor_names(store: Store, flipped: bool) -> list[str]:
    """Names of a shard's tensors that hold its latents: the latents and, if stored, their standard deviations."""
    latents = "latents_flip" if flipped else "latents"
    return [latents, f"{latents}_std"] if store == "mean_std" else [latents]


class LatentShardRecord(NamedTuple):
    """A shard as the manifest states it: file `name`, number of `images`, size in `bytes`, and `sha256`."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelScaling:
    """What the config of a model says of its latents' scaling, which a pipeline around the model undoes.

    Args:
        scaling_factor: what pipelines divide by; 1 where it was not measured.
        shift_factor: what some pipelines add after that.
        latents_mean: of each channel, if known; used by few pipelines.
        latents_std: of each channel, if known.

    Raises:
        InputError: a number is not finite, or a scaling factor or a standard deviation is of the wrong sign.
    """

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None

    def __post_init__(self) -> None:
        for name in ("scaling_factor", "shift_factor"):
            check_type(name, getattr(self, name), float)
        for name in ("latents_mean", "latents_std"):
            check_type(name, getattr(self, name), list[float] | None)
        numbers = (self.scaling_factor, self.shift_factor, *(self.latents_mean or ()), *(self.latents_std or ()))
        if not all(map(math.isfinite, numbers)) or self.scaling_factor <= 0 or min(self.latents_std or [0.0]) < 0:
            raise InputError(f"the model's latents cannot be scaled by {self}")


@dataclass(frozen=True)
class LatentManifest:
    """What is in a folder of latents.

    Args:
        shards: in their order.
        store: what is stored of an image: "mean", "sample" or "mean_std".
        flip: whether mirrored images have been encoded too.
        store_dtype: of the latents.
        shape: (c, h, w) of one latent.
        classes: names of the classes that the labels number; none where they are not known.
        statistics: of all that a reader yields.
        scaling: what the model's config said of its latents when the folder was finished.
        model: of the encoder: name, sha256, downsample_factor, latent_channels, and the numbers of `scaling`.
        settings: all of those that the latents were encoded with.
    """

    shards: list[LatentShardRecord]
    store: Store
    flip: bool
    store_dtype: str
    shape: tuple[int, int, int]
    classes: list[str]
    statistics: LatentStatistics
    scaling: ModelScaling
    model: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "LatentManifest":
        """Read the manifest of a folder.

        Raises:
            InputError: there is none, or it is damaged, or of another program or version; or the folder is not
                finished.
        """
        path = folder / MANIFEST_FILE
        try:
            check_file(path)
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(_without_manifest(folder)) from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"the manifest {str(path)!r} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.get("format") != LATENTS_FORMAT:
            raise InputError(f"{str(path)!r} is not of latents; dc-ssdae latents writes folders of those")
        if content.get("version") != LATENTS_VERSION:
            raise InputError(
                f"the manifest {str(path)!r} is of version {content.get('version')!r}; this dc-ssdae reads "
                f"{LATENTS_VERSION}"
            )
        try:
            return cls._of(content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the manifest {str(path)!r} is damaged: {detail}; encode the images again") from error

    @classmethod
    def _of(cls, content: dict[str, Any]) -> "LatentManifest":
        shards = [LatentShardRecord(**shard) for shard in content["shards"]]
        settings, model, shape, statistics = (
            content[name] for name in ("settings", "model", "latent_shape", "statistics")
        )
        check_type("shards", shards, list[LatentShardRecord])
        check_type("classes", content["classes"], list[str])
        check_type("latent_shape", shape, list[int])
        check_type("flip", settings["flip"], bool)
        check_type("model", model, dict[str, Any])
        if settings["store"] not in STORES or settings["store_dtype"] not in STORED_DTYPES:
            raise InputError(f"unknown store {settings['store']!r} or store_dtype {settings['store_dtype']!r}")
        for shard in shards:
            if not re.fullmatch(r"\d+\.safetensors", shard.name, re.ASCII) or min(shard.images, shard.bytes) < 0:
                raise InputError(f"there is no such shard as {shard}")
        if len({shard.name for shard in shards}) < len(shards):
            raise InputError("a shard is listed twice")
        count = sum(shard.images for shard in shards)
        if not 0 < count == content["images"]:
            raise InputError(f"its shards have {counted(count, 'image')}, not {content['images']}")
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"latent_shape is {shape}")
        check_type("statistics", statistics, dict[str, Any])
        mean, std = statistics["latents_mean"], statistics["latents_std"]
        scaling = ModelScaling(**{field.name: model[field.name] for field in fields(ModelScaling)})
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            check_type(name, values, list[float])
            for numbers in (values, getattr(scaling, name)):
                if numbers is not None and len(numbers) != shape[0]:
                    raise InputError(f"{name} has {counted(len(numbers), 'number')}, not {shape[0]}")
        return cls(
            shards,
            settings["store"],
            settings["flip"],
            settings["store_dtype"],
            (shape[0], shape[1], shape[2]),
            content["classes"],
            LatentStatistics(mean, std, count),
            scaling,
            model,
            settings,
        )


def _without_manifest(folder: Path) -> str:
    """Why a folder has no manifest, as far as one can see."""
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} of latents"
    if (folder / ".latents").is_dir():
        return f"dc-ssdae latents has not finished with {str(folder)!r}; run the same command again"
    parts = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_FILE}"))
    if parts:
        return f"{str(folder)!r} holds {' and '.join(f'{part}/' for part in parts)}; name one of them"
    return f"{str(folder)!r} holds no latents: {MANIFEST_FILE} is missing; dc-ssdae latents writes such folders"
