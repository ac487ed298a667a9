"""Calls of servers and ranks to an anchor. Each ends in time, with an answer or an ``AnchorError``."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import zmq

from anchortp_sglang.anchor import messages as m
from anchortp_sglang.anchor.files import AnchorFiles, AnchorRecord, device_name
from anchortp_sglang.anchor.pids import wait_readable

__all__ = [
    "AnchorClient",
    "AnchorError",
    "AnchorGone",
    "AnchorRefused",
    "AnchorTimeout",
    "HandleGrant",
    "open_handle",
]

_RETRY_S = 0.005  # while the handles socket's queue of connections is full
_MADE_AGAIN_S = 3.0

ReplyT = TypeVar("ReplyT", m.Ok, m.Allocated, m.Handle, m.StatusReply)


class AnchorError(Exception):
    """A call to an anchor failed."""


class AnchorGone(AnchorError):
    """The anchor is not running: it ended or was killed."""


class AnchorTimeout(AnchorError):
    """No answer came in time; the anchor may have carried out the call. All calls may be repeated."""


class AnchorRefused(AnchorError):
    """The anchor refused and changed nothing. ``code``: see ``messages.ReasonCode``."""

    def __init__(self, code: m.ReasonCode, text: str) -> None:
        super().__init__(code, text)
        self.code: m.ReasonCode = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


class HandleGrant(NamedTuple):
    """An open segment. The receiver closes ``fd``; it can be mapped writable unless ``sealed``."""

    fd: int
    nbytes: int
    sealed: bool


class AnchorClient:
    """Client of the anchor of ``device`` (-1: the host) in ``run_dir``.

    Safe in several threads and in forked processes: each control call has its own ZeroMQ socket, so that a late answer
    cannot reach another call. ``context`` is used only in the process that made this client; other processes make one
    at their first control call. ``open_handle`` and ``adopt_handle`` use no ZeroMQ. ``timeout_s`` bounds each call.
    ``generation`` is always the caller's.
    """

    def __init__(
        self,
        run_dir: Path | str,
        run_id: str,
        device: int,
        timeout_s: float = 5.0,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.device = device
        self._files = AnchorFiles(os.fspath(run_dir), device)
        self._run_id = run_id
        self._timeout_s = timeout_s
        self._seen: AnchorRecord | None = None
        self._contexts = {} if context is None else {os.getpid(): context}

    def status(self) -> m.StatusReply:
        """Return what the anchor holds."""
        return self._control(m.Status(run_id=self._run_id, generation=0), m.StatusReply)

    def fence(self, generation: int) -> None:
        """Raise the anchor's generation; it refuses messages of older ones from then on."""
        self._control(m.Fence(run_id=self._run_id, generation=generation), m.Ok)

    def attach(self, generation: int, controller_pid: int, identity: str, linger_s: float | None = None) -> None:
        """Take over a lingering anchor. Its generation becomes ``generation``, which must be above ``status()``'s.

        Refused while its former controller lives, or if ``identity`` is not the anchor's.
        """
        request = m.Attach(
            run_id=self._run_id,
            generation=generation,
            controller_pid=controller_pid,
            identity=identity,
            linger_s=linger_s,
        )
        self._control(request, m.Ok)

    def allocate(self, generation: int, name: str, nbytes: int, lazy: bool = False) -> m.Allocated:
        """Make a segment of ``nbytes`` zeros, unless one of this name and size exists (then not ``created``).

        ``lazy``: do not check that the machine has the memory, as most of it will not be touched.
        """
        request = m.Allocate(run_id=self._run_id, generation=generation, name=name, nbytes=nbytes, lazy=lazy)
        return self._control(request, m.Allocated)

    def seal(self, generation: int, name: str) -> None:
        """Make the segment read-only for good, except through existing mappings."""
        self._control(m.Seal(run_id=self._run_id, generation=generation, name=name), m.Ok)

    def release(self, generation: int, name: str) -> None:
        """Make the anchor release the segment. Freeing many GiB takes the kernel a while."""
        self._control(m.Release(run_id=self._run_id, generation=generation, name=name), m.Ok)

    def shutdown(self, generation: int | None = None) -> None:
        """Make the anchor release all segments, and wait until it has ended. ``generation`` None: whichever it has."""
        deadline = time.monotonic() + self._timeout_s
        if generation is None:
            generation = self.status().generation
        pidfd = os.pidfd_open(self._check_alive().pid)
        try:
            self._control(m.Shutdown(run_id=self._run_id, generation=generation), m.Ok)
            if not wait_readable(pidfd, deadline - time.monotonic()):
                raise self._error(AnchorTimeout, "accepted the shutdown, but has not ended in time")
        finally:
            os.close(pidfd)

    def open_handle(self, generation: int, name: str) -> HandleGrant:
        """Open the segment's memory, to be mapped with ``arena.map_fd``."""
        request = m.OpenHandle(run_id=self._run_id, generation=generation, name=name)
        reply, fds = self._exchange(request, [], m.Handle)
        if len(fds) != 1:
            raise self._error(AnchorError, "answered without a file descriptor")
        return HandleGrant(fds[0], reply.nbytes, reply.sealed)

    def adopt_handle(self, generation: int, name: str, fd: int, nbytes: int, sealed: bool) -> None:
        """Return a segment that survived in this process to a restarted anchor, which duplicates ``fd``."""
        request = m.AdoptHandle(run_id=self._run_id, generation=generation, name=name, nbytes=nbytes, sealed=sealed)
        self._exchange(request, [fd], m.Ok)

    def _control(self, request: m.ControlRequest, expected: type[ReplyT]) -> ReplyT:
        self._check_alive()
        with self._context().socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(f"ipc://{self._files.control}")
            dealer.send(m.encode(request))
            if not dealer.poll(int(self._timeout_s * 1000)):
                raise self._timed_out()
            return self._accept(dealer.recv(), expected)

    def _context(self) -> zmq.Context[zmq.Socket[bytes]]:
        # A context does not survive a fork. The parent's stays referenced here, so that the child does not close it.
        pid = os.getpid()
        return self._contexts.get(pid) or self._contexts.setdefault(pid, zmq.Context())

    def _exchange(self, request: m.HandleRequest, fds: list[int], expected: type[ReplyT]) -> tuple[ReplyT, list[int]]:
        deadline = time.monotonic() + self._timeout_s
        received: list[int] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                self._connect(sock, deadline)
                socket.send_fds(sock, [m.frame(request)], fds)
                header = self._receive(sock, m.FRAME_HEADER_BYTES, received, deadline)
                payload = self._receive(sock, m.frame_length(header), received, deadline)
            return self._accept(payload, expected), received
        except BaseException as error:
            for fd in received:
                os.close(fd)
            if isinstance(error, TimeoutError):
                raise self._timed_out() from error
            if isinstance(error, OSError) and error.errno != errno.EBADF:
                raise self._error(AnchorGone, f"is not reachable: {error}") from error
            raise

    def _connect(self, sock: socket.socket, deadline: float) -> None:
        while True:
            sock.settimeout(_remaining_s(deadline))
            try:
                return sock.connect(self._files.handles)
            except BlockingIOError:
                time.sleep(_RETRY_S)

    def _receive(self, sock: socket.socket, nbytes: int, fds: list[int], deadline: float) -> bytes:
        received = b""
        while len(received) < nbytes:
            sock.settimeout(_remaining_s(deadline))
            chunk, more, _, _ = socket.recv_fds(sock, nbytes - len(received), 1, socket.MSG_CMSG_CLOEXEC)
            fds += more
            if not chunk:
                raise ConnectionResetError(errno.ECONNRESET, "connection closed without an answer")
            received += chunk
        return received

    def _accept(self, payload: bytes, expected: type[ReplyT]) -> ReplyT:
        try:
            reply = m.decode_reply(payload)
        except msgspec.DecodeError as error:
            raise self._error(AnchorError, f"sent an answer that cannot be decoded: {error}") from error
        if isinstance(reply, m.Refused):
            raise AnchorRefused(reply.reason_code, reply.text)
        if not isinstance(reply, expected):
            raise self._error(AnchorError, f"answered {type(reply).__name__}, not {expected.__name__}")
        return reply

    def _check_alive(self) -> AnchorRecord:
        record = AnchorRecord.read(self._files.record)
        if record is None and self._seen is not None and self._seen.alive():
            record = self._found_again()
        if record is None or not record.alive():
            raise self._error(AnchorGone, "is not running")
        self._seen = record
        return record

    def _found_again(self) -> AnchorRecord | None:
        """Wait until a live anchor has made its files again after the run directory was removed.

        It takes a second (``loop.Anchor``). Returns None if the anchor is just ending.
        """
        deadline = time.monotonic() + min(self._timeout_s, _MADE_AGAIN_S)
        assert self._seen is not None
        while (record := AnchorRecord.read(self._files.record)) is None and self._seen.alive():
            if time.monotonic() > deadline:
                break
            time.sleep(_RETRY_S)
        return record

    def _timed_out(self) -> AnchorError:
        try:
            self._check_alive()
        except AnchorGone as gone:
            return gone
        return self._error(AnchorTimeout, f"did not answer within {self._timeout_s:g} s")

    def _error(self, kind: type[AnchorError], text: str) -> AnchorError:
        return kind(f"the anchor of device {device_name(self.device)} in {self._files.run_dir} {text}")


def open_handle(
    run_dir: Path | str, run_id: str, device: int, generation: int, name: str, timeout_s: float = 5.0
) -> HandleGrant:
    """Open a segment by ``AnchorClient.open_handle``, for ranks and others that make no other call."""
    return AnchorClient(run_dir, run_id, device, timeout_s).open_handle(generation, name)


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
