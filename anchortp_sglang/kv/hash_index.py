"""A hash table of slots by their chain hashes, from which slots can be removed: loops for ``follow_loops.py``.

``index`` (int32, a power of two of them) holds a slot or ``NONE``. Slots of equal hashes are a list, by ``after`` and
``before`` (int32[slots]), of which the first is in ``index``. ``factor``: a secret odd number, as clients choose
hashes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anchortp_sglang.kv.chain_hash import Hashes
from anchortp_sglang.kv.compiled import HASH, HASHES, ID, NODES, Nodes, compiled, written
from anchortp_sglang.kv.forest_loops import NONE

_TO_NODES = written(NODES)
_32 = np.uint64(32)


@compiled(HASHES, HASH, _TO_NODES, _TO_NODES, _TO_NODES, ID)
def index_slot(hashes: Hashes, factor: Any, index: Nodes, after: Nodes, before: Nodes, slot: int) -> bool:
    """Enter ``slot`` in the hash table ``index`` (int32[a power of two], NONE where empty) under its hash.

    Slots of equal hashes are a list, by ``after`` and ``before`` (int32[slots]), of which the first is in ``index``.
    Returns whether another slot has the same hash.
    """
    mask = len(index) - 1
    at = np.int64(hashes[slot] * factor >> _32) & mask
    after[slot] = before[slot] = NONE
    while index[at] >= 0:
        first = index[at]
        if hashes[first] == hashes[slot]:
            if after[first] >= 0:
                before[after[first]] = slot
            after[slot], after[first], before[slot] = after[first], slot, first
            return True
        at = (at + 1) & mask
    index[at] = slot
    return False


@compiled(HASHES, HASH, _TO_NODES, _TO_NODES, _TO_NODES, ID)
def unindex_slot(hashes: Hashes, factor: Any, index: Nodes, after: Nodes, before: Nodes, slot: int) -> bool:
    """Remove ``slot`` from ``index``; return whether another slot has the same hash."""
    mask = len(index) - 1
    if before[slot] >= 0:
        after[before[slot]] = after[slot]
        if after[slot] >= 0:
            before[after[slot]] = before[slot]
        return True
    at = np.int64(hashes[slot] * factor >> _32) & mask
    while index[at] != slot:
        at = (at + 1) & mask
    if after[slot] >= 0:
        index[at] = after[slot]
        before[after[slot]] = NONE
        return True
    # Close the gap: whoever was pushed past it moves up.
    gap = at
    while True:
        at = (at + 1) & mask
        if index[at] < 0:
            break
        home = np.int64(hashes[index[at]] * factor >> _32) & mask
        if (at - home) & mask >= (at - gap) & mask:
            index[gap] = index[at]
            gap = at
    index[gap] = NONE
    return False


@compiled(HASHES, HASH, _TO_NODES, HASH)
def first_with(hashes: Hashes, factor: Any, index: Nodes, wanted: Any) -> int:
    """Return the first slot in the list of a hash, NONE if there is no such list."""
    mask = len(index) - 1
    at = np.int64(wanted * factor >> _32) & mask
    while index[at] >= 0:
        if hashes[index[at]] == wanted:
            return int(index[at])
        at = (at + 1) & mask
    return NONE
