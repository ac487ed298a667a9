"""Follows a slot table that another process writes, so that little is left to do when that process has died.

A look compares the table with what was noted of it at the last look, and puts right the chains of the slots that
differ. The comparison is of content, so nothing depends on the writer: a torn or spoiled entry is an entry like any
other, and one that was read while it was written differs at the next look. ``retained`` is a last look at a table that
is no longer written to. It finds what ``retained_slots.retain`` finds, whatever was seen before: what one rank has
followed to a later moment than another does not show.

For a next generation with the same slots.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from anchortp_sglang.kv import follow_loops as loops
from anchortp_sglang.kv import run_loops
from anchortp_sglang.kv.chain_hash import UNKNOWN, Ids
from anchortp_sglang.kv.compiled import Nodes
from anchortp_sglang.kv.forest_loops import NONE
from anchortp_sglang.kv.namespaces import MOST_NAMESPACES
from anchortp_sglang.kv.prefix_forest import Chain
from anchortp_sglang.kv.retained_slots import Entries, RetainedSlots
from anchortp_sglang.kv.slot_table import SlotTable

__all__ = ["WORTHWHILE", "FollowedTable", "Runs"]

WORTHWHILE = 0.1
"""The share of changed slots up to which following the rest takes less time than to read the whole table."""

_CHUNK = 1 << 16
"""Slots that are compared between two questions whether to stop: a fifth of a millisecond."""


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of a prefix forest: ``run`` (int32[4, runs]), ``slots`` and ``tokens`` as in ``run_loops.py``."""

    run: Nodes
    slots: Ids
    tokens: Ids

    def chains(self, tokens: Ids, last_use: Ids) -> list[Chain]:
        """Return a chain for each leaf, as ``Forest.chains`` does; where it can be, as views of ``self``'s arrays.

        ``tokens`` is not read, as they are known.
        """
        runs = self.run.shape[1]
        upper, ends, above = np.empty(runs, np.int32), np.empty(runs + 1, np.int32), np.empty(runs, np.int64)
        ends = ends[: run_loops.find_ends(self.run, runs, upper, above, ends)]
        leaves = self.slots[self.run[run_loops.BEGIN, ends] + self.run[run_loops.LENGTH, ends] - 1]
        stamps = last_use[leaves]
        order = np.lexsort((leaves, stamps))
        ends, shared = ends[order], np.empty(len(ends), np.int64)
        run_loops.find_shared(self.run, upper, above, ends, np.zeros(runs, np.int32), shared)
        chains: list[Chain] = []
        begins, lengths = self.run[run_loops.BEGIN, ends], self.run[run_loops.LENGTH, ends]
        columns = ends, above[ends], begins, lengths, shared, stamps[order]
        for end, n_above, begin, length, n_shared, stamp in zip(*(c.tolist() for c in columns), strict=True):
            slots, its_tokens = self.slots[begin : begin + length], self.tokens[begin : begin + length]
            if n_above:
                slots, its_tokens = np.empty((2, n_above + length), np.int64)
                run_loops.lay_out(self.run, upper, above, end, self.slots, self.tokens, slots, its_tokens)
            chains.append(Chain(slots, its_tokens, n_shared, stamp))
        return chains


class FollowedTable:
    """Remembers what was seen of ``table`` at the last look, and its chains. Not thread-safe.

    It takes about 100 bytes for each slot that was ever used. ``page_size``: slots of a page.
    """

    def __init__(self, table: SlotTable, page_size: int = 1) -> None:
        slots = table.slots
        self._table, self._page_size = table, page_size
        self.last_changed = 0
        """Number of slots that ``retained`` found changed."""
        # Secret numbers: clients choose tokens, but not which entries look alike here.
        self._keys = np.array([secrets.randbits(64) | 1 for _ in range(3)], np.uint64)
        self._factor = np.uint64(secrets.randbits(64) | 1)
        self._hashes, self._prints = np.zeros((2, slots), np.uint64)
        self._tokens, self._last_use = np.zeros((2, slots), np.int64)
        self._parents = np.zeros(slots, np.int32)
        self._roots = np.zeros(MOST_NAMESPACES, np.uint64)
        self._pending, self._child, self._sibling, self._after, self._before = np.empty((5, slots), np.int32)
        self._found = np.empty(slots + 1, np.int32)
        self._ascending = np.full(slots, 0, np.int64)  # memory that is new to the kernel is slow, so it is written to
        self._run_slots, self._run_tokens = np.empty((2, 9 * slots // 4 + 4096), np.int64)
        most_runs = 5 * slots // 4 + 4096
        self._run, self._kept = np.empty((4, most_runs), np.int32), np.empty(most_runs, np.int32)
        self._where = np.empty(slots, np.int32)
        self._index = np.empty(2 << slots.bit_length(), np.int32)
        self._clear()

    def look(self) -> None:
        """Follow the table, which may be written to meanwhile."""
        changed = self.compare()
        assert changed is not None
        self.follow(changed)

    def follow(self, changed: Nodes) -> None:
        """Put right the chains of the slots that ``compare`` has found."""
        self._follow(changed, self._table.entries())
        places, runs = int(self._counts[loops.PLACES]), int(self._counts[loops.RUNS])
        crowded = 8 * places > 7 * len(self._run_slots) or 8 * runs > 7 * len(self._kept)
        if not self._complete or crowded or runs > 4 * self._least_runs + 4096:
            self._rebuild()

    def retained(self, old: Entries, most_changed: float = 1.0) -> RetainedSlots | None:
        """Return ``retain(old, None, slots, page_size)``, and be of no more use. ``old``: the table's last entries.

        None if it cannot be told from what was followed, or more than ``most_changed`` of the slots have changed.
        """
        if not self._complete:
            return None
        changed = self.compare()
        assert changed is not None
        self.last_changed = len(changed)
        if len(changed) > most_changed * self._table.slots:
            return None
        self._follow(changed, old)
        if not self._complete:
            return None
        n_nodes, n_orphans = int(self._counts[loops.NODES_]), int(self._counts[loops.ORPHANS])
        if self._page_size > 1:
            self._leave_incomplete()
        n_incomplete = n_nodes - int(self._counts[loops.NODES_])
        joined = bool(self._counts[loops.COPIES])
        if not self._complete or (joined and not self._join()):
            return None
        slots = self._ascending[: loops.sort(self._where, self._ascending)]
        hashes, parents = old.hashes, old.parents
        if len(slots) < n_nodes + n_orphans:
            hashes = np.where(self._where >= 0, hashes, np.uint64(UNKNOWN))
        if joined:
            parents = parents.copy()
            parents[slots] = self._parents[slots]
        run = self._run[:, : self._counts[loops.RUNS]]
        hangs = run[run_loops.HANG, run[run_loops.LENGTH] > 0]
        places = set((loops.PENDING - hangs[hangs < NONE]).tolist())
        namespaces = {place: key for place, key in old.namespaces.items() if place in places}
        entries = replace(old, hashes=hashes, parents=parents, namespaces=namespaces)
        runs = Runs(np.ascontiguousarray(run), self._run_slots, self._run_tokens)
        dropped = {"broken_chain": n_orphans, "lost_with_device": 0, "incomplete_page": n_incomplete, "no_room": 0}
        return RetainedSlots(slots, slots, entries, runs, dropped, self._sums)  # type: ignore[arg-type]

    def _clear(self) -> None:
        self._where.fill(NONE)
        self._index.fill(NONE)
        self._counts, self._sums = np.zeros(5, np.int64), np.zeros(4, np.uint64)
        self._least_runs = 0
        self._complete = True

    def _rebuild(self) -> None:
        """Put all that was noted in new runs, without gaps."""
        self._clear()
        self._put_right(np.flatnonzero(self._hashes).astype(np.int32), np.zeros(MOST_NAMESPACES, np.bool_))
        self._least_runs = int(self._counts[loops.RUNS])

    def compare(self, stopped: Callable[[], bool] = lambda: False) -> Nodes | None:
        """Return the slots whose entries are not those that were noted, until the next call; None if it is to stop."""
        table, count = self._table, 0
        columns = table.hashes, table.tokens, table.parents, table.last_use
        for begin in range(1, table.slots, _CHUNK):
            if stopped():
                return None
            end = min(begin + _CHUNK, table.slots)
            count += loops.find_changed(*columns, self._prints, self._keys, begin, end, self._found[count:])
        return self._found[:count]

    def _follow(self, changed: Nodes, entries: Entries) -> None:
        """Note the entries of ``changed`` slots, and put their chains right."""
        roots = entries.roots()
        stale, self._roots = self._roots != roots, roots
        if self._complete:
            self._put_right(changed, stale, entries)
        else:
            self._read(changed, entries)

    def _put_right(self, changed: Nodes, stale: np.ndarray, entries: Entries | None = None) -> None:
        """Take apart the chains of ``changed`` slots and below ``stale`` roots; read ``entries``; assemble them."""
        found = self._detach(changed, stale)
        if entries is not None:
            self._read(changed, entries)
        self._attach(found)

    def _detach(self, changed: Nodes, stale: np.ndarray) -> int:
        return loops.detach(
            changed, stale, self._hashes, self._parents, self._last_use, self._factor, self._index, self._after,
            self._before, self._where, self._pending, self._run_slots, self._run, self._kept, self._counts, self._sums,
        )  # fmt: skip

    def _read(self, changed: Nodes, entries: Entries) -> None:
        loops.read(
            changed, entries.hashes, entries.tokens, entries.parents, entries.last_use, self._keys, self._hashes,
            self._tokens, self._parents, self._last_use, self._prints,
        )  # fmt: skip

    def _attach(self, found: int) -> None:
        self._complete = loops.attach(
            found, self._hashes, self._tokens, self._parents, self._last_use, np.uint64(self._table.seed), self._roots,
            self._factor, self._index, self._after, self._before, self._where, self._pending, self._child,
            self._sibling, self._run_slots, self._run_tokens, self._run, self._counts, self._sums,
        )  # fmt: skip

    def _leave_incomplete(self) -> None:
        """Leave out what is not in full pages. What was noted is then no longer what is in the table."""
        slots = self._found[: loops.find_incomplete(self._where, self._parents, self._page_size, self._found)]
        found = self._detach(slots, np.zeros(MOST_NAMESPACES, np.bool_))
        self._hashes[slots] = UNKNOWN
        self._attach(found)

    def _join(self) -> bool:
        """Leave one page of all with equal chains, the parent of all their children; return whether that is possible.

        As ``retained_slots.retain`` does. What was noted is then no longer what is in the table.
        """
        first = np.full(self._table.slots, NONE, np.int32)
        if not loops.find_copies(
            self._hashes, self._tokens, self._parents, self._factor, self._after, self._where, self._page_size,
            self._index, first,
        ):  # fmt: skip
            return False
        copies = np.flatnonzero(first >= 0).astype(np.int32)
        found = self._detach(copies, np.zeros(MOST_NAMESPACES, np.bool_))
        loops.join_copies(found, self._pending, first, self._hashes, self._parents)
        self._attach(found)
        return self._complete
