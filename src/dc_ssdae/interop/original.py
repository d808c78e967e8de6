"""Checkpoints of the authors' original code: their tensor names, and reading them into ours.

Names map one to one. The rules below rewrite a name of ours into the original's; the way back is the inverse over
the names that a model has, so the two directions cannot disagree.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.errors import InputError, prefixed
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder
from dc_ssdae.networks.dc_encoder import EfficientViTBlock
from dc_ssdae.provenance import short_name
from dc_ssdae.weights import check_same_tensors, read_safetensors

Rules = tuple[tuple[str, str], ...]

_KL_ENCODER: Rules = (
    (r"down\.(\d+)\.\d+\.conv\.", r"down.\1.downsample.conv."),
    (r"down\.(\d+)\.(\d+)\.(?!downsample)", r"down.\1.block.\2."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"middle\.0\.", r"mid.block_1."),
    (r"middle\.2\.", r"mid.block_2."),
    (r"middle\.1\.(norm|q|k|v)(?:uery|ey|alue)?\.", r"mid.attn_1.\1."),
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
    (r"^middle\.(norm|proj)(?:ect)?", r"mid_block.\1"),
    (r"\.shift_scale\.", r".norm1.linear."),
    (r"\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn1.to_\1."),
    (r"\.attention\.out\.", r".attn1.out_proj."),
    (r"\.attention\.relative_position_table$", r".relative_position_bias.relative_bias_table"),
    (r"\.feed_forward_in\.", r".ff.proj_in_act.proj."),
    (r"\.feed_forward_out\.", r".ff.proj_out."),
)


_RULES: Mapping[type[nn.Module], Rules] = {KLEncoder: _KL_ENCODER, DCEncoder: _DC_ENCODER, UViTDecoder: _DECODER}


def rewrite(name: str, rules: Rules) -> str:
    """Apply the rules, regular expressions and what takes their place, to a tensor's name, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def original_names(module: nn.Module) -> dict[str, str]:
    """Map every tensor name of a model or of one of our networks to the original code's name for it.

    Raises:
        InputError: the network has a part that the original code's names are not known for.
    """
    if isinstance(module, DCSSDAE):
        return {
            f"{part}.{ours}": f"{part}.{theirs}"
            for part in ("encoder", "decoder")
            for ours, theirs in original_names(getattr(module, part)).items()
        }
    rules = next((rules for kind, rules in _RULES.items() if isinstance(module, kind)), None)
    has_shortcut = getattr(module, "out_shortcut", False)
    if rules is None or has_shortcut or any(isinstance(part, EfficientViTBlock) for part in module.modules()):
        raise InputError(f"the original code has no {type(module).__name__} like this one")
    return {name: rewrite(name, rules) for name in module.state_dict()}


def rename_tensors(module: nn.Module, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the original's state dict of a model or of one of its networks into one that `load_state_dict` takes.

    Raises:
        InputError: names the first tensors that are missing, left over, or of another shape.
    """
    names, expected = original_names(module), module.state_dict()
    check_same_tensors("the checkpoint", {theirs: expected[ours] for ours, theirs in names.items()}, original)
    return {ours: original[theirs].to(expected[ours].dtype) for ours, theirs in names.items()}


def settings_shown_by(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Read off a checkpoint what overrides a preset: the DC encoder's norm and the decoder's window radius.

    Args:
        tensors: the file's, under the original's names.

    Returns:
        Settings by part, as `DCSSDAE.from_preset` takes them.
    """
    settings: dict[str, dict[str, Any]] = {}
    is_deep_compression = any(name.startswith(("encoder.project_in.", "encoder.stages.")) for name in tensors)
    if is_deep_compression and not any(re.search(r"^encoder\..*\.norm\.weight$", name) for name in tensors):
        settings["encoder"] = {"norm": "none"}
    for name, tensor in tensors.items():
        if name.endswith("relative_bias_table") and tensor.ndim == 3:
            settings.setdefault("decoder", {"window_radius": (len(tensor) - 1) // 2})
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
    provenance = {"source": short_name(f"a checkpoint of the original code, {checkpoint.name}"), "preset": preset}
    tensors = read_safetensors(checkpoint)
    with prefixed(f"{checkpoint}, preset {preset!r}"):
        with torch.device("meta"):
            model = DCSSDAE.from_preset(preset, provenance=provenance, **settings_shown_by(tensors))
        model.load_state_dict(rename_tensors(model, tensors), assign=True)
    return model.eval()
