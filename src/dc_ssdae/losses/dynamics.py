"""The regression loss that trains the field or the velocity."""

from torch import Tensor, nn

from dc_ssdae.losses.term import StepOutputs


class DynamicsLoss(nn.Module):
    """The regression loss of the model's dynamics, per image: (B,) float32."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.dynamics.loss(outputs.record, outputs.prediction)
