"""The exponential moving average of a model: its parameters averaged, its buffers copied."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dc_ssdae.training.tensors import like, local_parts
from dc_ssdae.weights import check_same_tensors

Evaluated = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Gives the values of parameters, by name, at which they are to be evaluated."""


class ExponentialMovingAverage:
    """Averages a model's parameters, and copies its buffers.

    Running statistics are averages already, over a few batches. A second, longer average would keep what one batch of
    exploded latents leaves in a variance for tens of thousands of steps, and with it ruin every evaluation. diffusers'
    EMAModel knows no buffers; neither it nor PyTorch's AveragedModel can start later, or follow the weights that a
    schedule-free optimiser means to be evaluated.

    Args:
        model: whose tensors to average, sharded or not; it is copied.
        decay: of the average, per step, in [0, 1).
        start: step from which on to average; up to it the average is a copy.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        self.decay = decay
        self.start = start
        self._tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        parameters = model.named_parameters(remove_duplicate=False)
        self._averaged = [name for name, parameter in parameters if parameter.is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, evaluated: Evaluated | None = None) -> None:
        """Take in the model after a step.

        Args:
            model: the one given at the start.
            step: steps that are done, from 1 on.
            evaluated: gives the values of parameters, by name, at which they are to be evaluated; by default as they
                are.
        """
        tensors = model.state_dict()
        held = {name: tensors.pop(name) for name in self._averaged}
        parameters = held if evaluated is None else evaluated(held)
        self._copy(self._tensors, tensors)
        if step <= self.start:
            self._copy(self._tensors, parameters)
        else:
            pairs = local_parts(self._tensors, parameters), local_parts(parameters, parameters)
            torch._foreach_lerp_(*pairs, 1.0 - self.decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give the model the average for a while; afterwards it holds the very bits that it held before."""
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._copy(model.state_dict(), self._tensors)
        try:
            yield
        finally:
            # Asked for anew, because FSDP then shards again what it had gathered of the average.
            self._copy(model.state_dict(), before)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the model's state dict; the tensors themselves, not copies."""
        return self._tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over an average of whole tensors.

        Raises:
            InputError: a tensor is missing, left over or of another shape.
        """
        check_same_tensors("the average", self._tensors, state)
        self._copy(self._tensors, {name: like(tensor, self._tensors[name]) for name, tensor in state.items()})

    @staticmethod
    @torch.no_grad()
    def _copy(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        if values:
            torch._foreach_copy_(local_parts(targets, values), local_parts(values, values))
