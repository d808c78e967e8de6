"""A compiled field meets a shrinking batch: padded to a few sizes, it must be compiled once."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dc_ssdae.samplers import SamplerResult, gradient_descent, nesterov

DESCENTS: dict[str, Callable[..., SamplerResult]] = {
    "gradient descent": gradient_descent,
    "nesterov": nesterov,
    "nesterov eqm": partial(nesterov, variant="eqm"),
}
each_descent = pytest.mark.parametrize("name", DESCENTS)
each_batch = pytest.mark.parametrize("batch", [7, 8])


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


class Compiled:
    """A compiled field.

    Attributes:
        rows: how many each evaluation had.
    """

    def __init__(self, field: Field, **settings: bool) -> None:
        self._counter = CompileCounter()
        self._compiled = torch.compile(field, backend=self._counter, **settings)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, goal: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self._compiled(x, goal)

    @property
    def compilations(self) -> int:
        return self._counter.frame_count


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Goals, and starts at distances from them that grow tenfold from image to image, so that they stop one by one."""
    goal, way = torch.randn(2, batch, 3, 8, 8)
    return goal, goal + way * 10.0 ** torch.arange(batch).view(-1, 1, 1, 1)


def descend(
    field: Callable[[Tensor, Tensor], Tensor], batch: int, name: str = "gradient descent", bucket: bool = True
) -> SamplerResult:
    goal, start = images(batch)
    return DESCENTS[name](field, start, 60, 0.5, tolerance=1e-2, condition=goal, bucket=bucket)


def images_left(result: SamplerResult) -> list[int]:
    """At each evaluation."""
    return [int((result.num_evaluations > step).sum()) for step in range(int(result.num_evaluations.max()))]


@each_batch
@each_descent
def test_a_shrinking_batch_is_compiled_once(name: str, batch: int) -> None:
    compiled = Compiled(Field())
    result = descend(compiled, batch, name)
    assert set(images_left(result)) == set(range(1, batch + 1))
    assert result.num_evaluations.max() < 60
    assert compiled.compilations == 1


@each_batch
@each_descent
def test_the_field_meets_powers_of_two_from_two_on_or_the_whole_batch(name: str, batch: int) -> None:
    field = Field()
    rows: list[int] = []

    def recorded(x: Tensor, goal: Tensor) -> Tensor:
        assert len(x) == len(goal)
        rows.append(len(x))
        return field(x, goal)

    result = descend(recorded, batch, name)
    assert rows == [min(batch, max(2, 2 ** math.ceil(math.log2(left)))) for left in images_left(result)]
    assert set(rows) == {batch, 4, 2}


@each_batch
@each_descent
def test_compiled_and_padded_gives_what_plain_gives(name: str, batch: int) -> None:
    torch.manual_seed(1)
    field = Field()
    results = []
    for candidate, bucket in ((field, False), (field, True), (Compiled(field), True)):
        torch.manual_seed(2)
        results.append(descend(candidate, batch, name, bucket))
    plain = results[0]
    for result in results[1:]:
        assert torch.equal(result.num_evaluations, plain.num_evaluations)
        assert torch.equal(result.diverged, plain.diverged)
        torch.testing.assert_close(result.sample, plain.sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.residual_rms, plain.residual_rms, atol=1e-6, rtol=1e-4)
    # Away from convolutions, whose rounding depends on the batch, padding changes nothing at all.
    elementwise = []
    for bucket in (False, True):
        torch.manual_seed(2)
        elementwise.append(descend(lambda x, goal: (x - goal) * 0.9, batch, name, bucket))
    assert all(torch.equal(one, other) for one, other in zip(elementwise[0][:4], elementwise[1][:4], strict=True))


def test_other_batches_are_not_compiled_again() -> None:
    compiled = Compiled(Field())
    for batch in (8, 5, 2, 7, 3):
        descend(compiled, batch)
    assert compiled.compilations == 1


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda tensor: tensor,
    "half of the channels": lambda tensor: torch.cat([tensor, tensor], dim=1).chunk(2, dim=1)[0],
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize(
    ("layout", "inference"),
    [("half of the channels", False), ("channels last", False), ("as they are", True), ("half of the channels", True)],
)
def test_however_the_tensors_were_made_it_is_compiled_once(layout: str, inference: bool) -> None:
    """Latents are half of an encoder's channels, and made outside of the inference mode that they are decoded in."""
    compiled = Compiled(Field())
    goal, start = (LAYOUTS[layout](tensor) for tensor in images(8))
    with torch.inference_mode(inference):
        gradient_descent(compiled, start, 60, 0.5, tolerance=1e-2, condition=goal, bucket=True)
    assert set(compiled.rows) == {8, 4, 2}
    assert compiled.compilations == 1
