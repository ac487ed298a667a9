"""Arithmetic on sets of units, kept as sorted, coalesced half-open intervals."""

from collections.abc import Iterable, Sequence

Intervals = tuple[tuple[int, int], ...]
"""Half-open ``(start, stop)`` runs: sorted, disjoint, coalesced. A rank stores its units in this order."""


def normalize(runs: Iterable[tuple[int, int]]) -> Intervals:
    """Return the union of some runs in canonical form; empty runs vanish.

    Raises ValueError for a run that is reversed or starts below zero.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if start < 0 or stop < start:
            raise ValueError(f"[{start}, {stop}) is not an interval of units")
        if start == stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def total(runs: Intervals) -> int:
    """Count the units in the runs."""
    return sum(stop - start for start, stop in runs)


def intersect(left: Intervals, right: Intervals) -> Intervals:
    """Return the units that are in both."""
    return normalize((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) < min(b, d))


def subtract(left: Intervals, right: Intervals) -> Intervals:
    """Return the units in ``left`` and not in ``right``."""
    rest: list[tuple[int, int]] = []
    for start, stop in left:
        for taken_start, taken_stop in right:
            if taken_stop <= start or taken_start >= stop:
                continue
            if start < taken_start:
                rest.append((start, taken_start))
            start = min(taken_stop, stop)
        rest.append((start, stop))
    return normalize(rest)


def scale(runs: Intervals, factor: int) -> Intervals:
    """Count the same runs in a unit ``factor`` times smaller."""
    return tuple((start * factor, stop * factor) for start, stop in runs)


def locate(runs: Intervals, unit: int) -> int:
    """Return the position of ``unit`` among the units of ``runs``. Raises ValueError if it is not one of them."""
    before = 0
    for start, stop in runs:
        if start <= unit < stop:
            return before + unit - start
        before += stop - start
    raise ValueError(f"unit {unit} is not in {runs}")


def deal(runs: Intervals, counts: Sequence[int]) -> tuple[Intervals, ...]:
    """Deal the units in order: the first ``counts[0]`` units, the next ``counts[1]``, and so on.

    Raises ValueError unless the counts add up to all units.
    """
    if sum(counts) != total(runs):
        raise ValueError(f"{total(runs)} units cannot be dealt as {list(counts)}")
    hands: list[Intervals] = []
    left = runs
    for count in counts:
        hand = _first(left, count)
        left = subtract(left, hand)
        hands.append(hand)
    return tuple(hands)


def _first(runs: Intervals, count: int) -> Intervals:
    hand: list[tuple[int, int]] = []
    for start, stop in runs:
        length = min(stop - start, count)
        hand.append((start, start + length))
        count -= length
    return normalize(hand)
