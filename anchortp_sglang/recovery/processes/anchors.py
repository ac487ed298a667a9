"""The anchors of a server, and the segments they hold for one generation after the other.

Every call blocks, with a timeout.
"""

import contextlib
import logging
import mmap
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

import zmq

from anchortp_sglang.anchor.client import AnchorClient, AnchorError, AnchorTimeout
from anchortp_sglang.anchor.launch import AnchorProcess, find_anchor, start_anchor
from anchortp_sglang.anchor.messages import SegmentInfo
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.rank import heartbeat
from anchortp_sglang.rank.attachment import (
    HOST_DEVICE,
    control_segment,
    kv_segment,
    mirror_segment,
    slot_table_segment,
)
from anchortp_sglang.recovery.processes.anchor_rescue import taken_out_of
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.pidfd import died_within, is_dead
from anchortp_sglang.recovery.processes.server_plan import ServerPlan
from anchortp_sglang.recovery.processes.stops import end, resume
from anchortp_sglang.recovery.processes.target import Target
from anchortp_sglang.recovery.report.kv_usage import KVUsage

log = logging.getLogger(__name__)

ANCHOR_TIMEOUT_S = 10.0
_FENCE_TIMEOUT_S = 2.0  # it is answered at once
_END_TIMEOUT_S = 3.0


class Anchors:
    """The anchors of a server. ``processes``: by device (HOST_DEVICE: the host anchor)."""

    def __init__(self, plan: ServerPlan) -> None:
        self.plan = plan
        self.processes: dict[int, AnchorProcess] = {}
        self.planned: Target | None = None
        """Where a planned change leads whose memory is there, or is being made, beside the serving generation's."""
        self._changing = threading.RLock()
        """Held while the memory of a planned change is made or freed, beside what is served with."""
        self._clients: dict[tuple[int, float], AnchorClient] = {}

    def start(self, devices: Sequence[int]) -> None:
        """Start the missing anchors of ``devices`` and the host anchor."""
        for device in (HOST_DEVICE, *devices):
            if device not in self.processes:
                self.start_one(device)

    def start_one(self, device: int, generation: int = 0) -> None:
        """Start an anchor, or an empty one in place of a dead one, fenced at ``generation``."""
        self.replace(device, self.launch(device, generation))

    def launch(self, device: int, generation: int) -> AnchorProcess:
        """Start an anchor without adding it to ``processes``."""
        plan = self.plan
        return start_anchor(
            plan.run_dir,
            plan.run_id,
            device,
            plan.identity,
            plan.controller_pid,
            plan.linger_s,
            ANCHOR_TIMEOUT_S,
            generation,
            plan.arena(device),
        )

    def replace(self, device: int, anchor: AnchorProcess) -> None:
        """Make ``anchor`` the device's; the previous one must be dead."""
        before = self.processes.get(device)
        self.processes[device] = anchor
        if before is not None:
            os.close(before.pidfd)

    def take_over(self, weights: WeightPlacement) -> int | None:
        """Attach to lingering anchors of a server that died, if they hold all of ``weights``.

        Returns their generation; None if there is nothing to take over. Other anchors are shut down.
        """
        found = {device: find_anchor(self.plan.run_dir, device) for device in self.plan.stale_anchors}
        anchors = {device: anchor for device, anchor in found.items() if anchor is not None}
        if not anchors:
            return None
        ownership, generation = weights.ownership, 0
        try:
            for anchor in anchors.values():
                resume(anchor.pid, anchor.pidfd)
            generation = 1 + max(self.client(device).status().generation for device in anchors)
            for device in (HOST_DEVICE, *ownership.devices):
                self.client(device).attach(generation, os.getpid(), self.plan.identity, self.plan.linger_s)
            complete = all(self._holds(device, weights) for device in ownership.devices)
        except AnchorError as error:
            log.info("anchortp: lingering anchors cannot be taken over: %s", error)
            complete = False
        if complete and anchors.keys() == {HOST_DEVICE, *ownership.devices}:
            log.info("anchortp: weights and KV of %d lingering anchors are taken over", len(anchors))
            self.processes = anchors
            return generation
        for anchor in anchors.values():
            _terminate(anchor)
            os.close(anchor.pidfd)
        return None

    def _holds(self, device: int, weights: WeightPlacement) -> bool:
        """Return whether the device holds all of its weights, complete."""
        sealed = {segment.name for segment in self.client(device).status().segments if segment.sealed}
        return weights.shard_of(device).sizes.keys() <= sealed

    def client(self, device: int, timeout_s: float = ANCHOR_TIMEOUT_S) -> AnchorClient:
        """Return the client of a device's anchor. ``timeout_s``: of each call."""
        key = device, timeout_s
        if key not in self._clients:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
            self._clients[key] = AnchorClient(self.plan.run_dir, self.plan.run_id, device, timeout_s, context)
        return self._clients[key]

    def alive(self, device: int) -> bool:
        anchor = self.processes.get(device)
        return anchor is not None and not is_dead(anchor.pidfd)

    def fence(self, generation: int, devices: Sequence[int]) -> None:
        """Make the anchors refuse messages and attachments of older generations.

        An anchor that does not answer is replaced, and its memory handed to the new one; later calls can rely on
        answers.
        """
        for device in (HOST_DEVICE, *devices):
            try:
                self.client(device, _FENCE_TIMEOUT_S).fence(generation)
            except AnchorTimeout as error:
                log.warning("anchortp: %s; a new anchor takes over its memory", error)
                self._replace_silent(device, generation)

    def _replace_silent(self, device: int, generation: int) -> None:
        """Give all that a silent anchor holds to a new one, fenced at ``generation``.

        Raises AnchorError, AnchorStartError.
        """
        with taken_out_of(self.processes[device], device, self.plan.arena(device).seal_travels) as segments:
            self.start_one(device, generation)
            for name, fd in segments.items():
                self.client(device).adopt_handle(generation, name, fd, os.fstat(fd).st_size, sealed=False)

    def allocate(self, number: int, weights: WeightPlacement) -> None:
        """Allocate the segments of a generation; those that exist already stay as they are."""
        self._allocate_memory(number, weights)
        control = control_segment(number)
        self.client(HOST_DEVICE).allocate(number, control, self._control_bytes(weights.ownership), lazy=True)

    def _allocate_memory(self, number: int, weights: WeightPlacement) -> None:
        """Allocate all but the control segment."""
        plan, ownership = self.plan, weights.ownership
        for index, (device, shard) in enumerate(zip(ownership.devices, weights.shards, strict=True)):
            kv, client = plan.kv_layout(ownership, index), self.client(device)
            client.allocate(number, shard.added, shard.added_bytes, lazy=False)
            client.allocate(number, kv_segment(kv), kv.total_bytes, lazy=True)
        host = self.client(HOST_DEVICE)
        slots = plan.kv_of(ownership)
        host.allocate(number, slot_table_segment(ownership, slots), SlotTable.nbytes(slots.rows), lazy=True)
        mirror = plan.mirror_shape()
        if plan.mirror is not None and mirror is not None:
            host.allocate(number, mirror_segment(plan.mirror), mirror.nbytes, lazy=True)

    def provide(self, number: int, target: Target, wanted: Callable[[], bool]) -> None:
        """Start the anchors of devices that join, and allocate the memory of a planned generation ``number``.

        Raises AnchorError if it is not ``wanted`` any more, or there is no memory; AnchorStartError.
        """
        with self._changing:
            if not wanted():
                raise AnchorError("the change of devices was called off")
            self.planned = target
            for device in target.joining:
                if not self.alive(device):
                    self.start_one(device, number - 1)
            self._allocate_memory(number, target.weights)

    def give_up(self, generation: Generation) -> None:
        """Free what was made for a planned change that will not take place."""
        with self._changing:
            planned, self.planned = self.planned, None
            if planned is not None:
                self.end(set(planned.joining).difference(generation.ownership.devices), generation.number)
                self.seal_and_free(generation)

    def holds_planned(self, number: int) -> bool:
        """Return whether the anchors of a planned generation ``number`` live and still have its segments."""
        planned = self.planned
        if planned is None:
            return False
        needed = self.segments_of(number, planned.weights)
        needed[HOST_DEVICE].discard(control_segment(number))  # it runs with that of a standby
        return all(
            self.alive(device) and names <= {each.name for each in self._segments(device)}
            for device, names in needed.items()
        )

    def make_standby_control(self, number: int, ownership: Ownership) -> mmap.mmap:
        """Allocate a standby's control segment, zeroed, and map it read-only. That of an earlier one is freed."""
        host, name = self.client(HOST_DEVICE), control_segment(number, standby=True)
        if any(segment.name == name for segment in self._segments(HOST_DEVICE)):
            host.release(number, name)
        host.allocate(number, name, self._control_bytes(ownership), lazy=True)
        return self._map_host(number, name)

    def _control_bytes(self, ownership: Ownership) -> int:
        return heartbeat.BYTES + self.plan.platform.collectives_bytes(ownership.tp_size)

    def free_unneeded(self, number: int, held: WeightPlacement, weights: WeightPlacement, kv_valid: bool) -> None:
        """Free what neither generation ``number`` nor ``held`` needs, such as the segments of an aborted attempt.

        Call it before the generation is allocated. Unless ``kv_valid``, KV and slot table of ``held`` are freed as
        well. Raises AnchorError if a device lacks weights that are to stay.
        """
        old, new = self.segments_of(number, held), self.segments_of(number, weights)
        slot_tables = {slot_table_segment(each, self.plan.kv_of(each)) for each in (held.ownership, weights.ownership)}
        for device in (HOST_DEVICE, *weights.ownership.devices):
            needed = old.get(device, set()) | new[device]
            if not kv_valid:
                needed -= slot_tables if device == HOST_DEVICE else {name for name in needed if name.startswith("kv-")}
            there = self._release(device, number, needed)
            if device in held.ownership.devices and not held.shard_of(device).sizes.keys() <= there:
                raise AnchorError(f"the anchor of device {device} has lost segments of its weights")

    def seal_and_free(self, generation: Generation) -> None:
        """Seal this generation's weights and free the segments that belong to no generation any more.

        Raises AnchorError after the last device, if one of them failed.
        """
        with self._changing:
            self._seal_and_free(generation)

    def _seal_and_free(self, generation: Generation) -> None:
        failed: AnchorError | None = None
        needed = self.segments_of(generation.number, generation.weights)
        needed[HOST_DEVICE].add(control_segment(generation.number + 1, standby=True))
        if self.planned is not None:
            for device, names in self.segments_of(generation.number + 1, self.planned.weights).items():
                needed.setdefault(device, set()).update(names)
        for device in (HOST_DEVICE, *generation.ownership.devices):
            try:
                if device != HOST_DEVICE:
                    for segment in generation.weights.shard_of(device).sizes:
                        self.client(device).seal(generation.number, segment)
                self._release(device, generation.number, needed[device])
            except AnchorError as error:
                failed = error
        if failed is not None:
            raise failed

    def segments_of(self, number: int, weights: WeightPlacement) -> dict[int, set[str]]:
        """Return the names of all segments that a generation uses, by the device of their anchor."""
        plan, ownership = self.plan, weights.ownership
        names = {
            device: {kv_segment(plan.kv_layout(ownership, rank)), *weights.shards[rank].sizes}
            for rank, device in enumerate(ownership.devices)
        }
        names[HOST_DEVICE] = {slot_table_segment(ownership, plan.kv_of(ownership))}
        names[HOST_DEVICE] |= {control_segment(number, standby) for standby in (False, True)}
        if plan.mirror is not None:
            names[HOST_DEVICE].add(mirror_segment(plan.mirror))
        return names

    def map_control(self, number: int) -> mmap.mmap:
        """Map a generation's counters and collectives, read-only."""
        return self._map_host(number, control_segment(number))

    def open_kv_usage(self, generation: Generation) -> KVUsage:
        """Map a generation's slot table and the mirror, read-only."""
        plan, number = self.plan, generation.number
        slots = plan.kv_of(generation.ownership)
        table = self._map_host(number, slot_table_segment(generation.ownership, slots))
        mirror = plan.mirror if generation.ownership.tp_size > 1 else None  # a single rank writes to none
        memory = None if mirror is None else self._map_host(number, mirror_segment(mirror))
        return KVUsage(slots, plan.namespace, table, plan.mirror_shape(), memory)

    def _map_host(self, number: int, segment: str) -> mmap.mmap:
        fd, nbytes, _ = self.client(HOST_DEVICE).open_handle(number, segment)
        try:
            return map_fd(fd, nbytes, writable=False)
        finally:
            os.close(fd)

    def _release(self, device: int, number: int, needed: Collection[str]) -> set[str]:
        """Free all segments that are not ``needed``; return the names of those that are left."""
        client = self.client(device)
        there = {segment.name for segment in self._segments(device)}
        for name in there.difference(needed):
            client.release(number, name)
        return there.intersection(needed)

    def _segments(self, device: int) -> list[SegmentInfo]:
        return self.client(device).status().segments

    def shut_down(self, number: int) -> None:
        """End all anchors and free their memory. Those that do not answer are killed."""
        self.end(list(self.processes), number)

    def end(self, devices: Iterable[int], number: int) -> None:
        """End anchors of some devices and free their memory, as of generation ``number``; kill those that hang."""
        for device in devices:
            anchor = self.processes.get(device)
            if anchor is None:
                continue
            resume(anchor.pid, anchor.pidfd)
            if not is_dead(anchor.pidfd):
                try:
                    self.client(device, _END_TIMEOUT_S).shutdown(number)
                except Exception as error:
                    log.warning(
                        "anchortp: the anchor of device %s did not shut down (%s); it is ended by signal", device, error
                    )
                    _terminate(anchor)


def _terminate(anchor: AnchorProcess) -> None:
    """Send SIGTERM, and SIGKILL if that does not help."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(anchor.pidfd, signal.SIGTERM)
    if not died_within(anchor.pidfd, _END_TIMEOUT_S):
        end(anchor.pidfd)
        died_within(anchor.pidfd, _END_TIMEOUT_S)
