"""Loops over the prefix forest, for ``prefix_forest.py``.

A forest is its nodes, in the order of their depths: ``slots`` (int32[nodes]) holds the slot of each, ``above``
(int32[nodes]) the number of its parent, -1 below a root. What depends on all ancestors or on all descendants of a node
is then one pass, down or up. The callers allocate what a loop fills, as numpy asks for huge pages.

Only ``link`` follows numbers that other processes wrote: it reads each once, and checks it before it is an index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anchortp_sglang.kv.chain_hash import MIX_1, MIX_2, MULTIPLIER, SALT, UNKNOWN, Hashes, Ids
from anchortp_sglang.kv.compiled import FLAGS, HASH, HASHES, IDS, NODES, Mask, Nodes, compiled, written

NONE = -1

_TO_IDS, _TO_NODES, _TO_FLAGS = map(written, (IDS, NODES, FLAGS))
_A, _SALT, _MIX_1, _MIX_2 = np.uint64(MULTIPLIER), np.uint64(SALT), np.uint64(MIX_1), np.uint64(MIX_2)
_1, _27, _30, _31 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31)
_UNKNOWN = np.uint64(UNKNOWN)


@compiled(HASH)
def mix(x: Any) -> Any:
    """Return ``chain_hash.mix`` of one token, a uint64."""
    x ^= _SALT
    x = (x ^ x >> _30) * _MIX_1
    x = (x ^ x >> _27) * _MIX_2
    return x ^ x >> _31


@compiled(HASHES, IDS, IDS, HASH, HASHES, written(NODES, 2))
def link(hashes: Hashes, tokens: Ids, parents: Ids, root: Any, roots: Hashes, links: Nodes) -> None:
    """Write to ``links`` (int32[slots, 2]) 0 and the parent of each slot whose hash follows from its parent's, else -1.

    Parent 0 is the root of hash ``root``; parent -1 - n, for which 0 is written, that of hash ``roots[n]`` if this is
    not ``UNKNOWN``. The arrays may hold anything.
    """
    links[0] = 0, NONE
    for slot in range(1, len(hashes)):
        parent, its = parents[slot], _UNKNOWN
        if 0 < parent < len(hashes):
            its = hashes[parent]
        elif parent == 0:
            its = root
        elif -len(roots) <= parent < 0:
            its, parent = roots[-1 - parent], 0
        agrees = its != _UNKNOWN and max(its * _A + mix(np.uint64(tokens[slot])), _1) == hashes[slot]
        links[slot, 0] = 0
        links[slot, 1] = parent if agrees else NONE


@compiled(written(NODES, 2), _TO_NODES, _TO_NODES)
def grow(links: Nodes, slots: Nodes, above: Nodes) -> int:
    """Write the forest of the slots whose ``links`` lead to 0 to ``slots`` and ``above``; return how many there are.

    In ``links`` each parent is replaced by the next child of the same parent, each 0 by the slot's first child. What is
    in or below a cycle is never reached.
    """
    for slot in range(len(links) - 1, 0, -1):
        parent = links[slot, 1]
        if parent >= 0:
            links[slot, 1] = links[parent, 0]
            links[parent, 0] = slot
    nodes, parent, slot = 0, NONE, links[0, 0]
    while True:
        while slot:
            slots[nodes], above[nodes] = slot, parent
            nodes += 1
            slot = links[slot, 1]
        parent += 1
        if parent >= nodes:
            return nodes
        slot = links[slots[parent], 0]


@compiled(NODES, _TO_FLAGS, _TO_IDS)
def sort(slots: Nodes, mask: Mask, ascending: Ids) -> None:
    """Write ``slots``, all different, to ``ascending`` (int64[nodes]), and true to ``mask`` (bool[slots]) for each."""
    for node in range(len(slots)):
        mask[slots[node]] = True
    place = 0
    for slot in range(len(mask)):
        if mask[slot]:
            ascending[place] = slot
            place += 1


@compiled(NODES, NODES, FLAGS, _TO_NODES, _TO_NODES, _TO_NODES)
def close(slots: Nodes, above: Nodes, wanted: Mask, number: Nodes, kept_slots: Nodes, kept_above: Nodes) -> int:
    """Write the forest of the nodes that are ``wanted`` with all their ancestors; return how many there are.

    ``wanted``: bool[nodes]. ``number`` (int32[nodes]) holds -1 and is given the nodes' new numbers. A node whose parent
    comes later is left out.
    """
    nodes = 0
    for node in range(len(slots)):
        parent = above[node]
        if parent >= 0:
            parent = number[parent]
        if wanted[node] and (parent >= 0 or above[node] < 0):
            kept_slots[nodes], kept_above[nodes], number[node] = slots[node], parent, nodes
            nodes += 1
    return nodes


@compiled(NODES, _TO_FLAGS, _TO_NODES)
def find_leaves(above: Nodes, is_parent: Mask, leaves: Nodes) -> int:
    """Write the nodes that are no parents to ``leaves``; return how many. ``is_parent`` (bool[nodes]) is false."""
    found = 0
    for node in range(len(above) - 1, -1, -1):
        if above[node] >= 0:
            is_parent[above[node]] = True
        if not is_parent[node]:
            leaves[found] = node
            found += 1
    return found


@compiled(NODES, NODES, NODES, _TO_NODES, _TO_IDS, _TO_IDS, _TO_IDS, _TO_IDS)
def lay_out(
    slots: Nodes, above: Nodes, leaves: Nodes, owner: Nodes, ends: Ids, shared: Ids, donors: Ids, own_slots: Ids
) -> None:
    """Write to ``own_slots`` (int64[nodes]) the chains that end in ``leaves``, without what each shares, in this order.

    A chain shares what is in an earlier one. Of each chain (int64[chains]) its end in ``own_slots``, how many slots it
    shares and with which other chain are written to ``ends``, ``shared`` and ``donors``. ``owner`` (int32[nodes]) is
    filled. Between loops of scattered reads and of scattered writes the processor can do more at once.
    """
    for node in range(len(slots)):
        owner[node] = len(leaves)
    for chain in range(len(leaves)):
        owner[leaves[chain]], ends[chain], shared[chain] = chain, 0, NONE
    for node in range(len(slots) - 1, -1, -1):
        ends[owner[node]] += 1
        if above[node] >= 0:
            owner[above[node]] = min(owner[above[node]], owner[node])
    end = 0
    for chain in range(len(leaves)):
        end, ends[chain] = end + ends[chain], end
    depth, level = 0, NONE
    for node in range(len(slots)):
        if above[node] >= level:
            depth, level = depth + 1, node
        chain = owner[node]
        if shared[chain] < 0:
            shared[chain], donors[chain] = depth - 1, owner[above[node]] if above[node] >= 0 else 0
        own_slots[ends[chain]] = slots[node]
        ends[chain] += 1
