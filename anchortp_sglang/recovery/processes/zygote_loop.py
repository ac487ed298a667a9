"""Forks children on request: the loop of the zygote process, which has imported SGLang once.

It has a single thread and uses no device, so that its children can. Each child waits on its own pipe for its role.
Main's end of the socket is in ``zygote.py``.
"""

import ctypes
import logging
import os
import selectors
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection

from anchortp_sglang.recovery.processes.exits import Exits

FORK, PING = b"fork", b"ping"
"""Requests. The answer to PING is PING; to FORK the child's pid with its pidfd, or the text of an error."""

MESSAGE_BYTES = 64

_PR_SET_PDEATHSIG = 1


def announce(control: socket.socket) -> None:
    """Report that ``serve`` is about to begin, to a main that waits for it (``first_timeout_s``)."""
    control.send(PING)


def serve(control: socket.socket, exits: Exits) -> None:
    """Fork on request, reap the dead, and end when main's end of the socket closes.

    ``exits``: where it notes how its children ended.
    """
    _set_title("anchortp::reserve")  # until it is needed
    share_loggers()
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group; main decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # main's handler would clean up what is main's
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(exits)
        if control.fileno() in ready and not _answer_one(control, (wake_read, wake_write)):
            return


def share_loggers() -> None:
    """Let no logger's level be set, here and in children, that is set already.

    To set one writes to every logger that there is, as it clears their caches, and each child would copy their pages
    (8 MB): SGLang's ranks set what main has set.
    """
    logging.Logger.setLevel = _set_other_level  # type: ignore[method-assign,assignment]


_set_level = logging.Logger.setLevel


def _set_other_level(logger: logging.Logger, level: int | str) -> None:
    if level not in (logger.level, logging.getLevelName(logger.level)):
        _set_level(logger, level)


def _answer_one(control: socket.socket, close_in_child: tuple[int, ...]) -> bool:
    request, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
    if request == PING:
        control.send(PING)
        return True
    if not request or not fds:
        return False  # main is gone
    _set_title("anchortp::zygote")
    zygote = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        control.send(str(error).encode()[:MESSAGE_BYTES])
        os.close(fds[0])
        return True
    if pid == 0:
        _become_child(zygote, control, close_in_child, fds[0])
    # Reaping happens in this thread only, so the pid cannot be reused before its pidfd is open.
    pidfd = os.pidfd_open(pid)
    socket.send_fds(control, [str(pid).encode()], [pidfd])
    os.close(pidfd)
    os.close(fds[0])
    return True


def _become_child(zygote: int, control: socket.socket, close: tuple[int, ...], pipe_fd: int) -> None:
    try:
        die_with_parent(zygote)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        for fd in close:
            os.close(fd)
        pipe = Connection(pipe_fd)
        target, argument = pipe.recv()
        target(argument, pipe)
    except EOFError:
        pass  # main has closed a spare's pipe
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)  # no atexit, no collective teardown with dead peers


def _reap(exits: Exits) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        exits.note(pid, status)


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the forking thread of ``parent`` ends; exit at once if it already has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _set_title(title: str) -> None:
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(title)
