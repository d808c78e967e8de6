"""KL divergence of the latent's posterior."""

from torch import Tensor, nn

from dc_ssdae.losses.term import StepOutputs


class KLLoss(nn.Module):
    """KL divergence of the posterior from N(0, I), summed over c·h·w: (B,) float32."""

    def forward(self, outputs: StepOutputs) -> Tensor:
        return outputs.posterior.kl()
