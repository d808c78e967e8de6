"""`dc-ssdae encode`: images to latents, one safetensors file each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dc_ssdae.cli.common import encode_pixels, for_each_file, load_model, plan_outputs, shape_line
from dc_ssdae.cli.options import FileOptions
from dc_ssdae.errors import InputError
from dc_ssdae.settings import LARGEST_SEED, setting


@dataclass(kw_only=True)
class Options(FileOptions):
    """Encode images, to DIR/STEM.safetensors for each, with the tensors latent (c, h, w) and original_size (H, W).

    Images may have any size: they are padded by reflection to a multiple of the model's downsampling factor f.

    Args:
        images: image file.
        sample: sample from the encoder's Gaussian instead of taking its mode.
        seed: seed of --sample, the same for each image; by default 0.
    """

    images: list[Path] = setting(positional=True, metavar="IMAGE")
    sample: bool = False
    seed: int | None = setting(None, at_least=0, at_most=LARGEST_SEED, metavar="S")


def run(options: Options) -> int:
    """Encode every image; gives the exit code."""
    if options.seed is not None and not options.sample:
        raise InputError("--seed is for --sample; the mode is not random")
    targets = plan_outputs(options, options.images, ".safetensors")
    model = load_model(options)
    import torch

    from dc_ssdae.cli.latent_file import write_latent
    from dc_ssdae.data.images import read_image

    def encode(source: Path, target: Path) -> tuple[str, Sequence[str]]:
        image = read_image(source)
        posterior, size = encode_pixels(model, image.pixels)
        if not options.sample:
            latent = posterior.mode()
        elif posterior.logvar is None:
            raise InputError("this model's encoder gives no variance to sample with; leave --sample out")
        else:
            latent = posterior.sample(torch.Generator().manual_seed(options.seed or 0))
        write_latent(target, latent[0], size, model.config.downsample_factor)
        return shape_line(size, latent), image.notes

    return for_each_file(options, targets, encode)
