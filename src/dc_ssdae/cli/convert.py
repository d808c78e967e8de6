"""`dc-ssdae convert`: makes models of this package from other checkpoints, with a sub-command per source."""

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import check_output_folder, say
from dc_ssdae.cli.options import DType, OutputOptions, SeedOptions
from dc_ssdae.errors import InputError
from dc_ssdae.files import naming, write_whole
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

TRAINING_FILE = "frozen_encoder.yaml"
"""File written beside a model with a published encoder: the configuration of a run that trains its decoder."""


@dataclass(kw_only=True)
class ConvertOptions(OutputOptions):
    """For commands that make a model.

    Args:
        out: folder to write the model to; it must be empty or not exist.
        dtype: precision in which the weights are stored.
    """

    dtype: DType = "float32"


@dataclass(kw_only=True)
class OriginalOptions(ConvertOptions):
    """Convert a checkpoint of the DC-SSDAE authors' own code to a model of this package.

    Every tensor of the checkpoint must fit the preset, whose norm and window radius are taken from the checkpoint.

    Args:
        checkpoint: safetensors file.
        preset: preset with the checkpoint's architecture; dc-ssdae info lists the presets.
    """

    checkpoint: Path = setting(positional=True, metavar="CHECKPOINT")
    preset: str = setting(metavar="NAME")


@dataclass(kw_only=True)
class DiffusersOptions(ConvertOptions, SeedOptions):
    """Join the encoder of a published autoencoder of diffusers with a new decoder.

    Any class of diffusers that encodes images will do: AutoencoderKL, AutoencoderDC, AutoencoderTiny,
    AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderRAE and others. The decoder is untrained, or taken from a
    trained model. The scaling_factor, shift_factor, mean and standard deviation of the latent stay as published.

    Args:
        source: folder or hub id of the autoencoder, or of a pipeline that has one.
        subfolder: subfolder of SOURCE with the autoencoder; by default SOURCE itself, or its subfolder vae.
        variant: variant of the weight files, such as fp16.
        decoder: folder of a model or run with the same encoder, whose trained decoder to use; by default a new decoder
            is made according to --decoder-size, --dynamics and --seed.
        decoder_size: size of the new decoder: XS, S, B, M, L, XL, H or fast; by default S.
        dynamics: EquilibriumMatching or FlowMatching; by default EquilibriumMatching.
        seed: seed of the decoder's random weights.
        wrap: run the encoder by diffusers' code (DiffusersEncoder) where it could become a KLEncoder or DCEncoder too.
    """

    source: str = setting(positional=True, metavar="SOURCE")
    subfolder: str | None = setting(None, metavar="NAME")
    variant: str | None = setting(None, metavar="NAME")
    decoder: str | None = setting(None, metavar="DIR")
    decoder_size: str | None = setting(None, name="--decoder-size", metavar="SIZE")
    dynamics: str | None = setting(None, metavar="NAME")
    wrap: bool = False


def run_original(options: OriginalOptions) -> None:
    """Convert a checkpoint."""
    check_output_folder(options)
    from dc_ssdae.interop.original import convert_original

    model = convert_original(options.checkpoint, options.preset)
    _save(options, model)
    for part in ("encoder", "decoder"):
        say(f"{part}: {json.dumps(model.config[part])}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{options.checkpoint}: {parameters:,} parameters -> {options.out}")


def run_diffusers(options: DiffusersOptions) -> None:
    """Join a published encoder with a decoder."""
    check_output_folder(options)
    if options.decoder is not None and (options.decoder_size or options.dynamics):
        raise InputError("--decoder-size and --dynamics are for a new decoder; they cannot be given with --decoder")
    from dc_ssdae.interop.diffusers import convert_diffusers
    from dc_ssdae.presets import dump_yaml
    from dc_ssdae.training.config import ModelConfig

    remarks: list[str] = []
    given = options.given("decoder_size", "dynamics", "seed", "subfolder", "variant", "decoder", "wrap")
    model = convert_diffusers(options.source, remark=remarks.append, **given)
    _save(options, model)
    config = model.config
    run = {
        "description": f"a decoder on the frozen encoder of {config.provenance['source']}",
        "model": json.loads(json.dumps({entry.name: config[entry.name] for entry in fields(ModelConfig)})),
        "training": {"train": ["decoder", "losses.repa"]},
        "losses": {"kl": 0.0},
    }
    write_whole(options.out / TRAINING_FILE, dump_yaml(run).encode("utf-8"))
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    kind = f"f{config.downsample_factor}c{config.latent_channels} {config.encoder['class_path']}"
    say(f"{options.source}: {kind}, {parameters:,} parameters -> {options.out}")
    channelwise = "" if config.latents_std is None else ", latents_mean and latents_std of each channel"
    say(f"as published: scaling_factor {config.scaling_factor:g}, shift_factor {config.shift_factor:g}{channelwise}")
    for remark in remarks:
        say(remark)
    if options.decoder is None:
        command = shlex.join(["--config", str(options.out / TRAINING_FILE), "--training.init_from", str(options.out)])
        say(f"the decoder is untrained: train it with dc-ssdae train {command} --data.root PHOTOS")


def _save(options: ConvertOptions, model: "DCSSDAE") -> None:
    import torch

    # Not model.to, with which diffusers warns of modules to be kept in float32, of which there are none.
    with naming(options.out):
        torch.nn.Module.to(model, getattr(torch, options.dtype)).save_pretrained(options.out)
