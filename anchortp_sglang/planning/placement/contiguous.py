"""Continuous Minimal Migration: every device holds one interval of each axis, in the order of the devices.

A unit that a survivor holds is never reloaded, wherever it goes, so reloads are at their lower bound for any intervals.
Units that are neither kept nor reloaded move between devices, so most kept is least moved. Widths are rounded down or
up, in every layer and over all layers together; the only choice is which devices are rounded up where.

First the cuts are spread evenly over the layers. That is best in the usual case: layers that were cut alike, and cuts
that stay between the start of the left and the end of the right neighbour's old interval. Where a better choice may
exist, an integer program finds it, so the result is optimal. Only where the program would be too large (some fifty
devices, or fewer and dozens of layers that were all cut differently) a choice by prices takes its place.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.ownership.layer_ownership import Layout
from anchortp_sglang.planning.placement.even_spread import evenly_spread, is_best
from anchortp_sglang.planning.placement.largest_overlap import largest_overlap
from anchortp_sglang.planning.placement.priced_rounding import priced_rounding
from anchortp_sglang.planning.placement.rotation import Due, due
from anchortp_sglang.planning.placement.rounding import NEVER, LayerKind, RoundedUp, most_conceivable


def contiguous_layouts(units: int, weights: Sequence[int], held: Sequence[Layout]) -> tuple[Layout, ...]:
    """Return the shares of each layer in proportion to ``weights`` that keep most of what each device ``held``.

    Widths are rounded down or up in every layer, and over all layers together.
    """
    share = due(units, weights, len(held))
    even = [
        tuple(device for device, (start, stop) in enumerate(pairwise((0, *cuts))) if stop - start > share.whole[device])
        for cuts in evenly_spread(units, weights, held)
    ]
    layouts: dict[RoundedUp, Layout] = {}
    chosen = _largest_overlap(share, units - sum(share.whole), held, even)
    for rounded_up in set(chosen):
        ups = frozenset(rounded_up)
        cuts = accumulate(width + (device in ups) for device, width in enumerate(share.whole))
        layouts[rounded_up] = tuple(((start, stop),) if start < stop else () for start, stop in pairwise((0, *cuts)))
    return tuple(layouts[rounded_up] for rounded_up in chosen)


def _largest_overlap(share: Due, extra: int, held: Sequence[Layout], even: Sequence[RoundedUp]) -> Sequence[RoundedUp]:
    """Choose the devices that are rounded up in each layer: ``even``, unless another choice keeps more."""
    names: dict[Layout, int] = {}
    by_layer = [names.setdefault(layout, len(names)) for layout in held]
    kinds = [_kind(by_layer.count(name), share, extra, layout) for layout, name in names.items()]

    def overlap(choice: Sequence[RoundedUp]) -> int:
        return sum(kinds[name].overlap(rounded_up) for name, rounded_up in zip(by_layer, choice, strict=True))

    if (len(kinds) == 1 and is_best(share.whole, extra, held[0])) or overlap(even) == most_conceivable(kinds):
        return even
    if len(held) == 1:  # no other layers could make up for it
        return [kinds[0].best()[1]]
    devices = range(len(share.whole))
    found = largest_overlap(kinds, [(share.lowest(device), share.highest(device)) for device in devices])
    if found is None:
        ups = Counter(device for rounded_up in even for device in rounded_up)
        better = priced_rounding([kinds[name] for name in by_layer], [ups[device] for device in devices])
    else:
        better = [found[name].pop() for name in by_layer]
    return max(even, better, key=overlap)


def _kind(layers: int, share: Due, extra: int, layout: Layout) -> LayerKind:
    down, up = [], []
    starts = accumulate(share.whole, initial=0)
    for start, width, rest, runs in zip(starts, share.whole, share.rest, layout, strict=False):
        places = range(start, start + extra + 1)
        down.append(_overlaps(runs, places, width))
        up.append(_overlaps(runs, places, width + 1) if rest else (NEVER,) * len(places))
    return LayerKind(layers, extra, tuple(down), tuple(up))


def _overlaps(runs: Intervals, places: range, width: int) -> tuple[int, ...]:
    """Count the units of ``runs`` in an interval of this width, for each start in ``places``."""
    units = [0] * len(places)
    for start, stop in runs:
        for place in range(max(places.start, start - width + 1), min(places.stop, stop)):
            units[place - places.start] += min(place + width, stop) - max(place, start)
    return tuple(units)
