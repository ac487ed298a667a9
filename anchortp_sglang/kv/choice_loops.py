"""Loops that choose among the nodes of a prefix forest (``forest_loops.py``), for ``retained_slots.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from anchortp_sglang.kv.chain_hash import Hashes, Ids
from anchortp_sglang.kv.compiled import FLAGS, HASHES, ID, IDS, NODES, Mask, Nodes, compiled, written
from anchortp_sglang.kv.forest_loops import NONE, mix

_TO_IDS, _TO_NODES, _TO_FLAGS = map(written, (IDS, NODES, FLAGS))


@compiled(NODES, NODES, ID, _TO_NODES, _TO_FLAGS)
def find_whole_pages(slots: Nodes, above: Nodes, page_size: int, follow: Nodes, whole: Mask) -> None:
    """Write to ``whole`` (bool[nodes]) which nodes are in full pages of consecutive tokens, each below a page's end.

    ``follow`` (int32[pages]) holds zeros.
    """
    for node in range(len(slots)):
        slot, parent = slots[node], above[node]
        before = slots[parent] if parent >= 0 else 0
        if slot % page_size:
            follow[slot // page_size] += before == slot - 1
        else:
            follow[slot // page_size] += parent < 0 or (before + 1) % page_size == 0
    for node in range(len(slots)):
        whole[node] = follow[slots[node] // page_size] == page_size


@compiled(NODES, NODES, NODES, IDS, IDS, _TO_NODES, _TO_FLAGS)
def join_copies(slots: Nodes, above: Nodes, first: Nodes, tokens: Ids, parents: Ids, joined: Nodes, only: Mask) -> None:
    """Write to ``joined`` (int32[nodes]) the first copy of each node's parent, and to ``only`` which are first copies.

    ``first`` (int32[nodes]): the first node of the same hash. Equal hashes suggest equal chains; equal tokens below
    equal parents, from the roots down, prove it. A node that is not proven to be a copy is not in ``only``, nor is what
    is below it.
    """
    for node in range(len(slots)):
        joined[node] = first[above[node]] if above[node] >= 0 else NONE
    for node in range(len(slots)):
        slot, other = slots[node], slots[first[node]]
        proven = tokens[slot] == tokens[other] and joined[node] == joined[first[node]]
        only[node] = proven and (only[above[node]] if above[node] >= 0 else parents[slot] == parents[other])
    for node in range(len(slots)):
        only[node] = only[node] and first[node] == node


@compiled(NODES, NODES, IDS, _TO_IDS, _TO_NODES, _TO_NODES, _TO_NODES)
def find_best_below(
    slots: Nodes, above: Nodes, of_slots: Ids, urgency: Ids, depth: Nodes, best: Nodes, summits: Nodes
) -> int:
    """Write to ``best`` (int32[nodes]) the most urgent node among each and all below it.

    ``of_slots``: int64[slots]. Of equally urgent nodes it is the deepest, of these the one with the last slot. Those
    that are their own best are written to ``summits``; returns how many. ``urgency`` and ``depth`` are filled too.
    """
    for node in range(len(slots)):
        urgency[node] = of_slots[slots[node]]
    for node in range(len(slots)):
        best[node] = node
        depth[node] = depth[above[node]] + 1 if above[node] >= 0 else 1
    found = 0
    for node in range(len(slots) - 1, -1, -1):
        one = best[node]
        if one == node:
            summits[found] = node
            found += 1
        if above[node] < 0:
            continue
        other = best[above[node]]
        if urgency[one] != urgency[other]:
            better = urgency[one] > urgency[other]
        elif depth[one] != depth[other]:
            better = depth[one] > depth[other]
        else:
            better = slots[one] > slots[other]
        if better:
            best[above[node]] = one
    return found


@compiled(NODES, NODES, NODES, ID, ID, _TO_NODES, _TO_FLAGS, _TO_FLAGS)
def take_in_turn(
    slots: Nodes, best: Nodes, turns: Nodes, page_size: int, most: int, room: Nodes, pages: Mask, taken: Mask
) -> None:
    """Write to ``taken`` (bool[nodes]) the pages of the nodes whose ``best`` is first in ``turns``, at most ``most``.

    Of the last one's the upper ones are taken. ``room`` (int32[nodes]) and ``pages`` (bool[pages]) hold zeros.
    """
    for node in range(len(slots)):
        taken[node] = page_size == 1 or slots[node] % page_size == 0
        room[best[node]] += taken[node]
    for turn in turns:
        room[turn] = min(room[turn], most)
        most -= room[turn]
    for node in range(len(slots)):
        taken[node] = taken[node] and room[best[node]] > 0
        room[best[node]] -= taken[node]
    if page_size == 1:
        return
    for node in range(len(slots)):
        if taken[node]:
            pages[slots[node] // page_size] = True
    for node in range(len(slots)):
        taken[node] = pages[slots[node] // page_size]


@compiled(IDS, IDS, HASHES, IDS, IDS, written(HASHES))
def add_up(slots: Ids, numbers: Ids, hashes: Hashes, parents: Ids, last_use: Ids, sums: Hashes) -> None:
    """Add to ``sums`` (uint64[4]) slots and columns at ``numbers``, with a pseudorandom weight for each number."""
    for place in range(len(numbers)):
        number = numbers[place]
        weight = mix(np.uint64(number))
        sums[0] += np.uint64(slots[place]) * weight
        sums[1] += hashes[number] * weight
        sums[2] += np.uint64(parents[number]) * weight
        sums[3] += np.uint64(last_use[number]) * weight


@compiled(IDS, IDS, ID, _TO_FLAGS, _TO_IDS)
def find_free(free: Ids, numbers: Ids, page_size: int, used: Mask, left: Ids) -> int:
    """Write the pages of ``free``, in their order, that hold none of ``numbers`` to ``left``; return how many.

    ``numbers`` are whole pages. ``left`` is as long as ``free``; ``used`` (bool[pages]) is false.
    """
    for place in range(0, len(numbers), page_size):
        used[numbers[place] // page_size if page_size > 1 else numbers[place]] = True
    found = 0
    for page in free:
        left[found] = page
        found += not used[page]
    return found


@compiled(IDS)
def sum_in_order(slots: Ids) -> Any:
    """Return the uint64 sum of slots, with a pseudorandom weight for each place: other orders have other sums."""
    total = np.uint64(0)
    for place in range(len(slots)):
        total += np.uint64(slots[place]) * mix(np.uint64(place))
    return total
