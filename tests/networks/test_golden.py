"""The original's networks, rebuilt from the metadata of files that hold its weights, inputs and outputs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dc_ssdae.interop.original import rename_tensors
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder

TOLERANCE = 1e-4
KL_RELATIVE_TOLERANCE = 1e-5

Settings = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def kl_encoder(settings: Settings, weights: Tensors) -> nn.Module:
    assert settings["double_z"], "an encoder without a log-variance is not one of ours"
    return KLEncoder(
        latent_channels=settings["z_dim"],
        downsample_factor=2 ** (len(settings["ch_mult"]) - 1),
        channels=settings["base_dim"],
        multipliers=settings["ch_mult"],
        blocks_per_level=settings["num_res_blocks"],
    )


def dc_encoder(settings: Settings, weights: Tensors) -> nn.Module:
    stages = len(settings["width_list"])
    block_type = settings["block_type"]
    # Not by the metadata's name of the norm: the original's own registry lacks it, and no norm was built.
    has_norm = any(name.endswith(".norm.weight") for name in weights)
    return DCEncoder(
        latent_channels=settings["latent_channels"],
        downsample_factor=2 ** (stages - 1),
        widths=settings["width_list"],
        depths=settings["depth_list"],
        block_types=[block_type] * stages if isinstance(block_type, str) else block_type,
        norm="rms_norm" if has_norm else "none",
        variational=settings["double_latent"],
        out_shortcut=settings["out_shortcut"] is not None,
    )


def uvit_decoder(settings: Settings, weights: Tensors) -> nn.Module:
    table = next(value for name, value in weights.items() if name.endswith("relative_bias_table"))
    window, _, heads = table.shape
    return UViTDecoder(
        latent_channels=settings["z_dim"],
        downsample_factor=settings["downsample"],
        channels=settings["channels"],
        multipliers=settings["ch_mult"],
        middle_layers=settings["mid_nlayers"],
        heads=heads,
        window_radius=(window - 1) // 2,
        time_conditioning=settings["time_embedding"],
    )


BUILDERS: dict[str, Callable[[Settings, Tensors], nn.Module]] = {
    "VQEncoder": kl_encoder,
    "DCEncoder": dc_encoder,
    "UViTDecoder": uvit_decoder,
}


def parsed(value: str) -> Any:
    """A metadata value: JSON, or free text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Constructor's arguments, the original's state dict, and inputs and outputs of a golden file."""
    with safe_open(path, "pt") as file:
        settings = {key: parsed(value) for key, value in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    record = {name.removeprefix("io."): value for name, value in tensors.items() if name.startswith("io.")}
    return settings, weights, record


def cases(record: Tensors) -> list[str]:
    """Suffixes of the cases that the names spell: "_64x64" for x_64x64, "" for a plain x."""
    suffixes = sorted(name[1:] for name in record if name == "x" or name.startswith("x_"))
    assert suffixes, f"no input x among {sorted(record)}"
    return suffixes


def check_encoder(encoder: nn.Module, record: Tensors, suffix: str) -> None:
    posterior = encoder(record[f"x{suffix}"])
    torch.testing.assert_close(posterior.mean, record[f"mean{suffix}"], atol=TOLERANCE, rtol=0.0)
    if f"logvar{suffix}" in record:
        torch.testing.assert_close(posterior.logvar, record[f"logvar{suffix}"], atol=TOLERANCE, rtol=0.0)
    if f"kl{suffix}" in record:
        torch.testing.assert_close(posterior.kl(), record[f"kl{suffix}"], atol=0.0, rtol=KL_RELATIVE_TOLERANCE)


def check_decoder(decoder: nn.Module, record: Tensors, suffix: str) -> None:
    output = decoder(record[f"x{suffix}"], record[f"z{suffix}"], record.get(f"t{suffix}"))
    torch.testing.assert_close(output, record[f"y{suffix}"], atol=TOLERANCE, rtol=0.0)


@torch.no_grad()
def test_golden(golden_file: Path) -> None:
    settings, weights, record = read(golden_file)
    name = settings.get("module")
    if name not in BUILDERS:
        pytest.fail(f"{golden_file.name} holds a module {name!r}; known are {', '.join(BUILDERS)}")
    module = BUILDERS[name](settings, weights)
    module.load_state_dict(rename_tensors(module, weights))
    module.eval()
    check = check_decoder if name == "UViTDecoder" else check_encoder
    for suffix in cases(record):
        check(module, record, suffix)
