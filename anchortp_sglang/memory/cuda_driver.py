"""Calls of the CUDA driver by anchors and ranks, with checked results, and devices by UUID.

No function here makes a context, and those of cuda_vmm.py need none: cuda.h lists CUDA_ERROR_INVALID_CONTEXT for no
memory call made there.
"""

from __future__ import annotations

import functools
from typing import Any

from anchortp_sglang.memory.arena import ArenaError

__all__ = ["CudaError", "call", "device_by_uuid", "free_bytes", "round_up"]

UNSUPPORTED = ("CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_PERMITTED", "CUDA_ERROR_INVALID_VALUE")
"""The driver's errors for a request that this machine's driver, container or GPU does not allow."""


class CudaError(ArenaError):
    """A driver call failed. ``name``: that of its CUresult, for example CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, function: str, name: str) -> None:
        super().__init__(f"{function}: {name}")
        self.name = name


@functools.cache
def bindings() -> Any:
    """Import ``cuda.bindings.driver``, which a CPU machine need not have."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ArenaError(f"cuda-bindings is not installed ({error}): pip install cuda-bindings") from error
    return driver


def call(function: str, *args: Any) -> Any:
    """Call a driver function and return its result, if it has one. Raises ``CudaError`` if it fails."""
    driver = bindings()
    try:
        error, *results = getattr(driver, function)(*args)
    except RuntimeError as missing:  # cuda-bindings loads libcuda.so.1 at the first call
        raise ArenaError(f"the CUDA driver cannot be used: {missing}") from missing
    if error != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(function, error.name)
    return results[0] if results else None


def device_by_uuid(uuid: str) -> int:
    """Return a GPU's ordinal in this process by its UUID. Raises ``ArenaError`` if it is not visible."""
    call("cuInit", 0)
    found = []
    for ordinal in range(call("cuDeviceGetCount")):
        found.append(_format_uuid(call("cuDeviceGetUuid", call("cuDeviceGet", ordinal)).bytes))
        if found[-1] == uuid:
            return ordinal
    raise ArenaError(f"{uuid} is not among the visible GPUs ({', '.join(found) or 'none'}): see CUDA_VISIBLE_DEVICES")


def _format_uuid(raw: bytes) -> str:
    digits = raw[:16].hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def free_bytes(uuid: str) -> int:
    """Return the GPU's free bytes by NVML, as the driver's cuMemGetInfo needs a context."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).free)
    finally:
        pynvml.nvmlShutdown()


def round_up(nbytes: int, granularity: int) -> int:
    """Round up to a multiple of ``granularity``."""
    return -(-nbytes // granularity) * granularity
