"""Hands a rank's descriptors of its memory to main, on the pipe that the rank was forked with.

The pipe is a socket pair that no other process can reach. Main asks with ``ask``; a thread of the rank answers
(``answer_on``).
"""

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection

_NUMBER = struct.Struct("i")
"""A request: a descriptor's number in the rank, sent with a socket for the answer. The answer is the descriptor, or the
end of that socket. So a late answer has no receiver, and the messages of ranks on the pipe are untouched."""

_READ_BYTES = 4096
ANSWER_TIMEOUT_S = 2.0


def answer_on(pipe: Connection, descriptors: Callable[[], Collection[int]]) -> None:
    """Hand out the descriptors in ``descriptors()``, and no others; for a rank whose pipe main uses for nothing else.

    A blocked thread of its own answers whatever the rank does, unless the process is stopped or holds the GIL.
    """
    sock = socket.socket(fileno=os.dup(pipe.fileno()))
    threading.Thread(target=_answer, args=(sock, descriptors), name="anchortp-handover", daemon=True).start()


def _answer(sock: socket.socket, descriptors: Callable[[], Collection[int]]) -> None:
    while True:
        received, fds, _, _ = socket.recv_fds(sock, _READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not received:
            return  # main is gone
        request = received[-_NUMBER.size :]  # a read ends at the data that carries a descriptor
        for fd in fds:
            with contextlib.suppress(OSError, struct.error), socket.socket(fileno=fd) as answer:
                (number,) = _NUMBER.unpack(request)
                if number in descriptors():
                    socket.send_fds(answer, [request], [number])


def ask(pipe: Connection, number: int, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
    """Ask the rank at the other end for a duplicate of its descriptor ``number``. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs, socket.socket(fileno=os.dup(pipe.fileno())) as sock:
            socket.send_fds(sock, [_NUMBER.pack(number)], [theirs.fileno()])
        ours.settimeout(timeout_s)
        _, fds, _, _ = socket.recv_fds(ours, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise OSError(errno.EBADF, f"the rank is dead, or {number} is no descriptor of its memory")
    return fds[0]
