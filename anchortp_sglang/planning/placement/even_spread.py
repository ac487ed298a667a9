"""Cuts that move by one unit over the layers, spread as evenly as possible, at the best places for it.

All devices together keep a constant plus, for each cut, the units below it that its left device holds, less those that
its right device holds: every cut counts for itself. A dynamic program over the cuts, with the sum of a cut over the
layers as its state, chooses these sums. Nothing else is left to choose if a sum is spread evenly over the layers.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.ownership.layer_ownership import Layout
from anchortp_sglang.planning.placement.rotation import layer_order

WINDOW = 64
"""Number of sums tried for a cut: all that there are for up to 64 devices. For more, the work stays in proportion to
the number of devices."""

Chain = tuple[int, "Chain"] | None


def evenly_spread(units: int, weights: Sequence[int], held: Sequence[Layout]) -> list[tuple[int, ...]]:
    """Return the end of each device's interval in each layer.

    Widths are rounded down or up, in every layer and over all layers together.
    """
    layers = len(held)
    order = layer_order(layers)
    totals = _best_totals(units, weights, [held[layer] for layer in order])
    # Cut i ends at totals[i] / layers: one unit later in the first layers of the order.
    by_place = (tuple((total + layers - 1 - place) // layers for total in totals) for place in range(layers))
    return [cuts for _, cuts in sorted(zip(order, by_place, strict=True))]


def is_best(whole: Sequence[int], extra: int, layout: Layout) -> bool:
    """Return whether spreading evenly is best for layers that all have this layout.

    It is if each cut, moved up from where it is with all widths rounded down, first gains units, then neither gains nor
    loses any, then loses some. Then any sum of a cut over the layers is best spread evenly.
    """
    if len(whole) > WINDOW:
        return False
    ends = accumulate(whole[:-1])
    for cut, (end, (left, right)) in enumerate(zip(ends, pairwise(layout), strict=True)):
        places = range(end, end + min(extra, cut + 1))
        steps = [_holds(left, unit) - _holds(right, unit) for unit in places]
        if steps != sorted(steps, reverse=True):
            return False
    return True


def _best_totals(units: int, weights: Sequence[int], held: Sequence[Layout]) -> list[int]:
    """Return the end of each cut, summed over the layers: most kept first, then nearest to what is due below it.

    A state of the dynamic program is the sum of one cut; ``held`` is in the order in which layers get their cuts one
    unit later.
    """
    layers, parts = len(held), sum(weights)
    # sum of a cut -> (overlap so far, minus the distance of the cuts from their due), the sums that led there
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
            (overlap, off), chain = max(reached, key=lambda state: state[0])
            step[end] = ((overlap + gain, off - abs(end - ideal)), (end, chain))
        states = step
    chain = next(iter(states.values()))[1]
    totals: list[int] = []
    while chain is not None:
        totals.append(chain[0])
        chain = chain[1]
    return totals[::-1]


def _gains(sums: Sequence[int], sides: Sequence[tuple[Intervals, Intervals]]) -> list[int]:
    """Return the units kept with each sum of a cut, beyond those kept with the first sum.

    ``sides`` are what the devices before and after the cut held, by layer.
    """
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
