"""One rank's part in the mirror: copies its heads of the slots to which rank 0 has assigned rows.

A slot may be freed and written again during the copy. The slot table shows it: an entry is invalidated before any rank
may write to the slot, and a later entry has another step. (This relies on x86-64's memory order: a reader that sees new
bytes of a slot then sees its changed entry.)
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
    """Rows to write, their slots, and the slots' entries: chain hashes and the steps of their commit."""

    rows: Ids
    slots: Ids
    hashes: Hashes
    steps: Ids


class MirrorWriter:
    """The writer of one rank. ``kv``: its segment. ``moves``: from there to the mirror (``kv_layout.mirror_moves``)."""

    def __init__(self, rank: int, moves: Sequence[KVMove], kv: KVSegment, table: SlotTable, mirror: KVMirror) -> None:
        self._rank, self._moves, self._kv, self._table, self._mirror = rank, moves, kv, table, mirror

    def write_some(self) -> bool:
        """Copy some of the pending rows. Return whether any could be copied."""
        batch = self.take()
        if batch is None:
            return False
        for move in self._moves:
            self.copy(batch, move)
        self.sign(batch)
        return True

    def take(self) -> Batch | None:
        """Take pending rows whose slots still hold their entries; clear this rank's tags of them until ``sign``."""
        rows = self._mirror.pending(self._rank)[:_ROWS_AT_ONCE]
        hashes = self._mirror.hashes[rows]  # before the slots, as rank 0 stores hashes last
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
        """Copy the heads of one move to the batch's rows."""
        copy_move(self._mirror.kv, batch.rows, self._kv, batch.slots, move)

    def sign(self, batch: Batch) -> None:
        """Tag the copied rows whose slots' entries have not changed since ``take``."""
        same = (self._table.hashes[batch.slots] == batch.hashes) & (self._table.last_use[batch.slots] == batch.steps)
        self._mirror.set_tags(self._rank, batch.rows[same], batch.hashes[same])
