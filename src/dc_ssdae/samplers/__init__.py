"""Samplers: pure functions of a field. No networks, no dynamics."""

from dc_ssdae.samplers.euler import euler
from dc_ssdae.samplers.gradient_descent import gradient_descent
from dc_ssdae.samplers.result import SamplerResult

__all__ = ["SamplerResult", "euler", "gradient_descent"]
