"""Asks the kernel about a process."""

import ctypes
import os
import select
from dataclasses import dataclass
from typing import Any

_SYS_PIDFD_GETFD = 438  # Linux 5.6, the same on all architectures


def is_dead(pidfd: int) -> bool:
    return died_within(pidfd, 0.0)


def died_within(pidfd: int, timeout_s: float) -> bool:
    """Wait for a process's death: its pidfd becomes readable once its memory is torn down."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def fetch_descriptor(pidfd: int, remote_fd: int) -> int:
    """Duplicate a descriptor of another process, which need not cooperate (pidfd_getfd). Raises OSError."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, remote_fd, 0))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    return fd


@dataclass(frozen=True)
class Usage:
    """A process at one moment. ``state``: letter of /proc/<pid>/stat. ``ticks``: CPU time of all its threads."""

    state: str
    ticks: int


def usage(pid: int) -> Usage | None:
    """Read a process's state and CPU time; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Usage(fields[0], int(fields[11]) + int(fields[12]))  # utime, stime


def process_state(pid: int) -> str | None:
    """Return a process's state letter ("T": stopped); None if there is no such process."""
    now = usage(pid)
    return None if now is None else now.state
