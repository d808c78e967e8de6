"""The regression that trains the field, or the velocity."""

from torch import Tensor, nn

from dc_ssdae.losses.term import StepOutputs


class DynamicsLoss(nn.Module):
    """L_dynamics of the model's dynamics, an image: (B,) float32 (SPEC section 2)."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.dynamics.loss(outputs.record, outputs.prediction)
