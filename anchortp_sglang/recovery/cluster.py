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

from torch.distributed import TCPStore

from anchortp_sglang.anchor.client import AnchorClient, AnchorError
from anchortp_sglang.anchor.launch import AnchorProcess, find_anchor, start_anchor
from anchortp_sglang.cpu.collectives import region_bytes
from anchortp_sglang.elastic.attachment import (
    HOST_DEVICE,
    PAGE_TABLE_SEGMENT,
    Assignment,
    KVPlan,
    kv_segment,
    lanes_segment,
    weights_segment,
)
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.memory.page_table import PageTable
from anchortp_sglang.planning.layout import shard_layout
from anchortp_sglang.planning.model_axes import ModelAxes
from anchortp_sglang.planning.ownership import Ownership
from anchortp_sglang.recovery import detokenizer, heartbeat, rank
from anchortp_sglang.recovery.generation import Generation, StartFailed
from anchortp_sglang.recovery.processes import died_within, is_dead
from anchortp_sglang.recovery.zygote import Child, Zygote, ZygoteError, spawn_zygote

log = logging.getLogger(__name__)

ANCHOR_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ServerPlan:
    """What does not change over a server's life.

    ``server_args``: tp_size -> resolved ServerArgs. ``stale_anchors``: devices whose anchors linger in the run
    directory from a server that died.
    """

    run_dir: Path
    run_id: str
    identity: str
    checkpoint: Path
    model: ModelAxes
    kv: KVPlan
    linger_s: float
    server_args: Callable[[int], Any]
    controller_pid: int
    stale_anchors: tuple[int, ...] = ()


class Cluster:
    """Anchors by device (HOST_DEVICE: the host anchor), the zygote and its spare children."""

    def __init__(self, plan: ServerPlan, zygote: Zygote) -> None:
        self.plan = plan
        self.zygote = zygote
        self.anchors: dict[int, AnchorProcess] = {}
        self._clients: dict[int, AnchorClient] = {}
        self._spares: list[Child] = []
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
        )

    def take_over(self, ownership: Ownership) -> int | None:
        """Anchors that linger from a server that died: attach to them if they hold all of ``ownership``.

        Returns their generation; None if there is nothing to take over. Others are shut down.
        """
        found = {device: find_anchor(self.plan.run_dir, device) for device in self.plan.stale_anchors}
        anchors = {device: anchor for device, anchor in found.items() if anchor is not None}
        if not anchors:
            return None
        generation = 1 + max(self.client(device).status().generation for device in anchors)
        try:
            for device in (HOST_DEVICE, *ownership.devices):
                self.client(device).attach(generation, os.getpid(), self.plan.identity, self.plan.linger_s)
            complete = all(self._holds(device, ownership) for device in ownership.devices)
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

    def _holds(self, device: int, ownership: Ownership) -> bool:
        """Whether the weights of ``ownership`` lie complete on this device."""
        segments = self.client(device).status().segments
        return any(segment.name == weights_segment(ownership) and segment.sealed for segment in segments)

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

    def allocate(self, number: int, ownership: Ownership) -> None:
        """Segments of a generation; those that exist already are kept as they are."""
        plan = self.plan
        for index, device in enumerate(ownership.devices):
            layout = shard_layout(plan.model, ownership, index)
            kv_bytes = plan.kv.nbytes(plan.model, ownership.units("kv_head", index))
            client = self.client(device)
            client.allocate(number, weights_segment(ownership), layout.total_bytes, lazy=False)
            client.allocate(number, kv_segment(ownership), kv_bytes, lazy=True)
        host = self.client(HOST_DEVICE)
        host.allocate(number, PAGE_TABLE_SEGMENT, PageTable.nbytes(plan.kv.rows), lazy=True)
        lanes = heartbeat.BYTES + region_bytes(ownership.tp_size)
        host.allocate(number, lanes_segment(number), lanes, lazy=True)

    def release_kv(self, number: int, ownership: Ownership) -> None:
        """Free KV that no later generation can use, before its successor is allocated."""
        for device in ownership.devices:
            if self.anchor_alive(device):
                self._release(device, number, keep=lambda name: name != kv_segment(ownership))

    def settle(self, generation: Generation) -> None:
        """Seal this generation's weights and free whatever belongs to no generation any more."""
        keep = self.segments_of(generation)
        for device in generation.ownership.devices:
            self.client(device).seal(generation.number, weights_segment(generation.ownership))
        for device in (HOST_DEVICE, *generation.ownership.devices):
            self._release(device, generation.number, keep=keep.__contains__)

    @staticmethod
    def segments_of(generation: Generation) -> frozenset[str]:
        """Names of all segments that a generation uses, on whichever anchor."""
        return frozenset(
            (
                weights_segment(generation.ownership),
                kv_segment(generation.ownership),
                PAGE_TABLE_SEGMENT,
                lanes_segment(generation.number),
            )
        )

    def map_lanes(self, number: int) -> mmap.mmap:
        """A generation's counters and collectives, read only."""
        fd, nbytes, _ = self.client(HOST_DEVICE).open_handle(number, lanes_segment(number))
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
        """A spare child, or a new one; a dead zygote is replaced by a spawned one."""
        while self._spares:
            child = self._spares.pop()
            if not is_dead(child.pidfd):
                return child
            child.close()
        try:
            return self.zygote.fork()
        except ZygoteError as error:
            log.warning("anchortp: %s; starting another one, which imports SGLang anew", error)
            self.zygote = spawn_zygote()
            return self.zygote.fork()

    def prepare_next(self, tp_size: int) -> None:
        """What the next recovery would otherwise wait for: spare children, configurations."""
        while len(self._spares) < tp_size:
            self._spares.append(self.zygote.fork())
        for size in range(max(1, tp_size - 1), tp_size + 1):
            self.plan.server_args(size)

    def start_ranks(
        self, number: int, ownership: Ownership, previous: Ownership | None, restore_prefixes: bool
    ) -> Generation:
        """Fork a generation. Its anchors must be fenced and its segments allocated."""
        plan = self.plan
        server_args = plan.server_args(ownership.tp_size)
        self._store = TCPStore(rank.STORE_HOST, 0, is_master=True, wait_for_workers=False)
        generation = Generation(number, ownership, [])
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
                    ownership=ownership,
                    previous=previous,
                    kv=plan.kv,
                    restore_prefixes=restore_prefixes,
                )
                child = self.fork()
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
