"""Convolutions in half precision for CPUs without kernels for them, where PyTorch's own are 70 times slower."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ConvolutionsOfAGPU(TorchFunctionMode):
    """Convolutions of float16 and bfloat16, also by autocast, with sums in float32, as a GPU has them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.conv2d:
            return func(*args, **(kwargs or {}))
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype
        rounded = [value.to(dtype).float() if isinstance(value, Tensor) else value for value in args]
        with torch.autocast("cpu", enabled=False):
            return func(*rounded, **(kwargs or {})).to(dtype)
