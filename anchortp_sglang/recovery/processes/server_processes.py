"""The processes of a server: its anchors, the zygote, and one generation of ranks after the other.

Every call blocks, with a timeout; the coordinator makes it in a worker thread.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.keeper import RunDirKeeper
from anchortp_sglang.anchor.launch import AnchorProcess
from anchortp_sglang.anchor.outside import remove_files
from anchortp_sglang.kv.capacity import KVCapacity, kv_capacity
from anchortp_sglang.options import StandbyMode
from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.rank.attachment import Assignment
from anchortp_sglang.rank.main import RankSpec
from anchortp_sglang.rank.main import run as run_rank
from anchortp_sglang.rank.main import run_later as run_rank_later
from anchortp_sglang.rank.standby import APART_ID, ipc_names
from anchortp_sglang.recovery.processes import detokenizer
from anchortp_sglang.recovery.processes.anchors import Anchors
from anchortp_sglang.recovery.processes.generation import Generation, StartFailed, wait_dead
from anchortp_sglang.recovery.processes.pidfd import died_within
from anchortp_sglang.recovery.processes.server_plan import ServerPlan
from anchortp_sglang.recovery.processes.spares import Spares, make_store
from anchortp_sglang.recovery.processes.standby import Standby, Standbys
from anchortp_sglang.recovery.processes.stops import Reaper, resume
from anchortp_sglang.recovery.processes.target import Target
from anchortp_sglang.recovery.processes.zygote import Child, Zygote, ZygoteError
from anchortp_sglang.recovery.processes.zygotes import Zygotes

log = logging.getLogger(__name__)

_DETOKENIZER_TIMEOUT_S = 10.0
_DEATH_TIMEOUT_S = 5.0
_MOVE_TIMEOUT_S = 1200.0  # of a planned generation, besides the time that its weights take at their rate


class ServerProcesses:
    """Anchors, zygotes, their children that wait for a fault, and the detokenizer."""

    def __init__(
        self, plan: ServerPlan, zygote: Zygote, reserve: Zygote | None = None, keeper: RunDirKeeper | None = None
    ) -> None:
        self.plan = plan
        self._zygotes = Zygotes(zygote, reserve)
        self._reaper = Reaper()
        self._resumed: set[int] = set()
        self.keeper = keeper
        self.anchors = Anchors(plan)
        self._capacities: dict[Ownership, KVCapacity] = {}
        self._spares = Spares()
        self.standbys = Standbys()
        self.target: Target | None = None
        """Where a planned change of devices leads, while its generation is to be built."""
        self._store: Any = None
        self.port_args: Any = None
        self._outside: list[str] = []
        self.detokenizer: Child | None = None
        self._detokenizer_args: Any = None

    def kv_capacity(self, ownership: Ownership) -> KVCapacity:
        """Compute the KV slots with this ownership and with the other placement; once for each ownership."""
        if ownership not in self._capacities:
            plan = self.plan
            self._capacities[ownership] = kv_capacity(plan.model, plan.kv_of(ownership), ownership, plan.rotate_heads)
        return self._capacities[ownership]

    def take_ports(self, port_args: Any) -> None:
        """Move SGLang's sockets (PortArgs.init_new) into a folder of their own, which other users cannot enter.

        They accept pickles (io_struct.sock_recv): a process that connects to one can run code in this server. The run
        directory is no place for them: it may vanish and be made again, and SGLang's processes do not bind sockets
        again.
        """
        from sglang.srt.managers.load_snapshot import shm_path_for

        folder = tempfile.mkdtemp(prefix="anchortp-zmq-")
        for name in ipc_names(port_args):
            Path(getattr(port_args, name).removeprefix("ipc://")).unlink(missing_ok=True)
            setattr(port_args, name, f"ipc://{folder}/{name.removesuffix('_ipc_name')}")
        self.port_args = port_args
        # ShmLoadSnapshotWriter (managers/load_snapshot.py) makes the file in /dev/shm, and SGLang never removes it.
        self._outside = [folder, *(shm_path_for(port_args.instance_id + of) for of in ("", APART_ID))]
        if self.keeper is not None:
            self.keeper.note_outside(self._outside)

    # ---- detokenizer

    def start_detokenizer(self, server_args: Any) -> None:
        self._detokenizer_args = server_args
        child = self._zygotes.fork()
        try:
            child.start(detokenizer.run, detokenizer.DetokenizerSpec(server_args, self.port_args))
        except BaseException:
            child.kill()
            child.close()
            raise
        self.detokenizer = child

    def end_detokenizer(self) -> None:
        """Kill a detokenizer that does not answer; its death is noticed like any other."""
        assert self.detokenizer is not None
        log.warning("anchortp: the detokenizer (pid %d) does not answer; it is killed", self.detokenizer.pid)
        self.detokenizer.kill()

    def restart_detokenizer(self) -> None:
        """Replace a dead or killed detokenizer. Raises StartFailed, ZygoteError; the next call tries again."""
        old = self.detokenizer
        assert old is not None
        if not died_within(old.pidfd, _DEATH_TIMEOUT_S):
            raise StartFailed(f"the detokenizer (pid {old.pid}) has been killed, but is not dead yet")
        self.start_detokenizer(self._detokenizer_args)
        old.close()
        assert self.detokenizer is not None
        if not _is_ready(self.detokenizer):
            self.detokenizer.kill()
            raise StartFailed(f"the detokenizer did not start in {_DETOKENIZER_TIMEOUT_S:g} s")

    # ---- stopped processes

    def resume_stopped(self) -> None:
        """Resume stopped processes (SIGSTOP) other than ranks, as a recovery needs them.

        Each is resumed once between two calls of ``prepare_next``: one that is stopped again and again would work very
        slowly, but never reach a timeout.
        """
        found = [(f"zygote {zygote.pid}", self._resume(zygote)) for zygote in self._zygotes.all()]
        found += [(f"anchor {anchor.pid}", self._resume(anchor)) for anchor in list(self.anchors.processes.values())]
        if self.detokenizer is not None:
            found += [("detokenizer", self._resume(self.detokenizer))]
        found += [("spare ranks", self._spares.resume() > 0), ("the standby", self.standbys.resume() > 0)]
        for name, was_stopped in found:
            if was_stopped:
                log.warning("anchortp: %s was stopped (SIGSTOP) and has been continued", name)

    def _resume(self, process: Zygote | AnchorProcess | Child) -> bool:
        if process.pid in self._resumed or not resume(process.pid, process.pidfd):
            return False
        self._resumed.add(process.pid)
        return True

    # ---- ranks

    def prepare_next(self, generation: Generation, standby: StandbyMode) -> None:
        """Prepare what the next recovery would wait for: children, configurations, a zygote in reserve.

        Call it again and again, as helpers die or stop unnoticed.
        """
        tp_size = generation.ownership.tp_size
        for size in range(max(1, tp_size - 1), tp_size + 1):
            self.plan.server_args(size)
        self._resumed.clear()
        self.resume_stopped()
        self._reaper.reap()
        # With a standby, spare ranks are for the loss of a device.
        spares = {"off": 0, "cold": tp_size, "warm": tp_size - 1}[standby]
        try:
            self._zygotes.renew()
            if spares:
                timeout_s = self.plan.server_args(spares).dist_timeout
                self._spares.prepare(self._zygotes.fork, spares, self.plan.platform.spares_join_early, timeout_s)
        except (ZygoteError, AnchorError, OSError) as error:
            log.warning("anchortp: the next generation could not be prepared, and is tried again: %s", error)
        self._prepare_standby(generation, standby)

    def _prepare_standby(self, generation: Generation, standby: StandbyMode) -> None:
        number, held, target = generation.number + 1, generation.weights, self.target
        planned = self.anchors.planned
        if planned is not None and planned is not target:
            self.standbys.discard()
            try:
                self.anchors.give_up(generation)
            except AnchorError as error:
                log.info("anchortp: what was made for a change of devices is not freed yet: %s", error)
        if target is not None or standby == "warm":
            weights = held if target is None else target.weights
            self.standbys.prepare(number, weights, lambda: self._make_standby(number, held, target))

    def moving_s(self, weights: WeightPlacement) -> float:
        """Return how long new weights take beside a generation that serves, at the rate that is set; 0 without one."""
        rate = self.plan.change_bytes_per_s / weights.ownership.tp_size
        return max(sum(shard.sizes.values()) - shard.reused_bytes for shard in weights.shards) / rate if rate else 0.0

    def _make_standby(self, number: int, held: WeightPlacement, target: Target | None) -> Standby:
        """Begin to build a generation beside the one that serves with ``held``: as wide, or as ``target`` says."""
        weights, leaving = (held, ()) if target is None else (target.weights, target.leaving)
        if target is not None:
            self.anchors.provide(number, target, lambda: self.target is target)
        control = self.anchors.make_standby_control(number, weights.ownership)
        standby = Standby(number, weights, make_store(), control, leaving=leaving)
        if target is not None:
            standby.build_timeout_s = _MOVE_TIMEOUT_S + self.moving_s(weights)
        try:
            store_port = standby.store.port
            for spec in self._rank_specs(number, weights, held, True, store_port, leaving=leaving, standby=True):
                child = self._zygotes.fork()
                standby.ranks.append(child)
                child.start(run_rank_later, spec)
        except BaseException:
            standby.end()
            raise
        return standby

    def run_standby(
        self, number: int, weights: WeightPlacement, leaving: tuple[int, ...], running: bytes
    ) -> Generation | None:
        """Let a standby of these weights run as generation ``number``; None if there is none of use.

        The old ranks must be dead or have left, and the anchors fenced. ``leaving``, ``running``: as in Assignment.
        """
        standby = self.standbys.take(number, weights, leaving)
        if standby is None:
            return None
        self._store = standby.store
        generation = Generation(number, weights, standby.ranks, control=standby.control)
        try:
            for child in standby.ranks:
                child.pipe.send(running)
        except OSError:
            self._abandon(generation)
            return None
        return generation

    def start_ranks(
        self,
        number: int,
        weights: WeightPlacement,
        previous: WeightPlacement | None,
        restore_prefixes: bool,
        running: bytes = b"",
        leaving: tuple[int, ...] = (),
    ) -> Generation:
        """Fork a generation. Its anchors must be fenced and its segments allocated.

        ``running``, ``leaving``: as in Assignment.
        """
        spares, self._store = self._spares.take(weights.ownership.tp_size)
        generation = Generation(number, weights, [])
        try:
            store_port = self._store.port
            for spec in self._rank_specs(number, weights, previous, restore_prefixes, store_port, running, leaving):
                child = spares.pop(0) if spares else self._zygotes.fork()
                generation.ranks.append(child)
                child.start(run_rank, spec)
        except BaseException:
            for child in spares:
                child.kill()
                child.close()
            self._abandon(generation)
            raise
        return generation

    def _abandon(self, generation: Generation) -> None:
        generation.kill()
        wait_dead(generation)
        generation.close()

    def _rank_specs(
        self,
        number: int,
        weights: WeightPlacement,
        previous: WeightPlacement | None,
        restore_prefixes: bool,
        store_port: int,
        running: bytes = b"",
        leaving: tuple[int, ...] = (),
        standby: bool = False,
    ) -> Iterator[RankSpec]:
        """Yield what each rank of a generation is told, in rank order."""
        plan, ownership = self.plan, weights.ownership
        server_args = plan.server_args(ownership.tp_size)
        for index, device in enumerate(ownership.devices):
            assignment = Assignment(
                generation=number,
                rank=index,
                device=device,
                run_dir=plan.run_dir,
                run_id=plan.run_id,
                checkpoint=plan.checkpoint,
                model=plan.model,
                weights=weights,
                previous=previous,
                kv=plan.kv_of(ownership),
                previous_kv=plan.kv_of(ownership if previous is None else previous.ownership),
                restore_prefixes=restore_prefixes,
                mirror=plan.mirror,
                platform=plan.platform,
                running=running,
                random_weights=plan.random_weights,
                standby=standby,
                leaving=leaving,
                fill_bytes_per_s=plan.change_bytes_per_s / ownership.tp_size if standby else 0.0,
            )
            yield RankSpec(assignment, server_args, self.port_args, store_port)

    # ---- end

    def shut_down(self, number: int) -> None:
        """End ranks, zygote and anchors; free all memory."""
        self._zygotes.kill()
        self.anchors.shut_down(number)
        remove_files(self._outside)


def _is_ready(child: Child) -> bool:
    """Return whether a child reports that it is ready in time; False if it dies."""
    try:
        return child.pipe.poll(_DETOKENIZER_TIMEOUT_S) and child.pipe.recv()[0] == "ready"
    except (EOFError, OSError):
        return False
