"""Users' loss terms: one with a parameter, a buffer and randomness that a test may reach into, one that reads the
decoder's features.
"""

import os
import signal
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dc_ssdae.losses import StepOutputs


class FeatureNorm(nn.Module):
    """Mean square of the features of the decoder's first middle block."""

    reads_decoder_features = True
    decoder_layer = 0

    def forward(self, outputs: StepOutputs) -> Tensor:
        assert outputs.decoder_features is not None
        return outputs.decoder_features.float().square().mean()


class Hooked(nn.Module):
    """(mean of the prediction - value)², times a random number; `hook` may answer with another value for a call."""

    hook: Callable[[int, Tensor], Tensor] | None = None
    """Of all objects of the class, because the loop builds them; gets the number of the call and the value."""

    def __init__(self, start: float = 0.3) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.calls = 0

    def forward(self, outputs: StepOutputs) -> Tensor:
        self.seen += outputs.prediction.shape[0]
        value = (outputs.prediction.float().mean() - self.value).square() * torch.rand(())
        hook = type(self).hook
        if hook is not None:
            value = hook(self.calls, value)
        self.calls += 1
        return value


HOOKED = {"hooked": {"weight": 0.1, "class_path": "terms.Hooked"}}


def at(calls: Mapping[int, Callable[[], object]]) -> Callable[[int, Tensor], Tensor]:
    """A hook that does something at some calls."""

    def hook(call: int, value: Tensor) -> Tensor:
        if call in calls:
            calls[call]()
        return value

    return hook


def send(number: signal.Signals, count: int = 1) -> Callable[[], None]:
    """Send this process a signal."""

    def work() -> None:
        for _ in range(count):
            os.kill(os.getpid(), number)

    return work
