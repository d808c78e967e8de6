"""What the processor can compute in, and how this process keeps its memory."""

import ctypes
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, instead of returning it to the system at once.

    A decode allocates and frees large tensors. By default the system provides each one with freshly cleared pages,
    which takes up to half of the time of a decode on a CPU. The commands call this function as they start. Importing
    dc_ssdae does not, because a library should not change how its program allocates memory: call it once, at the
    beginning, in a program of your own. The process then keeps its peak memory, up to 2 GiB beyond what it is using.
    It affects memory on the CPU only, and only where the C library is glibc.

    Returns:
        Whether it had an effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, 2**26))


def slow_dtype_note(device: "torch.device", dtype: str) -> str | None:
    """Note that an x86 CPU has no instructions for `dtype`, "bfloat16" for example; None if it has, or elsewhere."""
    import torch

    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64") or dtype not in ("bfloat16", "float16"):
        return None
    supported = torch.cpu._is_avx512_bf16_supported() if dtype == "bfloat16" else torch.cpu._is_amx_fp16_supported()
    return None if supported else f"this CPU has no instructions for {dtype}, which makes it many times slower"
