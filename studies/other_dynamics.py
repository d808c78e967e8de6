"""Dynamics that the studies compare with the package's own."""

import torch
from torch import Tensor

from dc_ssdae.dynamics import Corruption, FlowMatching


class UnweightedFlowMatching(FlowMatching):
    """Flow matching whose prediction is the image, with the image's error as its loss, not that of the velocity."""

    def __init__(self) -> None:
        super().__init__("image")

    def loss(self, record: Corruption, prediction: Tensor) -> Tensor:
        return (prediction.float() - record.target.float()).square().flatten(1).mean(dim=1)


class Deterministic:
    """An autoencoder without diffusion: the decoder sees no noise, and its answer is the image.

    It is what a KL autoencoder without a GAN learns: plain mean squared error. Decode it with noise of zeros.
    """

    conditions_on_time = False
    noise_level = 0.0
    prediction = "image"

    def sample_level(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        return torch.zeros(batch_size, device=device)

    def corrupt(self, x: Tensor, noise: Tensor, level: Tensor) -> Corruption:
        return Corruption(x, noise, level, torch.zeros_like(x), x)

    def clean_estimate(self, x_level: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        return prediction

    def loss(self, record: Corruption, prediction: Tensor) -> Tensor:
        return (prediction.float() - record.target.float()).square().flatten(1).mean(dim=1)
