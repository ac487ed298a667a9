"""The anchor's side of the handles socket: each connection has one framed request and one reply, maybe with a handle.

No client can block the anchor: reads and writes are non-blocking, each connection has a deadline, their number is
bounded (a new one evicts the oldest), and connections of other users are closed unread.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from anchortp_sglang.anchor.messages import FRAME_HEADER_BYTES, MAX_MESSAGE_BYTES, Reply, frame, frame_length

__all__ = ["HandleListener"]

CONNECTION_TIMEOUT_S = 2.0
MAX_CONNECTIONS = 64
_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

Answer = Callable[[bytes, list[int]], tuple[Reply, "int | None"]]


@dataclass
class _Connection:
    sock: socket.socket
    deadline: float
    received: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)

    def missing_bytes(self) -> int:
        """Return the bytes missing of the header, or of the payload once the header is complete."""
        if len(self.received) < FRAME_HEADER_BYTES:
            return FRAME_HEADER_BYTES - len(self.received)
        length = frame_length(self.received[:FRAME_HEADER_BYTES])
        return FRAME_HEADER_BYTES + length - len(self.received)

    def oversized(self) -> bool:
        """Return whether the header announces more than is accepted."""
        known = len(self.received) >= FRAME_HEADER_BYTES
        return known and frame_length(self.received[:FRAME_HEADER_BYTES]) > MAX_MESSAGE_BYTES

    def close(self) -> None:
        """Close the connection and the descriptors received on it."""
        for fd in self.fds:
            os.close(fd)
        self.sock.close()


class HandleListener:
    """Listens at ``path`` and registers its sockets with ``poller``.

    ``answer(payload, fds)`` returns the reply and an fd to send with it, which is closed afterwards. It must duplicate
    received ``fds`` that it keeps. ``count(reason)`` is called for each dropped connection.
    """

    def __init__(self, path: str, poller: zmq.Poller, answer: Answer, count: Callable[[str], None]) -> None:
        self._poller, self._answer, self._count = poller, answer, count
        self._connections: dict[int, _Connection] = {}  # by fd, oldest first
        self._listener = self._listen(path)

    def listen_again(self, path: str) -> None:
        """Listen at ``path``, which must not exist, from now on. Open connections stay."""
        former, self._listener = self._listener, self._listen(path)
        self._poller.unregister(former.fileno())
        former.close()

    def _listen(self, path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(path)
        except BaseException:
            listener.close()
            raise
        listener.listen(_BACKLOG)
        self._poller.register(listener.fileno(), zmq.POLLIN)
        return listener

    def next_deadline(self) -> float | None:
        """Return when ``expire`` must be called next, or None."""
        return min((connection.deadline for connection in self._connections.values()), default=None)

    def serve(self, fd: int, now: float) -> None:
        """Accept or read: ``fd``, one of our sockets, is readable."""
        if fd == self._listener.fileno():
            self._accept(now)
        elif fd in self._connections:  # it may have made room for one accepted in the same round
            self._read(self._connections[fd])

    def expire(self, now: float) -> None:
        """Drop the connections whose deadline has passed."""
        for connection in list(self._connections.values()):
            if connection.deadline <= now:
                self._drop(connection, "slow")

    def close(self) -> None:
        """Close all sockets; the caller removes the path."""
        for connection in list(self._connections.values()):
            self._drop(connection, None)
        self._poller.unregister(self._listener.fileno())
        self._listener.close()

    def _accept(self, now: float) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
            sock.close()
            self._count("other_user")
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop(next(iter(self._connections.values())), "evicted")
        self._connections[sock.fileno()] = _Connection(sock, now + CONNECTION_TIMEOUT_S)
        self._poller.register(sock.fileno(), zmq.POLLIN)

    def _read(self, connection: _Connection) -> None:
        while connection.missing_bytes():
            try:
                chunk, fds, flags, _ = socket.recv_fds(
                    connection.sock, connection.missing_bytes(), 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                return self._drop(connection, "truncated")
            connection.fds += fds
            connection.received += chunk
            if not chunk:
                return self._drop(connection, "truncated")
            if connection.oversized():
                return self._drop(connection, "oversized")
            if len(connection.fds) > 1 or flags & socket.MSG_CTRUNC:
                return self._drop(connection, "too_many_handles")
        self._reply(connection)

    def _reply(self, connection: _Connection) -> None:
        reply, fd = self._answer(bytes(connection.received[FRAME_HEADER_BYTES:]), connection.fds)
        payload = frame(reply)
        try:
            sent = socket.send_fds(connection.sock, [payload], [] if fd is None else [fd])
        except OSError:
            sent = 0
        finally:
            if fd is not None:
                os.close(fd)
        self._drop(connection, None if sent == len(payload) else "unsent")

    def _drop(self, connection: _Connection, reason: str | None) -> None:
        fd = connection.sock.fileno()
        self._poller.unregister(fd)
        del self._connections[fd]
        connection.close()
        if reason:
            self._count(reason)
