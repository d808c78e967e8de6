"""Dynamics: corruption, target and clean estimate. Mathematics, no networks."""

from dc_ssdae.dynamics.corruption import Corruption, Dynamics
from dc_ssdae.dynamics.equilibrium import EquilibriumMatching
from dc_ssdae.dynamics.flow import FlowMatching

__all__ = ["Corruption", "Dynamics", "EquilibriumMatching", "FlowMatching"]
