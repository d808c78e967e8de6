"""A compiled field meets a shrinking batch: padded to a few sizes, it must be compiled once."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dc_ssdae.decoding import DESCENTS
from dc_ssdae.samplers import SamplerResult, gradient_descent

each_descent = pytest.mark.parametrize("name", DESCENTS)


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


def descend(
    field: Callable[[Tensor, Tensor], Tensor], batch: int, name: str = "gradient_descent", bucket: bool = True
) -> SamplerResult:
    goal, start = images(batch)
    return DESCENTS[name](field, start, 60, 0.5, tolerance=1e-2, condition=goal, bucket=bucket)


class Compiled:
    """A compiled field; `rows` tells how many images each evaluation had."""

    def __init__(self, field: Field) -> None:
        self.counter = CompileCounter()
        self._compiled = torch.compile(field, backend=self.counter)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, goal: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self._compiled(x, goal)


@pytest.mark.parametrize("batch", [7, 8])
@each_descent
def test_a_shrinking_batch_is_padded_to_powers_of_two_and_compiled_once(name: str, batch: int) -> None:
    torch.manual_seed(1)
    field = Field()
    compiled = Compiled(field)
    results = []
    for candidate, bucket in ((field, False), (field, True), (compiled, True)):
        torch.manual_seed(2)
        results.append(descend(candidate, batch, name, bucket))
    plain = results[0]
    left = [int((plain.num_evaluations > step).sum()) for step in range(int(plain.num_evaluations.max()))]
    assert set(left) == set(range(1, batch + 1))
    assert compiled.rows == [min(batch, max(2, 2 ** math.ceil(math.log2(images)))) for images in left]
    assert compiled.counter.frame_count == 1
    for result in results[1:]:
        assert torch.equal(result.num_evaluations, plain.num_evaluations)
        torch.testing.assert_close(result.sample, plain.sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.residual_rms, plain.residual_rms, atol=1e-6, rtol=1e-4)


def test_other_batches_are_not_compiled_again() -> None:
    compiled = Compiled(Field())
    for batch in (8, 5, 2, 7, 3):
        descend(compiled, batch)
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
