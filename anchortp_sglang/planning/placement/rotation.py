"""Rotates units that do not divide evenly over layers that are built alike.

In each layer a device is due ``units * weight / sum(weights)`` units and gets that rounded down or up. Over all layers
together it also gets its due rounded down or up, so no device is full before the others.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from anchortp_sglang.planning.placement.exchange import enlarge_overlap

_STRIDE = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: multiples of it, modulo 2**64, spread evenly however many are taken."""


def layer_order(layers: int) -> tuple[int, ...]:
    """Order the layers such that the first n of them, for any n, are spread evenly over all."""
    return tuple(sorted(range(layers), key=lambda layer: (layer * _STRIDE % 2**64, layer)))


@dataclass(frozen=True)
class Due:
    """Due of each device: ``whole[d] + rest[d] / parts`` units in each of ``layers`` layers."""

    layers: int
    parts: int
    whole: tuple[int, ...]
    rest: tuple[int, ...]

    def lowest(self, device: int) -> int:
        """Return the fewest extra units over all layers."""
        return self.layers * self.rest[device] // self.parts

    def highest(self, device: int) -> int:
        """Return the most extra units over all layers."""
        return -(-self.layers * self.rest[device] // self.parts)


def due(units: int, weights: Sequence[int], layers: int) -> Due:
    """Divide ``units`` in proportion to positive ``weights``."""
    parts = sum(weights)
    whole, rest = zip(*(divmod(units * weight, parts) for weight in weights), strict=True)
    return Due(layers, parts, whole, rest)


def spread(
    share: Due,
    counts: Sequence[int],
    allowed: Sequence[frozenset[int]],
    preferred: Sequence[frozenset[int]],
    given: Sequence[int],
) -> list[set[int]]:
    """Choose the devices that get one of the ``counts[layer]`` extra units of each layer, at most one each.

    Only ``allowed`` devices are chosen, ``preferred`` ones first, as long as the totals, with the extra units already
    ``given``, can come out as due. They do wherever exchanges between layers can achieve it.
    """
    # A device that keeps nothing anywhere needs only the least that it is due.
    keeps = frozenset[int]().union(*preferred)
    wanted = [
        share.layers * rest if not keeps or d in keeps else share.parts * share.lowest(d)
        for d, rest in enumerate(share.rest)
    ]
    chances = [0] * len(given)
    for devices in allowed:
        for device in devices:
            chances[device] += 1
    used = list(given)
    chosen: list[set[int]] = [set() for _ in counts]
    for layer in layer_order(len(counts)):
        left = [wanted[d] - share.parts * used[d] for d in range(len(used))]
        keyed = sorted(
            allowed[layer],
            key=lambda d: (
                -(left[d] > 0),
                not (d in preferred[layer] and left[d] >= share.parts),
                -left[d] / max(chances[d], 1),
                d,
            ),
        )  # fmt: skip
        chosen[layer] = set(keyed[: counts[layer]])
        for device in chosen[layer]:
            used[device] += 1
        for device in allowed[layer]:
            chances[device] -= 1
    _repair(share, chosen, allowed, used)
    if keeps:
        lowest = [min(count, share.lowest(d)) for d, count in enumerate(used)]
        highest = [max(count, share.highest(d)) for d, count in enumerate(used)]
        enlarge_overlap(chosen, allowed, preferred, used, lowest, highest)
    return chosen


def _repair(share: Due, chosen: list[set[int]], allowed: Sequence[frozenset[int]], used: list[int]) -> None:
    devices = range(len(used))
    while True:
        over = [d for d in devices if used[d] > share.highest(d)]
        under = [d for d in devices if used[d] < share.lowest(d)]
        path = _exchange(over, {d for d in devices if used[d] < share.highest(d)}, chosen, allowed)
        path = path or _exchange([d for d in devices if used[d] > share.lowest(d)], set(under), chosen, allowed)
        if path is None:
            return
        for layer, giver, taker in path:
            chosen[layer].discard(giver)
            chosen[layer].add(taker)
        used[path[0][1]] -= 1
        used[path[-1][2]] += 1


def _exchange(
    givers: Sequence[int], takers: set[int], chosen: Sequence[set[int]], allowed: Sequence[frozenset[int]]
) -> list[tuple[int, int, int]] | None:
    """Find a chain ``(layer, giver, taker)`` of exchanges that brings a unit from a giver to a taker."""
    if not givers or not takers:
        return None
    came: dict[int, tuple[int, int] | None] = dict.fromkeys(givers)
    queue = deque(givers)
    while queue:
        giver = queue.popleft()
        for layer, ones in enumerate(chosen):
            if giver not in ones:
                continue
            for taker in sorted(allowed[layer] - ones - came.keys()):
                came[taker] = (layer, giver)
                if taker in takers:
                    return _chain(taker, came)
                queue.append(taker)
    return None


def _chain(taker: int, came: dict[int, tuple[int, int] | None]) -> list[tuple[int, int, int]]:
    path: list[tuple[int, int, int]] = []
    step = came[taker]
    while step is not None:
        layer, giver = step
        path.append((layer, giver, taker))
        taker, step = giver, came[giver]
    return path[::-1]
