"""KL of the latent's posterior."""

from torch import Tensor, nn

from dc_ssdae.losses.term import StepOutputs


class KLLoss(nn.Module):
    """KL from N(0, I), summed over c·h·w: (B,) float32 (SPEC section 2)."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.posterior.kl()
