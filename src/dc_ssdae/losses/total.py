"""The training objective: a weighted sum of terms (SPEC section 2, "Total loss")."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.losses.dynamics import DynamicsLoss
from dc_ssdae.losses.kl import KLLoss
from dc_ssdae.losses.term import StepOutputs

BUILT_IN: Mapping[str, type[nn.Module]] = {"dynamics": DynamicsLoss, "kl": KLLoss}
"""Terms that a configuration names without a class_path."""


class Losses(NamedTuple):
    """The weighted total (scalar, with gradient) and each term's mean over the batch before its weight."""

    total: Tensor
    terms: dict[str, Tensor]


class WeightedTerm(NamedTuple):
    """A term and its factor, above 0."""

    weight: float
    term: nn.Module


class Objective(nn.Module):
    """A weighted sum of terms.

    Args:
        terms: by name; at least one.

    Raises:
        InputError: there is no term.
    """

    def __init__(self, terms: Mapping[str, WeightedTerm]) -> None:
        super().__init__()
        if not terms:
            raise InputError("an objective needs at least one term of a weight above 0")
        self.weights = {name: term.weight for name, term in terms.items()}
        self.terms = nn.ModuleDict({name: term.term for name, term in terms.items()})

    def forward(self, outputs: StepOutputs) -> Losses:
        """Compute every term and the total.

        Raises:
            InputError: a term gives no tensor of shape () or (B,).
        """
        batch = outputs.record.x.shape[0]
        values: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            value = term(outputs)
            if not isinstance(value, Tensor) or tuple(value.shape) not in ((), (batch,)):
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"losses.{name} gives {given}; a term gives a tensor of shape () or ({batch},)")
            values[name] = value.float().mean()
        total = sum((self.weights[name] * value for name, value in values.items()), start=values[name].new_zeros(()))
        return Losses(total, values)
