"""Weights and checkpoints in the hands of tests: filling what begins at zero, comparing bit for bit."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from tiny import run_config
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.training.build import build_model

M = TypeVar("M", bound=nn.Module)


def without_zeros(module: M) -> M:
    """Fill the parameters that begin at zero, which would hide what comes before them."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return module


def random_model(seed: int = 1, dynamics: Mapping[str, Any] | None = None) -> DCSSDAE:
    """A tiny model of which nothing is zero, nor as it was made."""
    torch.manual_seed(seed)
    model = without_zeros(build_model(run_config(model={"dynamics": dynamics}).model))
    norm: Any = model.decoder.latent_norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
