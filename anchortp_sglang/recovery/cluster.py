"""The processes and segments of a server: anchors, zygote, and one generation of ranks after the other.

Everything here blocks, with timeouts; the coordinator calls it from a worker thread.
"""

import logging
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchortp_sglang.anchor.client import AnchorClient, AnchorError
from anchortp_sglang.anchor.launch import AnchorProcess, find_anchor, start_anchor
from anchortp_sglang.cpu.collectives import region_bytes
from anchortp_sglang.elastic.attachment import (
    HOST_DEVICE,
    Assignment,
    MirrorPlan,
    kv_namespace,
    kv_segment,
    lanes_segment,
    mirror_segment,
    page_table_segment,
)
from anchortp_sglang.elastic.kv_capacity import KVCapacity, kv_capacity
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.memory.chain_hash import root_hash
from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.memory.kv_mirror import MirrorShape
from anchortp_sglang.memory.page_table import PageTable
from anchortp_sglang.planning.expert_load import ExpertCounts
from anchortp_sglang.planning.kv_layout import KVLayout, KVPlan, fit_slots, kv_layout, whole_layout
from anchortp_sglang.planning.model_axes import ModelAxes
from anchortp_sglang.planning.ownership import Ownership
from anchortp_sglang.planning.residence import Holding, hold
from anchortp_sglang.recovery import detokenizer, heartbeat, rank
from anchortp_sglang.recovery.generation import Generation, StartFailed
from anchortp_sglang.recovery.kv_books import KVBooks
from anchortp_sglang.recovery.processes import died_within, is_dead
from anchortp_sglang.recovery.spares import Spares
from anchortp_sglang.recovery.zygote import Child, Zygote, ZygoteError, spawn_zygote

log = logging.getLogger(__name__)

ANCHOR_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ServerPlan:
    """What does not change over a server's life.

    ``kv``: the most slots that any generation has. ``device_bytes``: of a device's memory, for weights and KV; None
    if it is not limited. ``rotate_heads``: heads and experts that do not divide rotate over the layers.
    ``expert_counts``: by which experts are dealt. ``mirror``: None without one. ``server_args``: tp_size -> resolved
    ServerArgs. ``stale_anchors``: devices whose anchors linger in the run directory from a server that died.
    ``gpus``: of each device, none on CPU. ``graph_batch_sizes``: for which decode graphs are captured, none if the
    ranks stay eager.
    """

    run_dir: Path
    run_id: str
    identity: str
    checkpoint: Path
    model: ModelAxes
    kv: KVPlan
    rotate_heads: bool
    expert_counts: ExpertCounts | None
    device_bytes: int | None
    mirror: MirrorPlan | None
    linger_s: float
    server_args: Callable[[int], Any]
    controller_pid: int
    stale_anchors: tuple[int, ...] = ()
    gpus: tuple[GpuShare, ...] = ()
    graph_batch_sizes: tuple[int, ...] = ()

    def gpu(self, device: int) -> GpuShare | None:
        """Where the memory of a device (not of the host anchor) is; None: in the host's."""
        return self.gpus[device] if self.gpus and device != HOST_DEVICE else None

    def kv_of(self, ownership: Ownership) -> KVPlan:
        """Slots of a generation with this ownership. Raises InvalidOwnership if there is no room for any."""
        return fit_slots(self.model, self.kv, ownership, self.device_bytes)

    def kv_layout(self, ownership: Ownership, rank: int) -> KVLayout:
        """Of a rank's KV segment."""
        return kv_layout(self.model, self.kv_of(ownership), ownership, rank)

    def hold(self, ownership: Ownership, before: Holding | None) -> Holding:
        """Where the weights of an ownership shall lie. On a GPU, which maps no single pages, they are copied."""
        return hold(self.model, ownership, None if self.gpus else before)

    @property
    def namespace(self) -> bytes:
        """Of page tables."""
        return kv_namespace(self.checkpoint, self.model)

    def mirror_shape(self) -> MirrorShape | None:
        """Of the mirror, if there is one."""
        if self.mirror is None:
            return None
        layout = whole_layout(self.model, self.mirror.rows, self.kv.unit_bytes(self.model))
        return MirrorShape(layout, root_hash(self.namespace))


class Cluster:
    """Anchors by device (HOST_DEVICE: the host anchor), the zygote and its spare children."""

    def __init__(self, plan: ServerPlan, zygote: Zygote, reserve: Zygote | None = None) -> None:
        self.plan = plan
        self.zygote = zygote
        self._reserve = reserve
        self._reserve_spent = False
        self.anchors: dict[int, AnchorProcess] = {}
        self._clients: dict[int, AnchorClient] = {}
        self._capacities: dict[Ownership, KVCapacity] = {}
        self._spares = Spares()
        self._store: Any = None
        self.port_args: Any = None
        self.detokenizer: Child | None = None
        self._detokenizer_args: Any = None

    # ---- anchors

    def start_anchors(self, devices: Sequence[int]) -> None:
        """Start the missing anchors of ``devices`` and the host anchor."""
        for device in (HOST_DEVICE, *devices):
            if device not in self.anchors:
                self.start_one_anchor(device)

    def start_one_anchor(self, device: int, generation: int = 0) -> None:
        """Start an anchor, or another one in place of a dead one, fenced at ``generation``."""
        plan = self.plan
        self.anchors[device] = start_anchor(
            plan.run_dir,
            plan.run_id,
            device,
            plan.identity,
            plan.controller_pid,
            plan.linger_s,
            ANCHOR_TIMEOUT_S,
            generation,
            plan.gpu(device),
        )

    def take_over(self, weights: Holding) -> int | None:
        """Anchors that linger from a server that died: attach to them if they hold all of ``weights``.

        Returns their generation; None if there is nothing to take over. Others are shut down.
        """
        found = {device: find_anchor(self.plan.run_dir, device) for device in self.plan.stale_anchors}
        anchors = {device: anchor for device, anchor in found.items() if anchor is not None}
        if not anchors:
            return None
        ownership = weights.ownership
        generation = 1 + max(self.client(device).status().generation for device in anchors)
        try:
            for device in (HOST_DEVICE, *ownership.devices):
                self.client(device).attach(generation, os.getpid(), self.plan.identity, self.plan.linger_s)
            complete = all(self._holds(device, weights) for device in ownership.devices)
        except AnchorError as error:
            log.info("anchortp: lingering anchors cannot be taken over: %s", error)
            complete = False
        if complete and anchors.keys() == {HOST_DEVICE, *ownership.devices}:
            log.info("anchortp: weights and KV of %d lingering anchors are taken over", len(anchors))
            self.anchors = anchors
            return generation
        for anchor in anchors.values():
            signal.pidfd_send_signal(anchor.pidfd, signal.SIGTERM)
            died_within(anchor.pidfd, ANCHOR_TIMEOUT_S)
            os.close(anchor.pidfd)
        return None

    def _holds(self, device: int, weights: Holding) -> bool:
        """Whether the weights lie complete on this device."""
        sealed = {segment.name for segment in self.client(device).status().segments if segment.sealed}
        return weights.shard_of(device).sizes.keys() <= sealed

    def client(self, device: int) -> AnchorClient:
        if device not in self._clients:
            self._clients[device] = AnchorClient(self.plan.run_dir, self.plan.run_id, device, ANCHOR_TIMEOUT_S)
        return self._clients[device]

    def anchor_alive(self, device: int) -> bool:
        anchor = self.anchors.get(device)
        return anchor is not None and not is_dead(anchor.pidfd)

    def fence(self, generation: int, devices: Sequence[int]) -> None:
        """From now on the anchors refuse messages and attachments of older generations."""
        for device in (HOST_DEVICE, *devices):
            self.client(device).fence(generation)

    def allocate(self, number: int, weights: Holding) -> None:
        """Segments of a generation; those that exist already are kept as they are."""
        plan, ownership = self.plan, weights.ownership
        for index, (device, shard) in enumerate(zip(ownership.devices, weights.shards, strict=True)):
            kv, client = plan.kv_layout(ownership, index), self.client(device)
            client.allocate(number, shard.added, shard.added_bytes, lazy=False)
            client.allocate(number, kv_segment(kv), kv.total_bytes, lazy=True)
        host = self.client(HOST_DEVICE)
        slots = plan.kv_of(ownership)
        host.allocate(number, page_table_segment(ownership, slots), PageTable.nbytes(slots.rows), lazy=True)
        mirror = plan.mirror_shape()
        if plan.mirror is not None and mirror is not None:
            host.allocate(number, mirror_segment(plan.mirror), mirror.nbytes, lazy=True)
        lanes = heartbeat.BYTES + region_bytes(ownership.tp_size)
        host.allocate(number, lanes_segment(number), lanes, lazy=True)

    def release_kv(self, number: int, ownership: Ownership) -> None:
        """Free KV that no later generation can use, before its successor is allocated."""
        for device in ownership.devices:
            if self.anchor_alive(device):
                self._release(device, number, keep=lambda name: not name.startswith("kv-"))

    def settle(self, generation: Generation) -> None:
        """Seal this generation's weights and free whatever belongs to no generation any more."""
        keep = self.segments_of(generation)
        for device, shard in zip(generation.ownership.devices, generation.weights.shards, strict=True):
            self.client(device).seal(generation.number, shard.added)
        for device in (HOST_DEVICE, *generation.ownership.devices):
            self._release(device, generation.number, keep=keep.__contains__)

    def kv_capacity(self, ownership: Ownership) -> KVCapacity:
        """How many KV slots fit with this ownership and with the other kind; worked out once for each."""
        if ownership not in self._capacities:
            plan = self.plan
            self._capacities[ownership] = kv_capacity(plan.model, plan.kv_of(ownership), ownership, plan.rotate_heads)
        return self._capacities[ownership]

    def segments_of(self, generation: Generation) -> frozenset[str]:
        """Names of all segments that a generation uses, on whichever anchor."""
        plan, ownership = self.plan, generation.ownership
        names = {kv_segment(plan.kv_layout(ownership, rank)) for rank in range(ownership.tp_size)}
        names |= {segment for shard in generation.weights.shards for segment in shard.sizes}
        names |= {page_table_segment(ownership, plan.kv_of(ownership)), lanes_segment(generation.number)}
        return frozenset(names if plan.mirror is None else names | {mirror_segment(plan.mirror)})

    def map_lanes(self, number: int) -> mmap.mmap:
        """A generation's counters and collectives, read only."""
        return self._map_host(number, lanes_segment(number))

    def open_kv_books(self, generation: Generation) -> KVBooks:
        """What a generation's slots and the mirror hold, read only."""
        plan, number = self.plan, generation.number
        slots = plan.kv_of(generation.ownership)
        table = self._map_host(number, page_table_segment(generation.ownership, slots))
        mirror = None if plan.mirror is None else self._map_host(number, mirror_segment(plan.mirror))
        return KVBooks(slots, plan.namespace, table, plan.mirror_shape(), mirror)

    def _map_host(self, number: int, segment: str) -> mmap.mmap:
        fd, nbytes, _ = self.client(HOST_DEVICE).open_handle(number, segment)
        try:
            return map_fd(fd, nbytes, writable=False)
        finally:
            os.close(fd)

    def _release(self, device: int, number: int, keep: Callable[[str], bool]) -> None:
        client = self.client(device)
        for segment in client.status().segments:
            if not keep(segment.name):
                client.release(number, segment.name)

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
            generation.kill()
            raise
        return generation

    # ---- end

    def shut_down(self, number: int) -> None:
        """End ranks, zygote and anchors; free all memory."""
        self.zygote.kill()
        if self._reserve is not None:
            self._reserve.kill()
        self._remove_load_file()
        for device, anchor in self.anchors.items():
            if not is_dead(anchor.pidfd):
                try:
                    self.client(device).shutdown(number)
                except Exception as error:
                    log.warning("anchortp: anchor %s did not take the shutdown (%s)", device, error)
        # PortArgs.init_new makes files for its sockets; who bound them has been killed, SGLang leaves them behind.
        names = [name for name in dir(self.port_args) if name.endswith("_ipc_name")]
        for endpoint in filter(None, (getattr(self.port_args, name) for name in names)):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def _remove_load_file(self) -> None:
        """ShmLoadSnapshotWriter (managers/load_snapshot.py) makes it in /dev/shm, and nobody removes it."""
        from sglang.srt.managers.load_snapshot import shm_path_for

        if self.port_args is not None:
            Path(shm_path_for(self.port_args.instance_id)).unlink(missing_ok=True)
