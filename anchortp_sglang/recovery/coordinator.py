"""Coordinates recoveries: feeds events to the state machine, and carries out what it decides.

It lives in main, on TokenizerManager's event loop, because it needs its request state. Blocking work (forks, anchors,
waiting for ranks) runs in a worker thread.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.launch import AnchorStartError
from anchortp_sglang.option_values import AVAILABLE
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.recovery import state_machine
from anchortp_sglang.recovery.detection import Detection
from anchortp_sglang.recovery.graphs import GraphCapture
from anchortp_sglang.recovery.housekeeping import Housekeeping
from anchortp_sglang.recovery.next_generation import NextGeneration, Unrecoverable
from anchortp_sglang.recovery.policy import Policy
from anchortp_sglang.recovery.processes.generation import Generation, StartFailed, last_words
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.target import Target
from anchortp_sglang.recovery.processes.zygote import ZygoteError
from anchortp_sglang.recovery.reconfiguration import Reconfiguration, Seams
from anchortp_sglang.recovery.rejoin import take_back_lost
from anchortp_sglang.recovery.report.kv_usage import KVUsage
from anchortp_sglang.recovery.report.progress import RecoveryProgress
from anchortp_sglang.recovery.report.record import Recoveries
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.recovery.requests.culprits import Culprits
from anchortp_sglang.recovery.requests.evidence import evidence
from anchortp_sglang.recovery.requests.fence import FenceLine
from anchortp_sglang.recovery.requests.inflight import InflightRequests, TokenCountMismatch
from anchortp_sglang.recovery.state_machine import Action, Event, EventKind, Phase
from anchortp_sglang.recovery.steps import Attempt, Steps
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_ANOTHER_FAULT = (StartFailed, AnchorError, AnchorStartError, ZygoteError, OSError)
"""Errors of a recovery step that mean another process died meanwhile: plan again from what is left."""


_LEFT_END_AFTER_S = 0.5


class Coordinator:
    """Leads a server through its recoveries; there is one per server. ``copies``: those of its adapters' files."""

    def __init__(self, processes: ServerProcesses, ownership: Ownership, policy: Policy, copies: AdapterCopies) -> None:
        self._copies = copies
        self.processes = processes
        self.configured = ownership
        self.policy = policy
        self.state = state_machine.State()
        self.recoveries = Recoveries()
        self.culprits = Culprits(policy.deadline_s)
        self.inflight: InflightRequests | None = None
        widths = None if policy.widths is None else dict(zip(ownership.devices, policy.widths, strict=True))
        self._next = NextGeneration(processes, ownership, policy.min_devices, widths)
        self._progress = RecoveryProgress(
            self.recoveries, lambda: self._serving() is not None, self._awaited, self._spawn
        )
        self._detection = Detection(processes, policy.hang_timeout_s, self._serving, self._fault, self._spawn)
        self._housekeeping = Housekeeping(processes, policy.standby, self._serving)
        self._devices = processes.plan.platform.watch(self._fault)
        self._graphs = GraphCapture(processes.plan.graph_batch_sizes, self._serving, self._idle, self._send)
        self._steps = Steps(processes, self._next, self._devices)
        self.reconfiguration = Reconfiguration(
            processes,
            self._next,
            ownership.devices,
            policy.standby == "warm",
            Seams(
                self._serving,
                lambda: self.state.phase in (Phase.DOWN, Phase.STOPPED),
                self._housekeeping.look_now,
                self._send,
                self._take_over,
                self._spawn,
                self._devices,
            ),
        )
        self._tm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fence_line: FenceLine | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def generation(self) -> Generation | None:
        """The current generation, from its fork on."""
        return self._steps.generation

    @property
    def kv_usage(self) -> KVUsage | None:
        """KV usage of the last generation that became ready."""
        return None if self._steps.ready is None else self._steps.ready.kv_usage

    @property
    def not_started(self) -> Mapping[int, str]:
        """Why devices could not be started with the server."""
        return self._next.not_started

    @property
    def paused(self) -> bool:
        """Whether an operator has paused the server (``/pause_generation``)."""
        return self._tm is not None and bool(self._tm.is_pause)

    # ---- the first generation (no event loop yet)

    def start_first(self) -> None:
        """Start anchors, segments and ranks of the first devices. Does not wait for the ranks."""
        devices = self.policy.start_devices
        if devices is not None and devices != AVAILABLE:
            self.reconfiguration.drained = set(self.configured.devices).difference(devices)
        self._steps.start_first(devices)

    def wait_first(self, timeout_s: float) -> list[dict[str, Any]]:
        """Wait for the first generation; return the schedulers' info. Raises StartFailed."""
        return self._steps.wait_first(timeout_s)

    # ---- on TokenizerManager's loop

    def attach(self, tokenizer_manager: Any) -> None:
        """Take over TokenizerManager's traffic and watch the processes; call on its running loop."""
        assert self.generation is not None
        self._tm, self._loop = tokenizer_manager, tokenizer_manager.event_loop
        self._fence_line = FenceLine(tokenizer_manager, self.processes.port_args.detokenizer_ipc_name)
        self.inflight = InflightRequests(tokenizer_manager, tokenizer_manager.send_to_scheduler.send, self._copies)
        self.inflight.continued.reseed = self._fence_line.reseed
        tokenizer_manager.is_pause_cond = self.inflight.gate
        self.inflight.replay(self.generation.number)
        self._detection.begin(tokenizer_manager.event_loop)
        self._spawn(self._fence_line.watch(self.processes, lambda: self._serving() is not None))
        self._spawn(self._devices.watch())
        if self.policy.rejoin == "auto":
            self._spawn(take_back_lost(self.reconfiguration))
        self._watch_over(self.generation)

    def on_tokens(self, tokens: int) -> None:
        """Note that new tokens go to clients."""
        self._progress.on_tokens(tokens)
        if self.state.fruitless:
            self._advance(Event(EventKind.TOKENS, "clients are served"))

    def on_mismatch(self, error: TokenCountMismatch) -> None:
        """Treat a batch that contradicts what clients have as a fault: nothing of this generation can be trusted."""
        log.error("anchortp: %s", error)
        self._fault(str(error))

    def stop(self) -> None:
        """End recoveries, as the operator ends the server: deaths are no longer faults."""
        self._advance(Event(EventKind.STOP, "the server is being shut down"))

    def shut_down(self) -> None:
        """End every process and free all memory. Needs no event loop."""
        self.stop()
        self.processes.shut_down(self._next.number)
        self._copies.close()

    # ---- callbacks of the other parts

    def _serving(self) -> Generation | None:
        return self.generation if self.state.phase is Phase.SERVING else None

    def _idle(self) -> bool:
        return not self._tm.rid_to_state

    def _awaited(self) -> bool:
        return not self._idle() and not self.paused

    def _send(self, message: Any) -> None:
        assert self.inflight is not None
        self.inflight.send(message)

    def _fault(self, reason: str) -> None:
        if self._tm.gracefully_exit and self._idle():
            self.stop()  # SGLang has asked its schedulers to leave
        if not self._awaited():
            self._advance(Event(EventKind.TOKENS, "no client waits for a token"))
        self._advance(Event(EventKind.FAULT, reason))

    def _take_over(self, target: Target, reason: str) -> bool:
        """Let a planned generation take the place of the serving one; return False if none serves."""
        if self.state.phase is not Phase.SERVING:
            return False
        self._next.target = target
        self._advance(Event(EventKind.CHANGE, reason))
        return True

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
        elif action is Action.RESUME:
            assert self.generation is not None
            self._watch_over(self.generation)
            self._spawn(self._end_left())
            self._spawn(self._end_lost(self.generation))
            self._spawn(self._housekeeping.seal_and_free(self.generation))
            self._progress.resumed()
        elif action is Action.GIVE_UP:
            self._give_up(reason)
        if action in (Action.FENCE, Action.START, Action.REPLAY):
            self._carry_out(action)

    def _watch_over(self, generation: Generation) -> None:
        """Begin to watch a generation that serves from now on, and check its helpers."""
        self._detection.watch(generation)
        self._spawn(self._housekeeping.check_helpers(generation))
        self._spawn(self._graphs.capture(generation))

    def _begin(self, before: state_machine.State, reason: str) -> None:
        """Stop what is left of the current generation, in response to a fault."""
        generation = self.generation
        assert self.inflight is not None and generation is not None
        self.inflight.outage = True
        planned = before.phase is Phase.SERVING and self._next.target is not None
        if not planned:
            self._graphs.on_fault(generation)
            generation.left = False  # it may not have left in full, or its successor needs its memory
        if before.phase in (Phase.SERVING, Phase.DOWN):
            self._progress.begin()
            self._spawn(self._expire(self.state.deadline_at or 0.0))
        recovery = self._progress.recovery
        assert recovery is not None
        recovery.reason = reason
        recovery.stage("detected")
        generation.note_deaths()
        if before.phase is Phase.SERVING and not planned and not self.paused:  # else nobody's request was computed
            self._find_culprits(generation, reason)
        if not generation.left:
            generation.kill()

    def _find_culprits(self, generation: Generation, reason: str) -> None:
        """End requests that ranks cannot serve; end all of them if no recovery gets any client a token."""
        assert self.inflight is not None and self._progress.recovery is not None
        found = evidence(last_words(generation), generation.hung_since, reason)
        self._progress.recovery.exception = found.text if found.kind == "exception" else ""
        starting = self._tm.server_status.value == "Starting"
        if self.culprits.judge(found, self.inflight, self.state, time.monotonic(), starting):
            self._advance(Event(EventKind.TOKENS, "no client waits for a token"))

    def _carry_out(self, action: Action) -> None:
        """Take the step for an action, and report to the state machine how it went."""
        step, done = self._step(action)
        attempt = self.state.attempt

        async def report() -> None:
            try:
                event = Event(done, await step)
            except _ANOTHER_FAULT as error:
                event = Event(EventKind.ABORTED, f"{type(error).__name__}: {error}", failure=getattr(error, "own", ""))
            except Exception as error:
                if not isinstance(error, Unrecoverable):
                    log.exception("anchortp: a recovery step failed")
                event = Event(EventKind.FAILED, str(error), final=isinstance(error, Unrecoverable))
            self._advance(replace(event, attempt=attempt))

        self._spawn(report())

    def _step(self, action: Action) -> tuple[Awaitable[str], EventKind]:
        """Begin the step of an action; also return the event that ends it."""
        recovery, inflight, line = self._progress.recovery, self.inflight, self._fence_line
        assert recovery is not None and inflight is not None and line is not None
        if action is Action.FENCE:
            return self._steps.fence(recovery, line, inflight), EventKind.FENCED
        if action is Action.START:
            return self._steps.start(recovery, inflight, self._attempt()), EventKind.STARTED
        self._tm.max_req_input_len = self._steps.scheduler_info["max_req_input_len"]
        return self._steps.replay(recovery, inflight, self._attempt()), EventKind.REPLAYED

    def _attempt(self) -> Attempt:
        state = self.state
        assert state.deadline_at is not None

        def is_current() -> bool:
            return (self.state.phase, self.state.attempt) == (state.phase, state.attempt)

        return Attempt(state_machine.back_off_s(state), state.deadline_at, is_current)

    async def _expire(self, deadline_at: float) -> None:
        await asyncio.sleep(deadline_at - time.monotonic())
        if self.state.deadline_at == deadline_at:
            self._advance(Event(EventKind.DEADLINE, f"not recovered within {self.policy.deadline_s:g} s"))

    def _give_up(self, reason: str) -> None:
        assert self.inflight is not None
        if self.generation is not None:
            self.generation.kill()
        self.processes.standbys.end(self._next.number)
        self._next.target = None
        ended = self.inflight.give_up(f"The server cannot recover: {reason}")
        self.culprits.ended["given_up"] += ended
        self._progress.give_up(reason)
        log.error("anchortp: down: %s; %d open requests ended with an error", reason, ended)
        if not self.state.final:
            self._spawn(self._retry_later(state_machine.retry_after_s(self.state)))

    async def _retry_later(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._advance(Event(EventKind.RETRY, f"trying again after {delay_s:g} s"))

    async def _end_left(self) -> None:
        await asyncio.sleep(_LEFT_END_AFTER_S)  # clients have their next tokens by then
        await self._steps.end_left()

    async def _end_lost(self, generation: Generation) -> None:
        """End anchors of devices that their driver has reported as lost: nobody could reset a device in use."""
        anchors = self.processes.anchors
        lost = [d for d in self._devices.errors if d not in generation.ownership.devices and anchors.alive(d)]
        if lost:
            await in_thread(anchors.end, lost, generation.number)

    # ---- plumbing

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
