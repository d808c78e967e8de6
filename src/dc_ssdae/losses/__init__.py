"""Losses: one file a term; `total` adds them up."""

from dc_ssdae.losses.kl import kl_loss
from dc_ssdae.losses.total import Losses, LossWeights, total_loss

__all__ = ["LossWeights", "Losses", "kl_loss", "total_loss"]
