"""Checkpoints of the authors' original code: their tensor names, and reading them into ours.

Names map one to one. The rules below rewrite a name of ours into the original's; the way back is the inverse over
the names that a model has, so the two directions cannot disagree.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder
from dc_ssdae.networks.dc_encoder import EfficientViTBlock
from dc_ssdae.presets import DEFAULT_CLASSES, load_preset
from dc_ssdae.provenance import short_name
from dc_ssdae.weights import check_same_tensors, read_safetensors

Rules = tuple[tuple[str, str], ...]

_KL_ENCODER: Rules = (
    (r"down\.(\d+)\.\d+\.conv\.", r"down.\1.downsample.conv."),
    (r"down\.(\d+)\.(\d+)\.(?!downsample)", r"down.\1.block.\2."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"middle\.0\.", r"mid.block_1."),
    (r"middle\.2\.", r"mid.block_2."),
    (r"middle\.1\.(norm)\.", r"mid.attn_1.\1."),
    (r"middle\.1\.(q|k|v)(?:uery|ey|alue)\.", r"mid.attn_1.\1."),
    (r"middle\.1\.out\.", r"mid.attn_1.proj_out."),
    (r"latent_head\.0\.", r"norm_out."),
    (r"latent_head\.2\.", r"conv_out."),
    (r"latent_head\.3\.", r"out_proj."),
)

_DC_ENCODER: Rules = (
    (r"^project_in\.", r"project_in.conv."),
    (r"stages\.(\d+)\.(\d+)\.norm\.", r"stages.\1.op_list.\2.main.conv2.norm."),
    (r"stages\.(\d+)\.(\d+)\.(conv\d?)\.", r"stages.\1.op_list.\2.main.\3.conv."),
    (r"latent_head\.", r"project_out.op_list.0.conv."),
)

_DECODER: Rules = (
    (r"^conv_out\.", r"conv_out."),
    (r"^norm_out\.", r"conv_norm_out."),
    (r"^latent_norm\.", r"batch_norm_z."),
    (r"^image_in\.", r"conv_in_img."),
    (r"^latent_in\.", r"conv_in_z."),
    (r"^join_in\.", r"conv_in."),
    (r"^context\.", r"ada_ctx_proj."),
    (r"^time_embedding\.linear(\d)\.", r"time_embedding.linear_\1."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0.conv."),
    (r"\.norm1\.scale_shift\.", r".norm1.ctx_proj."),
    (r"\.time_scale_shift\.", r".time_emb_proj."),
    (r"\.shortcut\.", r".conv_shortcut."),
    (r"^middle\.blocks\.(\d+)\.", r"mid_block.transformer_blocks.\1."),
    (r"^middle\.project_(in|out)\.", r"mid_block.proj_\1."),
    (r"^middle\.norm\.", r"mid_block.norm."),
    (r"\.shift_scale\.", r".norm1.linear."),
    (r"\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn1.to_\1."),
    (r"\.attention\.out\.", r".attn1.out_proj."),
    (r"\.attention\.relative_position_table$", r".relative_position_bias.relative_bias_table"),
    (r"\.feed_forward_in\.", r".ff.proj_in_act.proj."),
    (r"\.feed_forward_out\.", r".ff.proj_out."),
)


def original_names(module: nn.Module) -> dict[str, str]:
    """Map every tensor name of one of our networks to the original code's name for it.

    Raises:
        InputError: the network has a part that the original code's names are not known for.
    """
    rules: Rules
    if isinstance(module, KLEncoder):
        rules = _KL_ENCODER
    elif isinstance(module, DCEncoder):
        if module.out_shortcut or any(isinstance(part, EfficientViTBlock) for part in module.modules()):
            raise InputError(
                "the original's names are known for ResBlock stages without an output shortcut; "
                "set block_types to ResBlock and out_shortcut to false"
            )
        rules = _DC_ENCODER
    elif isinstance(module, UViTDecoder):
        rules = _DECODER
    else:
        raise InputError(f"no names of the original code are known for a {type(module).__name__}")
    return {name: _rewrite(name, rules) for name in module.state_dict()}


def _rewrite(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def original_model_names(model: DCSSDAE) -> dict[str, str]:
    """Map every tensor name of a whole autoencoder to the original's (`encoder.*`, `decoder.*`)."""
    return {
        f"{part}.{ours}": f"{part}.{theirs}"
        for part, module in (("encoder", model.encoder), ("decoder", model.decoder))
        for ours, theirs in original_names(module).items()
    }


def rename_tensors(module: nn.Module, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict under the original's names into one that `module.load_state_dict` takes.

    Raises:
        InputError: names the first tensors that are missing, left over, or of another shape.
    """
    return _rename(original_names(module), module.state_dict(), original)


def _rename(
    names: Mapping[str, str], expected: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    check_same_tensors("the checkpoint", {theirs: expected[ours] for ours, theirs in names.items()}, original)
    return {ours: original[theirs] for ours, theirs in names.items()}


def settings_shown_by(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """Read off a checkpoint what overrides a preset: the DC encoder's norm and the decoder's window radius.

    Args:
        names: the file's tensor names, the original's.
        shapes: their shapes.

    Returns:
        Settings by part, as `DCSSDAE.from_preset` takes them.
    """
    names = list(names)
    settings: dict[str, dict[str, Any]] = {}
    if any(name.startswith(("encoder.project_in.", "encoder.stages.")) for name in names):
        has_norm = any(re.search(r"^encoder\..*\.norm\.weight$", name) for name in names)
        settings["encoder"] = {"norm": "rms_norm" if has_norm else "none"}
    tables = [shapes[name] for name in names if name.endswith("relative_bias_table") and len(shapes[name]) == 3]
    if tables:
        settings["decoder"] = {"window_radius": (tables[0][0] - 1) // 2}
    return settings


def convert_original(checkpoint: Path, preset: str) -> DCSSDAE:
    """Build one of our models from a checkpoint of the original code.

    Args:
        checkpoint: a safetensors file with tensors `encoder.*` and `decoder.*`.
        preset: the preset whose architecture the checkpoint has; the file overrides its norm and window.

    Returns:
        The model in eval mode, float32.

    Raises:
        InputError: the file cannot be read, or its tensors are not exactly the preset's.
    """
    class_name = (load_preset(preset)["model"].get("encoder") or {}).get("class_path", DEFAULT_CLASSES["encoder"])
    tensors = read_safetensors(checkpoint)
    source = short_name(f"a checkpoint of the original code, {checkpoint.name}")
    settings = settings_shown_by(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if class_name != "DCEncoder":
        settings.pop("encoder", None)  # of another encoder's checkpoint; the names below tell what does not fit
    with torch.device("meta"):
        model = DCSSDAE.from_preset(preset, provenance={"source": source, "preset": preset}, **settings)
    expected = model.state_dict()
    try:
        renamed = _rename(original_model_names(model), expected, tensors)
    except InputError as error:
        raise InputError(f"{checkpoint}, preset {preset!r}: {error}") from None
    converted = {name: tensor.to(expected[name].dtype) for name, tensor in renamed.items()}
    model.load_state_dict(converted, assign=True)
    return model.eval()
