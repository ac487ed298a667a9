"""Copies committed KV to the mirror, in a thread of each rank beside the decode loop.

Copies go through numpy, which releases the GIL meanwhile, a few MiB at a time.
"""

import logging
import mmap
import threading
import time

from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.mirror import KVMirror, MirrorMismatch
from anchortp_sglang.kv.mirror_schedule import MirrorSchedule
from anchortp_sglang.kv.mirror_writer import MirrorWriter
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import mirror_moves
from anchortp_sglang.rank.attachment import HOST_DEVICE, Attachment, mirror_segment
from anchortp_sglang.rank.kv.restore import mirror_shape

log = logging.getLogger(__name__)

_POLL_S = 0.1
"""Pause between turns. Each turn disturbs the decode loop a little; KV committed between two is lost with a device."""


class Mirroring(threading.Thread):
    """A rank's mirroring thread. ``memory``, ``table_memory``: the mirror and the generation's slot table.

    Start it on rank 0 when it begins to write the slot table; on the others at any time before.
    """

    def __init__(self, attachment: Attachment, kv: KVSegment, memory: mmap.mmap, table_memory: mmap.mmap) -> None:
        super().__init__(name="anchortp-mirror", daemon=True)
        self._attachment, self._kv, self._memory, self._table_memory = attachment, kv, memory, table_memory
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End the thread, and wait until it writes no more."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        try:
            self._mirror_on()
        except Exception:  # whatever it is, a rank serves without its mirror
            log.exception("anchortp: KV is not mirrored any more; after the loss of a device its KV is computed again")

    def _mirror_on(self) -> None:
        assignment = self._attachment.assignment
        assert assignment.mirror is not None
        mirror = self._begin() if assignment.rank == 0 else self._await_begun()
        if mirror is None:
            return
        table = SlotTable.attach(self._table_memory, assignment.kv.rows, self._attachment.namespace)
        schedule = MirrorSchedule(table, mirror, assignment.mirror.bytes_per_s) if assignment.rank == 0 else None
        moves = mirror_moves(assignment.model, assignment.ownership, assignment.rank)
        writer = MirrorWriter(assignment.rank, moves, self._kv, table, mirror)
        seen = -1
        while not self._stopping.is_set():
            if schedule is not None:
                schedule.assign(time.monotonic())
            assigned = mirror.assignments
            if assigned == seen:
                self._stopping.wait(_POLL_S)
            elif not writer.write_some():
                seen = assigned

    def _begin(self) -> KVMirror:
        assignment = self._attachment.assignment
        mirror = KVMirror.attach_or_create(self._memory, mirror_shape(self._attachment))
        mirror.begin(assignment.generation, assignment.ownership.tp_size)
        return mirror

    def _await_begun(self) -> KVMirror | None:
        """Wait until rank 0 of this generation has taken the mirror over: the slot table is being written then.

        Returns None if the thread is to end before that.
        """
        while not self._stopping.is_set():
            try:
                mirror = KVMirror.attach(self._memory, mirror_shape(self._attachment))
            except MirrorMismatch:
                pass  # rank 0 has not made it yet
            else:
                if mirror.begun(self._attachment.assignment.generation):
                    return mirror
            self._stopping.wait(_POLL_S)
        return None


def open_mirroring(attachment: Attachment, kv: KVSegment, table_memory: mmap.mmap) -> Mirroring | None:
    """Map the mirror, if there is one. A single rank has no survivor to restore anything for."""
    assignment = attachment.assignment
    if assignment.mirror is None or assignment.ownership.tp_size == 1:
        return None
    memory = attachment.map(HOST_DEVICE, mirror_segment(assignment.mirror), writable=True)
    return Mirroring(attachment, kv, memory, table_memory)
