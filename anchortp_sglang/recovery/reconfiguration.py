"""Changes a server's devices on purpose: some leave, some join, and no request is lost.

The generation of the new devices is built beside the one that serves, as a standby is; its weights are moved while it
is built. Then the serving ranks end between two steps, and it takes over KV and open requests as after a fault. Until
that moment nothing has changed: a fault, a failed build or a client that goes away leaves the serving generation as it
is.

Without a warm standby (``--anchor-standby``) nothing is built ahead, and requests wait as after the loss of a device.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.planning.layout.change import change_of
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership
from anchortp_sglang.rank.messages import Leave
from anchortp_sglang.recovery.next_generation import NextGeneration
from anchortp_sglang.recovery.processes.generation import Generation, note_left
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.target import Target
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_POLL_S = 0.02
_LEAVE_POLL_S = 0.001
_LEAVE_TIMEOUT_S = 10.0


class ChangeRefused(RuntimeError):
    """A change that is not made. ``code``: the HTTP status; 409 where the same request may be right later."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Wish:
    """The devices that somebody wants to serve: ``devices``, or if that is None the serving ones with some changes.

    ``widths``: KV heads of each device, in the order of ids; None to leave that open.
    """

    devices: frozenset[int] | None = None
    drain: frozenset[int] = frozenset()
    rejoin: frozenset[int] = frozenset()
    widths: tuple[int, ...] | None = None

    def after(self, serving: frozenset[int]) -> frozenset[int]:
        """Return the devices that are to serve after those that serve now."""
        return (serving - self.drain) | self.rejoin if self.devices is None else self.devices

    def away(self, configured: frozenset[int]) -> frozenset[int]:
        """Return the devices that are to stay away, even if they do not serve now."""
        return self.drain if self.devices is None else configured - self.devices


@dataclass(frozen=True)
class Seams:
    """What a change needs of the coordinator; all on the event loop.

    ``serving`` returns the generation that serves, or None; ``is_down``, whether the server has given up; ``build_now``
    has the helpers looked after at once; ``send`` sends a message to the ranks; ``take_over`` starts the target's
    generation in place of the serving one, and returns False if none serves; ``device_errors`` returns reasons of
    devices that are lost although their anchors live; ``spawn`` runs a coroutine as a task.
    """

    serving: Callable[[], Generation | None]
    is_down: Callable[[], bool]
    build_now: Callable[[], None]
    send: Callable[[Any], None]
    take_over: Callable[[Target, str], bool]
    device_errors: Callable[[], Mapping[int, str]]
    spawn: Callable[[Coroutine[Any, Any, None]], None]


class Reconfiguration:
    """Makes one planned change after the other. ``built_ahead``: whether generations are built beside the serving one.

    ``drained``: devices that left on purpose, or were not started, and have not joined since.
    """

    def __init__(
        self,
        processes: ServerProcesses,
        next_generation: NextGeneration,
        configured: Collection[int],
        built_ahead: bool,
        seams: Seams,
    ) -> None:
        self.drained: set[int] = set()
        self._processes = processes
        self._next = next_generation
        self._configured = frozenset(configured)
        self._built_ahead = built_ahead
        self._seams = seams
        self._target: Target | None = None

    @property
    def joining(self) -> tuple[int, ...]:
        """Devices that are to join with the change under way."""
        return () if self._target is None else self._target.joining

    @property
    def leaving(self) -> tuple[int, ...]:
        """Devices that are to leave with the change under way."""
        return () if self._target is None else self._target.leaving

    def devices(self) -> tuple[frozenset[int], frozenset[int]]:
        """Return the devices that serve, and those that are lost; none of either while nothing serves."""
        serving = self._seams.serving()
        if serving is None:
            return frozenset(), frozenset()
        devices = frozenset(serving.ownership.devices)
        return devices, self._configured - devices - self.drained

    async def change(self, wish: Wish, generation: int | None = None, dry_run: bool = False) -> dict[str, Any]:
        """Make a wish come true; answer with what was moved, or would be.

        ``generation``: the one that must serve, or None. Nothing is done if it is so already. Cancelled before the new
        generation takes over, nothing is changed. Raises ChangeRefused.
        """
        serving = self._seams.serving()
        if serving is None:
            raise ChangeRefused(409, "the server is not serving: wait until it has recovered")
        if generation is not None and generation != serving.number:
            raise ChangeRefused(409, f"generation {serving.number} serves, not {generation}: look at the status again")
        if self._target is not None:
            raise ChangeRefused(409, "a change of devices is under way")
        before = frozenset(serving.ownership.devices)
        wanted = wish.after(before)
        self._check(wanted, wish.away(self._configured), before)
        same = {"changed": False, "generation": serving.number, "devices": sorted(before)}
        if not dry_run:
            self.drained |= wish.away(self._configured) - before
        if wanted == before and wish.widths is None:
            return same
        try:
            target = await in_thread(self._next.target_for, wanted, _by_device(wanted, wish.widths))
            if target.ownership == serving.ownership:
                return same
            answer = await in_thread(change_of, self._processes.plan.model, serving.weights, target.weights)
        except InvalidOwnership as error:
            raise ChangeRefused(400, str(error)) from None
        answer["kv_slots"] = [self._processes.plan.kv_of(each).slots for each in (serving.ownership, target.ownership)]
        if dry_run:
            return same | {"plan": answer}
        began = time.monotonic()
        number = await self._make(serving, target)
        seconds = round(time.monotonic() - began, 3)
        return {"changed": True, "generation": number, "devices": sorted(wanted), "seconds": seconds, "plan": answer}

    def _check(self, wanted: frozenset[int], away: frozenset[int], before: frozenset[int]) -> None:
        if strangers := (wanted | away) - self._configured:
            raise ChangeRefused(400, f"devices {sorted(strangers)} are none of {sorted(self._configured)}")
        errors = self._seams.device_errors()
        if broken := [f"device {device}: {errors[device]}" for device in wanted - before if device in errors]:
            raise ChangeRefused(409, "; ".join(broken))

    async def _make(self, serving: Generation, target: Target) -> int:
        """Make a change; return the number of the generation that serves then. Raises ChangeRefused."""
        if self._target is not None or self._seams.serving() is not serving:
            raise ChangeRefused(409, "something else happened meanwhile: look at the status again")
        self._target, finishing = target, False
        try:
            if self._built_ahead:
                await self._build(serving, target)
            done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._seams.spawn(self._carry_out(serving, target, done))
            finishing = True
            return await asyncio.shield(done)
        finally:
            if not finishing:
                self._end()

    async def _build(self, serving: Generation, target: Target) -> None:
        """Wait until the target's generation stands by. Raises ChangeRefused."""
        processes, number = self._processes, serving.number + 1
        processes.standbys.forget_failures()
        processes.target = target
        self._seams.build_now()
        while True:
            await asyncio.sleep(_POLL_S)
            if self._seams.serving() is not serving:
                raise ChangeRefused(409, "a fault came first; the change was not made")
            ready, failure = processes.standbys.progress(number, target.weights)
            if failure:
                raise ChangeRefused(503, f"the new generation could not be built: {failure}")
            if ready:
                break
        try:
            complete = await in_thread(processes.anchors.holds_planned)
        except AnchorError as error:
            raise ChangeRefused(503, str(error)) from None
        if not complete:
            raise ChangeRefused(409, "an anchor died while the new generation was built")

    async def _carry_out(self, serving: Generation, target: Target, done: "asyncio.Future[int]") -> None:
        """Let the target's generation take over, wait for what comes of it, and end the anchors without use then.

        From here on nothing can be called back, whether a client waits for it or not.
        """
        await self._let_leave(serving)
        if not self._seams.take_over(target, _reason(target)):
            self._end()
            return _fail(done, "a fault came first; the change was not made")
        new = None
        while new is None or new is serving:
            await asyncio.sleep(_POLL_S)
            new = self._seams.serving()
            if self._seams.is_down():
                self._end()
                return _fail(done, "the server is down: look at its status", 503)
        if new.weights == target.weights:
            self.drained = self.drained.difference(target.joining).union(target.leaving)
            self._processes.anchors.planned = None
        devices = new.ownership.devices
        await in_thread(self._processes.anchors.end, {*target.joining, *target.leaving}.difference(devices), new.number)
        self._end()
        if new.weights == target.weights:
            done.set_result(new.number)
        else:
            _fail(done, f"a fault came in between: devices {sorted(devices)} serve, as generation {new.number}")

    async def _let_leave(self, serving: Generation) -> None:
        """Let the serving ranks end after their step; those that take too long are killed afterwards."""
        self._seams.send(Leave())
        reported: set[int] = set()
        deadline = time.monotonic() + _LEAVE_TIMEOUT_S
        while self._seams.serving() is serving and not note_left(serving, reported):
            if time.monotonic() > deadline:
                log.warning("anchortp: ranks have not ended their step within %g s; they are killed", _LEAVE_TIMEOUT_S)
                return
            await asyncio.sleep(_LEAVE_POLL_S)

    def _end(self) -> None:
        self._target = self._processes.target = None
        self._seams.build_now()


def _by_device(devices: Collection[int], widths: Sequence[int] | None) -> dict[int, int] | None:
    if widths is None:
        return None
    if len(widths) != len(devices) or min(widths) < 1:
        raise ChangeRefused(400, f"give a width of at least 1 to each of {len(devices)} devices, not {list(widths)}")
    return dict(zip(sorted(devices), widths, strict=True))


def _fail(done: "asyncio.Future[int]", text: str, code: int = 409) -> None:
    done.set_exception(ChangeRefused(code, text))
    done.exception()  # somebody may wait for it no more


def _reason(target: Target) -> str:
    """Say what a change does, for the log and the timeline."""
    parts = [
        f"{'devices' if len(devices) > 1 else 'device'} {', '.join(map(str, devices))} {verb}"
        for devices, verb in ((target.joining, "joining"), (target.leaving, "leaving"))
        if devices
    ]
    return ", ".join(parts) or "shares changing"
