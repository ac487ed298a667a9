"""Checks whether CUDA still allows a fork of this process: the driver does not survive one."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["HARMLESS_THREADS", "driver_in_use"]

_CUDA_ERROR_NOT_INITIALIZED = 3

HARMLESS_THREADS = ("cuda0", "jemalloc_bg_thd")
"""Prefixes of names of threads that a fork may lose: libcuda's own, which it starts at the first call of any kind,
before cuInit (seen as cuda00001800007), and that of pyarrow's allocator."""


def driver_in_use() -> bool:
    """Return whether torch or anything else in this process has initialised CUDA. Initialises nothing itself.

    An open ``/dev/nvidia-uvm`` is no sign of it: NVML alone opens it, too (driver 580).
    """
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized()) or _driver_is_initialised()


def _driver_is_initialised() -> bool:
    """Return whether anything in this process has called cuInit."""
    with open("/proc/self/maps") as maps:
        if "/libcuda.so" not in maps.read():
            return False
    context = ctypes.c_void_p()
    return bool(ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) != _CUDA_ERROR_NOT_INITIALIZED)
