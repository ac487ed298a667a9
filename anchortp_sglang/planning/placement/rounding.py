"""Which devices get a unit more in a layer whose units do not divide, and what all together keep then."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

RoundedUp = tuple[int, ...]
"""The devices that get a unit more than their due rounded down, in one layer; sorted."""

Gains = tuple[tuple[int, ...], ...]
"""By device, then by how many before it are rounded up: where its interval starts follows from that."""

NEVER = -(10**15)
"""Gain of what is not allowed."""


@dataclass(frozen=True)
class LayerKind:
    """``layers`` layers that are alike: ``extra`` devices are rounded up in each, and ``down`` and ``up`` tell what
    a device keeps."""

    layers: int
    extra: int
    down: Gains
    up: Gains

    def kept(self, rounded_up: RoundedUp) -> int:
        """Units that all devices keep in one of the layers; below zero if this is not allowed."""
        kept = before = 0
        for device, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            is_up = before < self.extra and rounded_up[before] == device
            kept += (up if is_up else down)[before]
            before += is_up
        return kept

    def best(self, prices: Sequence[float] | None = None) -> tuple[float, RoundedUp]:
        """Find the most of kept units, less the prices of the devices rounded up, in one layer; and who these are."""
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
    """Bound what can be kept in all layers: no more than if each were rounded as is best for it alone."""
    return sum(kind.layers * kind.best()[0] for kind in kinds)
