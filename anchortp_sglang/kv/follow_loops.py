"""Loops that let the runs of a prefix forest (``run_loops.py``) follow a slot table, for ``followed_table.py``.

``where`` (int32[slots]) holds the place of each slot that is in a run, ``NONE`` of each without an entry, and
``PENDING`` - n of the slot that is ``pending[n]``: its entry is not known to be intact.

All arrays belong to this process but the live columns of a table. ``read`` and ``find_changed`` alone read those;
``read`` each number once, and notes no parent that is neither a slot nor negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anchortp_sglang.kv.chain_hash import MULTIPLIER, UNKNOWN, Hashes, Ids
from anchortp_sglang.kv.compiled import FLAGS, HASH, HASHES, ID, IDS, NODES, Mask, Nodes, compiled, written
from anchortp_sglang.kv.forest_loops import NONE, mix
from anchortp_sglang.kv.hash_index import first_with, index_slot, unindex_slot
from anchortp_sglang.kv.run_loops import BEGIN, HANG, LENGTH, ROOM, run_of

PENDING = -2
RUNS, PLACES, NODES_, ORPHANS, COPIES = range(5)
"""Counts: of runs, of used places, of slots in runs, of the others with an entry, of slots with another's hash."""

NOWHERE = -(1 << 31)
"""Stands for the parent of an entry whose parent is neither a slot nor a root."""

_TO_IDS, _TO_NODES, _TO_HASHES, _TO_FLAGS = map(written, (IDS, NODES, HASHES, FLAGS))
_TO_RUN = written(NODES, 2)
_A, _1, _UNKNOWN = np.uint64(MULTIPLIER), np.uint64(1), np.uint64(UNKNOWN)
_BLOCK = 256
_MOST_SPARE = 256


@compiled(HASHES, IDS, IDS, IDS, HASHES, HASHES, ID, ID, _TO_NODES)
def find_changed(
    hashes: Hashes, tokens: Ids, parents: Ids, last_use: Ids, prints: Hashes, keys: Hashes, begin: int, end: int,
    found: Nodes,
) -> int:  # fmt: skip
    """Write the slots from ``begin`` to ``end`` whose entries do not have their ``prints`` to ``found``; count them.

    A print is the sum of an entry's columns, all but the first times one of the odd ``keys`` (uint64[3]).
    """
    changed = 0
    for start in range(begin, end, _BLOCK):
        stop = min(start + _BLOCK, end)
        differ = _UNKNOWN
        for slot in range(start, stop):
            its = hashes[slot] + np.uint64(tokens[slot]) * keys[0]
            its += np.uint64(parents[slot]) * keys[1] + np.uint64(last_use[slot]) * keys[2]
            differ |= its ^ prints[slot]
        if differ:
            for slot in range(start, stop):
                its = hashes[slot] + np.uint64(tokens[slot]) * keys[0]
                its += np.uint64(parents[slot]) * keys[1] + np.uint64(last_use[slot]) * keys[2]
                found[changed] = slot
                changed += its != prints[slot]
    return changed


@compiled(_TO_HASHES, HASH, HASHES, NODES, IDS, ID)
def add_entry(sums: Hashes, sign: Any, hashes: Hashes, parents: Nodes, last_use: Ids, slot: int) -> None:
    """Add to ``sums`` (uint64[4]), ``sign`` times, what ``choice_loops.add_up`` adds for a slot that keeps its number.

    ``sign``: 1, or 2**64 - 1 to take it away.
    """
    weight = mix(np.uint64(slot)) * sign
    sums[0] += np.uint64(slot) * weight
    sums[1] += hashes[slot] * weight
    sums[2] += np.uint64(np.int64(parents[slot])) * weight
    sums[3] += np.uint64(last_use[slot]) * weight


@compiled(
    NODES, FLAGS, HASHES, NODES, IDS, HASH, _TO_NODES, _TO_NODES, _TO_NODES, _TO_NODES, _TO_NODES, IDS, _TO_RUN,
    _TO_NODES, _TO_IDS, _TO_HASHES,
)  # fmt: skip
def detach(
    changed: Nodes, stale: Mask, hashes: Hashes, parents: Nodes, last_use: Ids, factor: Any, index: Nodes,
    after: Nodes, before: Nodes, where: Nodes, pending: Nodes, run_slots: Ids, run: Nodes, kept: Nodes, counts: Ids,
    sums: Hashes,
) -> int:  # fmt: skip
    """Make ``changed`` slots, orphans, and all slots below either, or below a ``stale`` root, pending.

    Returns how many are pending. ``stale``: bool, one for each namespace. ``kept`` (int32[runs]) is filled.
    """
    runs, found = counts[RUNS], counts[ORPHANS]
    for number in range(found):
        where[pending[number]] = PENDING - number
    for each in range(runs):
        kept[each] = run[LENGTH, each]
    for slot in changed:
        if where[slot] >= 0:
            each = run_of(run, runs, where[slot])
            kept[each] = min(kept[each], where[slot] - run[BEGIN, each])
    for each in range(runs):
        hang = run[HANG, each]
        if kept[each] and hang >= 0:
            upper = run_of(run, runs, hang)
            if hang - run[BEGIN, upper] >= kept[upper]:
                kept[each] = 0
        elif kept[each] and hang < NONE and stale[PENDING - hang]:
            kept[each] = 0
    minus = np.uint64(0) - _1
    for each in range(runs):
        begin = run[BEGIN, each]
        for place in range(begin + kept[each], begin + run[LENGTH, each]):
            slot = run_slots[place]
            counts[COPIES] -= unindex_slot(hashes, factor, index, after, before, slot)
            add_entry(sums, minus, hashes, parents, last_use, slot)
            where[slot], pending[found] = PENDING - found, slot
            found += 1
        counts[NODES_] -= run[LENGTH, each] - kept[each]
        run[LENGTH, each] = kept[each]
    for slot in changed:
        if where[slot] == NONE:
            where[slot], pending[found] = PENDING - found, slot
            found += 1
    return found


@compiled(NODES, HASHES, IDS, IDS, IDS, HASHES, _TO_HASHES, _TO_IDS, _TO_NODES, _TO_IDS, _TO_HASHES)
def read(
    changed: Nodes, live_hashes: Hashes, live_tokens: Ids, live_parents: Ids, live_last_use: Ids, keys: Hashes,
    hashes: Hashes, tokens: Ids, parents: Nodes, last_use: Ids, prints: Hashes,
) -> None:  # fmt: skip
    """Note the entries of ``changed`` slots, and the print of what was noted."""
    for slot in changed:
        its, token, parent, use = live_hashes[slot], live_tokens[slot], live_parents[slot], live_last_use[slot]
        prints[slot] = its + np.uint64(token) * keys[0] + np.uint64(parent) * keys[1] + np.uint64(use) * keys[2]
        hashes[slot], tokens[slot], last_use[slot] = its, token, use
        parents[slot] = parent if NOWHERE < parent < len(hashes) else NOWHERE


@compiled(
    ID, HASHES, IDS, NODES, IDS, HASH, HASHES, HASH, _TO_NODES, _TO_NODES, _TO_NODES, _TO_NODES, _TO_NODES, _TO_NODES,
    _TO_NODES, _TO_IDS, _TO_IDS, _TO_RUN, _TO_IDS, _TO_HASHES,
)  # fmt: skip
def attach(
    found: int, hashes: Hashes, tokens: Ids, parents: Nodes, last_use: Ids, root: Any, roots: Hashes, factor: Any,
    index: Nodes, after: Nodes, before: Nodes, where: Nodes, pending: Nodes, child: Nodes, sibling: Nodes,
    run_slots: Ids, run_tokens: Ids, run: Nodes, counts: Ids, sums: Hashes,
) -> bool:  # fmt: skip
    """Put each of ``found`` pending slots that an intact chain leads to in a run; the rest are orphans or no entries.

    Returns false, with all of it of no more use, if there is no room. ``child`` and ``sibling`` (int32) are filled.
    """
    top = NONE
    for number in range(found):
        child[number] = sibling[number] = NONE
    for number in range(found):
        slot = pending[number]
        parent, its = np.int64(parents[slot]), _UNKNOWN
        if 0 < parent < len(hashes):
            its = hashes[parent]
        elif parent == 0:
            its = root
        elif -len(roots) <= parent < 0:
            its = roots[-1 - parent]
        if hashes[slot] == _UNKNOWN or its == _UNKNOWN:
            continue
        if max(its * _A + mix(np.uint64(tokens[slot])), _1) != hashes[slot]:
            continue
        if parent <= 0 or where[parent] >= 0:
            sibling[number], top = top, number
        else:
            upper = PENDING - where[parent]
            sibling[number], child[upper] = child[upper], number
    while top != NONE:
        number, top = top, sibling[top]
        parent, hang, each = parents[pending[number]], 0, counts[RUNS]
        is_new, continues = True, False
        if parent > 0:
            hang = where[parent]
            upper = run_of(run, counts[RUNS], hang)
            continues = hang == run[BEGIN, upper] + run[LENGTH, upper] - 1
            if continues and run[LENGTH, upper] < run[ROOM, upper]:
                each, is_new = upper, False
        if is_new:
            if each == run.shape[1] or counts[PLACES] == len(run_slots):
                return False
            run[BEGIN, each], run[LENGTH, each] = counts[PLACES], 0
            run[ROOM, each] = len(run_slots) - counts[PLACES]  # what it does not need is given back below
            run[HANG, each] = hang if parent > 0 else parent - 1
            counts[RUNS] += 1
        while True:
            slot, place = pending[number], run[BEGIN, each] + run[LENGTH, each]
            run_slots[place], run_tokens[place], where[slot] = slot, tokens[slot], place
            run[LENGTH, each] += 1
            counts[NODES_] += 1
            counts[COPIES] += index_slot(hashes, factor, index, after, before, slot)
            add_entry(sums, _1, hashes, parents, last_use, slot)
            number = child[number]
            if number == NONE:
                break
            other = sibling[number]
            while other != NONE:
                following = sibling[other]
                sibling[other], top = top, other
                other = following
            if run[LENGTH, each] == run[ROOM, each]:
                sibling[number], top = top, number
                break
        if is_new:
            # Room to grow, as long as places are plenty: a run that has none is continued in another one.
            spare = min(run[LENGTH, each] // 4 + (8 if 2 * counts[PLACES] < len(run_slots) else 0), _MOST_SPARE)
            if continues and 8 * counts[PLACES] < 7 * len(run_slots):
                spare = _MOST_SPARE  # it has grown by more than a quarter
            run[ROOM, each] = min(run[LENGTH, each] + spare, len(run_slots) - counts[PLACES])
            counts[PLACES] += run[ROOM, each]
    orphans = 0
    for number in range(found):
        slot = pending[number]
        if where[slot] < 0:
            if hashes[slot] == _UNKNOWN:
                where[slot] = NONE
            else:
                where[slot], pending[orphans] = PENDING - orphans, slot
                orphans += 1
    counts[ORPHANS] = orphans
    return True


@compiled(NODES, _TO_IDS)
def sort(where: Nodes, ascending: Ids) -> int:
    """Write the slots that are in runs to ``ascending`` (int64[slots]), in order; return how many."""
    found = 0
    for slot in range(len(where)):
        ascending[found] = slot
        found += where[slot] >= 0
    return found


@compiled(NODES, NODES, ID, _TO_NODES)
def find_incomplete(where: Nodes, parents: Nodes, page_size: int, found: Nodes) -> int:
    """Write to ``found`` the slots in runs that are not in full pages of consecutive tokens, below a page's end.

    Returns how many. What is below them in other pages is not among them.
    """
    count = 0
    for begin in range(0, len(where), page_size):
        end = min(begin + page_size, len(where))
        whole = end - begin == page_size
        for slot in range(begin, end):
            parent = parents[slot]
            follows = parent == slot - 1 if slot > begin else parent <= 0 or (parent + 1) % page_size == 0
            whole = whole and where[slot] >= 0 and follows
        if not whole:
            for slot in range(begin, end):
                found[count] = slot
                count += where[slot] >= 0
    return count


@compiled(HASHES, IDS, NODES, HASH, NODES, NODES, ID, _TO_NODES, _TO_NODES)
def find_copies(
    hashes: Hashes, tokens: Ids, parents: Nodes, factor: Any, after: Nodes, where: Nodes, page_size: int,
    index: Nodes, first: Nodes,
) -> bool:  # fmt: skip
    """Write to ``first`` (int32[slots], NONE) the slots of the least page of equal chains, for pages that have copies.

    All runs are in full pages. Returns false if equal tokens below equal parents do not prove that chains of equal
    hashes are equal.
    """
    for slot in range(page_size - 1, len(where), page_size):
        if where[slot] < 0 or after[slot] < 0:
            continue
        head = first_with(hashes, factor, index, hashes[slot])
        if first[head] >= 0:
            continue
        each = least = head
        while each >= 0:
            if (each + 1) % page_size:
                return False
            least, each = min(least, each), int(after[each])
        each = head
        while each >= 0:
            for back in range(page_size):
                first[each - back] = least - back
            each = int(after[each])
    for slot in range(len(where)):
        least = first[slot]
        if least < 0:
            continue
        parent, other = parents[slot], parents[least]
        if parent > 0 and first[parent] >= 0:
            parent = first[parent]
        if other > 0 and first[other] >= 0:
            other = first[other]
        if tokens[slot] != tokens[least] or parent != other:
            return False
    return True


@compiled(ID, NODES, NODES, _TO_HASHES, _TO_NODES)
def join_copies(found: int, pending: Nodes, first: Nodes, hashes: Hashes, parents: Nodes) -> None:
    """Give pending slots the first copies of their parents as parents, and those that are other copies no hash."""
    for number in range(found):
        slot = pending[number]
        if parents[slot] > 0 and first[parents[slot]] >= 0:
            parents[slot] = first[parents[slot]]
        if first[slot] >= 0 and first[slot] != slot:
            hashes[slot] = _UNKNOWN
