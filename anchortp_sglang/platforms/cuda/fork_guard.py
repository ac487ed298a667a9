"""Checks whether this process may still be forked as far as CUDA goes: the driver does not survive it."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["HARMLESS_THREADS", "driver_in_use"]

_CUDA_ERROR_NOT_INITIALIZED = 3

HARMLESS_THREADS = ("cuda0", "jemalloc_bg_thd")
"""Beginnings of names of threads that a fork may lose: libcuda's own, which it starts when it is first asked anything,
before any cuInit (seen as cuda00001800007), and the one that pyarrow's allocator has."""


def driver_in_use() -> bool:
    """Return whether torch or anything else in this process has initialised CUDA. Calls nothing that would.

    That ``/dev/nvidia-uvm`` is open is no sign of it: NVML alone opens it, too (driver 580).
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
