"""Sleeps until another process changes a word of shared memory: Linux futex(2), without the private flag."""

import ctypes
import errno
import os
import platform
import sys

_SYS_FUTEX = 202  # x86-64; supported() keeps every other machine out
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYONE = 2**31 - 1
_LOOK_AGAIN = (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
]


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


# A sleeper looks again once a second, so that no lost wake-up can stall a generation for good.
_timeout = _Timespec(1, 0)
_timeout_address = ctypes.addressof(_timeout)


def supported() -> bool:
    """Return whether the shared-memory collectives can run on this machine: Linux on x86-64.

    They rely on its strong store ordering (TSO): a plain store of a counter never overtakes the payload before it.
    """
    return sys.platform == "linux" and platform.machine() == "x86_64"


def wake(address: int) -> None:
    """Wake every process that sleeps on the 32-bit word at ``address``."""
    _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYONE, None, None, 0)


def sleep_while(address: int, value: int) -> None:
    """Sleep until woken, at most a second, if the word at ``address`` still holds ``value`` (low 32 bits).

    May return early: read the word again.
    """
    if _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, value & 0xFFFFFFFF, _timeout_address, None, 0) == 0:
        return
    error = ctypes.get_errno()
    if error not in _LOOK_AGAIN:
        raise OSError(error, f"futex wait on shared memory: {os.strerror(error)}")
