"""Continuous Minimal Migration: every device holds one interval of each axis, in the order of the devices.

A unit that a survivor holds is never reloaded, wherever it goes, so reloads are at their lower bound for any
intervals; what is not kept and not reloaded moves between devices, so most kept is least moved. Widths are rounded
down or up, in every layer and over all of them together; who is rounded up where is all there is to choose.

First the cuts are spread evenly over the layers, which is best in the usual case: layers that were cut alike, and
cuts that stay between the start of the left and the end of the right neighbour's old interval. An integer program
then looks for something better and ends when there can be none, so the result is optimal. Only where its work runs
out (some twenty devices, or fewer and dozens of layers that were all cut differently) it may not be: then it is the
best of the even spread, what the program has found, and a choice by prices.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.ownership.layer_ownership import Layout
from anchortp_sglang.planning.placement.even_spread import evenly_spread
from anchortp_sglang.planning.placement.most_kept import Search, most_kept
from anchortp_sglang.planning.placement.priced_rounding import priced_rounding
from anchortp_sglang.planning.placement.relaxation import Choice
from anchortp_sglang.planning.placement.rotation import Due, due
from anchortp_sglang.planning.placement.rounding import NEVER, LayerKind, RoundedUp

SPARE = -1
"""Names a layer that does not exist: who is rounded up there is rounded up once less than it may be in the others.
With it the totals over all layers are given."""


def contiguous_layouts(units: int, weights: Sequence[int], held: Sequence[Layout]) -> tuple[Layout, ...]:
    """Shares of each layer in proportion to ``weights``, given what each device ``held`` there before: widths
    rounded down or up in every layer, and over all layers together, such that most is kept."""
    share = due(units, weights, len(held))
    even = [
        tuple(device for device, (start, stop) in enumerate(pairwise((0, *cuts))) if stop - start > share.whole[device])
        for cuts in evenly_spread(units, weights, held)
    ]
    layouts: dict[RoundedUp, Layout] = {}
    chosen = _most_kept(share, units - sum(share.whole), held, even)
    for rounded_up in set(chosen):
        ups = frozenset(rounded_up)
        cuts = accumulate(width + (device in ups) for device, width in enumerate(share.whole))
        layouts[rounded_up] = tuple(((start, stop),) if start < stop else () for start, stop in pairwise((0, *cuts)))
    return tuple(layouts[rounded_up] for rounded_up in chosen)


def _most_kept(share: Due, extra: int, held: Sequence[Layout], even: Sequence[RoundedUp]) -> Sequence[RoundedUp]:
    """Who is rounded up in each layer: ``even``, unless another choice keeps more."""
    names: dict[Layout, int] = {}
    by_layer = [names.setdefault(layout, len(names)) for layout in held]
    kinds = [_kind(name, by_layer.count(name), share, extra, layout) for layout, name in names.items()]
    known = list(zip(by_layer, even, strict=True))
    kept = sum(kinds[name].kept(rounded_up) for name, rounded_up in known)
    free = [0] * len(share.whole)
    if kept == sum(kind.layers * kind.best(free)[0] for kind in kinds):
        return even
    spare = _spare(share, extra)
    totals = [share.highest(device) for device in range(len(free))]
    ups = Counter(device for rounded_up in even for device in rounded_up)
    unused = tuple(device for device, total in enumerate(totals) if ups[device] < total)
    search = Search([*known, (SPARE, unused)], kept)
    most_kept((*kinds, spare), totals, search)
    if search.work < 0:
        layers = [kinds[name] for name in by_layer]
        priced = priced_rounding([spare, *layers], totals)[1:]
        if sum(kind.kept(rounded_up) for kind, rounded_up in zip(layers, priced, strict=True)) > search.kept:
            return priced
    return _by_layer(by_layer, search.best) if search.kept > kept else even


def _by_layer(names: Sequence[int], choice: Choice) -> list[RoundedUp]:
    choices: defaultdict[int, list[RoundedUp]] = defaultdict(list)
    for name, rounded_up in reversed(choice):
        choices[name].append(rounded_up)
    return [choices[name].pop() for name in names]


def _kind(name: int, layers: int, share: Due, extra: int, layout: Layout) -> LayerKind:
    down, up = [], []
    starts = accumulate(share.whole, initial=0)
    for start, width, rest, runs in zip(starts, share.whole, share.rest, layout, strict=False):
        places = range(start, start + extra + 1)
        down.append(_overlaps(runs, places, width))
        up.append(_overlaps(runs, places, width + 1) if rest else (NEVER,) * len(places))
    return LayerKind(name, layers, extra, tuple(down), tuple(up))


def _overlaps(runs: Intervals, places: range, width: int) -> tuple[int, ...]:
    """How many units of ``runs`` an interval of this width has that starts at each of the places."""
    units = [0] * len(places)
    for start, stop in runs:
        for place in range(max(places.start, start - width + 1), min(places.stop, stop)):
            units[place - places.start] += min(place + width, stop) - max(place, start)
    return tuple(units)


def _spare(share: Due, extra: int) -> LayerKind:
    devices = range(len(share.whole))
    spare = sum(map(share.highest, devices)) - share.layers * extra
    free, barred = (0,) * (spare + 1), (NEVER,) * (spare + 1)
    ups = tuple(free if share.highest(device) > share.lowest(device) else barred for device in devices)
    return LayerKind(SPARE, 1, spare, (free,) * len(devices), ups)
