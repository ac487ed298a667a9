"""The slots that the next generation retains, and their new numbers: pure functions over a slot table's entries.

Every rank computes them from the same shared memory and must get the same result, so nothing here depends on the rank.
The retained slots are whole pages and include all their ancestors. Entries are copied before they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids, mix
from anchortp_sglang.kv.namespaces import MOST_NAMESPACES, PLAIN, Key, namespace_seed, namespaces_used
from anchortp_sglang.kv.prefix_forest import (
    ROOT,
    Chain,
    Mask,
    best_below,
    chains_of,
    closed,
    paths_of_mask,
    verified_slots,
)

__all__ = ["Entries", "RetainedSlots", "most_urgent", "retain"]


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

    @cached_property
    def above(self) -> Ids:
        """int64[slots]: the parents, with slot 0 for all roots."""
        return np.maximum(self.parents, ROOT)

    def verified(self) -> Mask:
        """Return bool[slots]: the slots whose chain up to a root is intact."""
        roots = np.zeros(MOST_NAMESPACES, np.uint64)
        for place, key in self.namespaces.items():
            roots[place] = namespace_seed(self.seed, key)
        return verified_slots(self.hashes, self.tokens, self.parents, self.seed, roots)

    def intact_chains(self) -> list[Chain]:
        """Return all intact chains, one for each leaf, oldest first. Equal arrays give equal lists.

        Chains may have equal tokens in different slots.
        """
        return self.chains(self.verified())

    def chains(self, mask: Mask) -> list[Chain]:
        """Return the chains of ``mask`` (verified, closed under ancestors), least recently used first."""
        return chains_of(mask, self.tokens, self.above, self.last_use)

    def namespace(self, chain: Chain) -> Key:
        """Return the namespace of a chain."""
        parent = int(self.parents[chain.slots[0]])
        return PLAIN if parent == ROOT else self.namespaces[-1 - parent]


@dataclass(frozen=True, eq=False)
class RetainedSlots:
    """The retained slots: ``slots`` (int64[n], ascending) of the old generation, ``numbers`` (int64[n]) in the new one.

    ``entries``: those of the new slot table. ``dropped``: numbers of the other slots with an entry, by reason.
    """

    slots: Ids
    numbers: Ids
    entries: Entries
    dropped: dict[Reason, int]

    def chains(self) -> list[Chain]:
        """Return all retained chains in their new slots, least recently used first."""
        mask = np.zeros(len(self.entries.hashes), np.bool_)
        mask[self.numbers] = True
        return self.entries.chains(mask)

    def digest(self) -> str:
        """Return a hex digest: ranks with equal digests retain the same slots under the same numbers.

        It is meant for ranks that err, not for any that deceive: sums with a pseudorandom weight for each number.
        Tokens are left out, as chain hashes follow from them.
        """
        weights, new = mix(self.numbers), self.entries
        columns = (self.slots, *(column[self.numbers] for column in (new.hashes, new.parents, new.last_use)))
        sums = [int((column.view(np.uint64) * weights).sum()) for column in columns]
        return f"{len(self.slots)}-" + "".join(f"{each:016x}" for each in sums)


def retain(
    old: Entries, usable: Mask | None, rows: int, page_size: int, running: Hashes | None = None
) -> RetainedSlots:
    """Choose the slots of ``old`` to retain in ``rows`` rows. ``usable``: bool[slots] with their KV; None for all.

    Of slots with equal chains one is retained, as the parent of all their children. If fewer rows than before have no
    room for all, running requests come first, in the order of ``running`` (chain hashes of their tokens), then the
    slots used last; chains are cut at their ends. With fewer rows the slots get new numbers without gaps, in their old
    order; otherwise they keep their numbers.
    """
    dropped: dict[Reason, int] = {}

    def drop(before: Mask, after: Mask, reason: Reason) -> Mask:
        dropped[reason] = int(np.count_nonzero(before)) - int(np.count_nonzero(after))
        return after

    known = old.hashes != UNKNOWN
    known[ROOT] = False
    mask = drop(known, old.verified(), "broken_chain")
    mask = drop(mask, mask if usable is None else closed(mask & usable, old.above), "lost_with_device")
    mask = drop(mask, mask if page_size == 1 else _whole_pages(mask, old.above, page_size), "incomplete_page")
    mask, old = _without_copies(mask, old, page_size)
    before = len(old.hashes)
    fits = rows >= before
    mask = drop(mask, mask if fits else most_urgent(old, mask, rows - page_size, page_size, running), "no_room")
    slots = np.flatnonzero(mask)
    numbers = slots if fits else _dense(slots, page_size)
    return RetainedSlots(slots, numbers, _renumbered(old, slots, numbers, rows), dropped)


def _without_copies(mask: Mask, old: Entries, page_size: int) -> tuple[Mask, Entries]:
    """Return ``mask`` with one page of all that hold equal chains, and entries with its slots as parents.

    Requests that compute the same prefix at the same time have separate slots until the prefix tree frees them.
    """
    pages = np.flatnonzero(mask[page_size - 1 :: page_size])
    ends = old.hashes[page_size - 1 :: page_size][pages]
    in_order = np.sort(ends)
    if not (in_order[1:] == in_order[:-1]).any():
        return mask, old
    pages = pages[np.argsort(ends, kind="stable")]
    is_first = np.append(True, in_order[1:] != in_order[:-1])
    first_page = np.arange(len(mask) // page_size)
    first_page[pages] = pages[is_first][np.cumsum(is_first) - 1]
    slots = np.arange(len(mask))
    first_slot = first_page[slots // page_size] * page_size + slots % page_size
    below = np.flatnonzero(mask & (old.parents > ROOT))
    parents = old.parents.copy()
    parents[below] = first_slot[parents[below]]
    merged = replace(old, parents=parents)
    alone = mask & (first_slot == slots)
    # Equal hashes suggest equal chains; equal tokens below equal parents, from the roots down, prove it.
    proven = (old.tokens == old.tokens[first_slot]) & (parents == parents[first_slot])
    if proven[mask].all():
        return alone, merged
    return closed(alone & closed(mask & proven, old.above), merged.above), merged


def _whole_pages(mask: Mask, parents: Ids, page_size: int) -> Mask:
    """Return bool[slots]: the slots of full pages with consecutive tokens, as the prefix tree needs them."""
    pages = mask.reshape(-1, page_size)
    slots = np.arange(len(mask)).reshape(pages.shape)
    above = parents.reshape(pages.shape)
    follows = (above == slots - 1)[:, 1:].all(1)
    begins = (above[:, 0] == ROOT) | ((above[:, 0] + 1) % page_size == 0)
    whole = np.repeat(pages.all(1) & follows & begins, page_size)
    return closed(whole, parents)


def most_urgent(old: Entries, mask: Mask, capacity: int, page_size: int, running: Hashes | None = None) -> Mask:
    """Return bool[slots]: the most urgent slots of ``mask``, at most ``capacity``. ``running``: as in ``retain``.

    ``mask`` is closed under ancestors, and so is the result: a slot's ancestors are at least as urgent. One chain is
    taken whole before the next, instead of a part of each.
    """
    slots = np.flatnonzero(mask)
    if len(slots) <= capacity:
        return mask
    paths = paths_of_mask(mask, old.above)
    # Priorities are unique, and each slot gets the best among its descendants: chains stay together.
    ranks = np.zeros(len(mask), np.int64)
    ranks[slots[np.lexsort((paths.depths(slots), _urgency(old, running)[slots]))]] = np.arange(1, len(slots) + 1)
    best = best_below(paths, ranks)
    firsts = slots[slots % page_size == 0]
    order = np.lexsort((paths.depths(firsts), -best[firsts]))
    taken = firsts[order[: capacity // page_size]]
    wanted = np.zeros(len(mask), np.bool_)
    wanted[(taken[:, None] + np.arange(page_size)).ravel()] = True
    return closed(wanted, old.above)


def _urgency(old: Entries, running: Hashes | None) -> Ids:
    """Return int64[slots]: the step of the last use, or more than any step for running requests, most for the first."""
    urgency = old.last_use.copy()
    if running is None or not running.size:
        return urgency
    order = np.argsort(running, kind="stable")
    at = order[np.minimum(np.searchsorted(running, old.hashes, sorter=order), len(running) - 1)]
    is_running = running[at] == old.hashes
    urgency[is_running] = old.step + len(running) - at[is_running]
    return urgency


def _dense(slots: Ids, page_size: int) -> Ids:
    """Return new numbers without gaps, from the first page after the padding on."""
    return page_size + np.arange(len(slots), dtype=np.int64)


def _renumbered(old: Entries, slots: Ids, numbers: Ids, rows: int) -> Entries:
    new_number = np.full(len(old.hashes), ROOT, np.int64)
    new_number[slots] = numbers
    hashes, (tokens, parents, last_use) = np.full(rows, UNKNOWN, np.uint64), np.zeros((3, rows), np.int64)
    hashes[numbers], tokens[numbers], last_use[numbers] = old.hashes[slots], old.tokens[slots], old.last_use[slots]
    parents[numbers] = np.where(old.parents[slots] < 0, old.parents[slots], new_number[old.above[slots]])
    hashes[ROOT] = old.seed
    used = namespaces_used(parents, hashes)
    namespaces = {place: key for place, key in old.namespaces.items() if used[place]}
    return Entries(old.seed, old.step, hashes, tokens, parents, last_use, namespaces)
