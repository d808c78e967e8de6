"""Tensors that may be sharded over processes (FSDP2's `DTensor`): the local part, the whole, and assigning it."""

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a `DTensor`; where nobody has imported that module, which takes seconds, nothing is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every process must take part. A plain tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """Gather a sharded tensor to the CPU; every process must take part. A plain tensor is copied to the CPU.

    Args:
        tensor: sharded or not.
        keep: False gives None; for the processes that only take part.
    """
    full = gathered(tensor)
    if not keep:
        return None
    return full.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a plain or sharded one of the same shape; every process must hold the same value."""
    target.copy_(like(value, target))


@torch.no_grad()
def like(value: Tensor, target: Tensor) -> Tensor:
    """Copy a whole tensor to where another of its shape is: to that device and memory order, sharded in that way.

    The memory order matters: vectorised arithmetic may round otherwise on another one.
    """
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return torch.empty_like(target, dtype=value.dtype).copy_(value)
