"""Samplers: pure functions of a field. No networks, no dynamics."""

from dc_ssdae.samplers.descent import Schedule, gradient_descent, nesterov
from dc_ssdae.samplers.euler import euler, midpoint
from dc_ssdae.samplers.result import SamplerResult

__all__ = ["SamplerResult", "Schedule", "euler", "gradient_descent", "midpoint", "nesterov"]
