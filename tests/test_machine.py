"""Freed memory stays with the process where it is told to; dtypes that a CPU lacks are named."""

import platform
import subprocess
import sys

import pytest
import torch

from dc_ssdae.machine import keep_freed_memory, slow_dtype_note

FAULTS = """
import ctypes, resource, sys
from dc_ssdae import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(2**26))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_kept_memory_is_not_cleared_again() -> None:
    """Of 64 MiB that are used a second time the system clears every page, or none."""
    faults = {
        word: int(subprocess.run([sys.executable, "-c", FAULTS, word], capture_output=True, check=True).stdout)
        for word in ("keep", "give back")
    }
    assert faults["keep"] < 10
    assert faults["give back"] >= 2**26 // 2**21  # 32 where the pages are huge, 16,384 where they have 4 KiB


def test_a_dtype_that_the_cpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "bfloat16" in (slow_dtype_note(cpu, "bfloat16") or "")
    assert slow_dtype_note(torch.device("cuda"), "bfloat16") is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert slow_dtype_note(cpu, "bfloat16") is None
