"""Which slots the mirror is to hold: decided by rank 0 from the page table, in bounded memory and bandwidth.

The newest entries come first. If the mirror has fewer rows than there are entries, it holds those that were used last,
with all that is above them in the prefix forest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchortp_sglang.memory.chain_hash import UNKNOWN, Ids
from anchortp_sglang.memory.kept_slots import most_wanted
from anchortp_sglang.memory.kv_mirror import KVMirror
from anchortp_sglang.memory.page_table import PageTable
from anchortp_sglang.memory.prefix_forest import ROOT, Mask

_BURST_S = 0.25
_CHOICE_INTERVAL_S = 1.0
"""Choosing what a mirror that is too small should hold looks at the whole forest: not with every step."""


class TokenBucket:
    """At most ``bytes_per_s`` in the long run, and never more than a quarter of a second's worth at once."""

    def __init__(self, bytes_per_s: float, piece_bytes: int) -> None:
        self._bytes_per_s, self._piece_bytes = bytes_per_s, piece_bytes
        self._most = max(bytes_per_s * _BURST_S, piece_bytes)
        self._left, self._at = self._most, 0.0

    def allowance(self, now: float) -> int:
        """How many pieces may go now (``now``: monotonic seconds)."""
        self._left = min(self._most, self._left + self._bytes_per_s * max(0.0, now - self._at))
        self._at = now
        return int(self._left // self._piece_bytes)

    def spend(self, pieces: int) -> None:
        self._left -= pieces * self._piece_bytes


class MirrorSchedule:
    """Assigns rows of ``mirror`` to slots of ``table``. Takes over the rows that an earlier generation left."""

    def __init__(self, table: PageTable, mirror: KVMirror, bytes_per_s: float) -> None:
        self._table, self._mirror = table, mirror
        self._bucket = TokenBucket(bytes_per_s, mirror.shape.row_bytes)
        self._done_step = -1
        self._chosen: Mask | None = None
        self._chosen_step = -1
        self._choose_at = 0.0
        self._take_over()

    def assign(self, now: float) -> int:
        """Give rows to slots that lack one, as far as bandwidth and memory allow; how many."""
        step = self._table.step
        allowed = self._bucket.allowance(now)
        if step == self._done_step or not allowed:
            return 0
        hashes = self._table.hashes.copy()
        hashes[ROOT] = UNKNOWN
        free, mirrored = self._sort_rows(hashes)
        wanted = np.flatnonzero((hashes != UNKNOWN) & ~mirrored)
        up_to_date = len(wanted) <= len(free)
        if not up_to_date:
            wanted, free = self._choose(wanted, free, now)
            up_to_date = self._chosen_step >= step
        newest_first = np.lexsort((wanted, -self._table.last_use[wanted]))
        slots = np.sort(wanted[newest_first[: min(allowed, len(free))]])
        if up_to_date and len(slots) == len(wanted):
            self._done_step = step
        if len(slots):
            self._mirror.assign(_rows_for(slots, free), slots, hashes[slots])
            self._bucket.spend(len(slots))
        return len(slots)

    def _take_over(self) -> None:
        """Rows of the last generation are for whichever slots hold their chains now."""
        table, mirror = self._table, self._mirror
        slots = np.flatnonzero(table.hashes)
        slots = slots[slots != ROOT]
        rows = mirror.rows_of(table.hashes[slots])
        slots, rows = slots[rows >= 0], rows[rows >= 0]
        mirror.slots[:] = ROOT
        mirror.slots[rows] = slots

    def _sort_rows(self, hashes: np.ndarray) -> tuple[Ids, Mask]:
        """The free rows, after those that hold what is no more have been freed; and which slots have a row."""
        mirror = self._mirror
        used = mirror.hashes != UNKNOWN
        stale = used & (hashes[mirror.slots] != mirror.hashes)
        mirror.free(np.flatnonzero(stale))
        mirrored = np.zeros(len(hashes), np.bool_)
        mirrored[mirror.slots[used & ~stale]] = True
        return np.flatnonzero(~used | stale), mirrored

    def _choose(self, wanted: Ids, free: Ids, now: float) -> tuple[Ids, Ids]:
        """What is wanted, and the rows for it, when there is no room for everything."""
        mirror = self._mirror
        if self._chosen is None or (now >= self._choose_at and self._table.step > self._chosen_step):
            self._choose_at = now + _CHOICE_INTERVAL_S
            entries = self._table.entries()
            self._chosen = most_wanted(entries, entries.verified(), mirror.shape.rows, 1)
            self._chosen_step = entries.step
            unwanted = np.flatnonzero((mirror.hashes != UNKNOWN) & ~self._chosen[mirror.slots])
            mirror.free(unwanted)
            free = np.union1d(free, unwanted)
        return wanted[self._chosen[wanted]], free


def _rows_for(slots: Ids, free: Ids) -> Ids:
    """A free row for each slot; the one of its own number where it can be, so that runs of slots are runs of rows."""
    own = np.isin(slots, free, assume_unique=True)
    rows = slots.copy()
    rows[~own] = np.setdiff1d(free, slots, assume_unique=True)[: np.count_nonzero(~own)]
    return rows


@dataclass(frozen=True)
class MirrorFacts:
    """``used``: slots with an entry; ``mirrored``: of them, those whose KV the mirror holds completely."""

    rows: int
    used: int
    mirrored: int

    @property
    def lag_slots(self) -> int:
        """Slots that the mirror has room for and does not hold yet."""
        return max(0, min(self.used, self.rows) - self.mirrored)

    @property
    def coverage(self) -> float:
        """Share of the used slots that a lost device would not take along."""
        return self.mirrored / self.used if self.used else 1.0


def mirror_facts(table: PageTable, mirror: KVMirror) -> MirrorFacts:
    """How far the mirror is. For any process that maps both, at any time."""
    hashes = table.hashes
    rows = np.flatnonzero(mirror.complete())
    slots = mirror.slots[rows]
    current = (slots > ROOT) & (slots < len(hashes))
    mirrored = np.count_nonzero(hashes[slots[current]] == mirror.hashes[rows[current]])
    return MirrorFacts(mirror.shape.rows, table.used(), int(mirrored))
