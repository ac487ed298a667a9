"""Carries out the steps of a recovery: fence the old generation, start the next one, replay open requests.

Each step returns why the state machine can go on, and raises the error that cut it short.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anchortp_sglang import start_log
from anchortp_sglang.option_values import StartDevices
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.platforms.base import DeviceWatch
from anchortp_sglang.recovery.next_generation import NextGeneration, Unrecoverable
from anchortp_sglang.recovery.processes.generation import Generation, KVUnusable, wait_dead, wait_ready
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.stall import StallWatch
from anchortp_sglang.recovery.report.record import Recovery
from anchortp_sglang.recovery.requests.fence import FenceLine
from anchortp_sglang.recovery.requests.inflight import InflightRequests
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_STALL_S = 2.0
_LOOK_EVERY_S = 0.5
"""Interval at which helpers are checked while a start may wait for a stopped one."""


@dataclass(frozen=True)
class Attempt:
    """The attempt that a step belongs to. ``deadline_at``: monotonic seconds.

    ``is_current`` returns whether the state machine still waits for this step.
    """

    back_off_s: float
    deadline_at: float
    is_current: Callable[[], bool]

    def check(self) -> None:
        """Raise Unrecoverable if the attempt was abandoned; the event of such a step is ignored."""
        if not self.is_current():
            raise Unrecoverable("the attempt was abandoned")


class Steps:
    """Holds the current generation and takes the steps to the next one; on the event loop, except for the first.

    ``generation``: the current one, from its fork on. ``ready``: the last one whose ranks were all ready.
    ``scheduler_info``: info from SGLang's scheduler of rank 0; SGLang keeps this very object, for /server_info.
    """

    def __init__(self, processes: ServerProcesses, next_generation: NextGeneration, devices: DeviceWatch) -> None:
        self.generation: Generation | None = None
        self.ready: Generation | None = None
        self.scheduler_info: dict[str, Any] = {}
        self._processes = processes
        self._next = next_generation
        self._devices = devices
        self._forking: asyncio.Future[Generation] | None = None
        self._left: list[Generation] = []

    def start_first(self, devices: StartDevices) -> None:
        """Start anchors and ranks of the configured ownership, or of some devices. Does not wait for the ranks."""
        self.generation = self._next.first(devices)

    def wait_first(self, timeout_s: float) -> list[dict[str, Any]]:
        """Wait for the first generation; return the schedulers' info. Raises StartFailed."""
        generation = self.generation
        assert generation is not None
        wait_ready(generation, timeout_s)
        self._on_ready(generation)
        self._processes.anchors.seal_and_free(generation)
        start_log.step("ranks are ready")
        return [self.scheduler_info, *(info["scheduler"] for info in generation.infos[1:])]

    async def fence(self, recovery: Recovery, line: FenceLine, inflight: InflightRequests) -> str:
        """Reap the killed ranks, unless they have left; then drain what rank 0 has sent."""
        if self._forking is not None:
            await asyncio.wait([self._forking])  # of an abandoned attempt: its ranks are killed, too
        generation = self.generation
        assert generation is not None
        await self.end_left()
        dead = asyncio.sleep(0) if generation.left else in_thread(wait_dead, generation)
        await asyncio.gather(dead, self._devices.probe())
        recovery.stage("reaped")
        await line.drain(generation.number, self._processes, inflight)
        recovery.stage("fenced")
        return f"the old generation {'has left' if generation.left else 'is dead'}, and is drained"

    async def start(self, recovery: Recovery, inflight: InflightRequests, attempt: Attempt) -> str:
        """Make the verdict and the plan, fork, and wait until the new ranks are ready."""
        old = self.generation
        assert old is not None
        await asyncio.sleep(attempt.back_off_s)
        attempt.check()
        verdict = self._next.judge(old, self._devices.errors, recovery.reason)
        recovery.take_verdict(verdict)
        log.info("anchortp: verdict: %s: %s", verdict.cause, recovery.reason)
        ownership = self._next.plan(verdict.lost)
        recovery.generation = self._next.number
        recovery.stage("planned")
        running = self._next.running_hashes(ownership, inflight.open_tokens())
        awake = asyncio.create_task(self._keep_helpers_awake())
        try:
            new = await self._begin(old, ownership, running, recovery, attempt)
        finally:
            awake.cancel()
        await in_thread(self._on_ready, new)
        recovery.add_ranks(new.infos)
        return "all ranks are ready"

    async def _begin(
        self, old: Generation, ownership: Ownership, running: bytes, recovery: Recovery, attempt: Attempt
    ) -> Generation:
        """Fork the next generation in place of ``old``, and wait until its ranks are ready."""
        self._forking = asyncio.ensure_future(in_thread(self._next.fork, ownership, running, old))
        new = await self._forking
        if old.left:
            self._left.append(old)
        else:
            old.close()
        self.generation = new
        recovery.stage("forked")
        try:
            attempt.check()
        except Unrecoverable:
            new.kill()  # abandoned while the fork was under way
            raise
        try:
            await in_thread(wait_ready, new, attempt.deadline_at - time.monotonic(), StallWatch(_STALL_S))
        except KVUnusable:
            self._next.kv_valid = False
            raise
        return new

    async def _keep_helpers_awake(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await in_thread(self._processes.resume_stopped)

    async def end_left(self) -> None:
        """Kill and reap the ranks of generations that have left."""
        while self._left:
            old = self._left.pop()
            old.kill()
            await in_thread(wait_dead, old)
            old.close()

    async def replay(self, recovery: Recovery, inflight: InflightRequests, attempt: Attempt) -> str:
        """Send the open requests to the new ranks."""
        generation = self.generation
        assert generation is not None
        attempt.check()
        recovery.requests_replayed = inflight.replay(generation.number)
        recovery.tokens = generation.tokens_reused
        recovery.stage("replayed")
        return f"{recovery.requests_replayed} requests resumed"

    def _on_ready(self, generation: Generation) -> None:
        anchors = self._processes.anchors
        self._next.on_generation_ready(generation)
        if generation.control is None:
            generation.control = anchors.map_control(generation.number)
        generation.kv_usage = anchors.open_kv_usage(generation)
        if self.ready is not None:
            self.ready.kv_usage = None  # its mappings end now, and not when Python looks for garbage
        self.ready = generation
        self.scheduler_info.update(generation.infos[0]["scheduler"])
