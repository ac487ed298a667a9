"""Adoption: every survivor keeps all its units and takes over a share of the lost ones.

Nothing moves between devices, and exactly the lost units are reloaded: no plan reloads less. When devices join, those
that hold more than they are due give up the difference, and nothing else moves.
"""

from collections.abc import Sequence
from heapq import heapify, heapreplace

from anchortp_sglang.planning.intervals import Intervals, deal, normalize, subtract, total
from anchortp_sglang.planning.ownership.layer_ownership import Layout
from anchortp_sglang.planning.placement.rotation import Due, due, spread


def adopted_layouts(units: int, weights: Sequence[int], held: Sequence[Layout], give_back: bool) -> tuple[Layout, ...]:
    """Return the shares of each layer, as close to ``weights`` as possible if every device keeps what it ``held``.

    With ``give_back`` shares are exactly as due, and devices keep as much as that allows.
    """
    share = due(units, weights, len(held))
    if give_back:
        # A unit on two devices counts for the first one; else both might give it up.
        held = [_each_once(layout) for layout in held]
    counted = [tuple(total(runs) for runs in layout) for layout in held]
    lost = [_missing(units, layout) for layout in held]
    widths = _balanced(units, share, counted) if give_back else _filled(share, counted, lost)
    dealt: dict[tuple[Layout, tuple[int, ...]], Layout] = {}
    for layout, wanted, gone in zip(held, widths, lost, strict=True):
        if (layout, wanted) not in dealt:
            dealt[layout, wanted] = _deal(layout, wanted, gone)
    return tuple(dealt[layout, wanted] for layout, wanted in zip(held, widths, strict=True))


def _each_once(layout: Layout) -> Layout:
    shares: list[Intervals] = []
    taken: Intervals = ()
    for runs in layout:
        shares.append(subtract(runs, taken))
        taken = normalize((*taken, *runs))
    return tuple(shares)


def _missing(units: int, layout: Layout) -> Intervals:
    return subtract(((0, units),), normalize(run for runs in layout for run in runs))


def _balanced(units: int, share: Due, counted: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return widths as due; extra units stay on devices that keep a unit by it."""
    devices = range(len(share.whole))
    uneven = frozenset(d for d in devices if share.rest[d])
    keepers = [frozenset(d for d in uneven if widths[d] > share.whole[d]) for widths in counted]
    counts = [units - sum(share.whole)] * len(counted)
    chosen = spread(share, counts, [uneven] * len(counted), keepers, [0] * len(devices))
    return [tuple(share.whole[d] + (d in extra) for d in devices) for extra in chosen]


def _filled(share: Due, counted: Sequence[tuple[int, ...]], lost: Sequence[Intervals]) -> list[tuple[int, ...]]:
    """Return widths after giving the lost units to the devices that are farthest below their due."""
    devices = range(len(share.whole))
    filled, counts, allowed, given = [], [], [], [0] * len(devices)
    for widths, gone in zip(counted, lost, strict=True):
        level, extra = _fill_to_whole(share, widths, total(gone))
        filled.append(level)
        counts.append(extra)
        allowed.append(frozenset(d for d in devices if level[d] <= share.whole[d] and share.rest[d]))
        for d in devices:
            given[d] += level[d] - share.whole[d]
    nobody: frozenset[int] = frozenset()
    chosen = spread(share, counts, allowed, [nobody] * len(counts), given)
    return [tuple(level[d] + (d in ones) for d in devices) for level, ones in zip(filled, chosen, strict=True)]


def _fill_to_whole(share: Due, widths: Sequence[int], units: int) -> tuple[list[int], int]:
    """Give up to ``units`` units, one by one, to the device that lacks most of its due rounded down.

    Return the widths, and the units left once no device lacks any.
    """
    level = list(widths)
    lacks = [(-(share.whole[d] - level[d]), d) for d in range(len(level)) if level[d] < share.whole[d]]
    heapify(lacks)
    while units and lacks and lacks[0][0] < 0:
        lack, device = lacks[0]
        heapreplace(lacks, (lack + 1, device))
        level[device] += 1
        units -= 1
    return level, units


def _deal(layout: Layout, widths: Sequence[int], gone: Intervals) -> Layout:
    """Let every device keep its first units, up to its width, and deal the others and the lost ones in order."""
    kept = [deal(runs, (min(total(runs), width), max(0, total(runs) - width)))[0]
            for runs, width in zip(layout, widths, strict=True)]  # fmt: skip
    held = normalize(run for runs in kept for run in runs)
    pool = normalize((*gone, *subtract(normalize(run for runs in layout for run in runs), held)))
    hands = deal(pool, [width - total(runs) for runs, width in zip(kept, widths, strict=True)])
    return tuple(normalize((*runs, *hand)) for runs, hand in zip(kept, hands, strict=True))
