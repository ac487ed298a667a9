"""The processes of a server: its anchors, the zygote, and one generation of ranks after the other.

Everything here blocks, with timeouts; the coordinator calls it from a worker thread.
"""

import logging
from pathlib import Path
from typing import Any

from anchortp_sglang.anchor.keeper import RunDirKeeper
from anchortp_sglang.elastic.attachment import Assignment
from anchortp_sglang.elastic.kv_capacity import KVCapacity, kv_capacity
from anchortp_sglang.planning.ownership import Ownership
from anchortp_sglang.planning.residence import Holding
from anchortp_sglang.recovery import detokenizer, rank
from anchortp_sglang.recovery.anchors import Anchors
from anchortp_sglang.recovery.generation import Generation, StartFailed, wait_dead
from anchortp_sglang.recovery.processes import is_dead
from anchortp_sglang.recovery.server_plan import ServerPlan
from anchortp_sglang.recovery.spares import Spares
from anchortp_sglang.recovery.zygote import Child, Zygote, ZygoteError, spawn_zygote

log = logging.getLogger(__name__)


class Cluster:
    """Anchors, the zygote and its spare children."""

    def __init__(
        self, plan: ServerPlan, zygote: Zygote, reserve: Zygote | None = None, keeper: RunDirKeeper | None = None
    ) -> None:
        self.plan = plan
        self.keeper = keeper
        self.zygote = zygote
        self._reserve = reserve
        self._reserve_spent = False
        self.anchors = Anchors(plan)
        self._capacities: dict[Ownership, KVCapacity] = {}
        self._spares = Spares()
        self._store: Any = None
        self.port_args: Any = None
        self._files: list[str] = []
        self.detokenizer: Child | None = None
        self._detokenizer_args: Any = None

    def kv_capacity(self, ownership: Ownership) -> KVCapacity:
        """How many KV slots fit with this ownership and with the other kind; worked out once for each."""
        if ownership not in self._capacities:
            plan = self.plan
            self._capacities[ownership] = kv_capacity(plan.model, plan.kv_of(ownership), ownership, plan.rotate_heads)
        return self._capacities[ownership]

    def use_ports(self, port_args: Any) -> None:
        """``port_args``: SGLang's PortArgs, known when its launch begins. Its files go when the server ends: who has
        bound their sockets is killed then, and nobody else removes them."""
        from sglang.srt.managers.load_snapshot import shm_path_for

        self.port_args = port_args
        endpoints = [getattr(port_args, name) for name in dir(port_args) if name.endswith("_ipc_name")]
        # ShmLoadSnapshotWriter (managers/load_snapshot.py) makes a file in /dev/shm.
        self._files = [endpoint.removeprefix("ipc://") for endpoint in endpoints if endpoint]
        self._files.append(shm_path_for(port_args.instance_id))
        if self.keeper is not None:
            self.keeper.note_outside(self._files)

    # ---- detokenizer

    def start_detokenizer(self, server_args: Any) -> None:
        self._detokenizer_args = server_args
        self.detokenizer = self.fork()
        self.detokenizer.start(detokenizer.run, detokenizer.DetokenizerSpec(server_args, self.port_args))

    def restart_detokenizer(self, timeout_s: float) -> None:
        """In place of a dead one. Raises StartFailed."""
        assert self.detokenizer is not None
        self.detokenizer.close()
        self.start_detokenizer(self._detokenizer_args)
        if not self.detokenizer.pipe.poll(timeout_s):
            raise StartFailed("the detokenizer did not start in time")

    # ---- ranks

    def fork(self) -> Child:
        """Of the zygote; a dead one is replaced by the one in reserve, or by a spawned one."""
        try:
            return self.zygote.fork()
        except ZygoteError as error:
            reserve, self._reserve, self._reserve_spent = self._reserve, None, True
            if reserve is not None and not is_dead(reserve.pidfd):
                log.warning("anchortp: %s; the one in reserve takes over", error)
                self.zygote = reserve
            else:
                log.warning("anchortp: %s; starting another one, which imports SGLang anew", error)
                self.zygote = spawn_zygote()
            return self.zygote.fork()

    def prepare_next(self, tp_size: int) -> None:
        """What the next recovery would otherwise wait for: spare children, configurations."""
        for size in range(max(1, tp_size - 1), tp_size + 1):
            self.plan.server_args(size)
        self._spares.prepare(self.zygote, tp_size, not self.plan.gpus, self.plan.server_args(tp_size).dist_timeout)
        if self._reserve_spent:
            self._reserve, self._reserve_spent = spawn_zygote(), False  # it imports SGLang in the background

    def start_ranks(
        self,
        number: int,
        weights: Holding,
        previous: Holding | None,
        restore_prefixes: bool,
        running: bytes = b"",
    ) -> Generation:
        """Fork a generation. Its anchors must be fenced and its segments allocated. ``running``: as in Assignment."""
        plan, ownership = self.plan, weights.ownership
        server_args = plan.server_args(ownership.tp_size)
        spares, self._store = self._spares.take(ownership.tp_size)
        generation = Generation(number, weights, [])
        try:
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
                    running=running,
                    gpu=plan.gpu(device),
                )
                child = spares.pop(0) if spares else self.fork()
                generation.ranks.append(child)
                child.start(rank.run, rank.RankSpec(assignment, server_args, self.port_args, self._store.port))
        except BaseException:
            for child in spares:
                child.kill()
                child.close()
            generation.kill()
            wait_dead(generation)
            generation.close()
            raise
        return generation

    # ---- end

    def shut_down(self, number: int) -> None:
        """End ranks, zygote and anchors; free all memory."""
        self.zygote.kill()
        if self._reserve is not None:
            self._reserve.kill()
        self.anchors.shut_down(number)
        for path in self._files:
            Path(path).unlink(missing_ok=True)
