"""The rounding by which most units are kept over all layers, if layers could be divided: a linear program.

It says how many of the layers of a kind take which rounding (Dantzig and Wolfe 1960). Only roundings that matter
are written down: at the prices that a solution sets on being rounded up, the best one of each kind is found by
dynamic programming; if none is worth more than it costs, the program is solved. Prices also bound what can be kept.
"""

from collections.abc import Sequence
from fractions import Fraction

from anchortp_sglang.planning.placement.rounding import LayerKind, RoundedUp, Step
from anchortp_sglang.planning.placement.simplex import Simplex

Kinds = tuple[LayerKind, ...]

Choice = list[tuple[int, RoundedUp]]
"""For layers, each its kind's name and who is rounded up."""

Column = tuple[int, RoundedUp]
"""The index of a kind, and a rounding of its layers."""

Flow = dict[Step, Fraction]
"""How many of the layers of a kind take a step."""


class Relaxation:
    """``totals`` say in how many layers each device is rounded up; what is ``known`` is tried first. ``bound`` is
    what nothing can exceed, as far as it is known, and ``work`` the numbers computed."""

    def __init__(self, kinds: Kinds, totals: Sequence[int], known: Choice) -> None:
        self.kinds, self.totals = kinds, totals
        self.bound, self.work = 0, 0
        self._simplex = Simplex[Column]([*totals, *(kind.layers for kind in kinds)])
        self._gains: dict[Column, int] = {}
        for name, rounded_up in dict.fromkeys(known):
            for index, kind in enumerate(kinds):
                if kind.name == name and (gain := kind.kept(rounded_up)) >= 0:
                    self._gains[index, rounded_up] = gain

    def solve(self, enough: int, most_work: int) -> list[Flow] | None:
        """The flow of each kind; None if no more than ``enough`` can be kept, or if it takes more than
        ``most_work``."""
        while self.work <= most_work:
            self.work += len(self._gains)
            worth, column = max(((self._worth(column), column) for column in self._gains), default=(0, None))
            if column is not None and worth > 0:
                self.work += self._simplex.enter(column, self._rows(column), self._gains[column])
                continue
            known = len(self._gains)
            self._price()
            if self.bound <= enough:
                return None
            if len(self._gains) == known:
                return self._flows()
        return None

    def used(self) -> Choice:
        """The roundings of the solution."""
        return [(self.kinds[index].name, rounded_up) for (index, rounded_up), _ in self._simplex.amounts()]

    def _price(self) -> None:
        """Add the best roundings at the present prices, and find the bound."""
        devices, prices = len(self.totals), self._simplex.prices
        bound = sum(price * total for price, total in zip(prices, self.totals, strict=False))
        for index, kind in enumerate(self.kinds):
            self.work += devices * (kind.extra + 1)
            value, rounded_up = kind.best(prices[:devices], self._simplex.scale)
            bound += kind.layers * int(value)
            if value > prices[devices + index]:
                self._gains[index, rounded_up] = kind.kept(rounded_up)
        self.bound = bound // self._simplex.scale

    def _worth(self, column: Column) -> int:
        return self._simplex.worth(self._rows(column), self._gains[column])

    def _rows(self, column: Column) -> tuple[int, ...]:
        index, rounded_up = column
        return (*rounded_up, len(self.totals) + index)

    def _flows(self) -> list[Flow]:
        flows: list[Flow] = [{} for _ in self.kinds]
        for (index, rounded_up), amount in self._simplex.amounts():
            for step in self.kinds[index].steps(rounded_up):
                flows[index][step] = flows[index].get(step, Fraction()) + Fraction(amount, self._simplex.scale)
        return flows
