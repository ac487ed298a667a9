"""The anchor's only thread: a poll loop over its sockets and its controller's pidfd."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from anchortp_sglang.anchor import daemon
from anchortp_sglang.anchor import messages as m
from anchortp_sglang.anchor.files import AnchorFiles, AnchorRecord
from anchortp_sglang.anchor.handles import HandleListener
from anchortp_sglang.anchor.pids import start_ticks
from anchortp_sglang.anchor.run_base import RunDirError, make_private
from anchortp_sglang.anchor.state import (
    Action,
    AdoptSegment,
    AnchorState,
    CloseSegment,
    ControllerDied,
    CreateSegment,
    Event,
    Phase,
    SealSegment,
    Terminated,
    Tick,
)
from anchortp_sglang.anchor.transitions import refuse, step
from anchortp_sglang.memory.arena import Arena, ArenaError, BadHandle, MemoryExhausted

__all__ = ["Anchor", "log"]

_MAX_QUEUED = 64  # control messages waiting in either direction, per peer
_GOODBYE_MS = 200  # how long the last replies may take to leave
_HANDSHAKE_MS = 2000
_ERROR_PAUSE_S = 0.01  # so that a repeated error does not take a whole core
_LOOK_S = 1.0  # how often it is checked that the files are still there
_LOG_TIMEOUT_S = 0.0


class Anchor:
    """An anchor: owns its sockets and memory, and executes what ``transitions.step`` decides."""

    def __init__(self, state: AnchorState, files: AnchorFiles, arena: Arena) -> None:
        self._state, self._files, self._arena = state, files, arena
        self._dropped: Counter[str] = Counter()
        self._started = time.monotonic()
        self._poller = zmq.Poller()
        self._context = zmq.Context()
        self._control = self._make_control()
        self._handles = HandleListener(files.handles, self._poller, self._answer_handle, self._count)
        self._termination = daemon.terminate_to()
        self._poller.register(self._termination.fileno(), zmq.POLLIN)
        self._record_files()
        self._next_look = self._started + _LOOK_S
        self._controller_pidfd: int | None = None
        try:
            self._watch(state.controller_pid)
        except ProcessLookupError:
            self._advance(ControllerDied(state.controller_pid))

    def run(self) -> None:
        """Serve until the state machine closes."""
        while self._state.phase is not Phase.CLOSED:
            for source, _ in self._poller.poll(self._wait_ms()):
                try:
                    self._serve(source)
                except Exception:  # an error in one message must not cost the memory
                    self._count("internal_error", traceback.format_exc())
                    time.sleep(_ERROR_PAUSE_S)
            self._handles.expire(time.monotonic())
            self._look_for_files()
            self._advance(Tick())

    def close(self) -> None:
        """Release the memory, then the sockets."""
        self._arena.close_all()
        self._handles.close()
        self._context.destroy(linger=_GOODBYE_MS)

    def _record_files(self) -> None:
        pid = os.getpid()
        state = self._state
        record = AnchorRecord(pid=pid, start_ticks=start_ticks(pid) or 0, run_id=state.run_id, device=state.device)
        record.write(self._files.record)

    def _look_for_files(self) -> None:
        """Make the files again if the run directory was cleared, as at the end of a login."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        if self._files.complete():
            return
        try:
            make_private(Path(self._files.run_dir))
            self._files.remove()  # what is left of them
            # The former listener stays open, though no client can reach it: closing it would remove the new file.
            self._control.bind(f"ipc://{self._files.control}")
            self._handles.listen_again(self._files.handles)
            self._record_files()
            daemon.use_log(self._files.log, _LOG_TIMEOUT_S)
        except (OSError, RunDirError, zmq.ZMQError) as error:
            self._count("no_run_dir", str(error))
        else:
            log("the files of this anchor had vanished, and were made again")

    def _make_control(self) -> zmq.Socket[bytes]:
        control = self._context.socket(zmq.ROUTER)
        # libzmq closes the connection of a longer message by itself; up to here it is refused and counted.
        control.setsockopt(zmq.MAXMSGSIZE, 2 * m.MAX_MESSAGE_BYTES)
        control.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
        control.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
        control.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        control.bind(f"ipc://{self._files.control}")
        self._poller.register(control, zmq.POLLIN)
        return control

    def _wait_ms(self) -> int:
        deadlines = (self._handles.next_deadline(), self._state.linger_deadline)
        nearest = min((deadline for deadline in deadlines if deadline is not None), default=self._next_look)
        wait_s = max(0.0, min(nearest, self._next_look) - time.monotonic())
        return int(wait_s * 1000) + 1  # rounded up, so that the loop does not spin in the last millisecond

    def _serve(self, source: object) -> None:
        if source is self._control:
            self._serve_control()
        elif source == self._controller_pidfd:
            self._unwatch()
            self._advance(ControllerDied(self._state.controller_pid))
        elif source == self._termination.fileno():
            self._advance(Terminated())
        elif isinstance(source, int):
            self._handles.serve(source, time.monotonic())

    def _serve_control(self) -> None:
        try:
            frames = self._control.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        if len(frames) != 2:
            return self._count("multipart")
        sender, payload = frames
        reply = self._answer_control(payload)
        # Non-blocking: a ROUTER drops replies to clients that are gone or do not read.
        self._control.send_multipart([sender, m.encode(reply)], zmq.NOBLOCK)

    def _answer_control(self, payload: bytes) -> m.Reply:
        if len(payload) > m.MAX_MESSAGE_BYTES:
            return self._refused("bad_message", f"a message of {len(payload)} bytes is too long", "oversized")
        try:
            request = m.decode_control(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._refused("bad_message", str(error), "undecodable")
        return self._advance(request) or self._status()

    def _answer_handle(self, payload: bytes, fds: list[int]) -> tuple[m.Reply, int | None]:
        try:
            request: m.HandleRequest = m.decode_handle_request(payload)
            if isinstance(request, m.AdoptHandle):
                request = self._checked(request, fds)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._refused("bad_message", str(error), "undecodable"), None
        except BadHandle as error:
            return self._refused("bad_handle", str(error)), None
        reply = self._advance(request, fds)
        assert reply is not None
        granted = isinstance(request, m.OpenHandle) and isinstance(reply, m.Handle)
        return reply, self._arena.open(request.name) if granted else None

    def _checked(self, request: m.AdoptHandle, fds: Sequence[int]) -> m.AdoptHandle:
        if not fds:
            raise BadHandle("the message came without a file descriptor")
        # The segment may have been sealed without its sender's knowledge.
        sealed = self._arena.verify(fds[0], request.nbytes, request.sealed)
        return msgspec.structs.replace(request, sealed=sealed)

    def _advance(self, event: Event, fds: Sequence[int] = ()) -> m.Reply | None:
        outcome = step(self._state, event, time.monotonic())
        if isinstance(outcome.reply, m.Refused):
            self._count(outcome.reply.reason_code, outcome.reply.text)
            return outcome.reply
        try:
            for action in outcome.actions:
                self._execute(action, fds)
        except (ArenaError, OSError) as error:
            return self._refused(_failure(error), str(error))
        if outcome.state != self._state:
            log(outcome.reason)
            self._state = outcome.state
        return outcome.reply

    def _execute(self, action: Action, fds: Sequence[int]) -> None:
        if isinstance(action, CreateSegment):
            self._arena.create(action.name, action.nbytes, action.lazy)
        elif isinstance(action, SealSegment):
            self._arena.seal(action.name)
        elif isinstance(action, CloseSegment):
            self._arena.close(action.name)
        elif isinstance(action, AdoptSegment):
            self._arena.adopt(action.name, fds[0], action.nbytes)
        else:
            self._watch(action.pid)

    def _watch(self, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._unwatch()
        self._controller_pidfd = pidfd
        self._poller.register(pidfd, zmq.POLLIN)

    def _unwatch(self) -> None:
        if self._controller_pidfd is not None:
            self._poller.unregister(self._controller_pidfd)
            os.close(self._controller_pidfd)
            self._controller_pidfd = None

    def _refused(self, code: m.ReasonCode, text: str, counted_as: str | None = None) -> m.Refused:
        self._count(counted_as or code, text)
        reply = refuse(self._state, code, text).reply
        assert isinstance(reply, m.Refused)
        return reply

    def _status(self) -> m.StatusReply:
        state = self._state
        segments = [
            m.SegmentInfo(
                name=name,
                nbytes=segment.nbytes,
                resident_bytes=self._arena.resident_bytes(name),
                generation=segment.generation,
                sealed=segment.sealed,
            )
            for name, segment in state.segments.items()
        ]
        return m.StatusReply(
            run_id=state.run_id,
            generation=state.generation,
            device=state.device,
            pid=os.getpid(),
            identity=state.identity,
            controller_pid=state.controller_pid if state.phase is Phase.OWNED else None,
            segments=segments,
            dropped=dict(self._dropped),
            uptime_s=time.monotonic() - self._started,
        )

    def _count(self, reason: str, text: str = "") -> None:
        self._dropped[reason] += 1
        if self._dropped[reason] == 1:  # a flood must not fill the disk
            log(f"dropped or refused a message; more of this kind are only counted: {reason} {text}")


def _failure(error: Exception) -> m.ReasonCode:
    if isinstance(error, MemoryExhausted):
        return "no_memory"
    if isinstance(error, BadHandle):
        return "bad_handle"
    return "no_such_process" if isinstance(error, ProcessLookupError) else "internal_error"


def log(text: str) -> None:
    """Write a line with the time to the log."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)
