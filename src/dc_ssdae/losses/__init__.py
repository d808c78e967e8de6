"""Losses: one file a term; `total` adds them up."""

from dc_ssdae.losses.dynamics import DynamicsLoss
from dc_ssdae.losses.kl import KLLoss
from dc_ssdae.losses.term import LossTerm, StepOutputs
from dc_ssdae.losses.total import Losses, Objective, WeightedTerm

__all__ = ["DynamicsLoss", "KLLoss", "LossTerm", "Losses", "Objective", "StepOutputs", "WeightedTerm"]
