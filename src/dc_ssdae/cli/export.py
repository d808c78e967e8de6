"""`dc-ssdae export`: encoder and one-step decoder as programs for torch.export, C++ and ONNX."""

from argparse import Namespace

from dc_ssdae.cli.common import add_model_options, add_overwrite_option, check_output_folder, load_model, say
from dc_ssdae.cli.parser import CommandParser, file_path, whole_number
from dc_ssdae.errors import InputError
from dc_ssdae.files import naming

FORMATS = ("pt2", "onnx")
DEFAULT_NOISE_SIZE = 1024


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae export",
        description="Write a model's encoder and one-step decoder as programs that run without this package: "
        "DIR/encoder.FORMAT (x -> mean, logvar), DIR/decoder.FORMAT (z, noise -> image), DIR/noise.safetensors (the "
        "noise that decode starts from by default) and DIR/export.json (shapes, f, c, the latents' statistics). Each "
        "program is loaded again and compared with the model; one that differs is an error, and nothing is written.",
    )
    add_model_options(parser)
    parser.add_argument("--out", required=True, type=file_path, metavar="DIR", help="folder to make, absent or empty")
    add_overwrite_option(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="pt2",
        help="pt2 (the default): torch.export, for PyTorch in Python and, compiled, C++; onnx: one file a part, in "
        "float32, for ONNX Runtime and others (needs pip install 'dc-ssdae[onnx]')",
    )
    parser.add_argument(
        "--size",
        type=whole_number(1),
        nargs="+",
        metavar="PIXELS",
        help="height and width to fix, or one number for both, multiples of f; by default the programs take any size "
        "from 2 f on. The batch is always free",
    )
    parser.add_argument(
        "--bake_noise", action="store_true", help="put decode's default noise into the decoder, which takes z alone"
    )
    parser.add_argument(
        "--noise_size",
        type=whole_number(1),
        metavar="PIXELS",
        help=f"side of the largest square image that the default noise is kept for (default {DEFAULT_NOISE_SIZE}); "
        "with --size, it is kept for that size",
    )
    return parser


def run(args: Namespace) -> int:
    """Export a model; gives the exit code."""
    if args.size is not None and len(args.size) > 2:
        raise InputError(f"--size takes a height and a width, or one number for both, not {len(args.size)} numbers")
    if args.size is not None and args.noise_size is not None:
        raise InputError("--noise_size is for programs of any size; with --size the noise is of that size")
    if args.format == "onnx":
        if args.device not in ("auto", "cpu") or args.dtype != "float32":
            raise InputError("--device and --dtype are for --format pt2; ONNX is written from float32 on the CPU")
        args.device = "cpu"
    check_output_folder(args)  # before the seconds that loading takes
    model = load_model(args)
    from dc_ssdae.interop.export import export_model

    size = None if args.size is None else (args.size[0], args.size[-1])
    noise_size = args.noise_size or DEFAULT_NOISE_SIZE
    with naming(args.out):
        export = export_model(model, args.out, args.format, size, args.bake_noise, noise_size, args.overwrite)
    for part in (export.encoder, export.decoder):
        shapes = [
            ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in tensors.items())
            for tensors in (part.inputs, part.outputs)
        ]
        say(f"{part.file}: {' -> '.join(shapes)}; largest difference from the model {part.largest_difference:.1e}")
    any_size = "" if size else "; h and w from 2 on"
    say(f"batch from 1 on{any_size}")
    total = sum((args.out / name).stat().st_size for name in export.files)
    say(f"{', '.join(export.files)}: {total / 1e6:.1f} MB -> {args.out}")
    return 0
