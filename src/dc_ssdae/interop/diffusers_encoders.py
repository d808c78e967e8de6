"""Published encoders of diffusers: of AutoencoderKL and AutoencoderDC turned into ours, of AutoencoderTiny wrapped."""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.errors import InputError, check_type, shown, unknown_name
from dc_ssdae.interop.diffusers_models import DiffusersSource, find_diffusers_model, load_diffusers_model
from dc_ssdae.model_folder import may_be_on_the_hub, model_folder, read_config, weight_files
from dc_ssdae.networks import DCEncoder, DiffusersEncoder, KLEncoder
from dc_ssdae.networks.attention import LinearAttention
from dc_ssdae.networks.dc_encoder import ARCHITECTURES, Architecture
from dc_ssdae.networks.diffusers_encoder import SAVED_BESIDE
from dc_ssdae.networks.uvit_decoder import SIZES
from dc_ssdae.provenance import name_of_path, short_name
from dc_ssdae.weights import WEIGHTS, read_safetensors

CLASSES: Mapping[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderDC": AutoencoderDC,
    "AutoencoderTiny": AutoencoderTiny,
}
"""The classes of diffusers whose encoders are known."""

UNSAFE_IN_FLOAT16 = (
    "its authors mark it as unsafe in float16 (force_upcast in its config.json): encode in bfloat16 or float32"
)
"""Of a published encoder whose activations may overflow."""

LARGEST_WIDTH = 2**16
LARGEST_DEPTH = 100
"""Of what a config may ask for: what is larger is a slip, or made to keep the loader busy for ever."""

Rules = tuple[tuple[str, str], ...]

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
    (r"^project_in\.conv\.", r"encoder.conv_in.conv."),
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


def diffusers_names(encoder: nn.Module) -> dict[str, list[str]]:
    """Map every tensor name of one of our encoders to the names of diffusers' tensors that make it up, in order.

    Raises:
        InputError: it is an encoder that diffusers does not have.
    """
    if isinstance(encoder, KLEncoder):
        rules = _KL
    elif isinstance(encoder, DCEncoder):
        rules = _DC
    else:
        raise InputError(f"diffusers has no encoder like a {type(encoder).__name__}")
    names = {}
    for ours in encoder.state_dict():
        theirs = ours
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        joined = ".attention.query_key_value."
        names[ours] = [theirs.replace(joined, f".attn.to_{part}.") for part in "qkv"] if joined in ours else [theirs]
    return names


def convert_tensors(
    encoder: KLEncoder | DCEncoder | DiffusersEncoder, theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Turn diffusers' tensors into a state dict of one of our encoders.

    An AutoencoderKL without `quant_conv` gets the identity there, one without attention an attention that adds zero.

    Args:
        encoder: gives names and shapes; it may be on the meta device.
        theirs: the whole state dict of the autoencoder; the decoder's tensors are passed over.

    Returns:
        What `encoder.load_state_dict` takes.

    Raises:
        InputError: a tensor is missing, left over, of another size, or not finite; names it.
    """
    if isinstance(encoder, DiffusersEncoder):
        names = {ours: [ours.removeprefix("autoencoder.")] for ours in encoder.state_dict()}
    else:
        names = diffusers_names(encoder)
    wanted = {name for parts in names.values() for name in parts}
    if isinstance(encoder, KLEncoder):
        for part in ("quant_conv.", "encoder.mid_block.attentions."):
            if not any(name.startswith(part) for name in theirs):
                wanted = {name for name in wanted if not name.startswith(part)}
    given = {name for name in theirs if name.startswith(("encoder.", "quant_conv."))}
    for word, odd in (("lacks", wanted - given), ("has left over", given - wanted)):
        if odd:
            raise InputError(f"the encoder {word} the tensor {min(odd)}")
    state = {}
    for ours, value in encoder.state_dict().items():
        if not wanted.issuperset(names[ours]):
            state[ours] = _of_an_absent_part(ours, value)
            continue
        joined = torch.cat([theirs[name] for name in names[ours]])
        if joined.numel() != value.numel():
            raise InputError(
                f"the tensor {names[ours][0]} has shape {tuple(theirs[names[ours][0]].shape)}, which does not fit "
                f"{tuple(value.shape)}"
            )
        if not joined.isfinite().all():
            raise InputError(f"the tensor {names[ours][0]} is not finite")
        # Linear layers of theirs are 1×1 convolutions of ours.
        state[ours] = joined.reshape(value.shape)
    return state


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read off a config.json of diffusers what `DCSSDAE` is to be built with.

    Args:
        config: with `_class_name`; what is left out takes the class's default.

    Returns:
        latent_channels, downsample_factor, encoder, and the latent's published statistics.

    Raises:
        InputError: a setting is unknown, of the wrong type, or of an encoder that this package does not have.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        if name == DCSSDAE.__name__:
            raise InputError("config.json describes a model of this package, which needs no conversion")
        raise InputError(
            f"config.json describes a {shown(name)}; the encoders of {' and '.join(CLASSES)} can be converted"
        )
    parameters = inspect.signature(CLASSES[name].__init__).parameters
    defaults = {key: value.default for key, value in parameters.items() if key != "self"}
    for key in config:
        if not str(key).startswith("_") and key not in (*defaults, *SAVED_BESIDE):
            raise unknown_name(f"setting of {name}", key, defaults)
    settings = {key: _as_lists(config.get(key, default)) for key, default in defaults.items()}
    _demand(settings, "in_channels", int, [3])
    channels = _number(settings, "latent_channels", LARGEST_WIDTH)
    widths, encoder = ENCODERS[name](settings)
    shift = settings.get("shift_factor")
    return {
        "latent_channels": channels,
        "downsample_factor": 2 ** (len(widths) - 1),
        "encoder": encoder,
        "scaling_factor": settings["scaling_factor"],
        "shift_factor": 0.0 if shift is None else shift,
        "latents_mean": settings.get("latents_mean"),
        "latents_std": settings.get("latents_std"),
    }


def convert_diffusers(
    name: str,
    decoder_size: str = "S",
    dynamics: str = "EquilibriumMatching",
    seed: int = 0,
    subfolder: str | None = None,
    variant: str | None = None,
    remark: Callable[[str], object] | None = None,
    decoder: str | Path | None = None,
) -> DCSSDAE:
    """Build one of our models from a published encoder, with a new decoder or a trained one.

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

    Returns:
        The model in eval mode, float32. The latent's statistics are the published ones.

    Raises:
        InputError: there is no such model, its files are damaged, or this package has no such encoder; or the decoder
            belongs to another one.
    """
    _check_name(name)
    source = find_diffusers_model(name, name, subfolder)
    folder = None if decoder is None else model_folder(decoder)
    parts = _new_parts(decoder_size, dynamics) if folder is None else _trained_parts(folder)
    with _naming(source):
        settings = {**model_settings(source.config), **parts}
        settings["provenance"] = {**parts.get("provenance", {"untrained": ["decoder"]}), "source": _origin(source)}
        with torch.device("meta"):
            encoder = DCSSDAE(**settings).encoder
    theirs = load_diffusers_model(source, CLASSES[source.config["_class_name"]], variant=variant)
    assert isinstance(encoder, KLEncoder | DCEncoder | DiffusersEncoder)
    with _naming(source):
        state = convert_tensors(encoder, theirs.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DCSSDAE(**settings)
    model.encoder.load_state_dict(state)
    if folder is not None:
        _load_decoder(model, folder, source.name)
    # Stated, and not the class's default, which is true: of most models nobody has asked the question.
    if remark is not None and source.config.get("force_upcast") is True:
        remark(UNSAFE_IN_FLOAT16)
    return model.eval()


def _new_parts(decoder_size: str, dynamics: str) -> dict[str, Any]:
    """The decoder of a size, and the dynamics; one of patches predicts the image."""
    decoder: dict[str, Any] = {"size": decoder_size}
    settings = {}
    if decoder_size in SIZES and SIZES[decoder_size].patch > 1:
        decoder["block_shortcut"] = "zero"
        settings = {"prediction": "image"}
    return {"decoder": {"init_args": decoder}, "dynamics": {"class_path": dynamics, "init_args": settings}}


def _trained_parts(folder: Path) -> dict[str, Any]:
    """The decoder of a saved model, its dynamics, and where they come from."""
    config = read_config(folder)
    try:
        return {
            "provenance": config.get("provenance") or {},
            **{part: config[part] for part in ("decoder", "dynamics")},
        }
    except KeyError as error:
        raise InputError(f"{folder}: config.json lacks {error.args[0]}") from None


def _load_decoder(model: DCSSDAE, folder: Path, source: str) -> None:
    """Give the model the decoder of a saved one, whose file may lack the encoder but for what tells it from others."""
    files = weight_files(folder)
    if not files:
        raise InputError(f"{folder} holds no {WEIGHTS}.safetensors")
    given = read_safetensors(*next(iter(files.values())))
    config, state = read_config(folder), model.state_dict()
    of_encoder = [name for name in given if name.startswith("encoder.")]
    if not of_encoder:
        raise InputError(
            f"{folder} has no encoder tensor to check that its encoder is the one of {source}; keep one in the file"
        )
    parts = ("latent_channels", "downsample_factor", "encoder")
    other = [name for name in parts if config.get(name) != model.config[name]]
    other += [name for name in of_encoder if name not in state or not _same(given[name], state[name])]
    if other:
        raise InputError(
            f"the decoder of {folder} was trained on another encoder than that of {source}: {other[0]} differs"
        )
    trained = {}
    for name, value in model.decoder.state_dict().items():
        name_there = f"decoder.{name}"
        if name_there not in given or given[name_there].shape != value.shape:
            raise InputError(
                f"{folder} has no {name_there} of shape {tuple(value.shape)}: its decoder was made for another latent"
            )
        trained[name] = given[name_there].float()
    model.decoder.load_state_dict(trained)


def _same(saved: Tensor, value: Tensor) -> bool:
    """Whether a tensor was saved from this one, perhaps in fewer digits."""
    return saved.shape == value.shape and torch.equal(saved, value.to(saved.dtype))


def _origin(source: DiffusersSource) -> str:
    name = name_of_path(source.name) if os.path.isdir(source.name) else short_name(source.name)
    kind = source.config["_class_name"]
    return f"{kind} {name}" if name else kind


def _kl_encoder(settings: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Widths of the levels, and our encoder's class and settings."""
    widths = _numbers(settings, "block_out_channels", LARGEST_WIDTH)
    _demand_each(settings, "down_block_types", ["DownEncoderBlock2D"], len(widths))
    _demand(settings, "act_fn", str, ["silu", "swish"])
    for key in ("use_quant_conv", "mid_block_add_attention"):
        check_type(key, settings[key], bool)
    channels = math.gcd(*widths)
    return widths, {
        "class_path": "KLEncoder",
        "init_args": {
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "blocks_per_level": _number(settings, "layers_per_block", LARGEST_DEPTH),
            "norm_groups": _number(settings, "norm_num_groups", LARGEST_WIDTH),
        },
    }


def _dc_encoder(settings: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    widths = _numbers(settings, "encoder_block_out_channels", LARGEST_WIDTH)
    depths = _numbers(settings, "encoder_layers_per_block", LARGEST_DEPTH, at_least=0)
    block_types = settings["encoder_block_types"]
    if isinstance(block_types, str):
        block_types = [block_types] * len(widths)
    check_type("encoder_block_types", block_types, list[str])
    scales = settings["encoder_qkv_multiscales"]
    check_type("encoder_qkv_multiscales", scales, list[list[int]])
    for key, values in (
        ("encoder_layers_per_block", depths),
        ("encoder_block_types", block_types),
        ("encoder_qkv_multiscales", scales),
    ):
        if len(values) != len(widths):
            raise InputError(f"{key} has {len(values)} stages; encoder_block_out_channels has {len(widths)}")
    used = [scale for kind, scale in zip(block_types, scales, strict=True) if kind == "EfficientViTBlock"]
    if used and any(scale != used[0] for scale in used):
        raise InputError(f"encoder_qkv_multiscales is {shown(scales)}; DCEncoder has the same in all its attention")
    if used:
        _demand(settings, "attention_head_dim", int, [LinearAttention.HEAD_WIDTH])
    # As published, SANA's says Conv; and diffusers takes whatever is not pixel_unshuffle for it.
    _demand(settings, "downsample_block_type", str, ["pixel_unshuffle", "conv", "Conv"])
    check_type("encoder_out_shortcut", settings["encoder_out_shortcut"], bool)
    _numbers(settings, "decoder_layers_per_block", LARGEST_DEPTH, at_least=0)  # diffusers builds the decoder too
    built = Architecture(
        widths=tuple(widths),
        depths=tuple(depths),
        block_types=tuple(block_types),
        attention_scales=tuple(used[0]) if used else (),
        strided_downsample=settings["downsample_block_type"] != "pixel_unshuffle",
    )
    variation = {"variational": False, "out_shortcut": settings["encoder_out_shortcut"]}
    return widths, {"class_path": "DCEncoder", "init_args": {**_architecture_settings(built), **variation}}


def _tiny_encoder(settings: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    widths = _numbers(settings, "encoder_block_out_channels", LARGEST_WIDTH)
    for key in ("num_encoder_blocks", "num_decoder_blocks"):
        _numbers(settings, key, LARGEST_DEPTH)
    return widths, {
        "class_path": "DiffusersEncoder",
        "init_args": {"autoencoder": "AutoencoderTiny", "settings": dict(settings)},
    }


ENCODERS: Mapping[str, Callable[[Mapping[str, Any]], tuple[list[int], dict[str, Any]]]] = {
    "AutoencoderKL": _kl_encoder,
    "AutoencoderDC": _dc_encoder,
    "AutoencoderTiny": _tiny_encoder,
}


def _architecture_settings(built: Architecture) -> dict[str, Any]:
    """The name of a family that the stages are the first of; else what they are."""
    stages = len(built.widths)
    for name, family in ARCHITECTURES.items():
        first = Architecture(
            family.widths[:stages],
            family.depths[:stages],
            family.block_types[:stages],
            family.attention_scales,
            family.strided_downsample,
        )
        if first == built:
            return {"architecture": name}
    return {
        "widths": list(built.widths),
        "depths": list(built.depths),
        "block_types": list(built.block_types),
        "attention_scales": list(built.attention_scales),
        "strided_downsample": built.strided_downsample,
    }


def _of_an_absent_part(name: str, value: Tensor) -> Tensor:
    """Weights with which a part of ours that theirs does not have changes nothing."""
    if name == "latent_head.3.weight":
        return torch.eye(value.shape[0]).view(value.shape)
    return torch.zeros(value.shape)


def _check_name(name: str) -> None:
    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise InputError(f"{name} is a file; name the folder that diffusers' save_pretrained has written")
    if not (may_be_on_the_hub(name) and name.isprintable()):
        raise InputError(f"{name!r}: no such folder, nor the id of a model on the hub")


@contextmanager
def _naming(source: DiffusersSource) -> Iterator[None]:
    """Put the source's name before the message of an error."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source.label}: {error}") from None


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _number(settings: Mapping[str, Any], key: str, at_most: int) -> int:
    check_type(key, settings[key], int)
    return _numbers({key: [settings[key]]}, key, at_most)[0]


def _numbers(settings: Mapping[str, Any], key: str, at_most: int, at_least: int = 1) -> list[int]:
    values = settings[key]
    check_type(key, values, list[int])
    for value in values:
        if isinstance(value, bool) or not at_least <= value <= at_most:
            raise InputError(f"{key} has {shown(value)}; it must be a whole number from {at_least} to {at_most}")
    if not values:
        raise InputError(f"{key} is empty; it needs a number a level")
    return values


def _demand(settings: Mapping[str, Any], key: str, kind: type, accepted: Sequence[Any]) -> None:
    """Refuse a value that this package's encoders do not have."""
    check_type(key, settings[key], kind)
    if settings[key] not in accepted:
        raise InputError(f"{key} is {shown(settings[key])}; this package's encoder has {_either(accepted)} there")


def _demand_each(settings: Mapping[str, Any], key: str, accepted: Sequence[str], count: int) -> None:
    check_type(key, settings[key], list[str])
    if len(settings[key]) != count:
        raise InputError(f"{key} has {len(settings[key])} levels; block_out_channels has {count}")
    for value in settings[key]:
        _demand({key: value}, key, str, accepted)


def _either(accepted: Sequence[Any]) -> str:
    return " or ".join(map(str, accepted))
