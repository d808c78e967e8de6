"""The training objective: a weighted sum of loss terms."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.losses.backbones import FrozenBackbone
from dc_ssdae.losses.dynamics import DynamicsLoss
from dc_ssdae.losses.kl import KLLoss
from dc_ssdae.losses.perceptual import LPIPSLoss
from dc_ssdae.losses.repa import REPALoss
from dc_ssdae.losses.term import StepOutputs

BUILT_IN: Mapping[str, type[nn.Module]] = {
    "dynamics": DynamicsLoss,
    "lpips": LPIPSLoss,
    "repa": REPALoss,
    "kl": KLLoss,
}
"""The terms that a configuration can name without a class_path."""


class Losses(NamedTuple):
    """The weighted total (a scalar, with gradients) and each term's unweighted mean over the batch."""

    total: Tensor
    terms: dict[str, Tensor]


class WeightedTerm(NamedTuple):
    """A term and its weight, which is above 0."""

    weight: float
    term: nn.Module


class Objective(nn.Module):
    """A weighted sum of terms.

    Args:
        terms: the terms by name, at least one.

    Attributes:
        wants_decoder_features: whether a term reads `StepOutputs.decoder_features`.
        decoder_layer: index from 0 of the middle block that these terms read; None is REPA's default.
        random_backbones: names of the terms whose backbone has random weights, so that their values mean nothing.

    Raises:
        InputError: there is no term, or two terms read different blocks of the decoder.
    """

    def __init__(self, terms: Mapping[str, WeightedTerm]) -> None:
        super().__init__()
        if not terms:
            raise InputError("an objective needs at least one term with a weight above 0")
        self.weights = {name: term.weight for name, term in terms.items()}
        self.terms = nn.ModuleDict({name: term.term for name, term in terms.items()})
        readers = {name: term for name, term in self.terms.items() if getattr(term, "reads_decoder_features", False)}
        layers = {name: getattr(term, "decoder_layer", None) for name, term in readers.items()}
        if len(set(layers.values())) > 1:
            wanted = ", ".join(f"losses.{name} {layer}" for name, layer in layers.items())
            raise InputError(f"all terms must read the same block of the decoder, but these differ: {wanted}")
        self.wants_decoder_features = bool(readers)
        self.decoder_layer = next(iter(layers.values()), None)
        self.random_backbones = [name for name, term in self.terms.items() if getattr(term, "random_weights", False)]

    def compile_backbones(self) -> None:
        """Compile the terms' frozen networks in place."""
        for module in self.modules():
            if isinstance(module, FrozenBackbone):
                module.compile()

    def forward(self, outputs: StepOutputs) -> Losses:
        """Compute every term and the total.

        Raises:
            InputError: a term returns something other than a tensor of shape () or (B,).
        """
        batch = outputs.record.x.shape[0]
        values: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            value = term(outputs)
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if given not in ((), (batch,)):
                raise InputError(f"losses.{name} returns {given}; a term returns a tensor of shape () or ({batch},)")
            values[name] = value.float().mean()
        total = sum((self.weights[name] * value for name, value in values.items()), start=values[name].new_zeros(()))
        return Losses(total, values)
