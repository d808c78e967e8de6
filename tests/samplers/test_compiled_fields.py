"""A compiled field meets a shrinking batch: padded to a few sizes, it must be compiled once."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dc_ssdae.decoding import DESCENTS
from dc_ssdae.samplers import gradient_descent


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Field(nn.Module):
    """Uphill from the goal, by a convolution and what works on elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor, goal: Tensor) -> Tensor:
        way = x - goal
        return way + 0.1 * self.conv(way).tanh() * way


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Goals, and starts at distances from them that grow tenfold from image to image, so that they stop one by one."""
    goal, way = torch.randn(2, batch, 3, 8, 8)
    return goal, goal + way * 10.0 ** torch.arange(batch).view(-1, 1, 1, 1)


class Compiled:
    """A compiled field; `rows` tells how many images each evaluation had."""

    def __init__(self, field: Field) -> None:
        self.field, self.counter = field, CompileCounter()
        self._compiled = torch.compile(field, backend=self.counter)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, goal: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self._compiled(x, goal)


@pytest.mark.parametrize("name", DESCENTS)
def test_shrinking_batches_are_padded_to_powers_of_two_and_compiled_once(name: str) -> None:
    compiled = Compiled(Field())
    for batch in (8, 7, 2):
        goal, start = images(batch)
        compiled.rows.clear()
        plain, padded = (
            DESCENTS[name](field, start, 60, 0.5, tolerance=1e-2, condition=goal, bucket=bucket)
            for field, bucket in ((compiled.field, False), (compiled, True))
        )
        left = [int((plain.num_evaluations > step).sum()) for step in range(int(plain.num_evaluations.max()))]
        assert set(left) == set(range(1, batch + 1))
        assert compiled.rows == [min(batch, max(2, 2 ** math.ceil(math.log2(images)))) for images in left]
        assert torch.equal(padded.num_evaluations, plain.num_evaluations)
        torch.testing.assert_close(padded.sample, plain.sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded.residual_rms, plain.residual_rms, atol=1e-6, rtol=1e-4)
    assert compiled.counter.frame_count == 1


@pytest.mark.parametrize(("halved", "inference"), [(False, True), (True, False), (True, True)])
def test_however_the_tensors_were_made_it_is_compiled_once(halved: bool, inference: bool) -> None:
    """Latents are half of an encoder's channels, and made outside of the inference mode that they are decoded in."""
    compiled = Compiled(Field())
    goal, start = images(8)
    if halved:
        goal, start = (torch.cat([tensor, tensor], dim=1).chunk(2, dim=1)[0] for tensor in (goal, start))
    with torch.inference_mode(inference):
        gradient_descent(compiled, start, 60, 0.5, tolerance=1e-2, condition=goal, bucket=True)
    assert set(compiled.rows) == {8, 4, 2}
    assert compiled.counter.frame_count == 1
