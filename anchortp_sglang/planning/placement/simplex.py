"""Linear programs in exact arithmetic, for columns that become known while the program is solved."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

UNMET = -(10**12)
"""Gain of each unit by which a row's sum is short."""

Name = TypeVar("Name", bound=Hashable)


class Simplex(Generic[Name]):
    """Amounts of columns, none negative, such that each row adds up to ``sums`` and the gain is largest.

    A column has ones in some rows and zeros elsewhere. All numbers are integers over a common ``scale``, as in
    fraction-free elimination (Bareiss 1968); ties are broken lexicographically, so that no basis comes twice
    (Dantzig, Orden and Wolfe 1955).
    """

    def __init__(self, sums: Sequence[int]) -> None:
        self.size = len(sums)
        self.scale = 1
        self.prices = [UNMET] * self.size  # of a unit in each row, times scale
        self._names: list[Name | None] = [None] * self.size
        self._rows = [[total, *(int(row == column) for column in range(self.size))] for row, total in enumerate(sums)]

    def worth(self, rows: Sequence[int], gain: int) -> int:
        """What a unit of the column adds to the gain, times ``scale``: at most 0 for all columns at the optimum."""
        return self.scale * gain - sum([self.prices[row] for row in rows])

    def enter(self, name: Name, rows: Sequence[int], gain: int) -> int:
        """Use as much of the column as there can be, instead of another. How many numbers that changed."""
        worth = self.worth(rows, gain)
        changes = [sum([row[1 + place] for place in rows]) for row in self._rows]
        leaving = self._leaving(changes)
        pivot, scale, out = changes[leaving], self.scale, self._rows[leaving]
        changing = [index for index, change in enumerate(changes) if index != leaving and (change or pivot != scale)]
        for index in changing:
            row, change = self._rows[index], changes[index]
            self._rows[index] = [(pivot * a - change * b) // scale for a, b in zip(row, out, strict=True)]
        self.prices = [(pivot * price + worth * b) // scale for price, b in zip(self.prices, out[1:], strict=True)]
        self._names[leaving], self.scale = name, pivot
        return self.size * len(changing)

    def amounts(self) -> Iterator[tuple[Name, int]]:
        """The columns in use and their amounts, times ``scale``."""
        for name, row in zip(self._names, self._rows, strict=True):
            if name is not None and row[0]:
                yield name, row[0]

    def _leaving(self, changes: Sequence[int]) -> int:
        falling = [index for index, change in enumerate(changes) if change > 0]
        first = falling[0]
        for index in falling[1:]:
            ours, theirs = changes[index], changes[first]
            for a, b in zip(self._rows[index], self._rows[first], strict=True):
                if a * theirs != b * ours:
                    first = index if a * theirs < b * ours else first
                    break
        return first
