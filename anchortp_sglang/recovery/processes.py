"""What the kernel says about a process."""

import ctypes
import os
import select
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
    """A duplicate of another process's descriptor, which need not cooperate (pidfd_getfd). Raises OSError."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, remote_fd, 0))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    return fd


def process_state(pid: int) -> str | None:
    """State letter of /proc/<pid>/stat ("T": stopped); None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None
