"""Records how a zygote's children ended: the zygote reaps them, and notes it in memory that main reads."""

import mmap
import os
import signal
import time

_ROWS = 1024
_ROW_BYTES = 8
_PID_SHIFT = 32
_REAPED_WITHIN_S = 0.2
_OWN_FAULT = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class Exits:
    """A ring of (pid, wait status) for the last thousand children; written by one zygote. ``fd``: of the memory.

    A row is one word, as main reads while the zygote writes: it never finds a pid beside the status of another.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("exits") if fd is None else fd
        if fd is None:
            os.truncate(self.fd, _ROWS * _ROW_BYTES)
        self._rows = memoryview(mmap.mmap(self.fd, _ROWS * _ROW_BYTES)).cast("Q")
        self._next = 0

    def close(self) -> None:
        """Close the descriptor; the notes stay readable."""
        os.close(self.fd)

    def note(self, pid: int, status: int) -> None:
        """Note how a child ended."""
        self._rows[self._next] = pid << _PID_SHIFT | status
        self._next = (self._next + 1) % _ROWS

    def crash_of(self, pid: int) -> str:
        """Name the signal of a child that crashed; empty if it did not crash, or was killed from outside.

        Blocks for a moment until it is reaped.
        """
        deadline = time.monotonic() + _REAPED_WITHIN_S
        while (status := self._status(pid)) is None:
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.005)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return signal.Signals(number).name if number in _OWN_FAULT else ""

    def _status(self, pid: int) -> int | None:
        found = (row for row in self._rows if row >> _PID_SHIFT == pid)
        return next((row & (1 << _PID_SHIFT) - 1 for row in found), None)
