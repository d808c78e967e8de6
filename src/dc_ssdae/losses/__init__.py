"""Losses: one file per term; `total` adds them up."""

from dc_ssdae.losses.backbones import FrozenBackbone
from dc_ssdae.losses.dynamics import DynamicsLoss
from dc_ssdae.losses.kl import KLLoss
from dc_ssdae.losses.perceptual import LPIPSLoss
from dc_ssdae.losses.repa import REPALoss
from dc_ssdae.losses.term import LossTerm, StepOutputs
from dc_ssdae.losses.total import Losses, Objective, WeightedTerm

__all__ = [
    "DynamicsLoss",
    "FrozenBackbone",
    "KLLoss",
    "LPIPSLoss",
    "LossTerm",
    "Losses",
    "Objective",
    "REPALoss",
    "StepOutputs",
    "WeightedTerm",
]
