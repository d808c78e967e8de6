"""The diffusion transformer of a probe: diffusers' DiT, and its answer as a function of latents, level and class."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dc_ssdae.dynamics import Dynamics
from dc_ssdae.errors import InputError

SIZES: Mapping[str, tuple[int, int, int]] = {
    "nano": (4, 128, 4),
    "tiny": (6, 192, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
}
"""Blocks, channels and heads by name; S and B are those of Peebles & Xie 2023, table 1."""

TIMES = 1000.0
"""What the embedding of a level in [0, 1] is made for."""


def build_network(latent_shape: tuple[int, ...], classes: int, size: str, patch: int) -> Any:
    """Build diffusers' `DiTTransformer2DModel` with fresh weights, from PyTorch's default generator.

    They are those of its authors (Peebles & Xie 2023, section 3.2 and their code): Xavier's in linear layers, small
    embeddings, and zero in the modulations and the last layer. diffusers' class is made to load weights, and begins
    with PyTorch's.

    Args:
        latent_shape: (c, h, w), h and w alike.
        classes: number of classes; one more stands for "no class".
        size: one of `SIZES`.
        patch: side of a token, which divides h.

    Raises:
        InputError: the latents are not square, or no multiple of the patch.
    """
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding

    channels, height, width = latent_shape
    if height != width or height % patch:
        raise InputError(f"latents of {height}×{width} are not made of patches of {patch}×{patch}; try another --patch")
    blocks, inner, heads = SIZES[size]
    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=inner // heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=blocks,
        attention_bias=True,
        sample_size=height,
        patch_size=patch,
        num_embeds_ada_norm=max(1, classes),
    )
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
            module.dropout_prob = 0.0  # it would drop the class in each block anew; the training step drops it once
        elif isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
    modulations = [block.norm1.linear for block in network.transformer_blocks]
    for layer in (*modulations, network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(layer.weight)
    return network


def answer(network: Any, dynamics: Dynamics, x: Tensor, level: Tensor | None, labels: Tensor) -> Tensor:
    """The network's answer for latents.

    Args:
        network: as `build_network` gives it.
        dynamics: says whether the network is told the level.
        x: (B, c, h, w).
        level: (B,) in [0, 1]; without meaning for a dynamics that does not condition on it.
        labels: int64 (B,); -1 stands for no class.

    Returns:
        Of x's shape.
    """
    known = dynamics.conditions_on_time and level is not None
    times = level * TIMES if known and level is not None else torch.zeros(len(x), device=x.device)
    labels = torch.where(labels < 0, network.config.num_embeds_ada_norm, labels)
    return network(x, timestep=times, class_labels=labels, return_dict=False)[0]
