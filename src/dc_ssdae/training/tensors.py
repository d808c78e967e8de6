"""Tensors that may be sharded over processes (FSDP2's `DTensor`): the local part, the whole, a copy like another."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a `DTensor`, whose module takes seconds to import."""
    return hasattr(tensor, "full_tensor")


def local_parts(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    """The parts of sharded tensors that this process holds, sharing their memory; plain tensors themselves."""
    return [tensors[name].to_local() if is_sharded(tensors[name]) else tensors[name] for name in names]  # type: ignore


def gathered(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every process must take part. A plain tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copy tensors to the CPU, whole; every process must take part where they are sharded.

    Args:
        tensors: by name.
        keep: False gives nothing; for the processes that only take part.
    """
    full = ((name, gathered(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in full if keep}


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
