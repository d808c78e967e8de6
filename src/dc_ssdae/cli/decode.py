"""`dc-ssdae decode`: latents, as `dc-ssdae encode` writes them, to PNG images."""

from argparse import Namespace

from dc_ssdae.cli.common import (
    Done,
    Job,
    add_model_options,
    add_output_option,
    add_tile_size_option,
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
        prog="dc-ssdae decode",
        description="Decode the latents that dc-ssdae encode wrote; writes DIR/STEM.png for each, at the image's "
        "original size.",
    )
    parser.add_argument("latents", nargs="+", type=file_path, metavar="LATENT", help="safetensors file")
    add_model_options(parser)
    add_tile_size_option(parser)
    add_output_option(parser)
    add_decoding_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Decode every latent; gives the exit code."""
    jobs = plan_decoded(args, args.latents)
    model = load_model(args)
    check_decoding(args, model)
    from dc_ssdae.cli.latent_file import check_model_fits, read_latent

    def decode(job: Job) -> Done:
        content = read_latent(job.source)
        check_model_fits(content, model.config.latent_channels, model.config.downsample_factor)
        latent = content.latent[None]
        decoded = decode_latent(args, model, latent, content.original_size, job.source.stem)
        write_decoded(decoded, job)
        return Done(shape_line(job, content.original_size, latent) + decoded.remark, decoded.notes)

    return for_each_file(args, jobs, decode)
