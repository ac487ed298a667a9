"""The slots that the next generation retains, and their new numbers: pure functions over a slot table's entries.

Every rank computes them from the same shared memory and must get the same result, so nothing here depends on the rank.
The retained slots are whole pages and include all their ancestors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from anchortp_sglang.kv import choice_loops as loops
from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids
from anchortp_sglang.kv.equal_hashes import first_places, places_of
from anchortp_sglang.kv.namespaces import MOST_NAMESPACES, PLAIN, Key, namespace_seed
from anchortp_sglang.kv.prefix_forest import ROOT, Chain, Forest, Mask, verified_forest

__all__ = ["Entries", "Ordered", "Reason", "RetainedSlots", "most_urgent", "retain"]


Reason = Literal["broken_chain", "lost_with_device", "incomplete_page", "no_room"]
"""Why a slot is not retained. A dropped parent is no reason of its own: ancestors are dropped last."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The arrays of a slot table, an element for each slot: ``hashes`` uint64, the others int64. ``step``: its clock.

    ``namespaces``: keys by place. Parent -1 - place is the root of a namespace, parent 0 the plain root.
    """

    seed: int
    step: int
    hashes: Hashes
    tokens: Ids
    parents: Ids
    last_use: Ids
    namespaces: Mapping[int, Key]

    def forest(self) -> Forest:
        """Return the slots whose chain up to a root is intact."""
        return verified_forest(self.hashes, self.tokens, self.parents, self.seed, self.roots())

    def roots(self) -> Hashes:
        """Return uint64[MOST_NAMESPACES]: the seed of each namespace, ``UNKNOWN`` where there is none."""
        roots = np.zeros(MOST_NAMESPACES, np.uint64)
        for place, key in self.namespaces.items():
            roots[place] = namespace_seed(self.seed, key)
        return roots

    def verified(self) -> Mask:
        """Return bool[slots]: the slots whose chain up to a root is intact."""
        return self.forest().mask()

    def intact_chains(self) -> list[Chain]:
        """Return all intact chains, one for each leaf, oldest first."""
        return self.forest().chains(self.tokens, self.last_use)

    def namespace(self, chain: Chain) -> Key:
        """Return the namespace of a chain."""
        parent = int(self.parents[chain.slots[0]])
        return PLAIN if parent == ROOT else self.namespaces[-1 - parent]


class Ordered(Protocol):
    """Orders the slots of intact chains: a Forest, or a FollowedTable's runs."""

    def chains(self, tokens: Ids, last_use: Ids) -> list[Chain]:
        """Return the chains, as ``Forest.chains`` does."""
        ...


@dataclass(frozen=True, eq=False)
class RetainedSlots:
    """The retained slots: ``slots`` (int64[n], ascending) of the old generation, ``numbers`` (int64[n]) in the new one.

    ``entries``: those of the new slot table, ``forest``: theirs. Entries without a hash have no other meaning either.
    ``dropped``: numbers of the other slots with an entry, by reason. ``sums`` (uint64[4]): what
    ``choice_loops.add_up`` finds, if that is known.
    """

    slots: Ids
    numbers: Ids
    entries: Entries
    forest: Ordered
    dropped: dict[Reason, int]
    sums: Hashes | None = None

    def chains(self) -> list[Chain]:
        """Return all retained chains in their new slots, least recently used first."""
        return self.forest.chains(self.entries.tokens, self.entries.last_use)

    def digest(self) -> str:
        """Return a hex digest: ranks with equal digests retain the same slots under the same numbers.

        It is meant for ranks that err, not for any that deceive: sums with a pseudorandom weight for each number.
        Tokens are left out, as chain hashes follow from them.
        """
        new, sums = self.entries, self.sums
        if sums is None:
            sums = np.zeros(4, np.uint64)
            loops.add_up(self.slots, self.numbers, new.hashes, new.parents, new.last_use, sums)
        return f"{len(self.slots)}-" + "".join(f"{each:016x}" for each in sums.tolist())


def retain(
    old: Entries, usable: Mask | None, rows: int, page_size: int, running: Hashes | None = None
) -> RetainedSlots:
    """Choose the slots of ``old`` to retain in ``rows`` rows. ``usable``: bool[slots] with their KV; None for all.

    Of slots with equal chains one is retained, as the parent of all their children. If fewer rows than before have no
    room for all, running requests come first, in the order of ``running`` (chain hashes of their tokens), then the
    slots used last; chains are cut at their ends. With fewer rows the slots get new numbers without gaps, in their old
    order; otherwise they keep their numbers.

    ``old`` may be views of a table that is no longer written to; the result then has some too.
    """
    dropped: dict[Reason, int] = {}
    known = before = int(np.count_nonzero(old.hashes)) - int(old.hashes[ROOT] != UNKNOWN)

    def drop(forest: Forest, reason: Reason) -> Forest:
        nonlocal before
        dropped[reason], before = before - len(forest), len(forest)
        return forest

    forest = drop(old.forest(), "broken_chain")
    forest = drop(forest if usable is None else forest.closed(usable[forest.slots]), "lost_with_device")
    forest = drop(forest if page_size == 1 else _whole_pages(forest, page_size), "incomplete_page")
    joined = _without_copies(forest, old, page_size)
    before = len(joined)
    fits = rows >= len(old.hashes)
    kept = drop(joined if fits else most_urgent(joined, old, rows - page_size, page_size, running), "no_room")
    slots = numbers = kept.ascending
    if rows == len(old.hashes):
        new = _in_place(old, kept, whole=len(kept) == known, joined=joined is not forest)
    else:
        if not fits:
            numbers = page_size + np.arange(len(slots))
        new, kept = _renumbered(old, kept, numbers, rows)
    return RetainedSlots(slots, numbers, new, kept, dropped)


def _whole_pages(forest: Forest, page_size: int) -> Forest:
    """Return the nodes of full pages with consecutive tokens, as the prefix tree needs them."""
    follow, whole = np.zeros(forest.table_slots // page_size + 1, np.int32), np.empty(len(forest), np.bool_)
    loops.find_whole_pages(forest.slots, forest.above, page_size, follow, whole)
    return forest.closed(whole)


def _without_copies(forest: Forest, old: Entries, page_size: int) -> Forest:
    """Return ``forest``, in whole pages, with one page of all that hold equal chains, and all their children below it.

    Requests that compute the same prefix at the same time have separate slots until the prefix tree frees them.
    """
    ends = forest.ascending if page_size == 1 else forest.ascending[page_size - 1 :: page_size]
    first, copies = first_places(old.hashes[ends])
    if not copies:
        return forest
    first_page = np.arange(forest.table_slots // page_size)
    first_page[ends // page_size] = ends[first] // page_size
    node = np.empty(forest.table_slots, np.int32)
    node[forest.slots] = np.arange(len(forest))
    its_first = node[first_page[forest.slots // page_size] * page_size + forest.slots % page_size]
    above, only = np.empty(len(forest), np.int32), np.empty(len(forest), np.bool_)
    loops.join_copies(forest.slots, forest.above, its_first, old.tokens, old.parents, above, only)
    return replace(forest, above=above).closed(only)


def most_urgent(forest: Forest, old: Entries, capacity: int, page_size: int, running: Hashes | None = None) -> Forest:
    """Return the most urgent nodes of ``forest``, in whole pages, at most ``capacity``. ``running``: as in ``retain``.

    A slot's ancestors are at least as urgent as it is. One chain is taken whole before the next, instead of a part of
    each. ``old`` may be views of a table that is being written to.
    """
    if len(forest) <= capacity:
        return forest
    of_slots = old.last_use
    if running is not None:
        place = places_of(running, old.hashes).astype(np.int64)
        of_slots = np.where(place < 0, of_slots, old.step + len(running) - place)
    urgency = np.empty(len(forest), np.int64)
    depth, best, summits = np.empty((3, len(forest)), np.int32)
    count = loops.find_best_below(forest.slots, forest.above, of_slots, urgency, depth, best, summits)
    turns = summits[:count]
    turns = turns[np.lexsort((forest.slots[turns], depth[turns], urgency[turns]))[::-1]]
    room, taken = np.zeros(len(forest), np.int32), np.empty(len(forest), np.bool_)
    pages = np.zeros(forest.table_slots // page_size + 1, np.bool_)
    loops.take_in_turn(forest.slots, best, turns, page_size, max(0, capacity) // page_size, room, pages, taken)
    return forest.closed(taken)


def _in_place(old: Entries, kept: Forest, whole: bool, joined: bool) -> Entries:
    """Return the entries of ``kept`` under their old numbers, as far as possible without copies.

    ``whole``: whether all entries are kept. ``joined``: whether some are below another slot than before.
    """
    hashes, parents = old.hashes, old.parents
    if not whole:
        hashes = np.where(kept.mask(), hashes, np.uint64(UNKNOWN))
    if joined:
        parents = parents.copy()
        _hang(kept, parents)
    return replace(old, hashes=hashes, parents=parents, namespaces=_namespaces(old, kept))


def _renumbered(old: Entries, kept: Forest, numbers: Ids, rows: int) -> tuple[Entries, Forest]:
    """Return the entries and the forest of ``kept`` in ``rows`` rows, its ascending slots under ``numbers``."""
    slots = kept.ascending
    number = np.empty(kept.table_slots, np.int32)
    number[slots] = numbers
    forest = Forest(number[kept.slots], kept.above, rows)
    hashes, (tokens, parents, last_use) = np.full(rows, UNKNOWN, np.uint64), np.zeros((3, rows), np.int64)
    hashes[numbers], tokens[numbers], last_use[numbers] = old.hashes[slots], old.tokens[slots], old.last_use[slots]
    parents[numbers] = old.parents[slots]
    _hang(forest, parents)
    hashes[ROOT] = old.seed
    return Entries(old.seed, old.step, hashes, tokens, parents, last_use, _namespaces(old, kept)), forest


def _hang(forest: Forest, parents: Ids) -> None:
    """Set the parents of all slots that are not below a root."""
    below = np.flatnonzero(forest.above >= 0)
    parents[forest.slots[below]] = forest.slots[forest.above[below]]


def _namespaces(old: Entries, kept: Forest) -> dict[int, Key]:
    if not old.namespaces:
        return {}
    used = set((-1 - old.parents[kept.slots[kept.above < 0]]).tolist())
    return {place: key for place, key in old.namespaces.items() if place in used}
