"""Which devices get a unit more in a layer whose units do not divide, and what all together keep then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add

RoundedUp = tuple[int, ...]
"""The devices that get a unit more than their due rounded down, in one layer; sorted."""

Gains = tuple[tuple[int, ...], ...]
"""By device, then by how many before it are rounded up: where its interval starts follows from that."""

NEVER = -(10**15)
"""Gain of what is not allowed."""


@dataclass(frozen=True, order=True, slots=True)
class Step:
    """A ``device`` rounded ``up`` or down, with ``before`` rounded up ahead of it."""

    device: int
    before: int
    up: bool


@dataclass(frozen=True)
class LayerKind:
    """``layers`` layers that are alike: ``extra`` devices are rounded up in each, and ``down`` and ``up`` tell what
    a device keeps. Kinds of one ``name`` are parts of one kind: what is allowed in one is the same in the others,
    or not allowed."""

    name: int
    layers: int
    extra: int
    down: Gains
    up: Gains

    def steps(self, rounded_up: RoundedUp) -> list[Step]:
        """What becomes of each device."""
        ups, steps, before = frozenset(rounded_up), [], 0
        for device in range(len(self.down)):
            steps.append(Step(device, before, device in ups))
            before += steps[-1].up
        return steps

    def gain(self, step: Step) -> int:
        """Units that the device keeps."""
        return (self.up if step.up else self.down)[step.device][step.before]

    def kept(self, rounded_up: RoundedUp) -> int:
        """Units that all devices keep in one of the layers; below zero if this is not allowed."""
        return sum(map(self.gain, self.steps(rounded_up)))

    def best(self, prices: Sequence[float], scale: int = 1) -> tuple[float, RoundedUp]:
        """The most of kept units, times ``scale``, less the prices of the devices rounded up; and who these are."""
        never = scale * NEVER
        values: list[float] = [0, *(never for _ in range(self.extra))]
        choices: list[tuple[list[float], list[float]]] = []
        for price, down, up in zip(prices, _scaled(self.down, scale), _scaled(self.up, scale), strict=True):
            less = list(map(add, values, down))
            more = [value + gain - price for value, gain in zip(values, up, strict=True)]
            more.insert(0, never)
            choices.append((less, more))
            values = list(map(max, less, more))
        rounded_up, before = [], self.extra
        for device, (less, more) in zip(range(len(choices) - 1, -1, -1), reversed(choices), strict=True):
            if more[before] > less[before]:
                rounded_up.append(device)
                before -= 1
        return values[self.extra], tuple(reversed(rounded_up))

    def part(self, step: Step, layers: int, taken: bool) -> tuple["LayerKind", ...]:
        """``layers`` of the layers, in which ``step`` must be taken, or must not be; and the others."""
        gains = [list(self.down), list(self.up)]
        row = gains[step.up][step.device]
        gains[step.up][step.device] = tuple(
            gain if (before == step.before) == taken else NEVER for before, gain in enumerate(row)
        )
        if taken:
            gains[not step.up][step.device] = (NEVER,) * len(row)
        bound = replace(self, layers=layers, down=tuple(gains[0]), up=tuple(gains[1]))
        rest = replace(self, layers=self.layers - layers)
        return (bound, rest) if rest.layers else (bound,)


def _scaled(gains: Gains, scale: int) -> Gains:
    return gains if scale == 1 else tuple(tuple([scale * gain for gain in row]) for row in gains)
