"""Loops over the runs of a prefix forest: from runs to chains, for ``followed_table.py``.

A run is a path of the forest whose slots lie side by side in ``run_slots``, and their tokens in ``run_tokens``. An
index of these is a place. A run hangs below a place of an earlier run, or below a root: ``hang`` is that place, or -1
for parent 0, -2 - n for parent -1 - n. ``run`` (int32[4, runs]) has a row each for the first places, lengths, rooms and
hangs of all runs, in the order of their places.
"""

from __future__ import annotations

from anchortp_sglang.kv.chain_hash import Ids
from anchortp_sglang.kv.compiled import ID, IDS, NODES, Nodes, compiled, written
from anchortp_sglang.kv.forest_loops import NONE

BEGIN, LENGTH, ROOM, HANG = range(4)

_TO_IDS, _TO_NODES, _TO_RUN = written(IDS), written(NODES), written(NODES, 2)


@compiled(_TO_RUN, ID, ID)
def run_of(run: Nodes, runs: int, place: int) -> int:
    """Return the number of the run, of the first ``runs``, that has a place."""
    low, high = 0, runs
    while high - low > 1:
        middle = (low + high) // 2
        if run[BEGIN, middle] <= place:
            low = middle
        else:
            high = middle
    return low


@compiled(_TO_RUN, ID, _TO_NODES, _TO_IDS, _TO_NODES)
def find_ends(run: Nodes, runs: int, upper: Nodes, above: Ids, ends: Nodes) -> int:
    """Write the runs that end in a leaf to ``ends``; return how many.

    Of each run the one that it hangs below is written to ``upper`` (int32[runs], NONE for a root), and the number of
    slots above its own to ``above`` (int64[runs]).
    """
    for each in range(runs):
        hang, upper[each], above[each] = run[HANG, each], NONE, 0
        if run[LENGTH, each] and hang >= 0:
            its = run_of(run, runs, hang)
            upper[each], above[each] = its, above[its] + hang - run[BEGIN, its] + 1
        ends[each] = 1
    for each in range(runs):
        its = upper[each]
        if its >= 0 and run[HANG, each] == run[BEGIN, its] + run[LENGTH, its] - 1:
            ends[its] = 0
    found = 0
    for each in range(runs):
        is_end = ends[each] > 0 and run[LENGTH, each] > 0
        ends[found] = each
        found += is_end
    return found


@compiled(_TO_RUN, NODES, IDS, NODES, _TO_NODES, _TO_IDS)
def find_shared(run: Nodes, upper: Nodes, above: Ids, ends: Nodes, claimed: Nodes, shared: Ids) -> None:
    """Write to ``shared`` how many slots of each chain, which ends in one of ``ends``, are in an earlier one.

    ``claimed`` (int32[runs]) holds zeros.
    """
    for chain in range(len(ends)):
        each = int(ends[chain])
        extent, shared[chain] = run[LENGTH, each], 0
        while each >= 0:
            if claimed[each]:
                shared[chain] = above[each] + min(claimed[each], extent)
                claimed[each] = max(claimed[each], extent)
                break
            claimed[each] = extent
            hang, each = run[HANG, each], int(upper[each])
            if each >= 0:
                extent = hang - run[BEGIN, each] + 1


@compiled(_TO_RUN, NODES, IDS, ID, IDS, IDS, _TO_IDS, _TO_IDS)
def lay_out(
    run: Nodes, upper: Nodes, above: Ids, end: int, run_slots: Ids, run_tokens: Ids, slots: Ids, tokens: Ids
) -> None:
    """Write the chain that ends in run ``end`` to ``slots`` and ``tokens``, which are as long as it is."""
    each, extent = end, run[LENGTH, end]
    while each >= 0:
        begin, first = run[BEGIN, each], above[each]
        slots[first : first + extent] = run_slots[begin : begin + extent]
        tokens[first : first + extent] = run_tokens[begin : begin + extent]
        hang, each = run[HANG, each], int(upper[each])
        if each >= 0:
            extent = hang - run[BEGIN, each] + 1
