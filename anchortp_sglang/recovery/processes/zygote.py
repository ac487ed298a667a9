"""Asks the zygote for children: main's end of the process that has imported SGLang once and forks in milliseconds.

Each request on its socket forks one child, which then waits on its own pipe for its role: spare ranks are children
forked early. The zygote's own code is in ``zygote_loop.py``.
"""

import gc
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from anchortp_sglang.anchor.pids import wait_readable
from anchortp_sglang.recovery.processes.exits import Exits
from anchortp_sglang.recovery.processes.pidfd import is_dead
from anchortp_sglang.recovery.processes.zygote_loop import FORK, MESSAGE_BYTES, PING, die_with_parent, serve

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0
_SPAWN_TIMEOUT_S = 90.0  # SGLang is imported before the first fork
_SEND_TIMEOUT_S = 2


class ZygoteError(RuntimeError):
    """The zygote is gone or does not answer."""


class ForkFailed(ZygoteError):
    """The zygote answers, but the kernel forks no process for it: another zygote would fail as well."""


@dataclass
class Child:
    """A forked process. ``pidfd`` becomes readable when it is dead and its memory torn down.

    ``pipe``: the child first receives a (target, argument) pair and calls target(argument, pipe). ``exits``: where its
    zygote notes how it ended.
    """

    pid: int
    pidfd: int
    pipe: Connection
    exits: Exits | None = None

    def crash(self) -> str:
        """Name the signal by which a dead child crashed; empty if it did not."""
        return "" if self.exits is None else self.exits.crash_of(self.pid)

    def start(self, target: Callable[[Any, Connection], None], argument: Any) -> None:
        """Give the child its role. Raises ZygoteError if it does not read its pipe (stopped, and the pipe is full)."""
        try:
            self.pipe.send((target, argument))
        except BlockingIOError as error:
            raise ZygoteError(f"process {self.pid} does not read its assignment") from error

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Give back the descriptors of a dead child."""
        self.pipe.close()
        os.close(self.pidfd)


def _limit_sends(pipe: Connection) -> None:
    """Make a send without progress raise BlockingIOError after a while: a stopped child does not empty its pipe."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))


class Zygote:
    """Main's end of a zygote. ``fork`` and ``answers`` may be called from any thread.

    ``first_timeout_s``: for the first answer of a zygote that imports SGLang first and then reports it; else None.
    """

    def __init__(
        self, pid: int, control: socket.socket, first_timeout_s: float | None = None, exits: Exits | None = None
    ) -> None:
        self.pid = pid
        self._exits = exits
        self.pidfd = os.pidfd_open(pid)
        self._first_timeout_s = first_timeout_s
        self._made_at = time.monotonic()
        self._control = control
        self._lock = threading.Lock()
        self._owed = 0 if first_timeout_s is None else 1  # answers to come: such a zygote first says it is ready

    def fork(self) -> Child:
        """Fork one child. Raises ZygoteError."""
        ours, theirs = Pipe()
        try:
            answer, fds = self._ask(FORK, [theirs.fileno()])
            if not fds:
                if answer:
                    raise ForkFailed(f"the zygote (pid {self.pid}) could not fork: {answer.decode()}")
                raise ZygoteError(f"the zygote (pid {self.pid}) is gone")
        except BaseException:
            ours.close()  # a child that is forked late finds it closed, and ends
            raise
        finally:
            theirs.close()
        _limit_sends(ours)
        return Child(int(answer), fds[0], ours, self._exits)

    @property
    def importing(self) -> bool:
        """Whether it has not reported yet that it is ready."""
        return self._first_timeout_s is not None

    def close(self) -> None:
        """Close the descriptors of a dead zygote."""
        os.close(self.pidfd)
        self._control.close()
        if self._exits is not None:
            self._exits.close()

    def answers(self) -> bool:
        """Return whether it answers in time; if it still imports SGLang, whether it has time left for that."""
        if self._first_timeout_s is not None and not wait_readable(self._control.fileno(), 0.0):
            return not is_dead(self.pidfd) and time.monotonic() < self._made_at + self._first_timeout_s
        try:
            return self._ask(PING, [])[0] == PING
        except ZygoteError:
            return False

    def _ask(self, request: bytes, fds: list[int]) -> tuple[bytes, list[int]]:
        """Send a request and return the answer. Late answers to earlier requests are dropped, so it can be retried."""
        try:
            with self._lock:
                deadline = time.monotonic() + (self._first_timeout_s or _ANSWER_TIMEOUT_S)
                self._control.settimeout(_ANSWER_TIMEOUT_S)
                socket.send_fds(self._control, [request], fds)
                self._owed += 1
                while True:
                    self._control.settimeout(max(0.001, deadline - time.monotonic()))
                    answer, received, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 1)
                    self._owed -= 1
                    self._first_timeout_s = None
                    if not self._owed or not answer:
                        return answer, received
                    for fd in received:
                        os.close(fd)
        except OSError as error:
            raise ZygoteError(f"the zygote (pid {self.pid}) does not answer: {error}") from error

    def kill(self) -> None:
        """End the zygote and, by their parent-death signal, all its children."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass


def fork_zygote() -> Zygote:
    """Fork this process into a zygote. The caller must have checked ``fork_guard.unfit_to_fork``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent, exits = os.getpid(), Exits()
    gc.collect()
    gc.freeze()  # the children then share these pages for good
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            die_with_parent(parent)  # not by the end of its socket: a zygote forked later also has main's end of it
            serve(theirs, exits)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    return Zygote(pid, ours, exits=exits)


def tile_folder() -> str | None:
    """Return this interpreter's folder for cuda.tile, which SGLang imports; None if it has not been imported.

    Each interpreter makes one, and removes it at a regular exit. A zygote has no such exit, so it uses main's.
    """
    tile = sys.modules.get("cuda.tile._cext")
    return None if tile is None else str(tile.default_tile_context.config.temp_dir)


def spawn_zygote() -> Zygote:
    """Start a zygote in a fresh interpreter, which imports SGLang again: for a main that must not fork any more."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    exits = Exits()
    fds = [theirs.fileno(), exits.fd]
    command = [sys.executable, "-m", "anchortp_sglang.zygote_main", *map(str, fds)]
    folder = tile_folder()
    env = os.environ | ({} if folder is None else {"CUDA_TILE_TEMP_DIR": folder})
    process = subprocess.Popen(command, pass_fds=fds, env=env)
    theirs.close()
    return Zygote(process.pid, ours, _SPAWN_TIMEOUT_S, exits)
