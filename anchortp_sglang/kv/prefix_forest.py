"""The prefix forest: KV slots that form intact token chains.

The slot table's arrays may hold anything (a process was killed while it wrote them, or they never were a slot table):
an entry is valid only if it agrees with its parent, and so on up to a root. The loops are in ``forest_loops.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anchortp_sglang.kv import forest_loops as loops
from anchortp_sglang.kv.chain_hash import Hashes, Ids
from anchortp_sglang.kv.compiled import Mask, Nodes

__all__ = ["ROOT", "Chain", "Forest", "Mask", "Nodes", "forest_of", "verified_forest"]

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


@dataclass(frozen=True, eq=False)
class Forest:
    """Slots that lead to a root, as nodes in the order of their depths.

    ``slots`` (int32[nodes]): the slot of each node. ``above`` (int32[nodes]): the number of its parent, -1 if that is a
    root. ``table_slots``: more than any slot.
    """

    slots: Nodes
    above: Nodes
    table_slots: int

    def __len__(self) -> int:
        return len(self.slots)

    def mask(self) -> Mask:
        """Return bool[table_slots]: the slots of all nodes."""
        mask = np.zeros(self.table_slots, np.bool_)
        mask[self.slots] = True
        return mask

    @cached_property
    def ascending(self) -> Ids:
        """int64[nodes]: the slots of all nodes, ascending."""
        ascending = np.empty(len(self), np.int64)
        loops.sort(self.slots, np.zeros(self.table_slots, np.bool_), ascending)
        return ascending

    def closed(self, wanted: Mask) -> Forest:
        """Return the forest of the nodes that are ``wanted`` (bool[nodes]) with all their ancestors."""
        if wanted.all():
            return self
        number = np.full(len(self), loops.NONE, np.int32)
        slots, above = np.empty((2, len(self)), np.int32)
        nodes = loops.close(self.slots, self.above, wanted, number, slots, above)
        return Forest(slots[:nodes], above[:nodes], self.table_slots)

    def leaves(self) -> Nodes:
        """Return int32[n]: the nodes that are no parents."""
        leaves = np.empty(len(self), np.int32)
        return leaves[: loops.find_leaves(self.above, np.zeros(len(self), np.bool_), leaves)]

    def chains(self, tokens: Ids, last_use: Ids) -> list[Chain]:
        """Return a chain for each leaf, least recently used first, ties by the leaf's slot. Equal forests, equal lists.

        ``tokens``, ``last_use``: int64[table_slots]. Chains may have equal tokens in different slots.
        """
        leaves = self.leaves()
        stamps = last_use[self.slots[leaves]]
        order = np.lexsort((self.slots[leaves], stamps))
        ends, shared, donors = np.empty((3, len(leaves)), np.int64)
        owner, own_slots = np.empty(len(self), np.int32), np.empty(len(self), np.int64)
        loops.lay_out(self.slots, self.above, leaves[order], owner, ends, shared, donors, own_slots)
        own_tokens = tokens[own_slots]
        chains: list[Chain] = []
        start = 0
        columns = (column.tolist() for column in (ends, shared, donors, stamps[order]))
        for end, n_shared, donor, stamp in zip(*columns, strict=True):
            slots, its_tokens = own_slots[start:end], own_tokens[start:end]
            if n_shared:
                slots = np.concatenate((chains[donor].slots[:n_shared], slots))
                its_tokens = np.concatenate((chains[donor].tokens[:n_shared], its_tokens))
            chains.append(Chain(slots, its_tokens, n_shared, stamp))
            start = end
        return chains


def verified_forest(hashes: Hashes, tokens: Ids, parents: Ids, root_hash: int, roots: Hashes) -> Forest:
    """Return the forest of the slots whose hash, and whose ancestors' hashes up to a root, follow from their parent's.

    Parent 0 is the root with ``root_hash``; parent -1 - n is the one with ``roots[n]``, if that is not ``UNKNOWN``.
    """
    links = np.empty((len(hashes), 2), np.int32)
    loops.link(hashes, tokens, parents, np.uint64(root_hash), roots, links)
    return forest_of(links)


def forest_of(links: Nodes) -> Forest:
    """Return the forest of the slots that lead to slot 0. ``links``: as ``forest_loops.link`` leaves them."""
    slots, above = np.empty((2, len(links)), np.int32)
    nodes = loops.grow(links, slots, above)
    return Forest(slots[:nodes], above[:nodes], len(links))
