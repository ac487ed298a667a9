"""Roundings of a layer whose units do not divide: which devices get one unit more, and what all of them then keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

RoundedUp = tuple[int, ...]
"""The devices that get one unit more than their due rounded down, in one layer; sorted."""

Gains = tuple[tuple[int, ...], ...]
"""Units kept, by device and by the number of devices rounded up before it, which gives the start of its interval."""

NEVER = -(10**15)
"""Gain of a rounding that is not allowed."""


@dataclass(frozen=True)
class LayerKind:
    """``layers`` layers that are alike, with ``extra`` devices rounded up in each.

    ``down``, ``up``: the units that a device keeps if it is rounded down or up.
    """

    layers: int
    extra: int
    down: Gains
    up: Gains

    def overlap(self, rounded_up: RoundedUp) -> int:
        """Count the units that all devices keep in one of the layers; below zero if this rounding is not allowed."""
        overlap = before = 0
        for device, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            is_up = before < self.extra and rounded_up[before] == device
            overlap += (up if is_up else down)[before]
            before += is_up
        return overlap

    def best(self, prices: Sequence[float] | None = None) -> tuple[float, RoundedUp]:
        """Find the most kept units, less the prices of devices rounded up, and the rounding that keeps them."""
        values: list[float] = [0, *(NEVER for _ in range(self.extra))]
        choices: list[tuple[list[float], list[float]]] = []
        for price, down, up in zip(prices or [0] * len(self.up), self.down, self.up, strict=True):
            less = list(map(add, values, down))
            more = [NEVER, *(value + gain - price for value, gain in zip(values, up, strict=True))]
            choices.append((less, more))
            values = list(map(max, less, more))
        rounded_up, before = [], self.extra
        for device, (less, more) in zip(range(len(choices) - 1, -1, -1), reversed(choices), strict=True):
            if more[before] > less[before]:
                rounded_up.append(device)
                before -= 1
        return values[self.extra], tuple(reversed(rounded_up))


def most_conceivable(kinds: Sequence[LayerKind]) -> float:
    """Bound the units kept in all layers: no more than if each layer were rounded as is best for it alone."""
    return sum(kind.layers * kind.best()[0] for kind in kinds)
