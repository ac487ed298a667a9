"""The recovery coordinator: carries out what the state machine decides.

It lives in main, on TokenizerManager's event loop, because it needs its request state. What blocks (forks, anchors,
waiting for ranks) runs in a worker thread.
"""

import asyncio
import logging
import mmap
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from anchortp_sglang import start_log
from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.launch import AnchorStartError
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.rank import heartbeat
from anchortp_sglang.rank.messages import CaptureGraphs
from anchortp_sglang.recovery import state_machine
from anchortp_sglang.recovery.detection import Detection
from anchortp_sglang.recovery.graphs import GraphCapture
from anchortp_sglang.recovery.housekeeping import Housekeeping
from anchortp_sglang.recovery.next_generation import NextGeneration, Unrecoverable
from anchortp_sglang.recovery.processes.generation import (
    Generation,
    KVUnusable,
    StartFailed,
    last_words,
    wait_dead,
    wait_ready,
)
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.stall import StallWatch
from anchortp_sglang.recovery.processes.zygote import ZygoteError
from anchortp_sglang.recovery.report.kv_usage import KVUsage
from anchortp_sglang.recovery.report.progress import RecoveryProgress
from anchortp_sglang.recovery.report.record import Recoveries, Recovery
from anchortp_sglang.recovery.requests.culprits import Culprits
from anchortp_sglang.recovery.requests.evidence import evidence
from anchortp_sglang.recovery.requests.fence import FenceLine
from anchortp_sglang.recovery.requests.inflight import InflightRequests, TokenCountMismatch
from anchortp_sglang.recovery.state_machine import Action, Event, EventKind, Phase
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_STALL_S = 2.0

_ANOTHER_FAULT = (StartFailed, AnchorError, AnchorStartError, ZygoteError, OSError)
"""What a recovery step raises when something died meanwhile: it is planned again from what is left."""


@dataclass(frozen=True)
class Policy:
    """The part of AnchorOptions that decides about recoveries; durations in seconds."""

    min_devices: int
    hang_timeout_s: float
    deadline_s: float
    spare_ranks: bool


class Coordinator:
    """One per server."""

    def __init__(self, processes: ServerProcesses, ownership: Ownership, policy: Policy) -> None:
        self.processes = processes
        self.configured = ownership
        self.policy = policy
        self.state = state_machine.State()
        self.recoveries = Recoveries()
        self.culprits = Culprits(policy.deadline_s)
        self.inflight: InflightRequests | None = None
        self.generation: Generation | None = None
        self.kv_usage: KVUsage | None = None
        """Of the last generation that was ready."""
        self.scheduler_info: dict[str, Any] = {}
        """What SGLang's scheduler of rank 0 says of itself; SGLang keeps this very object, for /server_info."""
        self._next = NextGeneration(processes, ownership, policy.min_devices)
        self._progress = RecoveryProgress(
            self.recoveries, lambda: self._serving() is not None, lambda: bool(self._tm.rid_to_state), self._spawn
        )
        self._detection = Detection(processes, policy.hang_timeout_s, self._serving, self._fault, self._spawn)
        self._housekeeping = Housekeeping(processes, policy.spare_ranks, self._serving)
        self._devices = processes.plan.platform.watch(self._fault)
        self._graphs = GraphCapture(processes.plan.graph_batch_sizes, self._serving, self._graphs_captured)
        self._tm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fence_line: FenceLine | None = None
        self._forking: asyncio.Future[Generation] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- the first generation (no event loop yet)

    def start_first(self) -> None:
        """Anchors, segments and ranks of the configured ownership. Does not wait for the ranks."""
        self.generation = self._next.first()

    def wait_first(self, timeout_s: float) -> list[dict[str, Any]]:
        """Until the first generation is ready; what its schedulers say of themselves. Raises StartFailed."""
        assert self.generation is not None
        wait_ready(self.generation, timeout_s)
        self._take_stock(self.generation)
        self.processes.anchors.seal_and_free(self.generation)
        start_log.step("ranks are ready")
        return [self.scheduler_info, *(info["scheduler"] for info in self.generation.infos[1:])]

    # ---- on TokenizerManager's loop

    def attach(self, tokenizer_manager: Any) -> None:
        """Take over TokenizerManager's traffic and watch the processes; call on its running loop."""
        assert self.generation is not None
        self._tm, self._loop = tokenizer_manager, tokenizer_manager.event_loop
        self._fence_line = FenceLine(tokenizer_manager, self.processes.port_args.detokenizer_ipc_name)
        self.inflight = InflightRequests(tokenizer_manager, tokenizer_manager.send_to_scheduler.send)
        self.inflight.replay(self.generation.number)
        self._detection.begin(tokenizer_manager.event_loop)
        self._detection.watch(self.generation)
        self._spawn(self._fence_line.watch(self.processes, lambda: self._serving() is not None))
        self._spawn(self._devices.watch())
        self._spawn(self._capture_graphs(self.generation))
        self._spawn(self._housekeeping.look_after_helpers(self.generation))

    def on_tokens(self, tokens: int) -> None:
        """New tokens go to clients."""
        self._progress.on_tokens(tokens)
        if self.state.fruitless:
            self._advance(Event(EventKind.TOKENS, "clients are served"))

    def on_mismatch(self, error: TokenCountMismatch) -> None:
        """A batch contradicts what clients have: nothing of this generation can be trusted."""
        log.error("anchortp: %s", error)
        self._fault(str(error))

    def tokens_reused(self) -> tuple[int, int] | None:
        """(reused, recomputed) tokens of the requests that this generation resumed so far."""
        control = self._control()
        return None if control is None else heartbeat.read_tokens(control)

    def _graphs_captured(self) -> bool:
        control = self._control()
        return control is not None and heartbeat.read_graphs(control)

    def _control(self) -> mmap.mmap | None:
        return None if self.generation is None else self._detection.control.get(self.generation.number)

    def stop(self) -> None:
        """The operator ends the server: deaths are no faults any more."""
        self._advance(Event(EventKind.STOP, "the server is being shut down"))

    def shut_down(self) -> None:
        """End every process and free all memory. Needs no event loop."""
        self.stop()
        self.processes.shut_down(self._next.number)

    # ---- detection

    def _serving(self) -> Generation | None:
        return self.generation if self.state.phase is Phase.SERVING else None

    def _fault(self, reason: str) -> None:
        if self._tm.gracefully_exit and not self._tm.rid_to_state:
            self.stop()  # SGLang has asked its schedulers to leave
        if not self._tm.rid_to_state:
            self._advance(Event(EventKind.TOKENS, "nobody waits for any"))
        self._advance(Event(EventKind.FAULT, reason))

    # ---- the machine's shell

    def _advance(self, event: Event) -> None:
        before = self.state
        self.state, action, reason = state_machine.step(before, event, time.monotonic(), self.policy.deadline_s)
        if action is not Action.NOTHING:
            log.info("anchortp: %s -> %s (%s)", before.phase, self.state.phase, reason)
        if self.state.phase is not Phase.SERVING:
            self._detection.stop_watching()
        if action is Action.FENCE:
            self._begin(before, reason)
            self._carry_out(self._fence())
        elif action is Action.START:
            self._carry_out(self._start())
        elif action is Action.REPLAY:
            self._carry_out(self._replay())
        elif action is Action.RESUME:
            assert self.generation is not None
            self._detection.watch(self.generation)
            self._spawn(self._housekeeping.settle(self.generation))
            self._spawn(self._housekeeping.look_after_helpers(self.generation))
            self._spawn(self._capture_graphs(self.generation))
            self._progress.resumed()
        elif action is Action.GIVE_UP:
            self._give_up(reason)

    def _begin(self, before: state_machine.State, reason: str) -> None:
        assert self.inflight is not None and self.generation is not None
        self.inflight.outage = True
        self._graphs.on_fault()
        if before.phase in (Phase.SERVING, Phase.DOWN):
            self._progress.begin()
            self._spawn(self._expire(self.state.deadline_at or 0.0))
        recovery = self._progress.recovery
        assert recovery is not None
        recovery.reason = reason
        recovery.stage("detected")
        self._detection.died.update(self.generation.dead())
        if before.phase is Phase.SERVING:
            self._find_culprits(reason)
        self.generation.kill()

    def _find_culprits(self, reason: str) -> None:
        """End requests that ranks cannot serve; and all, if no recovery gets anybody a token any more."""
        assert self.inflight is not None and self.generation is not None and self._progress.recovery is not None
        found = evidence(last_words(self.generation, self._detection.died), self._detection.hung_since, reason)
        self._progress.recovery.exception = found.text if found.kind == "exception" else ""
        starting = self._tm.server_status.value == "Starting"
        if self.culprits.judge(found, self.inflight, self.state, time.monotonic(), starting):
            self._advance(Event(EventKind.TOKENS, "nobody waits for any"))

    def _carry_out(self, work: Awaitable[Event]) -> None:
        attempt = self.state.attempt

        async def report() -> None:
            try:
                event = await work
            except _ANOTHER_FAULT as error:
                event = Event(EventKind.ABORTED, f"{type(error).__name__}: {error}", failure=getattr(error, "own", ""))
            except Exception as error:
                if not isinstance(error, Unrecoverable):
                    log.exception("anchortp: a recovery step failed")
                event = Event(EventKind.FAILED, str(error), final=isinstance(error, Unrecoverable))
            self._advance(replace(event, attempt=attempt))

        self._spawn(report())

    async def _expire(self, deadline_at: float) -> None:
        await asyncio.sleep(deadline_at - time.monotonic())
        if self.state.deadline_at == deadline_at:
            self._advance(Event(EventKind.DEADLINE, f"not recovered within {self.policy.deadline_s:g} s"))

    # ---- actions

    async def _fence(self) -> Event:
        """Reap the killed ranks, then drain what rank 0 still said."""
        if self._forking is not None:
            await asyncio.wait([self._forking])  # of an attempt that is given up: its ranks are killed, too
        generation, recovery = self.generation, self._progress.recovery
        assert generation is not None and recovery is not None
        await asyncio.gather(in_thread(wait_dead, generation), self._devices.probe())
        recovery.stage("reaped")
        assert self._fence_line is not None and self.inflight is not None
        await self._fence_line.drain(generation.number, self.processes, self.inflight)
        recovery.stage("fenced")
        return Event(EventKind.FENCED, "the old generation is dead and drained")

    async def _start(self) -> Event:
        """Verdict, plan, fork, and wait until the new ranks are ready."""
        old, recovery, attempt = self.generation, self._progress.recovery, self.state.attempt
        assert old is not None and recovery is not None
        await asyncio.sleep(state_machine.back_off_s(self.state))
        self._stay_if_current(attempt)
        ownership = self._next.plan(self._judge(old, recovery).lost)
        recovery.generation = self._next.number
        recovery.stage("planned")
        assert self.inflight is not None
        running = self._next.kept_first(ownership, self.inflight.open_tokens())
        self._forking = asyncio.ensure_future(in_thread(self._next.fork, ownership, running))
        new = await self._forking
        old.close()
        self.generation = new
        self._detection.reset(new)
        recovery.stage("forked")
        try:
            self._stay_if_current(attempt)
        except Unrecoverable:
            new.kill()  # given up while the fork was under way
            raise
        assert self.state.deadline_at is not None
        try:
            left_s = self.state.deadline_at - time.monotonic()
            await in_thread(wait_ready, new, left_s, StallWatch(_STALL_S))
        except KVUnusable:
            self._next.kv_valid = False
            raise
        await in_thread(self._take_stock, new)
        recovery.add_ranks(new.infos)
        return Event(EventKind.STARTED, "all ranks are ready")

    def _stay_if_current(self, attempt: int) -> None:
        if self.state.phase is not Phase.STARTING or self.state.attempt != attempt:
            raise Unrecoverable("abandoned")

    def _judge(self, generation: Generation, recovery: Recovery) -> state_machine.Verdict:
        verdict = self._next.judge(generation, self._detection, self._devices.errors, recovery.reason)
        recovery.cause, recovery.device, recovery.reason = verdict.cause, verdict.device, verdict.reason
        if recovery.exception:
            recovery.reason += f"; it failed with {recovery.exception}"
        recovery.lost = sorted({*recovery.lost, *verdict.lost})
        log.info("anchortp: verdict: %s: %s", verdict.cause, recovery.reason)
        return verdict

    def _take_stock(self, generation: Generation) -> None:
        self._next.on_generation_ready(generation)
        self._detection.control[generation.number] = self.processes.anchors.map_control(generation.number)
        self.kv_usage = self.processes.anchors.open_kv_usage(generation)
        self.scheduler_info.update(generation.infos[0]["scheduler"])

    async def _capture_graphs(self, generation: Generation) -> None:
        def idle() -> bool:
            return not self._tm.rid_to_state

        def send(sizes: list[int]) -> None:
            assert self.inflight is not None
            self.inflight.send(CaptureGraphs(batch_sizes=sizes))

        await self._graphs.capture(generation, idle, send)

    async def _replay(self) -> Event:
        generation, recovery = self.generation, self._progress.recovery
        assert generation is not None and recovery is not None and self.inflight is not None
        if self.state.phase is not Phase.REPLAYING:
            raise Unrecoverable("abandoned")
        self._tm.max_req_input_len = self.scheduler_info["max_req_input_len"]
        recovery.requests_replayed = self.inflight.replay(generation.number)
        recovery.tokens = self.tokens_reused
        recovery.stage("replayed")
        return Event(EventKind.REPLAYED, f"{recovery.requests_replayed} requests resumed")

    def _give_up(self, reason: str) -> None:
        assert self.inflight is not None
        if self.generation is not None:
            self.generation.kill()
        ended = self.inflight.give_up(f"The server cannot recover: {reason}")
        self.culprits.ended["given_up"] += ended
        if self._progress.recovery is not None:
            self._progress.recovery.failed = reason
            self._progress.recovery.stage("gave_up")
            self._progress.finish()
        log.error("anchortp: down: %s; %d open requests ended with an error", reason, ended)
        if not self.state.final:
            self._spawn(self._retry_later(state_machine.retry_after_s(self.state)))

    async def _retry_later(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._advance(Event(EventKind.RETRY, f"trying again after {delay_s:g} s"))

    # ---- plumbing

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
