"""Finds equal chain hashes in O(n), in a hash table.

Clients choose prompts, and so hashes, but not the places in the table: these depend on a secret number.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

from anchortp_sglang.kv.chain_hash import Hashes
from anchortp_sglang.kv.compiled import HASH, HASHES, ID, NODES, Nodes, compiled, written

__all__ = ["first_places", "places_of"]

_NONE = -1


def first_places(keys: Hashes) -> tuple[Nodes, int]:
    """Return for each of ``keys`` (uint64[n]) the place of the first that equals it, and how many are not the first."""
    bits = len(keys).bit_length() + 1
    table, (found, others) = np.full(1 << bits, _NONE, np.int32), np.empty((2, len(keys)), np.int32)
    n_others, copies = _meet(keys, np.uint64(secrets.randbits(64) | 1), bits, table, found, others)
    if n_others:
        others = others[:n_others]
        first, more = first_places(keys[others])
        found[others] = others[first]
        copies += more
    return found, copies


def places_of(keys: Hashes, wanted: Hashes) -> Nodes:
    """Return int32[n]: the first place of each hash of ``wanted`` (uint64[n]) among ``keys``, -1 for none."""
    found = first_places(np.concatenate((keys, wanted)))[0][len(keys) :]
    found[found >= len(keys)] = _NONE
    return found


@compiled(HASHES, HASH, ID, written(NODES), written(NODES), written(NODES))
def _meet(keys: Hashes, factor: Any, bits: int, table: Nodes, found: Nodes, others: Nodes) -> tuple[int, int]:
    """Give each of ``keys`` a place in ``table`` (int32[2**bits] of -1), which the first one keeps.

    ``factor``: uint64, odd. Writes to ``found`` (int32[n]) who was there first, and to ``others`` those that another
    key was before. Returns how many these are, and how many found their own key. Nothing branches on what is read from
    ``table``: the processor would wait for it.
    """
    shift = np.uint64(64 - bits)
    for place in range(len(keys)):
        at = np.int64(keys[place] * factor >> shift)
        first = table[at] if table[at] >= 0 else place
        table[at] = found[place] = first
    n_others, copies = 0, 0
    for place in range(len(keys)):
        others[n_others] = place
        same = keys[found[place]] == keys[place]
        n_others += not same
        copies += same and found[place] != place
    return n_others, copies
