"""Metrics that take no time: PSNR, others on request, and an "rFID" of colours."""

import torch
from torch import Tensor

from dc_ssdae.evaluation.frechet import FrechetDistance
from dc_ssdae.evaluation.metric_networks import MetricSuite, load_metrics
from dc_ssdae.evaluation.protocol import Protocol


def colours(pixels: Tensor) -> Tensor:
    """Mean and spread of each colour: (B, 6)."""
    values = pixels.double().div(255.0).flatten(2)
    return torch.cat([values.mean(dim=2), values.std(dim=2)], dim=1)


def suite_of(protocol: Protocol, *others: str) -> MetricSuite:
    """PSNR, an "rFID" of colours, and other metrics."""
    suite = load_metrics(protocol, torch.device("cpu"), ("psnr", *others))
    suite.distances["rfid"] = FrechetDistance(colours, 6, replicates=5)
    del suite.missing["rfid"]
    return suite
