"""The norms against float64 and against PyTorch's own, in one process and over two."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from two_processes import PROCESSES, TwoProcesses

from dc_ssdae.networks.norms import ChannelRMSNorm, GlobalBatchNorm2d


@torch.no_grad()
def test_channel_rms_norm() -> None:
    norm = ChannelRMSNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3.0 * torch.randn(2, 6, 3, 5)
    wide = x.double()
    root = (wide.square().sum(dim=1, keepdim=True) / 6 + 1e-5).sqrt()
    expected = wide / root * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_channel_rms_norm_computes_in_float32_and_keeps_the_dtype() -> None:
    """The squares of 300 overflow float16; the norm of equal channels is 1."""
    norm = ChannelRMSNorm(4).half()
    y = norm(torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16))
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


def batch_norms(**settings: float) -> tuple[GlobalBatchNorm2d, nn.BatchNorm2d]:
    ours, reference = GlobalBatchNorm2d(5, **settings), nn.BatchNorm2d(5, **settings)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def test_in_one_process_it_is_pytorchs_batch_norm() -> None:
    ours, reference = batch_norms(momentum=0.3)
    for _ in range(3):
        x = 2.0 * torch.randn(4, 5, 3, 2) + 1.0
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(mine), reference(theirs)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(mine.grad, theirs.grad)
        for name, value in reference.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    ours.eval()
    reference.eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(1, 5, 1, 1)
    assert torch.equal(ours(x), reference(x))
    for name, value in before.items():
        assert torch.equal(ours.state_dict()[name], value), f"{name} moved in eval mode"


@torch.no_grad()
def test_half_precision_buffers_are_updated() -> None:
    ours, reference = batch_norms()
    ours.bfloat16()
    x = torch.randn(4, 5, 3, 2) + 3.0
    reference(x)
    y = ours(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.bfloat16
    torch.testing.assert_close(ours.running_mean.float(), reference.running_mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(ours.running_var.float(), reference.running_var, atol=0.02, rtol=0.02)


def batches() -> list[Tensor]:
    """Whole batches of two steps; the second has means 1000 times the spread, which a one-pass variance would lose."""
    generator = torch.Generator().manual_seed(1)
    offset = torch.linspace(-1.0, 1.0, 5)[:, None, None]
    return [
        2.0 * torch.randn(4, 5, 3, 2, generator=generator) + offset,
        0.5 * torch.randn(4, 5, 3, 2, generator=generator) + 500.0 * offset,
    ]


def weighting() -> Tensor:
    """Weights of the outputs in the loss, different everywhere, so that input gradients do not vanish."""
    return torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(2))


def seeded_norm(kind: Callable[[int], nn.BatchNorm2d]) -> nn.BatchNorm2d:
    norm = kind(5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
        norm.bias.copy_(torch.linspace(-1.0, 1.0, 5))
    return norm


class CollectingNorm(nn.BatchNorm2d):
    """Normalises by the mean of the statistics of all batches, as PyTorch collects them without a momentum."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            super().forward(x.detach())
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def norm_of_what_stays(channels: int) -> GlobalBatchNorm2d:
    norm = GlobalBatchNorm2d(channels)
    norm.inputs_stay = True
    return norm


KINDS = {"training": (GlobalBatchNorm2d, nn.BatchNorm2d), "staying": (norm_of_what_stays, CollectingNorm)}
"""By what the inputs do: ours, and the reference."""


def steps(norm: nn.BatchNorm2d, share: slice, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of two training steps and one evaluation on a share of each batch."""
    record: dict[str, Tensor] = {}
    for index, whole in enumerate(batches()):
        x = whole[share].to(dtype, copy=True).requires_grad_()
        norm.zero_grad()
        y = norm(x)
        (y * weighting()[share]).sum().backward()
        assert x.grad is not None
        assert norm.weight.grad is not None
        assert norm.bias.grad is not None
        record |= {
            f"output {index}": y.detach(),
            f"input gradient {index}": x.grad,
            f"summed weight gradient {index}": norm.weight.grad.clone(),
            f"summed bias gradient {index}": norm.bias.grad.clone(),
            f"shared running_mean {index}": norm.running_mean.clone(),
            f"shared running_var {index}": norm.running_var.clone(),
            f"shared count {index}": norm.num_batches_tracked.clone(),
        }
    norm.eval()
    with torch.no_grad():
        record["output in eval mode after step 1"] = norm(batches()[0][share].to(dtype))
    return record


def work(rank: int, folder: str) -> None:
    """One process of the group: its half of every batch."""
    half = slice(2 * rank, 2 * rank + 2)
    for name, (ours, _) in KINDS.items():
        torch.save(steps(seeded_norm(ours), half), f"{folder}/{name}{rank}")
    with warnings.catch_warnings():
        # In one graph, without a word: a break or a warning is an error.
        warnings.simplefilter("error")
        for name, (ours, _) in KINDS.items():
            whole_graph = torch.compile(seeded_norm(ours), backend="aot_eager", fullgraph=True)
            torch.save(steps(whole_graph, half), f"{folder}/compiled_{name}{rank}")


def test_over_two_processes_it_is_the_batch_norm_of_the_whole_batch(
    tmp_path: Path, two_processes: TwoProcesses
) -> None:
    two_processes(work, str(tmp_path))
    for name, (ours, reference) in KINDS.items():
        halves, compiled = (
            [torch.load(tmp_path / f"{kind}{name}{rank}", weights_only=True) for rank in range(PROCESSES)]
            for kind in ("", "compiled_")
        )
        check_steps(halves, compiled, steps(seeded_norm(reference).double(), slice(None), torch.float64))
        alone = [steps(seeded_norm(ours), slice(None))]
        check_steps(alone, alone, steps(seeded_norm(reference).double(), slice(None), torch.float64))


def test_two_batches_before_a_backward_pass_have_each_their_own_statistics() -> None:
    batches = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    together, apart = norm_of_what_stays(3), norm_of_what_stays(3)
    sum(together(x).square().sum() for x in batches).backward()
    for x in batches:
        apart(x).square().sum().backward()
    torch.testing.assert_close(together.weight.grad, apart.weight.grad)


def test_what_stays_is_followed_also_after_a_long_training() -> None:
    norm = norm_of_what_stays(1)
    norm.num_batches_tracked.fill_(10**6)
    norm(torch.full((2, 1, 4, 4), 3.0))
    assert norm.running_mean.item() == pytest.approx(3e-3)


def check_steps(
    halves: list[dict[str, Tensor]], compiled: list[dict[str, Tensor]], expected: dict[str, Tensor]
) -> None:
    for eager, graph in zip(halves, compiled, strict=True):
        for name, value in eager.items():
            torch.testing.assert_close(graph[name], value, atol=1e-6, rtol=1e-6)
    assert all(half.keys() == expected.keys() for half in halves)
    for name, value in expected.items():
        # float32 holds a mean of 500 to 3e-5, which is 6e-5 of the second batch's spread.
        tolerance = 1e-3 if name.endswith("1") else 1e-5
        if name.startswith("shared"):
            found = [half[name] for half in halves]
        elif name.startswith("summed"):
            found = [sum(half[name] for half in halves)]
        else:
            found = [torch.cat([half[name] for half in halves])]
        for tensor in found:
            difference = (tensor.double() - value.double()).abs()
            assert (difference <= tolerance * (1.0 + value.double().abs())).all(), f"{name}: {difference.max()}"
