"""Deals whole experts by counts of tokens, so that those in demand are not all on one device.

How many experts a device has in a layer is the ownership's; this only exchanges them, so no more bytes move.
"""

from collections.abc import Sequence

from anchortp_sglang.planning.intervals import Intervals, intersect, normalize, subtract, total
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership, ownership_by_layer, validate

ExpertCounts = tuple[tuple[int, ...], ...]
"""Tokens that chose each expert in some sample, by layer and expert. Zeros for a layer without experts."""


def spread_hot_experts(
    model: ModelAxes, ownership: Ownership, counts: ExpertCounts, previous: Ownership | None = None
) -> Ownership:
    """Deal the same numbers of experts so that the busiest device of each layer has least to do.

    A device keeps the experts that it has in both ``previous`` and ``ownership``; only the others are exchanged. They
    are dealt busiest first, each to the device with the lowest load. A layer that this does not improve is left as it
    was.
    """
    shares = []
    for layer, tokens in enumerate(counts):
        given = ownership.ranks("expert", layer)
        overlaps = [_overlap(ownership, previous, rank, layer) for rank in range(ownership.tp_size)]
        dealt = _busiest_first(tokens, given, overlaps)
        better = _most(tokens, dealt) < _most(tokens, given)
        axes = {axis: ownership.ranks(axis, layer) for axis in model.axes}
        shares.append(axes | {"expert": dealt if better else given})
    spread = ownership_by_layer(ownership.devices, shares)
    validate(model, spread)
    return spread


def imbalance(ownership: Ownership, counts: ExpertCounts) -> float:
    """Return the load of the busiest device over the mean, summed over layers, as these run one after the other."""
    busiest = sum(_most(tokens, ownership.ranks("expert", layer)) for layer, tokens in enumerate(counts))
    return busiest * ownership.tp_size / max(1, sum(map(sum, counts)))


def _overlap(ownership: Ownership, previous: Ownership | None, rank: int, layer: int) -> Intervals:
    device = ownership.devices[rank]
    if previous is None or device not in previous.devices:
        return ()
    return intersect(ownership.of("expert", rank, layer), previous.of("expert", previous.devices.index(device), layer))


def _busiest_first(
    tokens: Sequence[int], given: Sequence[Intervals], overlaps: Sequence[Intervals]
) -> tuple[Intervals, ...]:
    hands = [list(_units(runs)) for runs in overlaps]
    loads = [sum(tokens[unit] for unit in hand) for hand in hands]
    free = subtract(((0, len(tokens)),), normalize(run for runs in overlaps for run in runs))
    for unit in sorted(_units(free), key=lambda unit: (-tokens[unit], unit)):
        rank = min((r for r in range(len(hands)) if len(hands[r]) < total(given[r])), key=lambda r: (loads[r], r))
        hands[rank].append(unit)
        loads[rank] += tokens[unit]
    return tuple(normalize((unit, unit + 1) for unit in hand) for hand in hands)


def _most(tokens: Sequence[int], ranks: Sequence[Intervals]) -> int:
    return max(sum(tokens[unit] for unit in _units(runs)) for runs in ranks)


def _units(runs: Intervals) -> list[int]:
    return [unit for start, stop in runs for unit in range(start, stop)]
