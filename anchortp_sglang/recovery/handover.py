"""A rank's descriptors of its memory, fetched by main when their anchor has died: by the kernel, or from the rank.

The kernel's way (pidfd_getfd) needs nothing of the rank, but Docker's default seccomp profile and yama forbid it. Then
a thread of the rank answers on the pipe that it was forked with, a socket pair that no other process can reach. Main
keeps no descriptor: outside a move, memory is held by its anchor and its rank alone.
"""

import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection

from anchortp_sglang.recovery.generation import Generation
from anchortp_sglang.recovery.processes import fetch_descriptor
from anchortp_sglang.recovery.zygote import Child

log = logging.getLogger(__name__)

_NUMBER = struct.Struct("i")
"""A request is a descriptor's number in the rank; the answer is the same number, with the descriptor."""

_READ_BYTES = 64 * _NUMBER.size
_ANSWER_TIMEOUT_S = 2.0
_FORBIDDEN = {errno.EPERM, errno.EACCES, errno.ENOSYS}

_asking = threading.Lock()


def answer_on(pipe: Connection, descriptors: Callable[[], Collection[int]]) -> None:
    """In a rank that has nothing more to say on its pipe: hand out those of ``descriptors()``, and no others.

    A blocked thread, whatever the rank's own is at, unless the process is stopped or keeps Python's lock.
    """
    sock = socket.socket(fileno=os.dup(pipe.fileno()))
    threading.Thread(target=_answer, args=(sock, descriptors), name="anchortp-handover", daemon=True).start()


def _answer(sock: socket.socket, descriptors: Callable[[], Collection[int]]) -> None:
    """What main never says is dropped, unanswered."""
    while requests := sock.recv(_READ_BYTES):
        whole = len(requests) % _NUMBER.size == 0
        for (number,) in _NUMBER.iter_unpack(requests) if whole else ():
            if number in descriptors():
                socket.send_fds(sock, [_NUMBER.pack(number)], [number])


def fetch(child: Child, number: int, timeout_s: float = _ANSWER_TIMEOUT_S) -> int:
    """A duplicate of the rank's descriptor ``number``, from the kernel or, where that is forbidden, from the rank.

    Raises OSError.
    """
    try:
        return fetch_descriptor(child.pidfd, number)
    except OSError as refused:
        if refused.errno not in _FORBIDDEN:
            raise
        try:
            return ask(child.pipe, number, timeout_s)
        except OSError as error:
            raise OSError(f"{refused.strerror}; the rank, asked for it: {error}") from error


def ask(pipe: Connection, number: int, timeout_s: float = _ANSWER_TIMEOUT_S) -> int:
    """A duplicate of descriptor ``number`` of the rank at the other end. Raises OSError."""
    # The threads of two dead anchors may ask the same rank: 0 has the host anchor's memory as well.
    with _asking, socket.socket(fileno=os.dup(pipe.fileno())) as sock:
        sock.send(_NUMBER.pack(number), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        deadline = time.monotonic() + timeout_s
        while _readable(sock, deadline - time.monotonic()):
            answer, fds, _, _ = socket.recv_fds(sock, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
            if fds and answer == _NUMBER.pack(number):
                return fds[0]
            for late in fds:  # of a question that was given up
                os.close(late)
            if not answer:
                raise OSError(errno.EPIPE, "it is dead")
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout_s:g} s")


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(max(0.0, timeout_s) * 1000))


def log_ways(generation: Generation) -> None:
    """Try how a rank's descriptors can be fetched here, and log it unless it is the kernel's way."""
    child, (number, _) = generation.ranks[0], next(iter(generation.infos[0]["fds"].values()))
    try:
        os.close(fetch_descriptor(child.pidfd, number))
    except OSError as refused:
        try:
            os.close(ask(child.pipe, number))
        except OSError as error:
            log.warning(
                "anchortp: %s, and ranks do not hand descriptors over (%s): the death of an anchor alone loses its "
                "device; see anchortp doctor",
                refused.strerror,
                error,
            )
        else:
            log.info(
                "anchortp: %s: when an anchor dies alone, its rank is asked for the memory; it must not hang then",
                refused.strerror,
            )
