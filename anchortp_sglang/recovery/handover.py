"""A rank's descriptors of its memory, fetched by main when their anchor has died: by the kernel, or from the rank.

The kernel's way (pidfd_getfd) needs nothing of the rank, but Docker's default seccomp profile and yama forbid it. Then
a thread of the rank answers what comes on the pipe that it was forked with, a socket pair that no other process can
reach. Main keeps no descriptor: outside a move, memory is held by its anchor and its rank alone.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection

from anchortp_sglang.recovery.generation import Generation
from anchortp_sglang.recovery.processes import fetch_descriptor
from anchortp_sglang.recovery.zygote import Child

log = logging.getLogger(__name__)

_NUMBER = struct.Struct("i")
"""A request: a descriptor's number in the rank. With it comes a socket for the answer, which is the descriptor, or the
socket's end; so an answer that comes too late meets nobody, and what ranks say on the pipe is left alone."""

_READ_BYTES = 4096
_ANSWER_TIMEOUT_S = 2.0
_FORBIDDEN = {errno.EPERM, errno.EACCES, errno.ENOSYS}


def answer_on(pipe: Connection, descriptors: Callable[[], Collection[int]]) -> None:
    """In a rank to which main has nothing more to say: hand out those of ``descriptors()``, and no others.

    A blocked thread, whatever the rank's own is at, unless the process is stopped or keeps Python's lock.
    """
    sock = socket.socket(fileno=os.dup(pipe.fileno()))
    threading.Thread(target=_answer, args=(sock, descriptors), name="anchortp-handover", daemon=True).start()


def _answer(sock: socket.socket, descriptors: Callable[[], Collection[int]]) -> None:
    while True:
        received, fds, _, _ = socket.recv_fds(sock, _READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not received:
            return  # main is gone
        request = received[-_NUMBER.size :]  # a read ends with what a descriptor came with
        for fd in fds:
            with contextlib.suppress(OSError, struct.error), socket.socket(fileno=fd) as answer:
                (number,) = _NUMBER.unpack(request)
                if number in descriptors():
                    socket.send_fds(answer, [request], [number])


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
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs, socket.socket(fileno=os.dup(pipe.fileno())) as sock:
            socket.send_fds(sock, [_NUMBER.pack(number)], [theirs.fileno()])
        ours.settimeout(timeout_s)
        _, fds, _, _ = socket.recv_fds(ours, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise OSError(errno.EBADF, f"it is dead, or {number} is no descriptor of its memory")
    return fds[0]


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
