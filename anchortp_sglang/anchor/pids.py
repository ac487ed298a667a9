"""Identity and end of processes that are not our children."""

from __future__ import annotations

import select

__all__ = ["is_alive", "start_ticks", "wait_readable"]


def start_ticks(pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot; None if it does not run or is a zombie.

    ``psutil.Process.create_time`` is wall-clock time, which changes when the clock is set.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the command may hold blanks and brackets
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(pid: int, ticks: int) -> bool:
    """Return whether the process ``pid`` that started at ``ticks`` still runs."""
    return start_ticks(pid) == ticks


def wait_readable(fd: int, timeout_s: float) -> bool:
    """Return whether ``fd`` becomes readable in time; a pidfd does when its process ends."""
    poller = select.poll()  # select() itself takes no fd above 1023
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0, int(timeout_s * 1000))))
