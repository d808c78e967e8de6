"""`dc-ssdae encode`: images to latents, one safetensors file each."""

from argparse import Namespace

from dc_ssdae.cli.common import (
    Done,
    Job,
    add_file_options,
    encode_pixels,
    for_each_file,
    load_model,
    plan_outputs,
    shape_line,
)
from dc_ssdae.cli.parser import LARGEST_SEED, CommandParser, file_path, whole_number
from dc_ssdae.errors import InputError


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae encode",
        description="Encode images; writes DIR/STEM.safetensors for each, with the tensors latent (c, h, w) and "
        "original_size (H, W). Any image size: padded by reflection to a multiple of the model's f.",
    )
    parser.add_argument("images", nargs="+", type=file_path, metavar="IMAGE", help="image file")
    add_file_options(parser)
    parser.add_argument(
        "--sample", action="store_true", help="sample from the encoder's Gaussian instead of taking its mode"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), metavar="S", help="of --sample, for each image (default 0)"
    )
    return parser


def run(args: Namespace) -> int:
    """Encode every image; gives the exit code."""
    if args.seed is not None and not args.sample:
        raise InputError("--seed is for --sample; the mode is not random")
    jobs = plan_outputs(args, args.images, ".safetensors")
    model = load_model(args)
    import torch

    from dc_ssdae.cli.latent_file import LatentFile, write_latent
    from dc_ssdae.data.images import read_image

    def encode(job: Job) -> Done:
        image = read_image(job.source)
        posterior, size = encode_pixels(model, image.pixels)
        if not args.sample:
            latent = posterior.mode()
        elif posterior.logvar is None:
            raise InputError("this model's encoder gives no variance to sample with; leave --sample out")
        else:
            latent = posterior.sample(torch.Generator().manual_seed(args.seed or 0))
        write_latent(job.target, LatentFile(latent[0], size, model.config.downsample_factor))
        return Done(shape_line(job, size, latent), image.notes)

    return for_each_file(args, jobs, encode)
