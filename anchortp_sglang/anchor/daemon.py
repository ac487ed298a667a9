"""Steps by which an anchor detaches from its starter and protects itself against accidental kills."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import time

__all__ = ["daemonize", "harden", "terminate_to", "use_log"]

_COMMAND = "anchortp-anchor"  # as shown by ps and top; the kernel keeps 15 bytes
_OOM_SCORES = (-1000, 0)  # the lowest, then the lowest without privileges
_LOCK_RETRY_S = 0.01
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


def daemonize() -> None:
    """Continue in a grandchild with its own session and no terminal, adopted by init or the nearest subreaper.

    SGLang ends a server by killing all its descendants, so an anchor must not be one.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def use_log(path: str, timeout_s: float) -> None:
    """Send stdout and stderr to the log, and lock it until this process ends.

    Raises ``BlockingIOError`` if another anchor holds the lock and does not end in time.
    """
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    _lock(log, time.monotonic() + timeout_s)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)


def harden() -> None:
    """Set the process's name, ignore a terminal's signals, be the OOM killer's last choice, allow many files."""
    os.umask(0o077)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        _write("/proc/self/comm", _COMMAND)
    for score in _OOM_SCORES:
        with contextlib.suppress(OSError):
            _write("/proc/self/oom_score_adj", str(score))
            break
    # libzmq 4.3.5 aborts the process when accept() finds no free descriptor (ipc_listener.cpp).
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def terminate_to() -> socket.socket:
    """Return a socket that becomes readable on SIGTERM, which no longer ends the process."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, stack: None)
    return reader


def _lock(fd: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOCK_RETRY_S)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
