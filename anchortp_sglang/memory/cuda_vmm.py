"""GPU memory that outlives the process using it: segments made by the driver's virtual memory management (VMM).

A segment is one physical allocation (cuMemCreate), held as the POSIX file descriptor it was exported to. Its bytes
exist as long as a process holds such a descriptor, a handle or a mapping (cuMemRelease in cuda.h). So an anchor keeps
only descriptors, as it does of memfds, and never maps them.

Unlike a memfd, a segment is not zeroed, takes its memory at once, and cannot be sealed: readers map it read-only, but a
holder of the descriptor could map it writable.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.memory.arena import BadHandle, MemoryExhausted
from anchortp_sglang.memory.cuda_driver import (
    UNSUPPORTED,
    CudaError,
    bindings,
    call,
    device_by_uuid,
    free_bytes,
    round_up,
)
from anchortp_sglang.memory.gpu import GpuShare

__all__ = ["Mapping", "VmmArena", "create", "map_fd"]


def create(device: int, nbytes: int) -> int:
    """Allocate ``nbytes``, rounded up to the granularity, on ``device`` (an ordinal); return a descriptor."""
    properties = _properties(device)
    handle = call("cuMemCreate", round_up(nbytes, _granularity(properties)), properties, 0)
    try:
        fd = int(call("cuMemExportToShareableHandle", handle, _posix_fd(), 0))
    finally:
        call("cuMemRelease", handle)
    os.set_inheritable(fd, False)
    return fd


@dataclass(frozen=True)
class Mapping:
    """Device memory mapped into this process at [address, address + nbytes) until ``unmap``."""

    address: int
    nbytes: int

    def unmap(self) -> None:
        """End the mapping. The caller has waited for all work that uses its addresses."""
        call("cuMemUnmap", self.address, self.nbytes)
        call("cuMemAddressFree", self.address, self.nbytes)


def map_fd(fd: int, nbytes: int, device: int, writable: bool) -> Mapping:
    """Map a whole segment, of this device or a peer, for ``device`` (an ordinal).

    Parts are views of the mapping, as "offset … currently must be zero" (cuMemMap in cuda.h). ``fd`` may be closed
    afterwards. Raises ``CudaError`` if the device cannot reach the memory.
    """
    call("cuInit", 0)
    handle = _import(fd)
    try:
        size = round_up(nbytes, _granularity(call("cuMemGetAllocationPropertiesFromHandle", handle)))
        address = int(call("cuMemAddressReserve", size, 0, 0, 0))
        try:
            call("cuMemMap", address, size, 0, handle, 0)
            try:
                _set_access(address, size, device, writable)
            except BaseException:
                call("cuMemUnmap", address, size)
                raise
        except BaseException:
            call("cuMemAddressFree", address, size)
            raise
    finally:
        call("cuMemRelease", handle)
    return Mapping(address, size)


class VmmArena:
    """VMM segments of one anchor on a GPU, by name, within its budget. Makes no context."""

    def __init__(self, gpu: GpuShare) -> None:
        self._gpu = gpu
        self._device = device_by_uuid(gpu.uuid)
        self._granularity = _granularity(_properties(self._device))
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def create(self, name: str, nbytes: int, lazy: bool) -> None:
        """Make and hold a new segment. ``lazy`` is ignored, as device memory is allocated at once."""
        size = round_up(nbytes, self._granularity)
        room = min(self._gpu.budget_bytes - sum(self._sizes.values()), free_bytes(self._gpu.uuid))
        if size > room:
            raise MemoryExhausted(
                f"segment {name!r} needs {size / 2**30:.2f} GiB, {max(0, room) / 2**30:.2f} GiB are left of"
                f" {self._gpu.budget_bytes / 2**30:.2f} GiB on {self._gpu.uuid}: free memory there, or ask for less"
            )
        try:
            self._add(name, create(self._device, nbytes), size)
        except CudaError as error:
            if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
                raise MemoryExhausted(f"segment {name!r}: {error}") from error
            raise

    def verify(self, fd: int, nbytes: int, sealed: bool) -> bool:
        """Check that ``fd`` is memory of this GPU. Size and seal cannot be checked: ``sealed`` is returned as given."""
        try:
            handle = _import(fd)
        except CudaError as error:
            raise BadHandle(f"the handle is no memory of a GPU ({error})") from error
        try:
            device = call("cuMemGetAllocationPropertiesFromHandle", handle).location.id
        finally:
            call("cuMemRelease", handle)
        if device != self._device:
            raise BadHandle(f"the handle is memory of GPU {device}, not of {self._device}")
        return sealed

    def adopt(self, name: str, fd: int, nbytes: int) -> None:
        """Hold a duplicate of ``fd``, a segment of ``nbytes``, unless one of this name is held."""
        if name not in self._fds:
            self._add(name, os.dup(fd), round_up(nbytes, self._granularity))

    def seal(self, name: str) -> None:
        """Do nothing here: the anchor tells each client that opens a handle whether the segment is sealed."""

    def open(self, name: str) -> int:
        """Return a new fd of the segment; the caller closes it."""
        return os.dup(self._fds[name])

    def close(self, name: str) -> None:
        """Release the segment; its bytes are freed once no other process holds it."""
        os.close(self._fds.pop(name))
        del self._sizes[name]

    def close_all(self) -> None:
        """Release all segments."""
        for name in list(self._fds):
            self.close(name)

    def resident_bytes(self, name: str) -> int:
        """Return the segment's size, as all of it is allocated at once."""
        return self._sizes[name]

    def _add(self, name: str, fd: int, size: int) -> None:
        self._fds[name], self._sizes[name] = fd, size


def _properties(device: int) -> Any:
    driver = bindings()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    properties.requestedHandleTypes = _posix_fd()
    return properties


def _posix_fd() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _granularity(properties: Any) -> int:
    recommended = bindings().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    return int(call("cuMemGetAllocationGranularity", properties, recommended))


def _import(fd: int) -> Any:
    return call("cuMemImportFromShareableHandle", fd, _posix_fd())


def _set_access(address: int, size: int, device: int, writable: bool) -> None:
    driver = bindings()
    flags = driver.CUmemAccess_flags
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    try:
        call("cuMemSetAccess", address, size, [access], 1)
    except CudaError as error:
        if writable or error.name not in UNSUPPORTED:
            raise
        # Only trying shows whether a driver has read-only device memory; without it the memory is unprotected.
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call("cuMemSetAccess", address, size, [access], 1)
