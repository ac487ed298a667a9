"""The prefix forest: KV slots that form intact token chains. Pure functions over the slot table's arrays.

The arrays may hold anything (a process was killed while it wrote them, or they never were a slot table): an entry is
valid only if it agrees with its parent, and so on up to a root. Once verified, slot 0 stands for all roots. No function
loops over slots in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids, child_hashes
from anchortp_sglang.kv.paths import ROOT, Mask, Paths, paths_of

__all__ = ["ROOT", "Chain", "Mask", "best_below", "chains_of", "closed", "paths_of_mask", "verified_slots"]


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
    return paths_of(known[agrees], np.maximum(above[agrees], ROOT), len(hashes)).rooted


def closed(mask: Mask, parents: Ids) -> Mask:
    """Return bool[slots]: the slots of ``mask``, all verified, whose ancestors up to a root are in it too."""
    return paths_of_mask(mask, parents).rooted


def paths_of_mask(mask: Mask, parents: Ids) -> Paths:
    """Return the paths of the slots of ``mask``, all verified. ``parents``: int64[slots]."""
    members = np.flatnonzero(mask)
    return paths_of(members, parents[members], len(mask))


def best_below(paths: Paths, ranks: Ids) -> Ids:
    """Return int64[slots]: the highest of ``ranks`` (int64[slots], from 0 to their number) of a slot or one below it.

    For slots on no path it is 0.
    """
    slots = np.flatnonzero(paths.rooted)
    # In the order of paths, each from its end up to its first slot, the highest so far is the highest below.
    starts = np.cumsum(paths.lengths) - paths.lengths
    at = starts[paths.path[slots]] + paths.lengths[paths.path[slots]] - 1 - paths.place[slots]
    along = np.empty(len(slots), np.int64)
    along[at] = ranks[slots]
    many = len(ranks) + 1
    by_path = np.repeat(np.arange(len(paths.lengths)) * many, paths.lengths)  # none exceeds the next path's
    along = np.maximum.accumulate(along + by_path) - by_path
    of_path = paths.most_below(along[starts + paths.lengths - 1])
    best = np.zeros(len(ranks), np.int64)
    best[slots] = along[at]
    hanging = np.zeros(len(paths.lengths), np.int64)
    np.maximum.at(hanging, paths.parent[paths.parent >= 0], of_path[paths.parent >= 0])
    best[slots] = np.maximum(best[slots], hanging[paths.path[slots]])
    return best


def chains_of(verified: Mask, tokens: Ids, parents: Ids, last_use: Ids) -> list[Chain]:
    """Return a chain for each leaf of the ``verified`` slots, least recently used first, ties by the leaf's slot."""
    paths = paths_of_mask(verified, parents)
    leaves = paths.ends[paths.leaves]
    order = np.lexsort((leaves, last_use[leaves]))
    leaves = leaves[order]
    # Each slot is laid out once, in the first chain that has it; later chains copy from there.
    first = np.full(len(paths.ends), len(leaves), np.int64)
    first[paths.leaves[order]] = np.arange(len(leaves))
    first = paths.least_below(first)

    depth = paths.depths(leaves)
    own = np.zeros(len(leaves), np.int64)
    np.add.at(own, first, paths.lengths)
    shared = depth - own
    ends = np.cumsum(own)
    starts = ends - own
    members = np.flatnonzero(verified)
    owner = first[paths.path[members]]
    own_slots = np.empty(len(members), np.int64)
    own_slots[(starts - 1 - shared)[owner] + paths.depths(members)] = members
    donors = first[paths.parent[paths.path[own_slots[starts]]]]

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
