"""What a loss term may read, and what it must answer to."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from dc_ssdae.dynamics import Corruption, Dynamics
from dc_ssdae.latent import DiagonalGaussian


@dataclass(frozen=True)
class StepOutputs:
    """Everything that one training step computed for a batch.

    Args:
        dynamics: of the model.
        record: what the dynamics made of the images: `x` (B, 3, H, W) in [-1, 1], `noise`, `level`, `x_level`,
            `target`.
        prediction: the decoder's answer, (B, 3, H, W).
        posterior: the encoder's answer.
        decoder_features: output of one of the decoder's middle blocks, (B, D, H/8, W/8), with gradient and in the
            precision of the networks; None where no term reads it.
    """

    dynamics: Dynamics
    record: Corruption
    prediction: Tensor
    posterior: DiagonalGaussian
    decoder_features: Tensor | None = None

    @cached_property
    def clean_estimate(self) -> Tensor:
        """x̂ (B, 3, H, W) in float32, about [-1, 1]: what perceptual terms compare with `record.x`."""
        return self.dynamics.clean_estimate(self.record.x_level, self.prediction.float(), self.record.level)


class LossTerm(Protocol):
    """A term of the objective: an `nn.Module`, whose parameters, if it has any, train with the model's.

    A term that reads `decoder_features` has the attribute `reads_decoder_features = True` and may have
    `decoder_layer`, the index of the middle block that it reads, from 0; None is REPA's.
    """

    def __call__(self, outputs: StepOutputs) -> Tensor:
        """Give the term before its weight: scalar, or (B,), of which the mean counts."""
        ...
