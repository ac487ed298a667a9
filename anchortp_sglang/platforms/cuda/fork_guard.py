"""Whether this process may still be forked as far as CUDA goes: the driver does not survive it."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["driver_in_use"]

_CUDA_ERROR_NOT_INITIALIZED = 3

_DRIVER_FILES = {"/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"}
"""What cuInit opens. (/dev/nvidiactl and /dev/nvidia0 … are NVML's too, which torch asks whether there are GPUs.)"""


def driver_in_use() -> str | None:
    """Say how this process shows that it uses the CUDA driver; None if it does not. Calls nothing that would."""
    torch = sys.modules.get("torch")
    if (torch is not None and torch.cuda.is_initialized()) or _driver_is_initialised():
        return "CUDA is initialised"
    opened = {_target(fd) for fd in os.listdir("/proc/self/fd")} & _DRIVER_FILES
    return f"it has {opened.pop()} open" if opened else None


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""  # of listing the folder itself


def _driver_is_initialised() -> bool:
    """Whether anything in this process has called cuInit."""
    with open("/proc/self/maps") as maps:
        if "/libcuda.so" not in maps.read():
            return False
    context = ctypes.c_void_p()
    return bool(ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) != _CUDA_ERROR_NOT_INITIALIZED)
