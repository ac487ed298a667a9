"""Resumes stopped processes (SIGSTOP), and reaps dead children."""

import contextlib
import os
import signal

import psutil

from anchortp_sglang.recovery.processes.pidfd import process_state


def resume(pid: int, pidfd: int) -> bool:
    """Resume a stopped process (state T); return whether it was stopped. One held by a debugger (t) is left alone."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        if process_state(pid) == "T":
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            return True
    return False


def end(pidfd: int) -> None:
    """Send SIGKILL, which ends stopped processes as well; nothing if the process is dead."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def has_living_children(pid: int) -> bool:
    try:
        return any(not _is_zombie(child) for child in psutil.Process(pid).children())
    except psutil.NoSuchProcess:
        return False


class Reaper:
    """Reaps zombie children of this process: killed zygotes and, as PID 1 of a container, orphans.

    Code that waits for a child of its own does so at once, so only zombies seen twice are reaped.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def reap(self) -> None:
        zombies = {child.pid for child in psutil.Process().children() if _is_zombie(child)} if _any_dead() else set()
        for pid in zombies & self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._seen = zombies


def _any_dead() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
