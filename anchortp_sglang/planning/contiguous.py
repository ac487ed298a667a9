"""Continuous Minimal Migration: every device holds one interval of each axis, in the order of the devices.

Why this is minimal. Let ``c[1] <= … <= c[D-1]`` be where the intervals of a layer end, and ``F[d](c)`` the units
below ``c`` that device ``d`` already has. It keeps ``F[d](c[d]) - F[d](c[d-1])`` units, so all together keep
``sum over d of F[d](c[d]) - F[d+1](c[d])`` and a constant: every cut counts for itself. A unit that a survivor
holds is never reloaded, wherever it goes, so reloads are at their lower bound for any cuts; what is not kept and
not reloaded moves between devices, so most kept is least moved. For given widths the cuts are given, and nothing
is left to choose. Where widths may be rounded either way, a dynamic program over the cuts, with the sum of a cut
over the layers as its state, chooses them: exact for a single layer. Over several layers a sum is spread evenly,
which is optimal as long as each cut stays between the start of its left and the end of its right neighbour's old
interval (there what is kept is concave in the cut), and layers were cut alike or by the same rotation. Devices
with only a few units of an axis each can leave that range; then a few units more than necessary may move.
"""

from collections.abc import Sequence
from itertools import pairwise

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.layer_ownership import Layout
from anchortp_sglang.planning.rotation import layer_order

WINDOW = 64
"""How many totals of a cut are tried. It is never fewer than there are for up to 64 devices; for more it keeps the
work in proportion to their number."""

Chain = tuple[int, "Chain"] | None


def contiguous_layouts(units: int, weights: Sequence[int], held: Sequence[Layout]) -> tuple[Layout, ...]:
    """Shares of each layer in proportion to ``weights``, given what each device ``held`` there before: widths
    rounded down or up in every layer, and over all layers together, such that most is kept."""
    layers = len(held)
    order = layer_order(layers)
    totals = _best_totals(units, weights, [held[layer] for layer in order])
    layouts: dict[tuple[int, ...], Layout] = {}
    by_layer: dict[int, Layout] = {}
    for place, layer in enumerate(order):
        # Cut i ends at totals[i] / layers: one unit later in the first layers of the order.
        cuts = tuple((total + layers - 1 - place) // layers for total in totals)
        if cuts not in layouts:
            layouts[cuts] = tuple(((start, stop),) if start < stop else () for start, stop in pairwise((0, *cuts)))
        by_layer[layer] = layouts[cuts]
    return tuple(by_layer[layer] for layer in range(layers))


def _best_totals(units: int, weights: Sequence[int], held: Sequence[Layout]) -> list[int]:
    """Where each cut ends, summed over the layers: most kept, then nearest to what is due up to there.

    One state of the dynamic program is the sum for one cut; ``held`` is in the order in which layers get their
    cuts one unit later.
    """
    layers, parts = len(held), sum(weights)
    # sum of a cut -> (units kept so far, less how far the cuts are off), the sums that led there
    states: dict[int, tuple[tuple[int, int], Chain]] = {0: ((0, 0), None)}
    before = 0
    for cut, weight in enumerate(weights):
        before += weight
        width, uneven = divmod(layers * units * weight, parts)
        ideal = layers * units * before // parts
        last = cut == len(weights) - 1
        low, high = (ideal, ideal) if last else (ideal - WINDOW // 2, ideal + WINDOW // 2)
        sums = sorted({end + width + more for end in states for more in range(1 + (uneven > 0))})
        sums = [end for end in sums if low <= end <= high]
        gains = [0] if last else _gains(sums, [(layout[cut], layout[cut + 1]) for layout in held])
        step: dict[int, tuple[tuple[int, int], Chain]] = {}
        for end, gain in zip(sums, gains, strict=True):
            reached = [states[start] for start in (end - width, end - width - 1) if start in states]
            if not uneven:
                reached = [states[end - width]]
            (kept, off), chain = max(reached, key=lambda state: state[0])
            step[end] = ((kept + gain, off - abs(end - ideal)), (end, chain))
        states = step
    chain = next(iter(states.values()))[1]
    totals: list[int] = []
    while chain is not None:
        totals.append(chain[0])
        chain = chain[1]
    return totals[::-1]


def _gains(sums: Sequence[int], sides: Sequence[tuple[Intervals, Intervals]]) -> list[int]:
    """Units more that are kept if a cut has each of these sums, than if it has the first. ``sides`` are what the
    devices before and after the cut held, by layer."""
    gains, gained, at = [], 0, sums[0]
    for end in sums:
        while at < end:
            unit, layer = divmod(at, len(sides))
            left, right = sides[layer]
            gained += _holds(left, unit) - _holds(right, unit)
            at += 1
        gains.append(gained)
    return gains


def _holds(runs: Intervals, unit: int) -> bool:
    return any(start <= unit < stop for start, stop in runs)
