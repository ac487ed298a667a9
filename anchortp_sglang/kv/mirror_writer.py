"""One rank's part in the mirror: copying its heads of the slots that rank 0 has assigned rows for.

A slot may be freed and written anew under the copy. Its entry in the slot table tells: it is invalidated before any
rank may write to the slot, and a later one carries another step. (x86-64 is assumed: who reads the new bytes of a slot
finds its entry changed.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids
from anchortp_sglang.kv.copy import KVSegment, copy_move
from anchortp_sglang.kv.mirror import KVMirror
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import KVMove

_ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows to be written from slots that held these entries, committed at ``steps``."""

    rows: Ids
    slots: Ids
    hashes: Hashes
    steps: Ids


class MirrorWriter:
    """``kv``: the segment of ``rank``; ``moves``: from there to the mirror (``kv_layout.mirror_moves``)."""

    def __init__(self, rank: int, moves: Sequence[KVMove], kv: KVSegment, table: SlotTable, mirror: KVMirror) -> None:
        self._rank, self._moves, self._kv, self._table, self._mirror = rank, moves, kv, table, mirror

    def write_some(self) -> bool:
        """Copy some of what is pending; whether there was anything that could be copied."""
        batch = self.take()
        if batch is None:
            return False
        for move in self._moves:
            self.copy(batch, move)
        self.sign(batch)
        return True

    def take(self) -> Batch | None:
        """Pending rows whose slots still hold what they were assigned for. They belong to nobody until signed."""
        rows = self._mirror.pending(self._rank)[:_ROWS_AT_ONCE]
        hashes = self._mirror.hashes[rows]  # before the slots: rank 0 stores them the other way round
        slots = self._mirror.slots[rows]
        steps = self._table.last_use[slots]
        good = np.flatnonzero((self._table.hashes[slots] == hashes) & (hashes != UNKNOWN))
        if not len(good):
            return None
        good = good[np.argsort(slots[good])]
        batch = Batch(rows[good], slots[good], hashes[good], steps[good])
        self._mirror.set_tags(self._rank, batch.rows, UNKNOWN)
        return batch

    def copy(self, batch: Batch, move: KVMove) -> None:
        """Copy the heads of one move."""
        copy_move(self._mirror.kv, batch.rows, self._kv, batch.slots, move)

    def sign(self, batch: Batch) -> None:
        """All is copied: tag the rows whose slots have held the same entry all the while."""
        same = (self._table.hashes[batch.slots] == batch.hashes) & (self._table.last_use[batch.slots] == batch.steps)
        self._mirror.set_tags(self._rank, batch.rows[same], batch.hashes[same])
