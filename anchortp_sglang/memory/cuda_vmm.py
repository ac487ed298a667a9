"""GPU memory that outlives the process using it: segments made by the driver's virtual memory management (VMM).

A segment is one physical allocation (cuMemCreate), held as the POSIX file descriptor it was exported to. Its bytes
exist as long as anybody holds such a descriptor, a handle or a mapping (cuMemRelease in cuda.h), so an anchor keeps
descriptors only, like those of memfds, and never maps anything.

Unlike a memfd, a segment is not zeroed, takes its memory at once, and cannot be sealed: readers map it read-only, but
nothing keeps a holder of the descriptor from mapping it writable.
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
    """A descriptor of ``nbytes`` of memory, rounded up to the granularity, on a device (an ordinal)."""
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
    """Device memory mapped into this process: [address, address + nbytes), until ``unmap``."""

    address: int
    nbytes: int

    def unmap(self) -> None:
        """Nothing may use the addresses any more; the caller has waited for what did."""
        call("cuMemUnmap", self.address, self.nbytes)
        call("cuMemAddressFree", self.address, self.nbytes)


def map_fd(fd: int, nbytes: int, device: int, writable: bool) -> Mapping:
    """Map a whole segment for use by ``device`` (an ordinal), be it that device's memory or a peer's.

    Always whole: "offset … currently must be zero" (cuMemMap in cuda.h). Parts are views of the mapping. ``fd`` may
    be closed afterwards. ``CudaError`` if the device cannot reach the memory.
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
    """The segments that one anchor holds on a GPU, by name, within its budget. Makes no context."""

    def __init__(self, gpu: GpuShare) -> None:
        self._gpu = gpu
        self._device = device_by_uuid(gpu.uuid)
        self._granularity = _granularity(_properties(self._device))
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def create(self, name: str, nbytes: int, lazy: bool) -> None:
        """Make and keep a new segment. ``lazy`` changes nothing: device memory is taken at once."""
        size = round_up(nbytes, self._granularity)
        room = min(self._gpu.budget_bytes - sum(self._sizes.values()), free_bytes(self._gpu.uuid))
        if size > room:
            raise MemoryExhausted(
                f"segment {name!r} needs {size / 2**30:.2f} GiB, {max(0, room) / 2**30:.2f} GiB are left of"
                f" {self._gpu.budget_bytes / 2**30:.2f} GiB on {self._gpu.uuid}: free memory there, or ask for less"
            )
        try:
            self._keep(name, create(self._device, nbytes), size)
        except CudaError as error:
            if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
                raise MemoryExhausted(f"segment {name!r}: {error}") from error
            raise

    def verify(self, fd: int, nbytes: int, sealed: bool) -> bool:
        """That ``fd`` is memory of this GPU. Neither its size nor a seal can be asked of it: the giver is believed."""
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
        """Keep a duplicate of ``fd``, a segment of ``nbytes``; no-op if one is held under this name."""
        if name not in self._fds:
            self._keep(name, os.dup(fd), round_up(nbytes, self._granularity))

    def seal(self, name: str) -> None:
        """Nothing to be done here: that the segment is sealed is told to all who ask for its handle."""

    def open(self, name: str) -> int:
        """A new fd of the segment; the caller closes it."""
        return os.dup(self._fds[name])

    def close(self, name: str) -> None:
        """Let go of the segment; its bytes are freed once nobody else holds it."""
        os.close(self._fds.pop(name))
        del self._sizes[name]

    def close_all(self) -> None:
        """Let go of everything."""
        for name in list(self._fds):
            self.close(name)

    def resident_bytes(self, name: str) -> int:
        """All of it, from the start."""
        return self._sizes[name]

    def _keep(self, name: str, fd: int, size: int) -> None:
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
        # Whether a driver knows read-only device memory can only be tried; without it nothing but care protects.
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call("cuMemSetAccess", address, size, [access], 1)
