"""Shares of query heads, where KV heads may be too few: a KV head is never split, but several devices may hold it.

With at least one KV head per device, shares are whole groups (a KV head and its query heads), dealt like any other
axis. With fewer, each device serves one KV head, which its neighbours hold as well, and a part of its query heads. A
device with several KV heads must serve equally many query heads of each, because SGLang's attention divides the number
of query heads by that of KV heads; so it serves all of each.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from anchortp_sglang.planning.intervals import Intervals, deal, normalize, scale, subtract, total
from anchortp_sglang.planning.ownership.layer_ownership import Layout
from anchortp_sglang.planning.placement.adoption import adopted_layouts
from anchortp_sglang.planning.placement.contiguous import contiguous_layouts
from anchortp_sglang.planning.placement.rotation import layer_order


def contiguous_heads(units: int, grain: int, weights: Sequence[int], held: Sequence[Layout]) -> tuple[Layout, ...]:
    """Return intervals of query units in the order of the devices, ``grain`` of them per KV head."""
    if len(weights) <= units // grain:
        groups = contiguous_layouts(units // grain, weights, [_whole_groups(layout, grain) for layout in held])
        return tuple(tuple(scale(runs, grain) for runs in layout) for layout in groups)
    return _replicated(units, grain, weights, len(held))


def adopted_heads(
    units: int, grain: int, weights: Sequence[int], held: Sequence[Layout], give_back: bool
) -> tuple[Layout, ...]:
    """Let devices keep their query heads, and give lost ones to devices that already hold their KV head.

    Then neither query nor KV weights move. Where this is impossible, because all holders of a KV head died and no
    device has whole groups only, the layer is cut anew as in ``contiguous_heads``.
    """
    if len(weights) <= units // grain and all(_is_whole(layout, grain) for layout in held):
        groups = adopted_layouts(units // grain, weights, [_whole_groups(one, grain) for one in held], give_back)
        return tuple(tuple(scale(runs, grain) for runs in layout) for layout in groups)
    served = [0] * len(weights)
    layouts: dict[int, Layout] = {}
    for layer in layer_order(len(held)):
        layout = _adopt(units, grain, weights, held[layer], served)
        layouts[layer] = layout or contiguous_heads(units, grain, weights, [held[layer]])[0]
        served = [before + total(runs) for before, runs in zip(served, layouts[layer], strict=True)]
    return tuple(layouts[layer] for layer in range(len(held)))


def _is_whole(layout: Layout, grain: int) -> bool:
    return all(start % grain == stop % grain == 0 for runs in layout for start, stop in runs)


def _whole_groups(layout: Layout, grain: int) -> Layout:
    """Return the groups of which a device holds all query heads."""
    return tuple(
        normalize((-(-a // grain), b // grain) for a, b in runs if -(-a // grain) < b // grain) for runs in layout
    )


def _replicated(units: int, grain: int, weights: Sequence[int], layers: int) -> tuple[Layout, ...]:
    served = [0] * len(weights)
    layouts: dict[int, Layout] = {}
    for place, layer in enumerate(layer_order(layers)):
        widths: list[int] = []
        for first, last in pairwise(_group_edges(units // grain, weights, 2 * place + 1, 2 * layers)):
            # What each device lacks of its due so far, in units times the sum of the weights: the neediest is served
            # first.
            lacks = [(place + 1) * units * weights[d] - sum(weights) * served[d] for d in range(first, last)]
            widths += _pour(grain, lacks, sum(weights))
        layouts[layer] = deal(((0, units),), widths)
        served = [before + width for before, width in zip(served, widths, strict=True)]
    return tuple(layouts[layer] for layer in range(layers))


def _group_edges(groups: int, weights: Sequence[int], phase: int, phases: int) -> list[int]:
    """Choose the devices that serve each KV head: head k is on devices ``[edges[k], edges[k + 1])``.

    A device that lies across an edge goes to one side or the other, depending on the phase.
    """
    whole, befores = sum(weights), accumulate(weights, initial=0)
    reaches = [
        (before * phases + weight * (phases - phase)) * groups for before, weight in zip(befores, weights, strict=False)
    ]
    return [sum(reach <= head * phases * whole for reach in reaches) for head in range(groups)] + [len(weights)]


def _pour(units: int, lacks: Sequence[int], unit: int) -> list[int]:
    """Give each device one unit, and the others one by one to the device that lacks most."""
    widths, left = [1] * len(lacks), [lack - unit for lack in lacks]
    for _ in range(units - len(lacks)):
        neediest = max(range(len(left)), key=lambda d: (left[d], -d))
        widths[neediest] += 1
        left[neediest] -= unit
    return widths


def _adopt(units: int, grain: int, weights: Sequence[int], held: Layout, served: Sequence[int]) -> Layout | None:
    shares = list(held)

    def fullness(device: int) -> tuple[float, float, int]:
        return total(shares[device]) / weights[device], served[device] / weights[device], device

    for start, stop in subtract(((0, units),), normalize(run for runs in held for run in runs)):
        for head in range(start // grain, -(-stop // grain)):
            gone = ((max(start, head * grain), min(stop, (head + 1) * grain)),)
            holders = [d for d, runs in enumerate(shares) if _heads(runs, grain) == {head}]
            if not holders:
                takers = [d for d, runs in enumerate(shares) if runs and _is_whole((runs,), grain)]
                if total(gone) < grain or not takers:
                    return None
                holders = [min(takers, key=fullness)]
            for unit in range(*gone[0]):
                taker = min(holders, key=fullness)
                shares[taker] = normalize((*shares[taker], (unit, unit + 1)))
    for joiner in (d for d, runs in enumerate(shares) if not runs):
        donor = max(range(len(shares)), key=fullness)
        if total(shares[donor]) < 2:
            return None
        shares[donor], shares[joiner] = _halve(shares[donor], grain)
    return tuple(shares)


def _heads(runs: Intervals, grain: int) -> set[int]:
    return {head for start, stop in runs for head in range(start // grain, -(-stop // grain))}


def _halve(runs: Intervals, grain: int) -> tuple[Intervals, Intervals]:
    """Split a donor's share into kept and given: one of its KV heads, or half of the query heads of its only one."""
    heads = sorted(_heads(runs, grain))
    given = total(runs) // len(heads) if len(heads) > 1 else total(runs) // 2
    kept, gave = deal(runs, (total(runs) - given, given))
    return kept, gave
