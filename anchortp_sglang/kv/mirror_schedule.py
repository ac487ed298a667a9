"""Assigns the mirror's rows to slots, in rank 0, by the slot table and within bounds of memory and bandwidth.

The newest entries come first. If the mirror has fewer rows than there are entries, it holds those used last and their
ancestors in the prefix forest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids
from anchortp_sglang.kv.mirror import KVMirror
from anchortp_sglang.kv.prefix_forest import ROOT, Mask
from anchortp_sglang.kv.retained_slots import most_urgent
from anchortp_sglang.kv.slot_table import SlotTable

_BURST_S = 0.25
_LEAST_INTERVAL_S = 1.0
_SEARCHING_SHARE = 0.01
"""Shortest interval, and share of a core, for what reads the whole slot table: rows that can be freed, and a choice of
what a too small mirror holds. Between two searches only free rows are given out. Most of a choice does not hold the GIL
(``compiled.py``): the decode loop goes on beside it."""


class TokenBucket:
    """A limit of ``bytes_per_s`` in the long run, and of a quarter of a second's worth at once."""

    def __init__(self, bytes_per_s: float, piece_bytes: int) -> None:
        self._bytes_per_s, self._piece_bytes = bytes_per_s, piece_bytes
        self._most = max(bytes_per_s * _BURST_S, piece_bytes)
        self._left, self._at = self._most, 0.0

    def allowance(self, now: float) -> int:
        """Return how many pieces may be sent at ``now`` (time.monotonic())."""
        self._left = min(self._most, self._left + self._bytes_per_s * max(0.0, now - self._at))
        self._at = now
        return int(self._left // self._piece_bytes)

    def spend(self, pieces: int) -> None:
        self._left -= pieces * self._piece_bytes


class MirrorSchedule:
    """Assigns rows of ``mirror`` to slots of ``table``, and takes over the rows of the last generation."""

    def __init__(self, table: SlotTable, mirror: KVMirror, bytes_per_s: float) -> None:
        self._table, self._mirror = table, mirror
        self._bucket = TokenBucket(bytes_per_s, mirror.shape.row_bytes)
        self._done_step = -1
        self._row_of: Ids = np.full(table.slots, -1, np.int64)
        """int64[slots]: the row that a slot had last, whatever the slot held then; -1 for none."""
        self._is_free: Mask = np.zeros(mirror.shape.rows, np.bool_)
        self._n_free = 0
        """Number of rows in ``_is_free``; rows of slots freed since are not yet among them."""
        self._search_at = 0.0
        """When the whole table may be read again (monotonic)."""
        self._take_over()

    def assign(self, now: float) -> int:
        """Assign rows to slots that lack one, as bandwidth and memory allow. Return the number of rows."""
        step = self._table.step
        allowed = self._bucket.allowance(now)
        if step == self._done_step or not allowed:
            return 0
        wanted, hashes = self._lacking(np.flatnonzero(self._table.last_use > self._done_step))
        if np.count_nonzero(self._row_of[wanted] < 0) > self._n_free and now >= self._search_at:
            began = time.thread_time()
            wanted, hashes = self._search()
            self._search_at = now + max(_LEAST_INTERVAL_S, (time.thread_time() - began) / _SEARCHING_SHARE)
        newest_first = np.lexsort((wanted, -self._table.last_use[wanted]))
        taken = np.sort(newest_first[: self._most(wanted[newest_first], allowed)])
        if len(taken) == len(wanted):
            self._done_step = step
        if len(taken):
            self._give_rows(wanted[taken], hashes[taken])
            self._bucket.spend(len(taken))
        return len(taken)

    def _lacking(self, slots: Ids) -> tuple[Ids, Hashes]:
        """Return those of ``slots`` whose entry has no row, and their chain hashes."""
        hashes = self._table.hashes[slots]
        rows = self._row_of[slots]
        lacking = (hashes != UNKNOWN) & (slots != ROOT) & ((rows < 0) | (self._mirror.hashes[rows] != hashes))
        return slots[lacking], hashes[lacking]

    def _most(self, slots: Ids, allowed: int) -> int:
        """Return how many of ``slots``, from the first on, can have rows."""
        new_rows = np.cumsum(self._row_of[slots] < 0)
        return min(allowed, int(np.searchsorted(new_rows, self._n_free, side="right")))

    def _give_rows(self, slots: Ids, hashes: Hashes) -> None:
        """Assign each slot its old row, or a free one: that of its own number if possible, so that runs of slots are
        runs of rows."""
        rows = self._row_of[slots]
        new = np.flatnonzero(rows < 0)
        in_range = slots[new] < len(self._is_free)
        own = new[in_range][self._is_free[slots[new][in_range]]]
        rows[own] = slots[own]
        self._is_free[rows[own]] = False
        other = np.flatnonzero(rows < 0)
        if other.size:
            rows[other] = np.flatnonzero(self._is_free)[: len(other)]
            self._is_free[rows[other]] = False
        self._n_free -= len(new)
        self._mirror.free(rows)  # they may hold earlier content of these slots
        self._mirror.assign(rows, slots, hashes)
        self._row_of[slots] = rows

    def _take_over(self) -> None:
        """Assign rows of the last generation to the slots that hold their chains now."""
        table, mirror = self._table, self._mirror
        slots = np.flatnonzero(table.hashes)
        slots = slots[slots != ROOT]
        rows = mirror.rows_of(table.hashes[slots])
        slots, rows = slots[rows >= 0], rows[rows >= 0]
        mirror.slots[:] = ROOT
        mirror.slots[rows] = slots
        self._collect_rows()

    def _collect_rows(self) -> None:
        """Free every row whose slot no longer holds its entry."""
        table, mirror = self._table, self._mirror
        used = mirror.hashes != UNKNOWN
        used &= (table.hashes[mirror.slots] == mirror.hashes) & (mirror.slots != ROOT)
        self._is_free = ~used
        self._n_free = int(np.count_nonzero(self._is_free))
        mirror.free(np.flatnonzero(self._is_free))
        self._row_of[:] = -1
        self._row_of[mirror.slots[used]] = np.flatnonzero(used)

    def _search(self) -> tuple[Ids, Hashes]:
        """Free the rows of slots that are not to be mirrored; return the slots that lack one, and their chain hashes.

        If there is no room for all slots, those chosen are to be mirrored.
        """
        self._collect_rows()
        wanted = np.flatnonzero((self._row_of < 0) & (self._table.hashes != UNKNOWN))
        if len(wanted) > self._n_free + 1:  # slot 0 has no entry, but a hash
            mirror, entries = self._mirror, self._table.entries()
            chosen = most_urgent(entries.forest(), entries, mirror.shape.rows, 1).mask()
            freed = np.flatnonzero(~(chosen[mirror.slots] | self._is_free))
            mirror.free(freed)
            self._is_free[freed] = True
            self._n_free += len(freed)
            self._row_of[mirror.slots[freed]] = -1
            wanted = wanted[chosen[wanted]]
        return self._lacking(wanted)


@dataclass(frozen=True)
class MirrorFacts:
    """Progress of a mirror. ``used``: slots with an entry. ``mirrored``: those of them with a complete row."""

    rows: int
    used: int
    mirrored: int

    @property
    def lag_slots(self) -> int:
        """Number of slots that the mirror has room for but does not hold yet."""
        return max(0, min(self.used, self.rows) - self.mirrored)

    @property
    def coverage(self) -> float:
        """Share of the used slots that survive the loss of a device."""
        return self.mirrored / self.used if self.used else 1.0


def mirror_facts(table: SlotTable, mirror: KVMirror) -> MirrorFacts:
    """Return the mirror's progress. Any process that maps table and mirror may call it at any time."""
    hashes = table.hashes
    rows = np.flatnonzero(mirror.complete())
    slots = mirror.slots[rows]
    current = (slots > ROOT) & (slots < len(hashes))
    mirrored = np.count_nonzero(hashes[slots[current]] == mirror.hashes[rows[current]])
    return MirrorFacts(mirror.shape.rows, table.used(), int(mirrored))
