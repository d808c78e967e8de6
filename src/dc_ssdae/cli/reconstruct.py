"""`dc-ssdae reconstruct`: images through the autoencoder and back, as PNG."""

from argparse import Namespace

from dc_ssdae.cli.common import (
    Done,
    Job,
    add_model_options,
    add_output_option,
    add_tile_size_option,
    encode_pixels,
    for_each_file,
    load_model,
    shape_line,
)
from dc_ssdae.cli.decoding_options import (
    add_decoding_options,
    check_decoding,
    decode_latent,
    plan_decoded,
    write_decoded,
)
from dc_ssdae.cli.parser import CommandParser, file_path


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae reconstruct",
        description="Encode images and decode them again; writes DIR/STEM.png for each. Any image size: padded by "
        "reflection to a multiple of the model's f, and cropped back.",
    )
    parser.add_argument("images", nargs="+", type=file_path, metavar="IMAGE", help="image file")
    add_model_options(parser)
    add_tile_size_option(parser)
    add_output_option(parser)
    add_decoding_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Reconstruct every image; gives the exit code."""
    jobs = plan_decoded(args, args.images)
    model = load_model(args)
    check_decoding(args, model)
    from dc_ssdae.data.images import read_image

    def reconstruct(job: Job) -> Done:
        image = read_image(job.source)
        posterior, size = encode_pixels(model, image.pixels)
        latent = posterior.mode()
        decoded = decode_latent(args, model, latent, size, job.source.stem)
        write_decoded(decoded, job)
        return Done(shape_line(job, size, latent) + decoded.remark, [*image.notes, *decoded.notes])

    return for_each_file(args, jobs, reconstruct)
