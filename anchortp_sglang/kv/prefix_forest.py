"""The prefix forest: KV slots that form intact token chains. Pure functions over the slot table's arrays.

The arrays may hold anything (a process was killed while it wrote them, or they never were a slot table): an entry is
valid only if it agrees with its parent, and so on up to a root. Once verified, slot 0 stands for all roots. No function
loops over slots in Python; ancestors are reached by pointer jumping, in log2(depth) rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids, child_hashes

Mask = NDArray[np.bool_]

ROOT = 0


@dataclass(frozen=True, eq=False)
class Chain:
    """The KV slots of one token sequence, from its first token to a leaf of the prefix forest.

    ``slots`` and ``tokens`` are int64[n], n >= 1. The first ``shared`` slots are also in an earlier chain of the same
    list. ``last_use``: the step at which the leaf was committed.
    """

    slots: Ids
    tokens: Ids
    shared: int
    last_use: int

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.tokens) or not 0 <= self.shared < len(self.slots):
            raise ValueError(f"a chain of {len(self.slots)} slots has {len(self.tokens)} tokens, {self.shared} shared")


def verified_slots(hashes: Hashes, tokens: Ids, parents: Ids, root_hash: int, roots: Hashes) -> Mask:
    """Return bool[slots]: the slots whose hash, and whose ancestors' hashes up to a root, follow from their parent's.

    Parent 0 is the root with ``root_hash``; parent -1 - n is the one with ``roots[n]``, if that is not ``UNKNOWN``.
    """
    known = np.flatnonzero(hashes)
    above = parents[known]
    # As unsigned numbers, negative parents are out of range too.
    below_slot = above.view(np.uint64) < np.uint64(len(hashes))
    below_root = (above < 0) & (above >= -len(roots))
    usable = (known != ROOT) & (below_slot | below_root)
    known, above, below_root = known[usable], above[usable], below_root[usable]
    above_hashes = hashes[np.maximum(above, ROOT)]
    above_hashes[above == ROOT] = root_hash
    above_hashes[below_root] = roots[-1 - above[below_root]]
    agrees = (child_hashes(above_hashes, tokens[known]) == hashes[known]) & (above_hashes != UNKNOWN)
    return _rooted(known[agrees], np.maximum(above[agrees], ROOT), len(hashes))


def closed(mask: Mask, parents: Ids) -> Mask:
    """Return bool[slots]: the slots of ``mask``, all verified, whose ancestors up to a root are in it too."""
    members = np.flatnonzero(mask)
    return _rooted(members, parents[members], len(mask))


def newest_use(members: Ids, parents: Ids, last_use: Ids) -> Ids:
    """Return int64[slots]: the latest use of a slot or one of its descendants; 0 for slots not in ``members``."""
    newest = np.zeros(len(parents), np.int64)
    newest[members] = last_use[members]
    up = np.zeros(len(parents), np.int64)
    up[members] = parents[members]
    # Invariant of round k: `up` is the 2**k-th ancestor, `newest` has seen all descendants closer than 2**k.
    climbing = members
    while (climbing := climbing[up[climbing] != ROOT]).size:
        above = up[climbing]
        np.maximum.at(newest, above, newest[climbing])
        up[climbing] = up[above]
    return newest


def _rooted(members: Ids, above: Ids, slots: int) -> Mask:
    """Return bool[slots]: the members whose parents lead to the root through members only."""
    nowhere = slots
    up = np.full(slots + 1, nowhere, np.int64)
    up[ROOT] = ROOT
    up[members] = above
    climbing = members
    # 2**rounds > slots: a slot that has not arrived after the last round is in or below a cycle.
    for _ in range(slots.bit_length()):
        climbing = climbing[(up[climbing] != ROOT) & (up[climbing] != nowhere)]
        if not climbing.size:
            break
        up[climbing] = up[up[climbing]]
    rooted: Mask = up[:slots] == ROOT
    rooted[ROOT] = False
    return rooted


def chains_of(verified: Mask, tokens: Ids, parents: Ids, last_use: Ids) -> list[Chain]:
    """Return a chain for each leaf of the ``verified`` slots, least recently used first, ties by the leaf's slot."""
    members = np.flatnonzero(verified)
    leaves = _leaves(verified, members, parents)
    leaves = leaves[np.argsort(last_use[leaves], kind="stable")]
    first_chain, depth = _first_chain_and_depth(members, leaves, parents)

    # Each slot is laid out once, in the first chain that has it; later chains copy from there.
    own = np.bincount(first_chain[members], minlength=len(leaves))
    shared = depth[leaves] - own
    ends = np.cumsum(own)
    starts = ends - own
    owner = first_chain[members]
    own_slots = np.empty(len(members), np.int64)
    own_slots[starts[owner] + depth[members] - 1 - shared[owner]] = members
    donors = first_chain[parents[own_slots[starts]]]

    chains: list[Chain] = []
    own_tokens = tokens[own_slots]
    columns = (column.tolist() for column in (starts, ends, shared, donors, last_use[leaves]))
    for start, end, n_shared, donor, stamp in zip(*columns, strict=True):
        slots, its_tokens = own_slots[start:end], own_tokens[start:end]
        if n_shared:
            slots = np.concatenate((chains[donor].slots[:n_shared], slots))
            its_tokens = np.concatenate((chains[donor].tokens[:n_shared], its_tokens))
        chains.append(Chain(slots, its_tokens, n_shared, stamp))
    return chains


def _leaves(verified: Mask, members: Ids, parents: Ids) -> Ids:
    is_leaf = verified.copy()
    is_leaf[parents[members]] = False
    return np.flatnonzero(is_leaf)


def _first_chain_and_depth(members: Ids, leaves: Ids, parents: Ids) -> tuple[Ids, Ids]:
    """Return int64[slots] each: the lowest index of a leaf below a slot, and the slot's distance from the root."""
    first_chain = np.full(len(parents), len(leaves), np.int64)
    first_chain[leaves] = np.arange(len(leaves))
    depth = np.zeros(len(parents), np.int64)
    depth[members] = 1
    up = np.zeros(len(parents), np.int64)
    up[members] = parents[members]
    # Invariant of round k: `up` is the 2**k-th ancestor, `depth` counts the steps to it, and `first_chain`
    # has seen all descendants closer than 2**k.
    climbing = members
    while (climbing := climbing[up[climbing] != ROOT]).size:
        above = up[climbing]
        np.minimum.at(first_chain, above, first_chain[climbing])
        depth[climbing] += depth[above]
        up[climbing] = up[above]
    return first_chain, depth
