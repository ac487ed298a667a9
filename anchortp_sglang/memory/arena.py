"""Memory that outlives the process using it: named segments, each backed by a memfd.

A segment's bytes exist as long as a process holds its file descriptor or a mapping of it. Seals fix its size when it is
made, so no process can shrink it under another's mapping. ``seal_read_only`` forbids new writable handles and mappings;
earlier mappings stay writable until their process unmaps them or dies.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = [
    "Arena",
    "ArenaError",
    "BadHandle",
    "HandleFacts",
    "MemfdArena",
    "MemoryExhausted",
    "Part",
    "available_bytes",
    "create_memfd",
    "inspect_handle",
    "map_fd",
    "map_together",
    "resident_bytes",
    "seal_read_only",
]

_SEAL_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1; missing from fcntl in Python 3.11
_SIZE_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_READ_ONLY_SEALS = _SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's block size
_CGROUP = "/sys/fs/cgroup"
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # missing from mmap in Python 3.11
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ = 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)


class ArenaError(Exception):
    """A memory segment could not be created or adopted."""


class MemoryExhausted(ArenaError):
    """The machine has less memory available than a segment needs."""


class BadHandle(ArenaError):
    """A file descriptor is not a segment of the claimed size and protection."""


class HandleFacts(NamedTuple):
    """Facts read from a segment's file descriptor. Handles with equal ``inode`` belong to one segment."""

    nbytes: int
    sealed: bool
    inode: tuple[int, int]


class Part(NamedTuple):
    """Part of a segment to be mapped: whole pages, in bytes."""

    fd: int
    offset: int
    nbytes: int
    writable: bool


class Arena(Protocol):
    """The segments that one anchor holds on its device, by name.

    A segment's handle is a file descriptor, passed on by SCM_RIGHTS. Implemented by ``MemfdArena`` below, and for GPUs
    by ``cuda_vmm.VmmArena`` and ``cuda_ipc.IpcArena``.
    """

    def create(self, name: str, nbytes: int, lazy: bool) -> None:
        """Make and hold a new segment. Raises ``MemoryExhausted`` if there is no room for it."""

    def verify(self, fd: int, nbytes: int, sealed: bool) -> bool:
        """Check, as far as possible, that a returned ``fd`` is the segment it is claimed to be.

        Returns whether it is sealed. Raises ``BadHandle`` if it is something else.
        """

    def adopt(self, name: str, fd: int, nbytes: int) -> None:
        """Hold a duplicate of ``fd``, unless it is held already. Raises ``BadHandle`` if it is something else."""

    def seal(self, name: str) -> None:
        """Make the segment read-only, except through existing mappings."""

    def open(self, name: str) -> int:
        """Return a new handle of the segment; the caller closes it."""

    def close(self, name: str) -> None:
        """Release the segment."""

    def close_all(self) -> None:
        """Release all segments."""

    def resident_bytes(self, name: str) -> int:
        """Return the bytes of the segment that occupy memory now."""


def available_bytes() -> int:
    """Return the bytes that the machine, or this process's container (cgroup v2), has free without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    container = _cgroup_available_bytes()
    return machine if container is None else min(machine, container)


def _cgroup_available_bytes() -> int | None:
    try:
        limit, used = (_read_cgroup(name).strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return None
        counters = dict(line.split() for line in _read_cgroup("memory.stat").splitlines())
    except OSError:
        return None
    reclaimable = int(counters.get("inactive_file", 0)) + int(counters.get("active_file", 0))
    return max(0, int(limit) - int(used) + reclaimable)


def _read_cgroup(name: str) -> str:
    with open(f"{_CGROUP}/{name}", encoding="ascii") as file:
        return file.read()


def create_memfd(name: str, nbytes: int, *, lazy: bool = False, promised_bytes: int = 0) -> int:
    """Make a memfd of ``nbytes`` zero bytes that can neither grow nor shrink; the caller closes it.

    A page is allocated when first touched. Unless ``lazy`` (the segment stays mostly untouched), the machine must have
    ``nbytes`` available besides ``promised_bytes``, which earlier segments will still touch; otherwise
    ``MemoryExhausted`` is raised.
    """
    if not lazy:
        available = available_bytes() - promised_bytes
        if nbytes > available:
            raise MemoryExhausted(
                f"segment {name!r} needs {nbytes / 2**30:.2f} GiB, {max(0, available) / 2**30:.2f} GiB are"
                " available: free memory on this machine, or ask for less"
            )
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_fd(fd: int, nbytes: int, writable: bool) -> mmap.mmap:
    """Map a whole segment, shared. Raises ``PermissionError`` if a sealed one is to be ``writable``.

    The mapping keeps the memory alive; ``fd`` may be closed afterwards.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection)
    except PermissionError as error:
        raise PermissionError(errno.EPERM, "the segment is sealed: map it with writable=False") from error


def map_together(parts: Sequence[Part]) -> mmap.mmap:
    """Map parts of segments one after the other, shared, as one run of memory. Raises ``OSError`` if a part cannot be.

    The caller must not write to parts that are not ``writable``, although the mapping object allows it.
    """
    nbytes = sum(part.nbytes for part in parts)
    whole = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    for part in parts:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if part.writable else 0)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(address, part.nbytes, protection, flags, part.fd, part.offset) == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"a part of a segment cannot be mapped: {os.strerror(number)}")
        address += part.nbytes
    return whole


def map_ahead(address: int, nbytes: int) -> None:
    """Let the kernel map pages that have content now, instead of one after the other when they are first read.

    Best effort: kernels before 5.14 cannot. ``address``: of the first page.
    """
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_READ)


def make_writable(address: int, nbytes: int) -> None:
    """Allow writes to memory that was mapped read-only from a writable descriptor. ``address``: of its first page.

    Raises OSError.
    """
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.PROT_READ | mmap.PROT_WRITE):
        number = ctypes.get_errno()
        raise OSError(number, f"a mapping cannot be made writable: {os.strerror(number)}")


def seal_read_only(fd: int) -> None:
    """Make all handles of this segment read-only: no write, no writable mapping. Existing mappings stay."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _READ_ONLY_SEALS:  # a handle of a sealed one may be read-only: EPERM
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)


def resident_bytes(fd: int) -> int:
    """Return the bytes of the segment that occupy memory (or swap) now: its touched pages."""
    return os.fstat(fd).st_blocks * _BLOCK_BYTES


def inspect_handle(fd: int) -> HandleFacts:
    """Read the facts of a segment made by ``create_memfd``. Raises ``BadHandle`` if ``fd`` is something else."""
    try:
        # Asked first: it answers without touching a file system, which for a foreign fd might block.
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise BadHandle("the handle is no memfd") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or seals & _SIZE_SEALS != _SIZE_SEALS:
        raise BadHandle("the handle's size is not sealed")
    sealed = bool(seals & _READ_ONLY_SEALS)
    if not sealed and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise BadHandle("the handle of a writable segment must be open for reading and writing")
    return HandleFacts(facts.st_size, sealed, (facts.st_dev, facts.st_ino))


class MemfdArena:
    """Memfd segments of one anchor, by name; never mapped, so they do not count as its resident memory."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._lazy: set[str] = set()

    def create(self, name: str, nbytes: int, lazy: bool) -> None:
        """Make and hold a new segment. Raises like ``create_memfd``."""
        promised = 0 if lazy else self._promised_bytes()
        self._add(name, create_memfd(name, nbytes, lazy=lazy, promised_bytes=promised), lazy)

    def verify(self, fd: int, nbytes: int, sealed: bool) -> bool:
        """Compare ``inspect_handle`` of ``fd`` with the claims; return whether it is sealed by now."""
        facts = inspect_handle(fd)
        if facts.nbytes != nbytes or (sealed and not facts.sealed):
            raise BadHandle(
                f"the handle has {facts.nbytes} bytes (sealed: {facts.sealed}), the message says {nbytes} ({sealed})"
            )
        return facts.sealed

    def adopt(self, name: str, fd: int, nbytes: int) -> None:
        """Hold a duplicate of ``fd``, checked by ``inspect_handle``, unless it is held already.

        Raises ``BadHandle`` if another segment has this name.
        """
        facts = inspect_handle(fd)
        if name not in self._fds:
            self._add(name, os.dup(fd), lazy=True)  # it has been filled, or was lazy
        elif inspect_handle(self._fds[name]).inode != facts.inode:
            raise BadHandle(f"another segment is already held as {name!r}")

    def seal(self, name: str) -> None:
        """Make the segment read-only by ``seal_read_only``."""
        seal_read_only(self._fds[name])

    def open(self, name: str) -> int:
        """Return a new fd of the segment, read-only if it is sealed; the caller closes it."""
        fd = self._fds[name]
        if inspect_handle(fd).sealed:
            try:
                return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                pass  # no procfs here: the seal alone protects the segment
        return os.dup(fd)

    def close(self, name: str) -> None:
        """Release the segment; its bytes are freed once no other process holds it."""
        os.close(self._fds.pop(name))
        self._lazy.discard(name)

    def close_all(self) -> None:
        """Release all segments."""
        for name in list(self._fds):
            self.close(name)

    def resident_bytes(self, name: str) -> int:
        """Return the segment's touched bytes, as ``resident_bytes`` does."""
        return resident_bytes(self._fds[name])

    def _add(self, name: str, fd: int, lazy: bool) -> None:
        self._fds[name] = fd
        if lazy:
            self._lazy.add(name)

    def _promised_bytes(self) -> int:
        facts = [os.fstat(fd) for name, fd in self._fds.items() if name not in self._lazy]
        return sum(max(0, fact.st_size - fact.st_blocks * _BLOCK_BYTES) for fact in facts)
