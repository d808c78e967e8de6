"""Samplers: pure functions of a field. No networks, no dynamics."""

from dc_ssdae.samplers.descent import Schedule
from dc_ssdae.samplers.euler import euler, midpoint
from dc_ssdae.samplers.gradient_descent import gradient_descent
from dc_ssdae.samplers.nesterov import nesterov
from dc_ssdae.samplers.result import SamplerResult

__all__ = ["SamplerResult", "Schedule", "euler", "gradient_descent", "midpoint", "nesterov"]
