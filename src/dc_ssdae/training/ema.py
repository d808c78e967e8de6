"""The exponential moving average of a model: its parameters averaged, its buffers copied."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError
from dc_ssdae.training.tensors import assign, local_part

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
        start: step from which on to average; up to it the average is a copy, which is made when it is wanted.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        self.decay = decay
        self.start = start
        self._uncopied: tuple[nn.Module, Evaluated | None] | None = None
        self._tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def update(self, model: nn.Module, step: int, evaluated: Evaluated | None = None) -> None:
        """Take in the model after a step.

        Args:
            model: the one given at the start.
            step: steps that are done, from 1 on.
            evaluated: gives the values of parameters, by name, at which they are to be evaluated; by default as they
                are.
        """
        if step > self.start:
            self._take_in(model, evaluated, 1.0 - self.decay)
            return
        self._uncopied = (model, evaluated)
        if step == self.start:
            self.catch_up()

    def catch_up(self) -> None:
        """Copy the model of the last update, if that was put off; the model must not have moved since."""
        if self._uncopied is not None:
            self._take_in(*self._uncopied, 1.0)
            self._uncopied = None

    @torch.no_grad()
    def _take_in(self, model: nn.Module, evaluated: Evaluated | None, share: float) -> None:
        """Move the averages by a share of the way to the model's parameters; buffers are copied."""
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        parameters = {name: tensor for name, tensor in tensors.items() if name in self._parameters}
        tensors |= parameters if evaluated is None else evaluated(parameters)
        averages, values = [], []
        for name, tensor in tensors.items():
            mine, theirs = local_part(self._tensors[name]), local_part(tensor)
            if share < 1.0 and name in parameters and tensor.is_floating_point():
                averages.append(mine)
                values.append(theirs)
            else:
                mine.copy_(theirs)
        if averages:
            torch._foreach_lerp_(averages, values, share)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Give the model the average for a while; afterwards it holds the very bits that it held before."""
        self.catch_up()
        self._swap(model)
        try:
            yield
        finally:
            # Backwards, because one tensor may have two names, and is then exchanged twice.
            self._swap(model, backwards=True)

    @torch.no_grad()
    def _swap(self, model: nn.Module, backwards: bool = False) -> None:
        tensors = list(model.state_dict().items())
        for name, tensor in reversed(tensors) if backwards else tensors:
            mine, theirs = local_part(self._tensors[name]), local_part(tensor.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the model's state dict; the tensors themselves, not copies."""
        self.catch_up()
        return dict(self._tensors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over an average of whole tensors.

        Raises:
            InputError: a tensor is missing, left over or of another shape.
        """
        check_same_tensors("the average", self._tensors, state)
        self._uncopied = None
        for name, tensor in state.items():
            assign(self._tensors[name], tensor)


def check_same_tensors(what: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse a state whose names or shapes are not the expected ones.

    Raises:
        InputError: names the first tensor that is missing, left over or of another shape.
    """
    for name in (*expected, *given):
        if name not in given:
            raise InputError(f"{what} lacks tensor {name}")
        if name not in expected:
            raise InputError(f"{what} has a tensor {name} that this model does not have")
        if given[name].shape != expected[name].shape:
            shapes = tuple(given[name].shape), tuple(expected[name].shape)
            raise InputError(f"{what} has tensor {name} of shape {shapes[0]}; this model's has {shapes[1]}")
