"""What a loss term may read, and what it must provide."""

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
        dynamics: the model's dynamics.
        record: what the dynamics made of the images: `x` (B, 3, H, W) in [-1, 1], `noise`, `level`, `x_level`,
            `target`.
        prediction: the decoder's output, (B, 3, H, W).
        posterior: the encoder's output.
        decoder_features: output of one of the decoder's middle blocks, (B, D, H/8, W/8), with gradients and in the
            precision of the networks; None if no term reads it.
    """

    dynamics: Dynamics
    record: Corruption
    prediction: Tensor
    posterior: DiagonalGaussian
    decoder_features: Tensor | None = None

    @cached_property
    def clean_estimate(self) -> Tensor:
        """The estimate x̂ of the image, (B, 3, H, W) float32, roughly in [-1, 1], to be compared with `record.x`."""
        return self.dynamics.clean_estimate(self.record.x_level, self.prediction.float(), self.record.level)


class LossTerm(Protocol):
    """A term of the objective: an `nn.Module` whose parameters, if it has any, are trained with the model's.

    A term that reads `decoder_features` sets the attribute `reads_decoder_features = True`. It may also set
    `decoder_layer`, the index from 0 of the middle block that it reads; None is the block that REPA reads by default.
    """

    def __call__(self, outputs: StepOutputs) -> Tensor:
        """Return the unweighted loss: a scalar, or (B,), of which the objective takes the mean."""
        ...
