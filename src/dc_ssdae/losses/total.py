"""The training objective: a weighted sum of terms (SPEC section 2, "Total loss")."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dc_ssdae.dynamics import Corruption, Dynamics
from dc_ssdae.errors import InputError, check_type
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.losses.kl import kl_loss


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term; 0 leaves the term out."""

    dynamics: float = 1.0
    kl: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("dynamics", "kl"):
            check_type(f"loss weight {name}", getattr(self, name), float)
            if not getattr(self, name) >= 0.0:
                raise InputError(f"loss weight {name} is {getattr(self, name)}; it must be 0 or more")
        if not self.dynamics and not self.kl:
            raise InputError("every loss weight is 0: there is nothing to train")


class Losses(NamedTuple):
    """The weighted total (scalar, with gradient) and each term before its weight."""

    total: Tensor
    terms: dict[str, Tensor]


def total_loss(
    dynamics: Dynamics,
    record: Corruption,
    prediction: Tensor,
    posterior: DiagonalGaussian,
    weights: LossWeights,
) -> Losses:
    """Add up the terms of one batch.

    Args:
        dynamics: gives L_dynamics.
        record: what the dynamics made of the images.
        prediction: the decoder's answer, of the images' shape.
        posterior: the encoder's answer.
        weights: of the terms.
    """
    terms: dict[str, Tensor] = {}
    if weights.dynamics:
        terms["dynamics"] = dynamics.loss(record, prediction).mean()
    if weights.kl:
        terms["kl"] = kl_loss(posterior)
    total = sum((getattr(weights, name) * term for name, term in terms.items()), start=prediction.new_zeros(()))
    return Losses(total, terms)
