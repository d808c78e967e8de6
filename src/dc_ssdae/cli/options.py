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
        device: auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one.
        dtype: precision in which the networks compute.
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
        modules: Python module to import, with classes of your own that the model is made of; it is looked up in the
            current folder and among the installed packages. May be given several times.
    """

    modules: list[str] = setting([], name="--import", repeated=True, metavar="MODULE")


@dataclass(kw_only=True)
class ModelOptions(DeviceOptions, ImportOptions):
    """Which model.

    Args:
        model: folder of a saved model or of a training run, or id of a model on the Hugging Face hub; photos_f8c16 is
            the trained model that comes with this package.
    """

    model: str = setting(SHIPPED_MODEL, metavar="DIR")


@dataclass(kw_only=True)
class OutputOptions(Options):
    """Where to write.

    Args:
        out: folder to write to; it is created if it does not exist.
        overwrite: replace existing files.
    """

    out: Path = setting(metavar="DIR")
    overwrite: bool = False


@dataclass(kw_only=True)
class FileOptions(ModelOptions, OutputOptions):
    """For commands that go through files of any image size.

    Args:
        tile_size: process images larger than S pixels in overlapping tiles of S x S pixels, which bounds the memory
            needed. S is a multiple of the model's downsampling factor f; 512 is a good choice.
    """

    tile_size: int | None = setting(None, at_least=1, metavar="S")


@dataclass(kw_only=True)
class BatchOptions(Options):
    """How images are read and computed on.

    Args:
        size: images are resized so that the shorter side has S pixels, and cropped to the central square; a multiple
            of the model's downsampling factor f.
        batch: images per batch.
        workers: number of processes that read images; by default one per core except one, at most 8.
    """

    size: int = setting(256, at_least=1, metavar="S")
    batch: int = setting(16, at_least=1, metavar="B")
    workers: int | None = setting(None, at_least=0, metavar="N")


@dataclass(kw_only=True)
class SeedOptions(Options):
    """What is random.

    Args:
        seed: seed of everything random.
    """

    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED, metavar="S")


@dataclass(kw_only=True)
class ShardOptions(Options):
    """For commands that turn images into shards.

    Args:
        shard_size: images per shard.
        max_broken_share: images that cannot be read are left out; fail if they are more than this share of all.
        cache: folder to keep shards in that are downloaded from a URL; by default ~/.cache/dc_ssdae/shards.
    """

    shard_size: int = setting(1000, at_least=1, name="--shard-size", metavar="N")
    max_broken_share: float = setting(0.1, at_least=0.0, at_most=1.0, name="--max-broken-share", metavar="X")
    cache: str | None = setting(None, metavar="DIR")


@dataclass(kw_only=True)
class SamplerOptions(Options):
    """How models of this package decode.

    Args:
        sampler: one_step; gradient_descent, nesterov or nesterov_eqm (the variant in its authors' code) for models
            trained by equilibrium matching; euler or midpoint for flow matching. By default one_step, or
            gradient_descent or euler if other options ask for several steps.
        num_steps: number of steps, or the largest number with --tolerance. A step evaluates the decoder once, or twice
            with midpoint. By default 1; 4 for a sampler of several steps; 16 with --tolerance.
        step_size: step size of a descent: one for all steps, or one per step; by default derived from the model's
            decay.
        momentum: momentum of nesterov, at least 0 and below 1; by default 0.3.
        tolerance: stop the descent of each image once the root mean square of its field, for a gradient scale of 1, is
            below this.
    """

    sampler: str | None = setting(None, metavar="NAME")
    num_steps: int | None = setting(None, at_least=1, name="--steps", alias="--num_steps", metavar="N")
    step_size: float | list[float] | None = setting(None, metavar="X[,X...]")
    momentum: float | None = None
    tolerance: float | None = None


@dataclass(kw_only=True)
class DecodingOptions(SamplerOptions, SeedOptions, FileOptions):
    """For commands that write a decoded image for each of their files.

    Args:
        draft: start from this image mixed with noise, instead of from pure noise; if it is a folder, from the image
            STEM.png in it for each input.
        start: share of --draft in the starting point, from 0 to 1; the rest is noise.
        return_trajectory: also write DIR/STEM-trajectory.png with the states after all steps, side by side.
        seed: seed of the noise that each image starts from; 0 is also the default of DCSSDAE.decode.
    """

    draft: Path | None = setting(None, metavar="PATH")
    start: float | None = setting(None, at_least=0.0, at_most=1.0)
    return_trajectory: bool = False


@dataclass(kw_only=True)
class EvaluationOptions(SamplerOptions, DeviceOptions, ImportOptions, BatchOptions, SeedOptions, OutputOptions):
    """For commands that measure autoencoders.

    Args:
        data: images to measure on: a folder of images or shards, or a pattern of shards, as in data.root of a training
            run. If the folder has a subfolder validation/, its images are used.
        protocol: how images are prepared and measured: dcae, lightningdit, rae or original; see docs/evaluation.md.
        size: side of the images in pixels; by default the protocol's.
        limit: largest number of images, spread evenly over the data set; by default all.
        metrics: which of psnr, ssim, lpips, dreamsim, rfid and rfdd to compute; by default all whose weights are on
            this machine.
        lpips: network of LPIPS; by default the protocol's.
        random_backbones: use random weights for metrics whose weights are missing, to try things out; the values mean
            nothing.
        download: download weights of metrics that are missing on this machine.
        replicates: number of bootstrap replicates for the intervals of rFID and rFDD; 0 computes no intervals.
        seed: seed of sampled latents and of the bootstrap.
        dtype: precision in which the models compute; metrics are always float32 or float64.
    """

    data: str = setting(metavar="ROOT")
    protocol: str = setting("dcae", metavar="NAME")
    size: int | None = setting(None, at_least=1, metavar="S")  # type: ignore[assignment]
    limit: int | None = setting(None, at_least=1, metavar="N")
    metrics: list[str] | None = setting(None, metavar="NAME,...")
    lpips: Literal["alex", "vgg", "squeeze"] | None = None
    random_backbones: bool = False
    download: bool = False
    replicates: int = setting(20, at_least=0, metavar="R")
