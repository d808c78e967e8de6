"""Options that several commands share. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dc_ssdae.cli.parser import Options
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.settings import LARGEST_SEED, setting

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class DeviceOptions(Options):
    """Where and in what the networks compute.

    Args:
        device: auto, cpu, cuda, cuda:N or mps; auto takes a GPU where there is one.
        dtype: what the networks compute in.
    """

    device: str = setting("auto", metavar="DEVICE")
    dtype: DType = "float32"


@dataclass(kw_only=True)
class JsonOptions(Options):
    """How figures are printed.

    Args:
        json: print the same as JSON.
    """

    json: bool = False


@dataclass(kw_only=True)
class ImportOptions(Options):
    """Users' own classes.

    Args:
        modules: import a Python module with classes of your own that the model names, from the current folder or where
            it is installed; may be given several times.
    """

    modules: list[str] = setting([], name="--import", repeated=True, metavar="MODULE")


@dataclass(kw_only=True)
class ModelOptions(DeviceOptions, ImportOptions):
    """Which model.

    Args:
        model: the folder of a saved model or of a training run, or a model's id on the hub; photos_f8c16 is the trained
            model that comes with this package.
    """

    model: str = setting(SHIPPED_MODEL, metavar="DIR")


@dataclass(kw_only=True)
class OverwriteOptions(Options):
    """Whether files may be replaced.

    Args:
        overwrite: replace files that are there already.
    """

    overwrite: bool = False


@dataclass(kw_only=True)
class OutputOptions(OverwriteOptions):
    """Where to write.

    Args:
        out: folder to write to; made if need be.
    """

    out: Path = setting(metavar="DIR")


@dataclass(kw_only=True)
class FileOptions(ModelOptions, OutputOptions):
    """For commands that go through files of any image size.

    Args:
        tile_size: go through images with a side above S pixels in overlapping tiles of S by S, a multiple of the
            model's f (512 is a good one): memory follows the tile.
    """

    tile_size: int | None = setting(None, at_least=1, metavar="S")


@dataclass(kw_only=True)
class SizeOptions(Options):
    """For commands that encode squares cut from images.

    Args:
        size: side in pixels of the square that is cut from an image's centre, after resizing by the shorter side; a
            multiple of the model's f.
    """

    size: int = setting(256, at_least=1, metavar="S")


@dataclass(kw_only=True)
class BatchOptions(Options):
    """How images are read and computed on.

    Args:
        batch: images at a time.
        workers: processes that read images; by default one for each core but one, at most 8.
    """

    batch: int = setting(16, at_least=1, metavar="B")
    workers: int | None = setting(None, at_least=0, metavar="N")


@dataclass(kw_only=True)
class SeedOptions(Options):
    """What is random.

    Args:
        seed: of everything that is random.
    """

    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED, metavar="S")


@dataclass(kw_only=True)
class ShardOptions(Options):
    """For commands that turn images into shards.

    Args:
        shard_size: images per shard.
        max_broken_share: fail if more than this share of the images cannot be read; up to there they are left out.
        cache: folder for shards that come from a URL; by default ~/.cache/dc_ssdae/shards.
    """

    shard_size: int = setting(1000, at_least=1, name="--shard-size", metavar="N")
    max_broken_share: float = setting(0.1, at_least=0.0, at_most=1.0, name="--max-broken-share", metavar="X")
    cache: str | None = setting(None, metavar="DIR")


@dataclass(kw_only=True)
class SamplerOptions(Options):
    """How models of this package decode.

    Args:
        sampler: one_step; for equilibrium matching gradient_descent, nesterov or nesterov_eqm (the variant of its
            authors' code); for flow matching euler or midpoint. By default one_step, and where other options ask for
            several steps gradient_descent or euler.
        num_steps: steps, each an evaluation of the decoder (two with midpoint), with --tolerance at most; by default
            1, 4 for a sampler of several steps, and 16 with --tolerance.
        step_size: step size of a descent, one for all steps or one per step; by default it follows from the decay.
        momentum: momentum of nesterov, at least 0 and below 1; by default 0.3.
        tolerance: a descent is done with an image when the root mean square of its field falls below this, for a
            gradient scale of 1.
    """

    sampler: str | None = setting(None, metavar="NAME")
    num_steps: int | None = setting(None, at_least=1, name="--steps", alias="--num_steps", metavar="N")
    step_size: float | list[float] | None = setting(None, metavar="X[,X...]")
    momentum: float | None = None
    tolerance: float | None = None


@dataclass(kw_only=True)
class DecodingOptions(SamplerOptions, SeedOptions):
    """How single latents are decoded.

    Args:
        draft: start from this image, noised, in place of pure noise; or from DIR/STEM.png of each input.
        start: share of --draft in the start, from 0 to 1; the rest is noise.
        return_trajectory: also write DIR/STEM-trajectory.png, all states side by side.
        seed: seed of the noise that each image starts from; 0 is also what DCSSDAE.decode takes by default.
    """

    draft: Path | None = setting(None, metavar="PATH")
    start: float | None = setting(None, at_least=0.0, at_most=1.0)
    return_trajectory: bool = False


@dataclass(kw_only=True)
class EvaluationOptions(SamplerOptions, DeviceOptions, ImportOptions, BatchOptions, SeedOptions, OutputOptions):
    """For commands that measure autoencoders.

    Args:
        data: images, named as data.root of a training run; where there is a validation/ folder, that is measured.
        protocol: how images are prepared and measured: dcae, lightningdit, rae or original; see docs/evaluation.md.
        size: side of the images in pixels; by default the protocol's.
        limit: images at most, evenly spread; by default all.
        metrics: of psnr, ssim, lpips, dreamsim, rfid and rfdd; by default all whose weights are on this machine.
        lpips: network of LPIPS; by default the protocol's.
        random_backbones: take networks with random weights for metrics whose weights are missing, to try things out.
        download: fetch weights that metrics need and this machine lacks.
        replicates: number of replicates of the bootstrap of rFID and rFDD; 0 gives no intervals.
        seed: seed of sampled latents and of the bootstrap.
        dtype: what the models compute in; metrics are always float32 or float64.
    """

    data: str = setting(metavar="ROOT")
    protocol: str = setting("dcae", metavar="NAME")
    size: int | None = setting(None, at_least=1, metavar="S")
    limit: int | None = setting(None, at_least=1, metavar="N")
    metrics: list[str] | None = setting(None, metavar="NAME,...")
    lpips: Literal["alex", "vgg", "squeeze"] | None = None
    random_backbones: bool = False
    download: bool = False
    replicates: int = setting(20, at_least=0, metavar="R")
