"""What the machine can do, and how this process asks it for memory."""

import ctypes
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, instead of giving it back to the system at once.

    A decode makes and frees large tensors. By default each comes from the system and goes back to it, which clears
    every page of it anew: up to half of the time of a decode on a CPU. The commands call this as they start. A library
    must not change that for the program it is in, so importing dc_ssdae does not: call it once, at the beginning, in a
    program of your own. The memory that the process has used at most (up to 2 GiB beyond what it is using) then stays
    with it. It has an effect on the CPU alone, and where the C library is glibc.

    Returns:
        Whether it had an effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, 2**26))


def slow_dtype_note(device: "torch.device", dtype: str) -> str | None:
    """Say that an x86 CPU has no instructions for a dtype, "bfloat16" for example; None where it has, or for others."""
    import torch

    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64") or dtype not in ("bfloat16", "float16"):
        return None
    supported = torch.cpu._is_avx512_bf16_supported() if dtype == "bfloat16" else torch.cpu._is_amx_fp16_supported()
    return None if supported else f"this CPU has no instructions for {dtype}, in which it takes many times as long"
