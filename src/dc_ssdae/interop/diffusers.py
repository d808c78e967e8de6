"""Autoencoders of diffusers: finding and loading them safely and strictly, and models of ours with their encoders."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.components import HANDED_OVER, ResolvedPart
from dc_ssdae.errors import InputError, prefixed
from dc_ssdae.hub import fetch_model
from dc_ssdae.interop.original import Rules, rewrite
from dc_ssdae.model_folder import NOT_MEASURED, may_be_on_the_hub, model_folder, read_config, weight_files
from dc_ssdae.networks import DCEncoder, DiffusersEncoder, KLEncoder
from dc_ssdae.networks.dc_encoder import ARCHITECTURES, Architecture
from dc_ssdae.networks.diffusers_encoder import (
    constructor_settings,
    encode_images,
    find_autoencoder,
    fixed_side,
    has_frames,
)
from dc_ssdae.networks.uvit_decoder import SIZES
from dc_ssdae.provenance import name_of_path, short_name
from dc_ssdae.weights import WEIGHTS, check_same_tensors, read_safetensors

UNSAFE_IN_FLOAT16 = "its authors mark it as unsafe in float16 (force_upcast): encode in bfloat16 or float32"
"""Of a published encoder whose activations may overflow."""

PROBE_SIDE = 128
"""Height and width of the image that shows what a published encoder does."""

LARGEST_DIFFERENCE = 1e-3
"""Between a published encoder's latent and the converted one's, against the largest value."""

_KL: Rules = (
    (r"^conv_in\.", r"encoder.conv_in."),
    (r"^down\.(\d+)\.\d+\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^down\.(\d+)\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"\.shortcut\.", r".conv_shortcut."),
    (r"^middle\.0\.", r"encoder.mid_block.resnets.0."),
    (r"^middle\.2\.", r"encoder.mid_block.resnets.1."),
    (r"^middle\.1\.norm\.", r"encoder.mid_block.attentions.0.group_norm."),
    (r"^middle\.1\.(q|k|v)(?:uery|ey|alue)\.", r"encoder.mid_block.attentions.0.to_\1."),
    (r"^middle\.1\.out\.", r"encoder.mid_block.attentions.0.to_out.0."),
    (r"^latent_head\.0\.", r"encoder.conv_norm_out."),
    (r"^latent_head\.2\.", r"encoder.conv_out."),
    (r"^latent_head\.3\.", r"quant_conv."),
)

_DC: Rules = (
    (r"^project_in\.", r"encoder.conv_in."),
    (r"^latent_head\.", r"encoder.conv_out."),
    (r"^stages\.", r"encoder.down_blocks."),
    (r"\.attention\.scales\.(\d+)\.0\.", r".attn.to_qkv_multiscale.\1.proj_in."),
    (r"\.attention\.scales\.(\d+)\.1\.", r".attn.to_qkv_multiscale.\1.proj_out."),
    (r"\.attention\.out\.", r".attn.to_out."),
    (r"\.attention\.norm\.", r".attn.norm_out."),
    (r"\.bottleneck\.expand\.", r".conv_out.conv_inverted."),
    (r"\.bottleneck\.depthwise\.", r".conv_out.conv_depth."),
    (r"\.bottleneck\.project\.", r".conv_out.conv_point."),
    (r"\.bottleneck\.norm\.", r".conv_out.norm."),
)

_RULES: Mapping[type, Rules] = {KLEncoder: _KL, DCEncoder: _DC, DiffusersEncoder: ((r"^autoencoder\.", ""),)}


class DiffusersSource(NamedTuple):
    """A model that diffusers' `save_pretrained` has written.

    Args:
        name: the folder or hub id that the user gave.
        folder: where the model lies, in the hub's cache for a hub id.
        config: its config.json.
        is_on_the_hub: whether the name is a hub id.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    is_on_the_hub: bool


def find_diffusers_model(name: str, subfolder: str | None = None, variant: str | None = None) -> DiffusersSource:
    """Find a model and read its config.json, which imports nothing that it names.

    Args:
        name: a model's folder, a pipeline's, whose `vae/` is meant, or the id of either on the hub, of which
            config.json and safetensors are downloaded, and nothing else.
        subfolder: where in it the model lies; None looks at the top, then in `vae/`.
        variant: of the weight files to download, such as "fp16".

    Raises:
        InputError: there is no config.json, or it is no JSON object.
    """
    is_folder = os.path.isdir(name)
    if not is_folder and not may_be_on_the_hub(name):
        raise InputError(f"{name!r}: no such folder, nor the id of a model on the hub")
    for place in ("", "vae") if subfolder is None else (subfolder,):
        folder = Path(name, place) if is_folder else fetch_model(name, place, variant)
        if (folder / "config.json").exists():
            return DiffusersSource(name, folder, read_config(folder), not is_folder)
    raise InputError(f"{name}: there is no config.json in {subfolder or 'it, nor in its vae'}/")


def has_weights(source: DiffusersSource) -> bool:
    """Whether there are weights beside the config, of whatever format; a model on the hub is taken to have some."""
    return source.is_on_the_hub or any(source.folder.glob(f"{WEIGHTS}*"))


def build_autoencoder(source: DiffusersSource) -> Any:
    """Build a model with random weights, in eval mode.

    Args:
        source: as `find_diffusers_model` gives it.

    Raises:
        InputError: its config.json names no autoencoder of diffusers; a setting is unknown; or the settings make no
            model, or one larger than any autoencoder.
    """
    with prefixed(source.name):
        kind = find_autoencoder(source.config.get("_class_name"))
        settings = constructor_settings(kind, source.config)
        return ResolvedPart(kind, {"class_path": kind.__name__}, settings).build().eval()


def load_diffusers_model(
    source: DiffusersSource, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """Load a model onto the CPU, in eval mode; strict where diffusers is lenient, and never from a pickle.

    Args:
        source: as `find_diffusers_model` gives it.
        dtype: of the weights.
        variant: which of several files, such as "fp16"; None takes the one without, or the only one.

    Raises:
        InputError: as `build_autoencoder`; or there are no safetensors, or they are damaged or do not fit the config;
            names the tensor.
    """
    with init_empty_weights():
        model = build_autoencoder(source)
    expected = model.state_dict()
    with prefixed(source.name):
        given = read_safetensors(*_weight_files(source, variant))
        model._fix_state_dict_keys_on_load(given)  # which knows what old files call the parts of attention
        passed_over = "|".join(model._keys_to_ignore_on_load_unexpected or ["^$"])
        given = {name: tensor for name, tensor in given.items() if name in expected or not re.search(passed_over, name)}
        check_same_tensors(f"what is loaded as {type(model).__name__}", expected, given)
    model.load_state_dict(given, assign=True)
    # Not model.to, with which diffusers warns of modules to be kept in float32.
    return nn.Module.to(model, dtype)


def _weight_files(source: DiffusersSource, variant: str | None) -> list[Path]:
    """The safetensors of a variant; None means those without one, or the only ones."""
    found = weight_files(source.folder)
    if variant is None and len(found) == 1:
        variant = next(iter(found))
    name = f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"
    if source.is_on_the_hub and variant not in found:
        raise InputError(f"there is no {name} on the hub, or in the cache; a pickle can be fetched with hf download")
    return found.get(variant, [source.folder / name])


def message_of(error: BaseException) -> str:
    """An exception's message without line breaks; its class where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def diffusers_names(encoder: nn.Module) -> dict[str, list[str]]:
    """Map every tensor name of one of our encoders to the names of diffusers' tensors that make it up, in order."""
    joined = ".attention.query_key_value."
    names = {ours: rewrite(ours, _RULES[type(encoder)]) for ours in encoder.state_dict()}
    return {
        ours: [theirs.replace(joined, f".attn.to_{part}.") for part in "qkv"] if joined in theirs else [theirs]
        for ours, theirs in names.items()
    }


def convert_tensors(encoder: nn.Module, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn diffusers' tensors into a state dict of one of our encoders.

    Args:
        encoder: gives names and shapes; it may be on the meta device. A `KLEncoder` has the identity where an
            AutoencoderKL has no `quant_conv`.
        theirs: the whole state dict of the autoencoder; the decoder's tensors are passed over.

    Returns:
        What `encoder.load_state_dict` takes.

    Raises:
        InputError: a tensor is not finite, missing, or of another size; names it.
    """
    if isinstance(encoder, KLEncoder) and "quant_conv.weight" not in theirs:
        width = len(encoder.state_dict()["latent_head.3.bias"])
        theirs = {**theirs, "quant_conv.weight": torch.eye(width), "quant_conv.bias": torch.zeros(width)}
    state, names = {}, diffusers_names(encoder)
    for ours, value in encoder.state_dict().items():
        joined = torch.cat([theirs.get(name, torch.empty(0)).flatten() for name in names[ours]])
        if joined.numel() != value.numel() or not joined.isfinite().all():
            raise InputError(f"{names[ours][0]} is not finite, missing, or does not fit {tuple(value.shape)}")
        state[ours] = joined.view(value.shape)  # linear layers of theirs are 1×1 convolutions of ours
    return state


def latent_settings(autoencoder: Any, channels: int) -> dict[str, Any]:
    """How diffusers' pipelines normalise the latent of an autoencoder, as settings of `DCSSDAE`.

    Args:
        autoencoder: of diffusers, with its weights.
        channels: c.
    """
    config, state = autoencoder.config, autoencoder.state_dict()
    known = {name: config[name] for name in NOT_MEASURED if config.get(name) is not None}
    settings: dict[str, Any] = {**NOT_MEASURED, **known}
    if hasattr(autoencoder, "_normalize_latents"):  # AutoencoderRAE, whose latents come normalised
        return {**NOT_MEASURED, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    if "bn.running_mean" in state:  # AutoencoderKLFlux2, which normalises each of the 2×2 places of a block for itself
        mean = state["bn.running_mean"].double().view(channels, -1)
        variance = state["bn.running_var"].double().view(channels, -1) + config.batch_norm_eps
        pooled = mean.mean(dim=1)
        spread = (variance + (mean - pooled[:, None]).square()).mean(dim=1).sqrt()
        return {**settings, "latents_mean": pooled.tolist(), "latents_std": spread.tolist()}
    for name in ("latents_mean", "latents_std"):
        values = state[name].tolist() if name in state else settings[name]  # LTX keeps them with the weights
        if isinstance(values, list | tuple):
            # Of several frames, channel by channel, as Cosmos has them, an image is the first.
            settings[name] = list(values)[:: max(len(values) // channels, 1)]
    return settings


def convert_diffusers(
    name: str,
    decoder_size: str = "S",
    dynamics: str = "EquilibriumMatching",
    seed: int = 0,
    subfolder: str | None = None,
    variant: str | None = None,
    remark: Callable[[str], object] = str,
    decoder: str | Path | None = None,
    wrap: bool = False,
) -> DCSSDAE:
    """Build one of our models from a published encoder, with a new decoder or a trained one.

    Encoders of AutoencoderKL and AutoencoderDC become a `KLEncoder` or `DCEncoder`, where that gives the same latent;
    any other is run by diffusers' code, in a `DiffusersEncoder`.

    Args:
        name: a folder that diffusers' `save_pretrained` has written, a pipeline's, or the id of either on the hub.
        decoder_size: of the U-ViT decoder.
        dynamics: "EquilibriumMatching" or "FlowMatching".
        seed: of the decoder's random weights.
        subfolder: where in it the autoencoder lies; None looks at the top, then in `vae/`.
        variant: which of several weight files, such as "fp16".
        remark: is called with a line for each thing that a user of this encoder should know.
        decoder: the folder of a model or of a run whose decoder to take, in place of a new one; it must have been
            trained on this very encoder.
        wrap: take a `DiffusersEncoder` in any case.

    Returns:
        The model in eval mode, float32. The latent's statistics are the published ones.

    Raises:
        InputError: there is no such model, its files are damaged, or it does not encode images; or the decoder belongs
            to another one.
    """
    source = find_diffusers_model(name, subfolder, variant)
    theirs = load_diffusers_model(source, variant=variant)
    origin = name if source.is_on_the_hub else name_of_path(name) or ""
    folder = None if decoder is None else model_folder(decoder)
    given = _new_parts(decoder_size, dynamics) if folder is None else read_config(folder)
    parts = {part: given.get(part) for part in ("decoder", "dynamics", "provenance")}
    parts["provenance"] = {**(parts["provenance"] or {}), "source": short_name(f"{type(theirs).__name__} {origin}")}
    with prefixed(name):
        model = _join(theirs, parts, seed, wrap, remark)
    if folder is not None:
        _load_decoder(model, folder, name)
    # Stated, and not the class's default, which is true: of most models nobody has asked the question.
    if source.config.get("force_upcast") is True:
        remark(UNSAFE_IN_FLOAT16)
    return model


@torch.no_grad()
def _join(theirs: Any, parts: dict[str, Any], seed: int, wrap: bool, remark: Callable[[str], object]) -> DCSSDAE:
    """A model with the encoder of an autoencoder of diffusers: an encoder of ours that does the same, or theirs."""
    name = type(theirs).__name__
    side = fixed_side(theirs) or PROBE_SIDE
    x = 2.0 * torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) - 1.0
    try:
        posterior = encode_images(theirs, x, has_frames(theirs))
        channels, wanted = posterior.mean.shape[1], torch.cat(posterior.moments, dim=1)
        sizes = {"latent_channels": channels, "downsample_factor": side // wanted.shape[3]}
        parts = {**parts, **sizes, **latent_settings(theirs, channels)}
    except Exception as error:  # an autoencoder of sound, say
        raise InputError(f"{name} does not encode images of 3 channels: {message_of(error)}") from error

    def build(encoder: dict[str, Any]) -> DCSSDAE:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = DCSSDAE(encoder=encoder, **parts).eval()
        model.encoder.load_state_dict(convert_tensors(model.encoder, theirs.state_dict()))
        found = torch.cat(model.encoder(x).moments, dim=1)
        if found.shape != wanted.shape or not (found - wanted).abs().max() <= LARGEST_DIFFERENCE * wanted.abs().max():
            raise InputError(f"{encoder['class_path']} gives another latent than {name}")
        return model

    if name in OWN_ENCODERS and not wrap:
        try:
            return build(OWN_ENCODERS[name](theirs.config))
        except (InputError, TypeError) as error:  # the second from settings that are not used, or odd
            remark(f"{error}; its encoder is run by diffusers' own code")
    settings = constructor_settings(type(theirs), theirs.config)
    return build({"class_path": "DiffusersEncoder", "init_args": {"autoencoder": name, "settings": settings}})


def _new_parts(decoder_size: str, dynamics: str) -> dict[str, Any]:
    """The decoder of a size, and the dynamics; one of patches predicts the image."""
    of_patches = decoder_size in SIZES and SIZES[decoder_size].patch > 1
    return {
        "decoder": {"init_args": {"size": decoder_size, **({"block_shortcut": "zero"} if of_patches else {})}},
        "dynamics": {"class_path": dynamics, "init_args": {"prediction": "image"} if of_patches else {}},
        "provenance": {"untrained": ["decoder"]},
    }


def _load_decoder(model: DCSSDAE, folder: Path, source: str) -> None:
    """Give the model the decoder of a saved one, whose file may lack the encoder but for what tells it from others."""
    given = read_safetensors(*next(iter(weight_files(folder).values()), [folder / f"{WEIGHTS}.safetensors"]))
    config, expected = read_config(folder), model.state_dict()
    of_encoder = {name: given.pop(name) for name in expected if name.startswith("encoder.") and name in given}
    differing = [name for name in (*HANDED_OVER["encoder"], "encoder") if config.get(name) != model.config[name]]
    differing += [name for name, value in of_encoder.items() if not torch.equal(value, expected[name].to(value.dtype))]
    if differing or not of_encoder:
        reason = f"{differing[0]} differs" if differing else "its file must keep a tensor of it, to be compared"
        raise InputError(f"{folder}: its decoder must have been trained on the encoder of {source}; {reason}")
    wanted = {name: tensor for name, tensor in expected.items() if not name.startswith("encoder.")}
    check_same_tensors(f"the decoder of {folder}", wanted, given)
    model.load_state_dict(given, strict=False)


def _kl_encoder(config: Any) -> dict[str, Any]:
    """Our encoder with the settings of an AutoencoderKL."""
    channels = math.gcd(*config.block_out_channels)
    settings = {
        "channels": channels,
        "multipliers": [width // channels for width in config.block_out_channels],
        "blocks_per_level": config.layers_per_block,
        "norm_groups": config.norm_num_groups,
    }
    return {"class_path": "KLEncoder", "init_args": settings}


def _dc_encoder(config: Any) -> dict[str, Any]:
    """Our encoder with the settings of an AutoencoderDC; called by the name of a family where it is of one."""
    stages, scales = len(config.encoder_block_out_channels), config.encoder_qkv_multiscales
    kinds: Any = config.encoder_block_types
    kinds = (kinds,) * stages if isinstance(kinds, str) else tuple(kinds)
    built = Architecture(
        tuple(config.encoder_block_out_channels),
        tuple(config.encoder_layers_per_block),
        kinds,
        tuple(next(filter(None, scales), ())),
        config.downsample_block_type != "pixel_unshuffle",
    )
    settings = asdict(built)
    for name, family in ARCHITECTURES.items():
        firsts = {key: getattr(family, key)[:stages] for key in ("widths", "depths", "block_types")}
        if replace(family, **firsts) == built:
            settings = {"architecture": name}
    settings |= {"variational": False, "out_shortcut": config.encoder_out_shortcut}
    return {"class_path": "DCEncoder", "init_args": settings}


OWN_ENCODERS = {"AutoencoderKL": _kl_encoder, "AutoencoderDC": _dc_encoder}
"""Of classes of diffusers whose encoders this package has too: from the config to class and settings of ours."""
