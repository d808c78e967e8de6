"""One step's computation as a module, which is what a process group wraps."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range
from dc_ssdae.errors import InputError
from dc_ssdae.losses import Losses, Objective, StepOutputs


class TrainingStep(nn.Module):
    """Encode, corrupt, predict and add up the objective.

    Args:
        model: the autoencoder.
        objective: its terms may hold parameters, which train too.
        precision: "float32", or "bfloat16" or "float16" for autocast around the networks; losses stay float32.
        channels_last: bring the images into that memory order.
    """

    def __init__(
        self, model: DCSSDAE, objective: Objective, precision: str = "float32", channels_last: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._dtype = getattr(torch, precision)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, pixels: Tensor, noise: Tensor, level: Tensor, latent_noise: Tensor) -> Losses:
        """Compute the losses of a batch; gradients flow to encoder, decoder and objective.

        Args:
            pixels: uint8 (B, 3, S, S).
            noise: (B, 3, S, S), standard normal.
            level: (B,), of the dynamics.
            latent_noise: (B, c, S/f, S/f), standard normal.
        """
        dynamics = self.model.dynamics
        x = to_model_range(pixels).contiguous(memory_format=self._memory_format)
        record = dynamics.corrupt(x, noise.contiguous(memory_format=self._memory_format), level)
        with self._autocast(x):
            posterior = self.model.posterior(x)
            z = posterior.sample(noise=latent_noise)
            prediction = self.model.decoder(record.x_level, z, level if dynamics.conditions_on_time else None)
        return self.objective(StepOutputs(dynamics, record, prediction, posterior))

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Encode images and decode the mode of their latents in one step.

        Args:
            pixels: uint8 (B, 3, S, S).

        Returns:
            float32 (B, 3, S, S), about [-1, 1].
        """
        x = to_model_range(pixels).contiguous(memory_format=self._memory_format)
        with torch.no_grad(), self._autocast(x):
            latent = self.model.encode(x).latent_dist.mode()
            return self.model.decode(latent.float()).sample.float()

    def _autocast(self, x: Tensor) -> AbstractContextManager[None]:
        if self._dtype == torch.float32:
            return nullcontext()
        if not torch.amp.is_autocast_available(x.device.type):
            raise InputError(f"training.precision: {x.device.type} has no autocast; use float32")
        return torch.autocast(x.device.type, self._dtype)
