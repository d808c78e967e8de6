"""`dc-ssdae convert`: other people's checkpoints to models of this package; one sub-command a source."""

from argparse import Namespace

from dc_ssdae.cli.common import add_dtype_option, say
from dc_ssdae.cli.parser import CommandParser, file_path
from dc_ssdae.errors import InputError


def build_parser() -> CommandParser:
    """Build the command's parser, with one below it for each source."""
    parser = CommandParser(
        prog="dc-ssdae convert", description="Turn other people's checkpoints into models of this package."
    )
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    original = sources.add_parser(
        "original",
        help="a checkpoint of the DC-SSDAE authors' own code",
        description="Convert a checkpoint of the DC-SSDAE authors' own code. Every tensor must have its place; the "
        "file overrides the preset's norm and window radius.",
    )
    original.add_argument("checkpoint", type=file_path, metavar="CHECKPOINT", help="safetensors file")
    original.add_argument("--preset", required=True, metavar="NAME", help="its architecture; dc-ssdae info lists them")
    original.add_argument("--out", required=True, type=file_path, metavar="DIR", help="folder to make, absent or empty")
    add_dtype_option(original, "what to store the weights in")
    original.set_defaults(convert=_convert_original)
    return parser


def run(args: Namespace) -> int:
    """Convert a checkpoint; gives the exit code."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {args.out} exists and is not an empty folder; name a new one")
    args.convert(args)
    return 0


def _convert_original(args: Namespace) -> None:
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.interop.original import convert_original

    model = convert_original(args.checkpoint, args.preset)
    with torch.device("meta"):
        preset = DCSSDAE.from_preset(args.preset)
    # Not model.to, with which diffusers warns of modules to be kept in float32, of which there are none.
    torch.nn.Module.to(model, getattr(torch, args.dtype)).save_pretrained(args.out)
    for part in ("encoder", "decoder"):
        theirs, ours = model.config[part]["init_args"], preset.config[part]["init_args"]
        for name in theirs:
            if theirs[name] != ours[name]:
                say(f"{part} {name}: {theirs[name]}, as the checkpoint shows (preset: {ours[name]})")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{args.checkpoint}: {parameters:,} parameters -> {args.out}")
