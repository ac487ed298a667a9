"""Follows the serving generation's slot table while a rank stands by, in a thread of low priority.

What is left to do at the take-over then depends on what has changed since the last look (``kv/followed_table.py``). A
look reads the whole table, so the pauses between looks are as long as keeps that to a share of a core. The table is
mapped read-only. Whatever happens to this thread, the rank can always read the table as one that has not followed.
"""

import logging
import os
import threading
import time

from anchortp_sglang.kv.followed_table import FollowedTable
from anchortp_sglang.kv.slot_table import SlotTable, SlotTableMismatch
from anchortp_sglang.rank.attachment import HOST_DEVICE, Attachment, slot_table_segment

log = logging.getLogger(__name__)

_SHARE = 0.005
"""The share of a core that comparisons may take, of CPU time. What has changed takes about 1 us for each slot."""

_LEAST_PAUSE_S = 0.2
_NICER = 10
_STOP_TIMEOUT_S = 0.02
"""How long a look may take to stop. If it rebuilds all chains it takes longer, and reading the table is done sooner."""


_BLOCK_BYTES = 1 << 15
_TREE_BYTES = 32
"""For each slot, with what it takes to fill the tree (measured with SGLang 0.5.23 as page faults that remain)."""


class HeapReserve:
    """Memory for a prefix tree of ``slots`` slots, on the heap of the thread that makes this.

    Memory that is new to the kernel takes longer to get than to fill.
    """

    def __init__(self, slots: int) -> None:
        self._blocks = [bytearray(_BLOCK_BYTES) for _ in range(1 + _TREE_BYTES * slots // _BLOCK_BYTES)]

    def release(self) -> None:
        """Leave the memory to what is allocated next, as long as this object lives.

        The last block stays, or the C library would give the end of the heap back to the kernel.
        """
        del self._blocks[:-1]


class Following(threading.Thread):
    """Follows ``table``, of pages of ``page_size`` slots, from ``start`` until ``take``.

    ``identity``: of the table's memory, as ``os.fstat`` tells it.

    Make it in the thread that fills the prefix tree later, for which it reserves memory.
    """

    def __init__(self, table: SlotTable, page_size: int, identity: tuple[int, int]) -> None:
        super().__init__(name="anchortp-follow", daemon=True)
        self.identity = identity
        self._table, self._page_size = table, page_size
        self._followed: FollowedTable | None = None
        self._stopped = threading.Event()
        self._heap = HeapReserve(table.slots)

    def run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + _NICER, 19))  # of this thread
            self._follow(FollowedTable(self._table, self._page_size))
        except Exception:  # of whatever kind, the table can still be read as a whole
            log.exception("anchortp: a rank that stands by follows the slot table no more; it will read it as a whole")
            self._followed = None

    def _follow(self, followed: FollowedTable) -> None:
        pause_s, seen = 0.0, -1
        while not self._stopped.wait(pause_s):
            began, step = time.thread_time(), self._table.step
            if step != seen:  # without a commit nothing has changed but slots that were freed
                changed = followed.compare(self._stopped.is_set)
                if changed is None:
                    return
                pause_s = max(_LEAST_PAUSE_S, (time.thread_time() - began) * (1 / _SHARE - 1))
                followed.follow(changed)
                seen, self._followed = step, followed

    def take(self) -> FollowedTable | None:
        """Stop, and return what was followed; None if there is nothing yet, or a look does not stop in time.

        Call it from the thread that fills the prefix tree next.
        """
        self._stopped.set()
        self._heap.release()
        self.join(_STOP_TIMEOUT_S)
        if self.is_alive():
            log.info("anchortp: a look at the slot table did not stop in time; the table is read as a whole")
            return None
        followed, self._followed = self._followed, None
        return followed


def follow(attachment: Attachment) -> Following | None:
    """Begin to follow the table that a rank that stands by will take over; None if it cannot go on with it as it is."""
    assignment = attachment.assignment
    if assignment.previous is None:
        return None
    segment = slot_table_segment(assignment.previous.ownership, assignment.previous_kv)
    if segment != slot_table_segment(assignment.ownership, assignment.kv):
        return None
    memory, identity = attachment.map_identified(HOST_DEVICE, segment)
    try:
        table = SlotTable.attach(memory, assignment.kv.rows, attachment.namespace)
    except SlotTableMismatch as error:
        log.info("anchortp: a rank that stands by does not follow the slot table: %s", error)
        return None
    following = Following(table, assignment.kv.page_size, identity)
    following.start()
    return following
