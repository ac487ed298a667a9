"""The recovery coordinator: watches processes, carries out what the state machine decides.

It lives in main, on TokenizerManager's event loop, because it needs its request state. What blocks (forks, anchors,
waiting for ranks) runs in a worker thread.
"""

import asyncio
import logging
import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import zmq

from anchortp_sglang.elastic.attachment import HOST_DEVICE, lanes_segment
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.planning.ownership import InvalidOwnership, Ownership, adopt
from anchortp_sglang.recovery import heartbeat, machine
from anchortp_sglang.recovery.cluster import Cluster, Generation, StartFailed, is_dead
from anchortp_sglang.recovery.ledger import Ledger, TokenCountMismatch
from anchortp_sglang.recovery.machine import Action, Event, EventKind, Phase
from anchortp_sglang.recovery.record import Recoveries, Recovery
from anchortp_sglang.recovery.wire import Fence

log = logging.getLogger(__name__)

_FENCE_TIMEOUT_S = 5.0
_HANG_POLL_S = 0.5


class Unrecoverable(RuntimeError):
    """No new generation is possible; the text says why."""


class Coordinator:
    """One per server. ``min_devices``, ``hang_timeout_s`` and ``deadline_s`` as in AnchorOptions."""

    def __init__(
        self,
        cluster: Cluster,
        ownership: Ownership,
        *,
        min_devices: int,
        hang_timeout_s: float,
        deadline_s: float,
        spare_ranks: bool,
    ) -> None:
        self.cluster = cluster
        self.configured = ownership
        self.state = machine.State()
        self.recoveries = Recoveries()
        self.ledger: Ledger | None = None
        self.generation: Generation | None = None
        self._min_devices = min_devices
        self._hang_timeout_s = hang_timeout_s
        self._deadline_s = deadline_s
        self._spare_ranks = spare_ranks
        self._held: Ownership | None = None  # whose complete weights the anchors hold
        self._kv_valid = False  # whether the held ownership's KV and page table can be taken over
        self._number = 0
        self._recovery: Recovery | None = None
        self._first_died: set[int] = set()
        self._hung: set[int] = set()
        self._tm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fence_push: zmq.Socket[bytes] | None = None
        self._fence_seen: asyncio.Future[Fence] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: list[int] = []

    # ---- the first generation (no event loop yet)

    def start_first(self) -> None:
        """Anchors, segments and ranks of the configured ownership. Does not wait for the ranks."""
        ownership = self.configured
        self.cluster.start_anchors(ownership.devices)
        self.cluster.fence(0, ownership.devices)
        self.cluster.allocate(0, ownership)
        self.generation = self.cluster.start_ranks(0, ownership, None, restore_prefixes=False)

    def wait_first(self, timeout_s: float) -> list[dict[str, Any]]:
        """Until the first generation is ready; its ranks' infos. Raises StartFailed."""
        assert self.generation is not None
        self.cluster.wait_ready(self.generation, timeout_s)
        self.cluster.settle(self.generation)
        self._held, self._kv_valid = self.generation.ownership, True
        return self.generation.infos

    # ---- on TokenizerManager's loop

    def attach(self, tokenizer_manager: Any, send: Callable[[Any], None]) -> None:
        """Take over TokenizerManager's traffic and watch the ranks; call on its running loop."""
        from sglang.utils import TypeBasedDispatcher

        assert self.generation is not None
        self._tm, self._loop = tokenizer_manager, tokenizer_manager.event_loop
        self._tm._result_dispatcher += TypeBasedDispatcher([(Fence, self._on_fence)])
        self._fence_push = zmq.Context.instance().socket(zmq.PUSH)
        self._fence_push.connect(self.cluster.port_args.detokenizer_ipc_name)
        self.ledger = Ledger(tokenizer_manager, send)
        self.ledger.replay(0)
        self._watch()
        self._spawn(self._watch_for_hangs())
        self._refill()

    def on_token(self) -> None:
        """A new token goes to a client."""
        if self._recovery is not None and self.state.phase is Phase.SERVING:
            self._recovery.stage("first_token")
            self._recovery.tfs_s = self._recovery.stages[-1][1]
            self._recovery = None

    def on_mismatch(self, error: TokenCountMismatch) -> None:
        """A batch contradicts what clients have: nothing of this generation can be trusted."""
        log.error("anchortp: %s", error)
        self._fault(str(error))

    def stop(self) -> None:
        """The operator ends the server: deaths are no faults any more."""
        self._advance(Event(EventKind.STOP, "the server is being shut down"))

    def shut_down(self) -> None:
        """End every process and free all memory. Needs no event loop."""
        self.stop()
        self.cluster.shut_down(self._number)

    # ---- detection

    def _watch(self) -> None:
        assert self._loop is not None and self.generation is not None
        for index, child in enumerate(self.generation.ranks):
            self._watched.append(child.pidfd)
            self._loop.add_reader(child.pidfd, self._on_rank_death, self.generation, index)
        detokenizer = self.cluster.detokenizer
        assert detokenizer is not None
        self._watched.append(detokenizer.pidfd)
        self._loop.add_reader(detokenizer.pidfd, self._on_detokenizer_death)

    def _unwatch(self) -> None:
        assert self._loop is not None
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self._watched.clear()

    def _on_rank_death(self, generation: Generation, index: int) -> None:
        if generation is self.generation and self.state.phase is not Phase.STOPPED:
            if self._tm.gracefully_exit and not self._tm.rid_to_state:
                self.stop()
                return
            self._first_died.update(generation.dead() or (index,))
            self._fault(f"the process of rank {index} died")

    def _on_detokenizer_death(self) -> None:
        if self.state.phase is not Phase.STOPPED:
            self._fault("the detokenizer died")

    def _fault(self, reason: str) -> None:
        self._unwatch()
        self._advance(Event(EventKind.FAULT, reason))

    async def _watch_for_hangs(self) -> None:
        """Ranks whose loop counter stands still for the timeout are hung; a stopped one stops its peers too."""
        seen: tuple[int, tuple[int, ...]] | None = None
        since = time.monotonic()
        lanes: tuple[int, mmap.mmap] | None = None
        while self.state.phase is not Phase.STOPPED:
            await asyncio.sleep(min(_HANG_POLL_S, self._hang_timeout_s / 4))
            generation = self.generation
            if self.state.phase is not Phase.SERVING or generation is None:
                seen = None
                continue
            if lanes is None or lanes[0] != generation.number:
                lanes = (generation.number, await self._in_thread(self._map_lanes, generation.number))
            beats = heartbeat.read(lanes[1], generation.ownership.tp_size)
            if seen != (generation.number, beats):
                seen, since = (generation.number, beats), time.monotonic()
            elif time.monotonic() - since > self._hang_timeout_s:
                self._hung = await self._in_thread(_stopped_ranks, generation)
                self._fault(f"no rank made progress for {self._hang_timeout_s:g} s")
                seen = None

    def _map_lanes(self, number: int) -> mmap.mmap:
        fd, nbytes, _ = self.cluster.client(HOST_DEVICE).open_handle(number, lanes_segment(number))
        try:
            return map_fd(fd, nbytes, writable=False)
        finally:
            os.close(fd)

    # ---- the machine's shell

    def _advance(self, event: Event) -> None:
        before = self.state
        self.state, action, reason = machine.step(before, event, time.monotonic(), self._deadline_s)
        if action is not Action.NOTHING:
            log.info("anchortp: %s -> %s (%s)", before.phase, self.state.phase, reason)
        if action is Action.FENCE:
            self._begin(before, reason)
            self._carry_out(self._fence())
        elif action is Action.START:
            self._carry_out(self._start())
        elif action is Action.REPLAY:
            self._carry_out(self._replay())
        elif action is Action.RESUME:
            self._refill()
        elif action is Action.GIVE_UP:
            self._give_up(reason)

    def _begin(self, before: machine.State, reason: str) -> None:
        assert self.ledger is not None and self.generation is not None
        self.ledger.outage = True
        if before.phase is Phase.SERVING:
            self._recovery = self.recoveries.begin()
            self._spawn(self._expire(self.state.deadline_at or 0.0))
        assert self._recovery is not None
        self._recovery.reason = reason
        self._recovery.stage("detected")
        self.generation.kill()

    def _carry_out(self, work: Any) -> None:
        attempt = self.state.attempt

        async def report() -> None:
            try:
                event = await work
            except (StartFailed, Unrecoverable) as error:
                kind = EventKind.FAULT if isinstance(error, StartFailed) else EventKind.FAILED
                event = Event(kind, str(error), attempt)
            except Exception as error:
                log.exception("anchortp: recovery step failed")
                event = Event(EventKind.FAILED, f"{type(error).__name__}: {error}", attempt)
            self._advance(Event(event.kind, event.reason, attempt))

        self._spawn(report())

    async def _expire(self, deadline_at: float) -> None:
        await asyncio.sleep(deadline_at - time.monotonic())
        if self.state.deadline_at == deadline_at:
            self._advance(Event(EventKind.DEADLINE, f"not recovered within {self._deadline_s:g} s"))

    # ---- actions

    async def _fence(self) -> Event:
        """Kill and reap the old ranks, then drain what rank 0 still said."""
        generation, recovery = self.generation, self._recovery
        assert generation is not None and recovery is not None
        await self._in_thread(_wait_dead, generation)
        recovery.stage("reaped")
        await self._drain(generation.number)
        recovery.stage("fenced")
        return Event(EventKind.FENCED, "the old generation is dead and drained")

    async def _drain(self, number: int) -> None:
        from sglang.srt.managers.io_struct import sock_send

        assert self._loop is not None and self._fence_push is not None and self.ledger is not None
        detokenizer = self.cluster.detokenizer
        if detokenizer is not None and is_dead(detokenizer.pidfd):
            await self._in_thread(self.cluster.restart_detokenizer, _FENCE_TIMEOUT_S)
            sock_send(self._fence_push, self.ledger.reseed())
        self._fence_seen = self._loop.create_future()
        sock_send(self._fence_push, Fence(generation=number))
        await asyncio.wait_for(self._fence_seen, _FENCE_TIMEOUT_S)

    def _on_fence(self, fence: Fence) -> None:
        seen, generation = self._fence_seen, self.generation
        if seen is None or seen.done() or generation is None or fence.generation != generation.number:
            return
        seen.set_result(fence)

    async def _start(self) -> Event:
        old, recovery = self.generation, self._recovery
        assert old is not None and recovery is not None and self._held is not None
        verdict = machine.judge(self._evidence(old), recovery.reason)
        recovery.cause, recovery.device = verdict.cause, verdict.device
        recovery.reason = verdict.reason
        log.info("anchortp: verdict: %s: %s", verdict.cause, verdict.reason)
        ownership = self._plan(verdict)
        self._number += 1
        recovery.generation = self._number
        recovery.stage("planned")
        new = await self._in_thread(self._fork_generation, ownership)
        old.close()
        self.generation = new
        recovery.stage("forked")
        self._first_died, self._hung = set(), set()
        assert self.state.deadline_at is not None
        await self._in_thread(self.cluster.wait_ready, new, self.state.deadline_at - time.monotonic())
        await self._in_thread(self.cluster.settle, new)
        self._report_ranks(recovery, new)
        self._held, self._kv_valid = ownership, True
        return Event(EventKind.STARTED, "all ranks are ready")

    def _evidence(self, generation: Generation) -> list[machine.DeviceEvidence]:
        return [
            machine.DeviceEvidence(
                device=device,
                anchor_alive=self.cluster.anchor_alive(device),
                rank_died=index in self._first_died,
                rank_hung=index in self._hung,
            )
            for index, device in enumerate(generation.ownership.devices)
        ]

    def _plan(self, verdict: machine.Verdict) -> Ownership:
        """The next ownership. Raises Unrecoverable."""
        assert self._held is not None
        survivors = [d for d in self._held.devices if d not in verdict.lost]
        if len(survivors) < self._min_devices:
            raise Unrecoverable(
                f"{len(survivors)} of {len(self.configured.devices)} devices are left, "
                f"--anchor-min-devices is {self._min_devices}"
            )
        if not self.cluster.anchor_alive(HOST_DEVICE):
            self._kv_valid = False
        if not verdict.lost:
            return self._held
        self._kv_valid = False
        try:
            return adopt(self.cluster.plan.model, self._held, survivors)
        except InvalidOwnership as error:
            raise Unrecoverable(str(error)) from error

    def _fork_generation(self, ownership: Ownership) -> Generation:
        cluster = self.cluster
        if not cluster.anchor_alive(HOST_DEVICE):
            cluster.start_one_anchor(HOST_DEVICE)
        cluster.fence(self._number, ownership.devices)
        assert self._held is not None
        if ownership != self._held:
            cluster.release_kv(self._number, self._held)
        cluster.allocate(self._number, ownership)
        return cluster.start_ranks(self._number, ownership, self._held, restore_prefixes=self._kv_valid)

    def _report_ranks(self, recovery: Recovery, new: Generation) -> None:
        for stage, name in (("groups_ready", "groups"), ("bytes_moved", "moved"), ("bound", "bound")):
            times = [info["stamps"][name] for info in new.infos if name in info["stamps"]]
            if times:
                recovery.stage(stage, max(times))
        for info in new.infos:
            for kind, nbytes in info["moved_bytes"].items():
                recovery.bytes_moved[kind] = recovery.bytes_moved.get(kind, 0) + nbytes
        recovery.stage("ready")

    async def _replay(self) -> Event:
        generation, recovery = self.generation, self._recovery
        assert generation is not None and recovery is not None and self.ledger is not None
        self._tm.max_req_input_len = generation.infos[0]["max_req_input_len"]
        self._watch()
        resumed = self.ledger.replay(generation.number)
        recovery.requests_replayed = len(resumed)
        recovery.stage("replayed")
        return Event(EventKind.REPLAYED, f"{len(resumed)} requests resumed")

    def _give_up(self, reason: str) -> None:
        assert self.ledger is not None
        if self.generation is not None:
            self.generation.kill()
        ended = self.ledger.give_up(f"The server cannot recover: {reason}")
        if self._recovery is not None:
            self._recovery.failed = reason
            self._recovery.stage("gave_up")
            self._recovery = None
        log.error("anchortp: down: %s; %d open requests ended with an error", reason, ended)

    def _refill(self) -> None:
        if self._spare_ranks and self.generation is not None:
            self._spawn(self._in_thread(self.cluster.refill_spares, self.generation.ownership.tp_size))

    # ---- plumbing

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        assert self._loop is not None
        return await self._loop.run_in_executor(None, function, *args)

    def _spawn(self, work: Any) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _wait_dead(generation: Generation) -> None:
    """Until every rank of a killed generation is dead, so that nothing can write to kept memory any more."""
    for child in generation.ranks:
        while not is_dead(child.pidfd):
            time.sleep(0.001)


def _stopped_ranks(generation: Generation) -> set[int]:
    """Ranks in state T (stopped); all of them if none is: whoever is stuck holds up the others."""
    stopped = set()
    for index, child in enumerate(generation.ranks):
        try:
            with open(f"/proc/{child.pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "T":
                    stopped.add(index)
        except FileNotFoundError:
            continue
    return stopped or {0}
