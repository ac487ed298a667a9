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
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.platforms.base import DeviceWatch
from anchortp_sglang.rank.messages import Leave
from anchortp_sglang.recovery.change_plans import FAULT_FIRST, ChangeRefused, Planner, Wish
from anchortp_sglang.recovery.next_generation import NextGeneration
from anchortp_sglang.recovery.processes.generation import Generation, note_left
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.target import Target
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_POLL_S = 0.02
_LEAVE_POLL_S = 0.001
_LEAVE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Seams:
    """The coordinator's functions that a change calls; all on the event loop.

    ``serving`` returns the generation that serves, or None; ``is_down``, whether the server has given up; ``build_now``
    has the helpers looked after at once; ``send`` sends a message to the ranks; ``take_over`` starts the target's
    generation in place of the serving one, and returns False if none serves; ``spawn`` runs a coroutine as a task.
    ``devices`` knows those that are lost although their anchors live.
    """

    serving: Callable[[], Generation | None]
    is_down: Callable[[], bool]
    build_now: Callable[[], None]
    send: Callable[[Any], None]
    take_over: Callable[[Target, str], bool]
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    devices: DeviceWatch


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
        self._planner = Planner(processes, next_generation, seams.serving, seams.send)
        self._configured = frozenset(configured)
        self._built_ahead = built_ahead
        self._seams = seams
        self._target: Target | None = None
        self._busy = False

    @property
    def joining(self) -> tuple[int, ...]:
        """Devices that are to join with the change under way."""
        return () if self._target is None else self._target.joining

    @property
    def leaving(self) -> tuple[int, ...]:
        """Devices that are to leave with the change under way."""
        return () if self._target is None else self._target.leaving

    def devices(self) -> tuple[frozenset[int], frozenset[int]]:
        """Return the devices that serve, and those that are lost; none of either while nothing serves.

        Devices that their driver has reported are not among the lost: somebody must repair them and say so.
        """
        serving = self._seams.serving()
        if serving is None:
            return frozenset(), frozenset()
        devices = frozenset(serving.ownership.devices)
        return devices, self._configured - devices - self.drained - self._seams.devices.errors.keys()

    async def change(self, wish: Wish, generation: int | None = None, dry_run: bool = False) -> dict[str, Any]:
        """Make a wish come true; answer with what was moved, or would be.

        ``generation``: the one that must serve, or None. Nothing is done if it is so already, whatever serves.
        Cancelled before the new generation takes over, nothing is changed. Raises ChangeRefused.
        """
        serving = self._seams.serving()
        if serving is None:
            down = self._seams.is_down()
            text = "is down: its status says why" if down else "does not serve: wait until it has recovered"
            raise ChangeRefused(409, f"the server {text}")
        before = frozenset(serving.ownership.devices)
        wanted, away = wish.after(before), wish.away(self._configured)
        self._check(wanted, away)
        is_so = wanted == before and away <= self.drained and wish.widths is None and wish.rebalance is None
        if generation not in (None, serving.number) and not is_so:
            raise ChangeRefused(409, f"generation {serving.number} serves, not {generation}: look at the status again")
        if self._busy:
            raise ChangeRefused(409, "a change of devices is under way, or being planned")
        answer: dict[str, Any] = {"changed": False, "generation": serving.number, "devices": sorted(before)}
        self._busy, carried_on = True, False
        try:
            await self._recheck(wanted - before, serving.number, dry_run)
            target = None
            if wish.rebalance is not None:
                target, found = await self._planner.rebalanced(serving, wish.rebalance)
                answer |= found
            elif wanted != before or wish.widths is not None:
                target, answer["plan"] = await self._planner.devices(serving, wanted, wish.widths)
            if target is not None:
                moving_s = self._processes.moving_s(target.weights) if self._built_ahead else 0.0
                answer["plan"]["least_s"] = round(moving_s, 3)
            if dry_run:
                return answer
            if target is None or target.ownership == serving.ownership:
                answer.pop("plan", None)
                self.drained |= away - before
                return answer
            began, done = time.monotonic(), await self._prepare(serving, target)
            carried_on = True  # it ends the change, whether a client waits for it or not
            number = await asyncio.shield(done)
        finally:
            if not carried_on:
                self._end()
        self.drained |= away - before
        seconds = round(time.monotonic() - began, 3)
        return answer | {"changed": True, "generation": number, "devices": sorted(wanted), "seconds": seconds}

    def _check(self, wanted: frozenset[int], away: frozenset[int]) -> None:
        if strangers := (wanted | away) - self._configured:
            raise ChangeRefused(400, f"devices {sorted(strangers)} are none of {sorted(self._configured)}")

    async def _recheck(self, joining: frozenset[int], generation: int, dry_run: bool) -> None:
        """Have joining devices that are lost probed anew; those that answer get new anchors. Raises ChangeRefused."""
        errors = self._seams.devices.errors
        for device in sorted(joining.intersection(errors)):
            if dry_run:
                raise ChangeRefused(503, f"device {device}: {errors[device]}; it is probed anew without --dry-run")
            if reason := await self._seams.devices.recheck(device):
                raise ChangeRefused(503, f"device {device}: {reason}")
            await in_thread(self._processes.anchors.end, [device], generation)

    async def _prepare(self, serving: Generation, target: Target) -> "asyncio.Future[int]":
        """Build what can be built ahead, and begin to carry the change out; return what becomes of it.

        Raises ChangeRefused.
        """
        if self._seams.serving() is not serving:
            raise ChangeRefused(409, FAULT_FIRST)
        self._target = target
        if self._built_ahead:
            await self._build(serving, target)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._seams.spawn(self._carry_out(serving, target, done))
        return done

    async def _build(self, serving: Generation, target: Target) -> None:
        """Wait until the target's generation stands by. Raises ChangeRefused."""
        processes, number = self._processes, serving.number + 1
        processes.standbys.forget_failures()
        processes.target = target
        self._seams.build_now()
        while True:  # a standby that takes too long fails
            await asyncio.sleep(_POLL_S)
            if self._seams.serving() is not serving:
                raise ChangeRefused(409, FAULT_FIRST)
            ready, failure = processes.standbys.progress(number, target.weights)
            if failure:
                raise ChangeRefused(503, f"the new generation could not be built: {failure}")
            if ready:
                break
        try:
            complete = await in_thread(processes.anchors.holds_planned, number)
        except AnchorError as error:
            raise ChangeRefused(503, str(error)) from None
        if not complete:
            raise ChangeRefused(409, "an anchor died while the new generation was built")

    async def _carry_out(self, serving: Generation, target: Target, done: "asyncio.Future[int]") -> None:
        """Let the target's generation take over, wait for what comes of it, and end the anchors without use then.

        From here on nothing can be called back, whether a client waits for it or not.
        """
        try:
            if self._built_ahead:
                await self._let_leave(serving)
            if not self._seams.take_over(target, _reason(target)):
                return _fail(done, FAULT_FIRST)
            new = await self._next_serving(serving, done)
            self._processes.target = None
            if new.weights == target.weights:
                self._processes.anchors.planned = None
            devices = set(new.ownership.devices)
            self.drained = (self.drained | set(target.leaving)) - devices
            unused = {*target.joining, *target.leaving} - devices
            await in_thread(self._processes.anchors.end, unused, new.number)
            if new.weights == target.weights and not done.done():
                done.set_result(new.number)
            else:
                _fail(done, f"a fault came in between: devices {sorted(devices)} serve, as generation {new.number}")
        finally:
            self._end()
            _fail(done, "the change has failed: the server's log says why", 503)

    async def _next_serving(self, serving: Generation, done: "asyncio.Future[int]") -> Generation:
        """Wait for the generation after ``serving``; if the server gives up first, whoever waits for it is told."""
        while True:
            await asyncio.sleep(_POLL_S)
            new = self._seams.serving()
            if new is not None and new is not serving:
                return new
            if self._seams.is_down():
                _fail(done, "the server is down: its status says why", 503)

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
        self._busy, self._target, self._processes.target = False, None, None
        self._seams.build_now()


def _fail(done: "asyncio.Future[int]", text: str, code: int = 409) -> None:
    """Make a change fail, unless it is known already what became of it."""
    if not done.done():
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
