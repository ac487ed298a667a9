"""GPU memory shared by CUDA IPC, for machines whose driver does not export VMM allocations (cuda_vmm).

The arena here has a context and owns its segments: they end with its process, even while others have them mapped. A
segment's handle is a memfd with the 64 bytes of a CUipcMemHandle, sent over the same socket as any other.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import NoReturn

from anchortp_sglang.memory.arena import BadHandle, MemoryExhausted, create_memfd
from anchortp_sglang.memory.cuda_driver import CudaError, bindings, call, device_by_uuid
from anchortp_sglang.memory.gpu import GpuShare

__all__ = ["IpcArena", "IpcMapping", "map_fd"]

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


@dataclass(frozen=True)
class IpcMapping:
    """Device memory of another process, mapped into this one at ``address`` until ``unmap``."""

    address: int
    nbytes: int

    def unmap(self) -> None:
        """End the mapping. Nothing may use its addresses any more."""
        call("cuIpcCloseMemHandle", self.address)


def map_fd(fd: int, nbytes: int, device: int, writable: bool) -> IpcMapping:
    """Map a segment for ``device`` (an ordinal). It is always writable, as IPC has no protection."""
    _use_primary_context(device)
    handle = bindings().CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), os.pread(fd, _HANDLE_BYTES, 0), _HANDLE_BYTES)
    lazily = bindings().CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    return IpcMapping(int(call("cuIpcOpenMemHandle", handle, lazily)), nbytes)


class IpcArena:
    """CUDA IPC segments of one anchor on a GPU, by name, within its budget."""

    def __init__(self, gpu: GpuShare) -> None:
        self._gpu = gpu
        _use_primary_context(device_by_uuid(gpu.uuid))
        self._addresses: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._handles: dict[str, int] = {}

    def create(self, name: str, nbytes: int, lazy: bool) -> None:
        """Make and hold a new segment. ``lazy`` is ignored, as device memory is allocated at once."""
        room = self._gpu.budget_bytes - sum(self._sizes.values())
        if nbytes > room:
            raise MemoryExhausted(f"segment {name!r} needs {nbytes} bytes, {room} are left on {self._gpu.uuid}")
        try:
            address = int(call("cuMemAlloc", nbytes))
        except CudaError as error:
            if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
                raise MemoryExhausted(f"segment {name!r}: {error}") from error
            raise
        exported = call("cuIpcGetMemHandle", address)
        handle = create_memfd(name, _HANDLE_BYTES, lazy=True)
        os.pwrite(handle, ctypes.string_at(exported.getPtr(), _HANDLE_BYTES), 0)
        self._addresses[name], self._sizes[name], self._handles[name] = address, nbytes, handle

    def verify(self, fd: int, nbytes: int, sealed: bool) -> NoReturn:
        """Raise BadHandle: segments end with the anchor that made them."""
        raise BadHandle("memory shared by CUDA IPC ends with its anchor and cannot be given back")

    def adopt(self, name: str, fd: int, nbytes: int) -> NoReturn:
        """Raise BadHandle, as ``verify`` does."""
        self.verify(fd, nbytes, False)

    def seal(self, name: str) -> None:
        """Do nothing, as IPC has no protection."""

    def open(self, name: str) -> int:
        """Return a new fd of the memfd with the segment's IPC handle; the caller closes it."""
        return os.dup(self._handles[name])

    def close(self, name: str) -> None:
        """Free the segment, even while other processes have it mapped."""
        call("cuMemFree", self._addresses.pop(name))
        os.close(self._handles.pop(name))
        del self._sizes[name]

    def close_all(self) -> None:
        """Free all segments."""
        for name in list(self._addresses):
            self.close(name)

    def resident_bytes(self, name: str) -> int:
        """Return the segment's size, as all of it is allocated at once."""
        return self._sizes[name]


def _use_primary_context(device: int) -> None:
    call("cuInit", 0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device)))
