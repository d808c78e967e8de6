"""Convolutions in half precision for CPUs without kernels for them, which take 70 times as long as in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Bfloat16Convolutions(TorchFunctionMode):
    """Within autocast, does convolutions as PyTorch does: operands and result rounded to bfloat16, sums in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.conv2d or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        rounded = [value.bfloat16().float() if isinstance(value, Tensor) else value for value in args]
        with torch.autocast("cpu", enabled=False):
            return func(*rounded, **(kwargs or {})).bfloat16()
