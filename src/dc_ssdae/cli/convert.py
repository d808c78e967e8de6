"""`dc-ssdae convert`: other people's checkpoints to models of this package; one sub-command a source."""

import json
import shlex
from argparse import Namespace

from dc_ssdae.cli.common import add_dtype_option, add_overwrite_option, add_seed_option, check_output_folder, say
from dc_ssdae.cli.parser import CommandParser, file_path, filled
from dc_ssdae.errors import InputError
from dc_ssdae.files import naming, write_whole

TRAINING_FILE = "frozen_encoder.yaml"
"""Beside a model with a published encoder: the configuration of a run that trains its decoder."""


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
    add_overwrite_option(original)
    add_dtype_option(original, "what to store the weights in")
    original.set_defaults(convert=_convert_original)
    published = sources.add_parser(
        "diffusers",
        help="the encoder of diffusers' AutoencoderKL, AutoencoderDC or AutoencoderTiny, with a new decoder",
        description="Take the encoder of a published AutoencoderKL, AutoencoderDC or AutoencoderTiny of diffusers, and "
        "join it with a new, untrained decoder, or with a trained one. The latent's scaling_factor, shift_factor, mean "
        "and standard deviation stay as published.",
    )
    published.add_argument(
        "source", type=filled, metavar="SOURCE", help="the folder of a model or of a pipeline, or its id on the hub"
    )
    published.add_argument(
        "--out", required=True, type=file_path, metavar="DIR", help="folder to make, absent or empty"
    )
    published.add_argument(
        "--subfolder", type=filled, metavar="NAME", help="where in SOURCE the autoencoder is (default: the top, or vae)"
    )
    published.add_argument("--variant", type=filled, metavar="NAME", help="which weight files, such as fp16")
    published.add_argument(
        "--decoder",
        type=filled,
        metavar="DIR",
        help="a model or a run with this encoder whose trained decoder to take (default: a new one, of the next three)",
    )
    published.add_argument(
        "--decoder-size", type=filled, metavar="SIZE", help="XS, S, B, M, L, XL or H (default S), or fast"
    )
    published.add_argument(
        "--dynamics", type=filled, metavar="NAME", help="EquilibriumMatching (the default) or FlowMatching"
    )
    add_seed_option(published, "of the decoder's random weights")
    add_overwrite_option(published)
    add_dtype_option(published, "what to store the weights in")
    published.set_defaults(convert=_convert_diffusers)
    return parser


def run(args: Namespace) -> int:
    """Convert a checkpoint; gives the exit code."""
    check_output_folder(args)
    with naming(args.out):
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


def _convert_diffusers(args: Namespace) -> None:
    import torch

    from dc_ssdae.components import COMPONENTS
    from dc_ssdae.interop.diffusers_encoders import convert_diffusers
    from dc_ssdae.presets import dump_yaml

    for option in ("decoder_size", "dynamics"):
        if args.decoder is not None and getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')} is of a new decoder: leave it or --decoder out")
    remarks: list[str] = []
    model = convert_diffusers(
        args.source,
        args.decoder_size or "S",
        args.dynamics or "EquilibriumMatching",
        args.seed,
        args.subfolder,
        args.variant,
        remarks.append,
        args.decoder,
    )
    torch.nn.Module.to(model, getattr(torch, args.dtype)).save_pretrained(args.out)
    config = model.config
    parts = {part: config[part] for part in COMPONENTS}
    shape = {"latent_channels": config.latent_channels, "downsample_factor": config.downsample_factor}
    run = {
        "description": f"a decoder on the frozen encoder of {config.provenance['source']}",
        "model": json.loads(json.dumps({**shape, **parts})),
        "training": {"train": ["decoder", "losses.repa"]},
        "losses": {"kl": 0.0},
    }
    write_whole(args.out / TRAINING_FILE, dump_yaml(run).encode("utf-8"))
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    kind = f"f{config.downsample_factor}c{config.latent_channels} {config.encoder['class_path']}"
    say(f"{args.source}: {kind}, {parameters:,} parameters -> {args.out}")
    say(f"as published: scaling_factor {config.scaling_factor:g}, shift_factor {config.shift_factor:g}")
    for remark in remarks:
        say(remark)
    if args.decoder is not None:
        say(f"the decoder is that of {args.decoder}")
        return
    command = shlex.join(["--config", str(args.out / TRAINING_FILE), "--training.init_from", str(args.out)])
    say(f"the decoder is untrained: train it with dc-ssdae train {command} --data.root PHOTOS")
